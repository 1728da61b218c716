"""Constants: evaluated once, in float64 where that is only more exact, as the program does it where it rounds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import export
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from normfuse.folding import FoldError, constants, fold
from normfuse.folding.program import Program

from .checks import difference, folded, operations
from .maps import MapNorm, Net

aten = torch.ops.aten
C = 4
# Each is near an edge in float32 for some of the weights, and further from it in float64.
ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "integers": lambda w: (w * 10).to(torch.int64),
    "bytes": lambda w: (w * 10).to(torch.uint8),
    "float16": lambda w: w.half(),
    "bfloat16": lambda w: w.bfloat16(),
    "round": lambda w: (w * 7.3).round(),
    "floor": lambda w: torch.floor(w * 10),
    "floor division": lambda w: w // 0.1,
    "remainder": lambda w: w % 0.1,
    "sign": lambda w: (w * 10 - 3).sign() + 2,
    "comparison": lambda w: torch.where(w * 10 >= 3, w, w + 1),
    "quantisation": lambda w: torch.fake_quantize_per_tensor_affine(w, 0.1, 0, -8, 7),
    "sum in float32": lambda w: w.sum(dtype=torch.float32) + w,
    "behind": lambda w: torch.tanh(w.half().to(w.dtype) * 1.7) + w,
}


class Factor(nn.Module):
    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.make = nn.Linear(C, C), nn.Linear(C, 2), make
        self.factor = nn.Parameter(torch.tensor([0.7, 0.3, 0.6, 0.9]))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x) * self.make(self.factor).to(x.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_what_rounds_is_evaluated_as_the_program_does_it(rounding: str, dtype: torch.dtype) -> None:
    model, x = Factor(ROUNDINGS[rounding]).to(dtype), torch.randn(3, C, dtype=dtype)
    program, report = fold(export(model, (x,)))
    assert len(operations(program)) == 2 and not report.remaining
    assert difference(model(x), program.module()(x)) <= 16 * torch.finfo(dtype).eps


def test_smooth_arithmetic_is_done_in_float64() -> None:
    model = Factor(lambda w: torch.exp(w) @ torch.diag(w / 3))
    opened = Program(export(model, (torch.randn(3, C),)))
    (constant,) = (node for node in opened.graph.nodes if node.target is torch.ops.aten.matmul.default)
    wide = model.factor.detach().double()
    torch.testing.assert_close(opened.constant(constant), torch.exp(wide) @ torch.diag(wide / 3), rtol=1e-15, atol=0)


class Reflections(nn.Module):
    """Every step reads the value before it twice."""

    def __init__(self, count: int, *, read_all: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.axes, self.weight = nn.Parameter(torch.randn(count, C)), nn.Parameter(torch.eye(C))
        self.read_all, self.norm = read_all, MapNorm(C)

    def forward(self, x: Tensor) -> Tensor:
        q = self.weight
        for axis in self.axes.unbind(0):
            axis = axis / axis.norm()
            q = q - 2 * torch.outer(axis, axis @ q)
            x = F.linear(x, q) if self.read_all else x
        return F.linear(self.norm(x), q)


class Counting(TorchDispatchMode):
    """How often each operation runs."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[object] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("read_all", [False, True])
def test_every_value_is_computed_once(read_all: bool) -> None:
    model = Reflections(40, read_all=read_all).double().eval()
    x = torch.randn(3, C, dtype=torch.float64)
    program = export(model, (x,))
    with Counting() as running:
        result, report = fold(program)
    assert not report.remaining and difference(model(x), result.module()(x)) <= 1e-12
    assert running.counts[aten.outer.default] == running.counts[aten.matmul.default] == 40


def test_values_beyond_what_is_kept_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "KEPT_BYTES", 8 * C * C * 8)
    _, report = folded(Reflections(20, read_all=True), (torch.randn(3, C, dtype=torch.float64),))
    assert not report.remaining


@pytest.mark.parametrize("shape", [(10**12,), (10**6, 10**6)])
def test_a_constant_of_any_size_is_not_evaluated(shape: tuple[int, ...]) -> None:
    """A program of a few bytes may ask for a tensor that fits no memory."""
    program = export(
        Net(
            lambda m, x: m.linear(m.norm(x)) * torch.full(shape, 2.0, dtype=x.dtype).expand(shape).sum(),
            norm=MapNorm(C),
            linear=nn.Linear(C, C),
        ).eval(),
        (torch.randn(3, C),),
    )
    with Counting() as running:
        _, report = fold(program, verify=False)
    assert not report.remaining and not any("full" in str(operation) for operation in running.counts)


def test_a_parameter_that_is_read_in_two_dtypes_is_stored_in_both() -> None:
    def both(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        y = m.norm(x)
        return m.linear(y), F.linear(y.double(), m.linear.weight.double(), m.linear.bias.double())

    model, x = Net(both, norm=MapNorm(C), linear=nn.Linear(C, C)).eval(), torch.randn(3, C)
    program, report = fold(export(model, (x,)))
    assert not report.remaining
    results = program.module()(x)
    assert [r.dtype for r in results] == [torch.float32, torch.float64] and difference(model(x), results) <= 1e-6


def test_an_empty_tensor_with_one_axis_leaves_a_concatenation() -> None:
    program, report = folded(
        Net(
            lambda m, x: m.linear(torch.cat([torch.tensor([], dtype=x.dtype), m.norm(x), x.new_empty(0)], 1)),
            norm=MapNorm(C),
            linear=nn.Linear(C, C),
        ),
        (torch.randn(2, 3, C, dtype=torch.float64),),
    )
    assert report.norms[0].status == "folded"
    assert operations(program)[-2:] == ["aten.cat.default", "aten.linear.default"]


@pytest.mark.parametrize("name", ["batch_norm", "instance_norm"])
def test_statistics_of_the_batch_that_move_running_ones_are_refused_by_name(name: str) -> None:
    class Measures(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(C, C, 1)
            self.register_buffer("mean", torch.zeros(C))
            self.register_buffer("var", torch.ones(C))

        def forward(self, x: Tensor) -> Tensor:
            flag = {"batch_norm": "training", "instance_norm": "use_input_stats"}[name]
            return getattr(F, name)(self.conv(x), self.mean, self.var, **{flag: True})

    outer = nn.Sequential(nn.ReLU(), Measures()).eval()
    with pytest.raises(FoldError, match=rf"{name} in '1'.*updates its running statistics"):
        fold(export(outer, (torch.randn(2, C, 5),)))


@pytest.mark.parametrize("gain", [1e5, 1e-6])
def test_a_float16_island_keeps_scales_that_leave_its_range_out(gain: float) -> None:
    class Island(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(C, C), MapNorm(C)
            nn.init.constant_(self.norm.scale, gain)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.linear(x).half().to(x.dtype))

    model, x = Island().eval(), torch.randn(64, C)
    program, report = fold(export(model, (x,)))
    assert [(r.status, "float16" in r.reason) for r in report.norms] == [("kept", True)]
    assert difference(model(x), program.module()(x)) <= 1e-6
    model.norm.scale.data.fill_(3.0)
    program, report = fold(export(model, (x,)))
    assert not report.remaining
    assert difference(model(x), program.module()(x)) <= 4 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize(("factor", "products"), [(300.0, 2), (100.0, 1), (1e-3, 2), (0.1, 1)])
def test_factors_that_float16_holds_are_not_merged_into_one_that_it_does_not(factor: float, products: int) -> None:
    class Factors(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x * factor * factor)

    program, _ = folded(Factors(), (torch.randn(3, C, dtype=torch.float64),))
    assert operations(program) == ["aten.mul.Tensor"] * products + ["aten.tanh.default"]
    assert operations(fold(program)[0]) == operations(program)


def test_a_constant_of_unknown_size_is_left_alone() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm, self.last = nn.Linear(C, C), MapNorm(C), nn.Linear(C, C)

        def forward(self, x: Tensor) -> Tensor:
            counts = torch.bincount((self.last.weight.flatten() * 3).abs().long(), minlength=C)
            return self.last(self.norm(self.linear(x))) * counts[:C]

    _, report = folded(Counts(), (torch.randn(3, C, dtype=torch.float64),))
    assert not [record for record in report.remaining if record.kind == "MapNorm"]


@pytest.mark.parametrize("wide", [True, False])
def test_an_added_mask_is_no_shift_and_does_not_hold_up_the_norm_in_front(wide: bool) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(C, C), MapNorm(C)
            shape = (3, C) if wide else (C,)
            self.register_buffer("mask", torch.where(torch.arange(C) == 2, -torch.inf, 0.0).expand(shape).clone())

        def forward(self, x: Tensor) -> Tensor:
            return (self.norm(self.linear(x)) + self.mask).softmax(-1)

    _, report = folded(Masked(), (torch.randn(3, C, dtype=torch.float64),))
    assert [record.status for record in report.norms] == ["folded"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_mask_of_the_lowest_number_keeps_its_scale(dtype: torch.dtype) -> None:
    """Scores are ranked behind it, so that a scale could pass: it would take the mask out of its dtype."""
    mask = torch.full((5, 5), torch.finfo(dtype).min, dtype=dtype).triu(1)
    model = Net(
        lambda m, x: torch.topk(m.first(x) @ m.first(x).mT * 8**-0.5 + m.mask, 2)[1],
        first=nn.Linear(C, C), mask=nn.Buffer(mask),
    ).to(dtype)  # fmt: skip
    x = torch.randn(2, 5, C, dtype=dtype, generator=torch.Generator().manual_seed(1))
    result, _ = fold(export(model.eval(), (x,)))
    assert (result.module()(x) == model(x)).all()
