"""Outputs share memory with inputs, weights and each other exactly where the original's do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import export
from torch.nn import functional as F

from normfuse.folding import fold

from .checks import difference
from .maps import MapNorm

C = 4


class Outputs(nn.Module):
    """A linear, norms that change something and norms that change nothing, and what is returned of them."""

    def __init__(self, returned: Callable[[Outputs, Tensor], tuple[Tensor, ...]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm, self.nothing, self.last = nn.Linear(C, C), MapNorm(C), MapNorm(C), nn.Linear(C, C)
        nn.init.ones_(self.nothing.scale)
        nn.init.zeros_(self.nothing.shift)
        self.token, self.returned = nn.Parameter(torch.randn(C)), returned

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.returned(self, x)


def norm_and_halves(self: Outputs, x: Tensor) -> tuple[Tensor, ...]:
    y = self.norm(self.linear(x))
    return y, y[..., :2], y[..., 2:]


def only_halves(self: Outputs, x: Tensor) -> tuple[Tensor, ...]:
    y = self.norm(self.linear(x))
    return y.chunk(2, -1)


def after_relu(self: Outputs, x: Tensor) -> tuple[Tensor, ...]:
    y = self.nothing(self.linear(x).relu())
    return self.last(y), y, y.view(-1)


CASES: dict[str, Callable[[Outputs, Tensor], tuple[Tensor, ...]]] = {
    "the input": lambda self, x: (x, self.last(self.norm(x))),
    "a view of the input": lambda self, x: (x.mT, F.dropout(x, 0.5, training=False), x.to(x.dtype)),
    "a norm that changes nothing of the input": lambda self, x: (self.nothing(x),),
    "twice": lambda self, x: (self.nothing(x), self.nothing(x)),
    "a value and a norm of it": lambda self, x: (h := self.linear(x), self.nothing(h)),
    "a value and a view of a norm of it": lambda self, x: (h := self.linear(x), self.nothing(h).mT, self.nothing(h)),
    "a value twice": lambda self, x: (h := self.linear(x), h),
    "a copy": lambda self, x: (x.clone(), x.to(x.dtype, copy=True), x + 0, x * 1),
    "a weight": lambda self, x: (self.token, self.token.view(2, 2), self.token * 1, self.last(self.norm(x))),
    "a value and its halves": norm_and_halves,
    "only halves": only_halves,
    "behind an activation": after_relu,
    "reshaped": lambda self, x: (h := self.norm(self.linear(x)), h.reshape(-1), h.mT.reshape(-1), h.mT.contiguous()),
}


def sharing(results: tuple[Tensor, ...], others: list[Tensor]) -> list[tuple[int, int]]:
    """The pairs of results, and of results and other tensors, that lie in one memory."""
    tensors = [*results, *others]
    places = [tensor.untyped_storage().data_ptr() for tensor in tensors]
    return [(i, j) for i in range(len(results)) for j in range(i + 1, len(tensors)) if places[i] == places[j]]


@pytest.mark.parametrize("case", CASES)
def test_outputs_share_memory_where_the_original_ones_do(case: str) -> None:
    model, x = Outputs(CASES[case]).double().eval(), torch.randn(3, C, dtype=torch.float64)
    program = export(model, (x,))
    folded, _ = fold(program)
    folded.validate()
    with torch.no_grad():
        expected, got = program.module()(x), folded.module()(x)
    assert difference(expected, got) <= 1e-12
    weights, own = ([p.data for p in m.state_dict.values()] for m in (program, folded))
    assert sharing(got, [x]) == sharing(expected, [x])
    # Which weight it is may change; whether it is one may not.
    in_weights = [{i for i, j in sharing(r, w) if j >= len(r)} for r, w in ((expected, weights), (got, own))]
    assert in_weights[0] == in_weights[1]
