"""Every operation that normalises has a row, and the rows say what is really left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram, export

from normfuse.folding import FoldReport, fold
from normfuse.folding.operations import NORMALISING
from normfuse.nn import UnifiedNorm

C = 4
IMAGE, TOKENS = (2, C, 5, 5), (2, 3, C)


class Branch(nn.Module):
    """A norm in a branch that depends on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(C), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda y: self.norm(y), lambda y: self.linear(y), (x,))


class Region(nn.Module):
    def __init__(self, context: Callable) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(C, C), UnifiedNorm(C), nn.LayerNorm(C), nn.Linear(C, C))
        self.context = context

    def forward(self, x: Tensor) -> Tensor:
        with self.context():
            return self.body(x)


class Computed(nn.Module):
    """A LayerNorm whose gain is computed from the input."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, (C,), x.mean((0, 1)))


def images(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(C, 6, 1), norm, nn.Conv2d(6, 3, 1))


# What is made, the input's shape, the cores of its dynamic norms, and a word of the reason for each that is untouched.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[str], list[str]]] = {
    "BatchNorm": (lambda: images(nn.BatchNorm2d(6)), IMAGE, [], []),
    "BatchNorm without statistics": (
        lambda: images(nn.BatchNorm2d(6, track_running_stats=False)),
        IMAGE,
        ["BatchNorm"],
        ["measures each batch"],
    ),
    "InstanceNorm": (lambda: images(nn.InstanceNorm2d(6)), IMAGE, ["InstanceNorm"], ["measures each sample"]),
    "InstanceNorm with gain": (
        lambda: images(nn.InstanceNorm2d(6, affine=True)),
        IMAGE,
        ["InstanceNorm"],
        ["measures each sample"],
    ),
    "LayerNorm": (lambda: nn.Sequential(nn.Linear(C, C), nn.LayerNorm(C), nn.Linear(C, C)), TOKENS, ["RMSNorm"], []),
    "LayerNorm over three axes": (lambda: images(nn.LayerNorm((6, 5, 5))), IMAGE, ["LayerNorm"], ["3 axes"]),
    "GroupNorm": (lambda: images(nn.GroupNorm(2, 6)), IMAGE, ["GroupNorm"], []),
    "computed gain": (Computed, TOKENS, ["LayerNorm"], ["computed from the input"]),
    "no_grad": (lambda: Region(torch.no_grad), TOKENS, ["RMSNorm"], []),
    "autocast": (lambda: Region(lambda: torch.autocast("cpu", torch.bfloat16)), TOKENS, ["RMSNorm"], []),
    "branch": (Branch, TOKENS, ["LayerNorm"], ["inside cond"]),
    "two in a row": (lambda: nn.Sequential(nn.LayerNorm(C), nn.LayerNorm(C)), TOKENS, ["LayerNorm"] * 2, []),
}


def left(program: ExportedProgram) -> Counter[str]:
    """The norms that are left in a program, in the graphs that it calls as well."""
    graphs = [part.graph for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    return Counter(NORMALISING[node.target] for graph in graphs for node in graph.nodes if node.target in NORMALISING)


def checked(model: nn.Module, x: Tensor, **options: bool) -> FoldReport:
    """Fold and compare the report with what is left."""
    program, report = fold(export(model.eval(), (x,)), **options)
    assert left(program) == Counter(record.core for record in report.dynamic)
    assert all(record.gain == record.shift == "none" or record.name for record in report.dynamic)
    return report


@pytest.mark.parametrize("name", MODELS)
def test_the_report_names_every_norm_that_is_left(name: str) -> None:
    make, shape, cores, reasons = MODELS[name]
    torch.manual_seed(0)
    report = checked(make(), torch.randn(shape))
    assert [record.core for record in report.dynamic] == cores
    words = [" ".join(record.reasons.values()) for record in report.dynamic]
    assert all(reason in word for reason, word in zip(reasons, words, strict=False))
    assert not report.remaining


def test_the_report_counts_norms_that_are_to_be_kept() -> None:
    make, shape, _, _ = MODELS["LayerNorm"]
    assert [record.core for record in checked(make(), torch.randn(shape), keep_dynamic_norms=True).dynamic] == [
        "LayerNorm"
    ]


def test_a_norm_that_stays_at_one_of_its_uses_is_partly_folded() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(C, C), UnifiedNorm(C), nn.Linear(C, C)
            nn.init.uniform_(self.norm.weight, 0.5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.norm(self.first(x))) + torch.tanh(self.norm(torch.tanh(x)))

    (record,) = checked(Twice(), torch.randn(TOKENS)).norms
    assert record.status == "partly folded"
    assert record.reason.startswith("at 1 of 2 uses its input is fixed by tanh")


@pytest.mark.parametrize("norm", [UnifiedNorm, nn.BatchNorm1d])
@pytest.mark.parametrize("outside", [False, True])
def test_static_norms_in_branches_have_a_row(norm: type[nn.Module], outside: bool) -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = norm(C), nn.Linear(C, C)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.linear(x)) if outside else x
            return torch.cond(x.sum() > 0, lambda y: self.norm(y), lambda y: self.linear(y), (x,))

    _, report = fold(export(Inside().eval(), (torch.randn(3, C),)))
    (record,) = report.norms
    assert (record.name, record.status) == ("norm", "partly folded" if outside else "kept")
    assert "inside cond" in record.reason and not report.dynamic


def test_reasons_read_well_where_a_shared_weight_may_not_be_copied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.norm = nn.Embedding(7, C), UnifiedNorm(C)
            nn.init.uniform_(self.norm.weight, 0.5, 2)

        def forward(self, ids: Tensor) -> Tensor:
            return self.norm(self.table(ids)) @ self.table.weight.mT

    (record,) = checked(Tied(), torch.tensor([[1, 2]]), copy_shared=False).norms
    assert ",," not in record.reason and ",:" not in record.reason


@pytest.mark.parametrize("kinds", [("Gain", "ScaleNorm"), ("GainNorm", "Scale"), ("LayerScale", "Affine")])
def test_what_is_folded_does_not_depend_on_the_names_of_classes(kinds: tuple[str, str]) -> None:
    """Two norms that cannot both go: the one that saves more does, or the first."""

    class Two(nn.Module):
        def __init__(self, first: str, second: str) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(C, C), nn.Linear(C, 2)
            self.a, self.b = type(first, (UnifiedNorm,), {})(C), type(second, (UnifiedNorm,), {})(C)
            for norm in (self.a, self.b):
                nn.init.uniform_(norm.weight, 0.5, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.last(self.a(x) + self.b(x))

    model = Two(*kinds)
    report = checked(model, torch.randn(3, C))
    assert [record.name.split(".")[0] for record in report.remaining] == ["b"]
    nn.init.uniform_(model.b.bias, 0.5, 2)  # now b leaves two operations behind, a one
    report = checked(model, torch.randn(3, C))
    assert [record.name.split(".")[0] for record in report.remaining] == ["a"]
