"""Regions are opened exactly: what autocast casts is written out; what is not known to do the same stays closed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import export
from torch.nn import functional as F

from normfuse.folding import fold
from normfuse.folding.regions import open_regions

from .checks import difference, operations
from .maps import MapNorm

C = 4


def autocast(dtype: torch.dtype = torch.bfloat16, *, enabled: bool = True) -> Callable:
    return lambda: torch.autocast("cpu", dtype=dtype, enabled=enabled)


class Inside(nn.Module):
    """A linear, a static norm and whatever is given, in a context."""

    def __init__(self, context: Callable, body: Callable[[Inside, Tensor], Tensor] = lambda self, x: x) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm, self.last = nn.Linear(C, C), MapNorm(C), nn.Linear(C, 3)
        self.context, self.body = context, body

    def forward(self, x: Tensor) -> Tensor:
        with self.context():
            y = self.norm(self.linear(x))
            y = self.body(self, y)
        return self.last(y.to(x.dtype))


def nested(self: Inside, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        x = self.linear(x.float())
        with torch.no_grad():
            x = self.linear(x) + 1
    return self.linear(x)


BODIES = {
    "plain": lambda self, x: x,
    "einsum": lambda self, x: torch.einsum("bi,oi->bo", x, self.linear.weight),
    "attention": lambda self, x: F.scaled_dot_product_attention(x[None], x[None], self.linear(x)[None])[0],
    "softmax": lambda self, x: x.softmax(-1) + F.layer_norm(x, (C,)),
    "batch norm": lambda self, x: F.batch_norm(x, torch.zeros(C), torch.ones(C)),
    "chunks": lambda self, x: torch.cat(self.linear(x).chunk(2, -1)[::-1], -1),
    "in place": lambda self, x: self.linear(x).add_(1).mul_(2),
    "nested": nested,
}
CONTEXTS = {
    "no_grad": torch.no_grad,
    "bfloat16": autocast(),
    "float16": autocast(torch.float16),
    "off": autocast(enabled=False),
}


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("dynamic", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_opened_regions_compute_the_same_bits(context: str, body: str, dynamic: bool) -> None:
    model, x = Inside(CONTEXTS[context], BODIES[body]).eval(), torch.randn(3, C)
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    opened = open_regions(torch.export.export(model, (x,), dynamic_shapes=shapes))
    assert not any(node.op == "get_attr" for node in opened.graph.nodes)
    opened.validate()
    assert torch.equal(opened.module()(x), model(x))


@pytest.mark.parametrize("context", [torch.no_grad, autocast(enabled=False)])
def test_norms_in_regions_fold(context: Callable) -> None:
    model, x = Inside(context).double().eval(), torch.randn(3, C, dtype=torch.float64)
    program, report = fold(export(model, (x,)))
    assert [record.status for record in report.norms] == ["folded"]
    assert operations(program) == ["aten.linear.default", "aten.linear.default"]
    assert difference(model(x), program.module()(x)) <= 1e-13


def test_norms_under_autocast_fold_into_weights_of_its_dtype() -> None:
    model, x = Inside(autocast()).eval(), torch.randn(64, C)
    program, report = fold(export(model, (x,)))
    assert [record.status for record in report.norms] == ["folded"]
    exact = Inside(torch.no_grad).double()(x.double())
    ours, own = (difference(exact, result.double()) for result in (program.module()(x), model(x)))
    assert ours <= 3 * own  # both round to eight binary digits; folding rounds products of the same numbers


def test_an_operation_that_autocast_takes_apart_stays_closed() -> None:
    """Trilinear products multiply matrices inside their kernel, where autocast casts and no trace sees it."""

    def bilinear(self: Inside, x: Tensor) -> Tensor:
        return F.bilinear(x.float(), x.float(), self.linear.weight[None])

    model, x = Inside(autocast(), bilinear).eval(), torch.randn(3, C)
    model.last = nn.Linear(1, 3)
    program = export(model, (x,))
    opened = open_regions(program)
    assert any(node.op == "get_attr" for node in opened.graph.nodes)
    folded, _ = fold(program)
    assert torch.equal(folded.module()(x), model(x))


def test_a_branch_inside_a_region_is_carried_through() -> None:
    def branch(self: Inside, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda y: y.relu() + 1, lambda y: y.tanh(), (x,))

    model, x = Inside(torch.no_grad, branch).eval(), torch.randn(3, C)
    program, _ = fold(export(model, (x,)))
    assert {node.op for node in program.graph.nodes if "graph" in str(node.target)} == {"get_attr"}
    for sign in (1, -1):
        assert difference(model(sign * x), program.module()(sign * x)) <= 1e-6


@pytest.mark.parametrize("grad", [True, False])
def test_gradients_around_it_do_not_decide_whether_a_region_is_opened(grad: bool) -> None:
    """A product of three axes by two is computed in another way where an operand has a gradient."""
    with torch.no_grad():
        program = export(Inside(autocast(), lambda self, x: self.linear(x[None])[0]), (torch.randn(5, C),))
    with torch.set_grad_enabled(grad):
        opened = open_regions(program)
    assert not any("autocast" in str(node.target) for node in opened.graph.nodes)
