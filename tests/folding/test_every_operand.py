"""Every operand of every operation that has a rule: its scale and its shift are carried, demanded or fixed.

In front of one operand after the other stands a weight and a static norm along each of its axes, with gains of both
signs; the others come from weights alone. Behind the operation stands nothing, or another norm and a weight. A scale
that a rule forgot would be lost. Because a forgotten scale may happen to be one, the program is folded again with every
free scale and every free shift chosen at random: any choice has to give the same function.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils._pytree import tree_flatten, tree_unflatten

from normfuse.folding import fold, relate
from normfuse.folding.gauge import Facts
from normfuse.folding.rules import Match, match
from normfuse.folding.rules.base import RULES
from normfuse.programs import Runner

from .cases import CASES, Case
from .checks import any_gauge, difference


class AlongNorm(nn.Module):
    """A static norm along one axis."""

    def __init__(self, size: int, axis: int, rank: int) -> None:
        super().__init__()
        shape = [1] * rank
        shape[axis] = size
        shape = shape[next((i for i, s in enumerate(shape) if s != 1), rank - 1) :]
        self.scale = nn.Parameter((torch.rand(shape) + 0.5) * torch.where(torch.rand(shape) < 0.4, -1.0, 1.0))
        self.shift = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift, x, self.scale)


class Along(nn.Module):
    """A linear map along one axis of a tensor: a linear, a convolution, or a product with the weight on the left."""

    def __init__(self, size: int, axis: int, rank: int, outputs: int | None = None, *, bias: bool = True) -> None:
        super().__init__()
        self.axis, self.last = axis, axis == rank - 1
        self.convolves = axis == 1 and 3 <= rank <= 5 and not self.last
        if self.convolves:
            self.map: nn.Module = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 3](size, outputs or size, 1, bias=bias)
        else:
            self.map = nn.Linear(size, outputs or size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.last or self.convolves:
            return self.map(x)
        if self.axis == x.dim() - 2:
            return self.map.weight @ x
        return self.map(x.movedim(self.axis, -1)).movedim(-1, self.axis).contiguous()


class Use(nn.Module):
    """One use of the operation: a norm along `axis` of the operand with number `normed`."""

    def __init__(self, case: Case, normed: int, axis: int, read: bool) -> None:
        super().__init__()
        self.case, self.read, self.normed = case, read, normed
        axes = [axis if i == normed else len(shape) - 1 for i, shape in enumerate(case.shapes)]
        self.writers = nn.ModuleList(
            Along(s[a], a, len(s), bias=i == normed) for i, (s, a) in enumerate(zip(case.shapes, axes, strict=True))
        )
        self.norm = AlongNorm(case.shapes[normed][axis], axis, len(case.shapes[normed]))
        self.constants = nn.ParameterList(nn.Parameter(torch.randn(shape), False) for shape in case.constants)
        self.readers = nn.ModuleList()
        if read:
            results = case.apply(*(torch.randn(shape) for shape in case.shapes), *self.constants)
            for result in results if isinstance(results, list | tuple) else [results]:
                self.readers.append(nn.Identity())
                if result.dim():
                    along, rank = min(axis, result.dim() - 1), result.dim()
                    size = result.shape[along]
                    self.readers[-1] = nn.Sequential(AlongNorm(size, along, rank), Along(size, along, rank, 3))

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        operands = [writer(x) for writer, x in zip(self.writers, inputs, strict=True)]
        operands[self.normed] = self.norm(operands[self.normed])
        results = self.case.apply(*operands, *self.constants)
        results = list(results) if isinstance(results, list | tuple) else [results]
        if self.read:
            results = [reader(r.to(torch.float64)) for reader, r in zip(self.readers, results, strict=True)]
        return results


class Uses(nn.Module):
    """Every use of some cases, each with weights of its own: read by a norm and a weight, or by nobody."""

    def __init__(self, cases: list[Case]) -> None:
        super().__init__()
        self.uses = nn.ModuleList(
            Use(case, number, axis, read)
            for case in cases
            for number, shape in enumerate(case.shapes)
            for axis in range(len(shape))
            if shape[axis] > 1 or axis == len(shape) - 1
            for read in ((True, False) if axis == len(shape) - 1 else (True,))
        )

    def forward(self, inputs: dict[str, Tensor]) -> list[list[Tensor]]:
        return [use(*(inputs[str(shape)] for shape in use.case.shapes)) for use in self.uses]


def names(target: object) -> str:
    return getattr(target, "__name__", str(target))


@pytest.mark.parametrize("target", CASES, ids=names)
@torch.no_grad()
def test_no_operand_is_forgotten(target: object, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Uses(CASES[target]).double().eval()
    shapes = {shape for case in CASES[target] for shape in case.shapes}
    inputs = {str(shape): torch.randn(shape, dtype=torch.float64) for shape in sorted(shapes)}
    program = torch.export.export(model, (inputs,))
    rules = set()

    def matched(node: Node, facts: Facts) -> Match | None:
        found = match(node, facts)
        if node.target is target and found is not None:
            rules.add(type(found))
        return found

    expected, structure = tree_flatten(model(inputs))

    def compare(**options: bool) -> None:
        got = Runner(fold(program, verify=False, **options)[0])(inputs)
        for use, *results in zip(model.uses, *(tree_unflatten(r, structure) for r in (expected, got)), strict=True):
            assert difference(*results) <= 1e-11, (CASES[target].index(use.case), use.normed, use.norm.scale.shape)

    monkeypatch.setattr(relate, "match", matched)
    compare()
    assert rules >= set(RULES[target]), "a rule for this operation takes none of its cases"
    with any_gauge(0):
        compare(carry_biases=True)


def test_every_operation_that_has_a_rule_has_cases() -> None:
    assert set(CASES) == set(RULES)
