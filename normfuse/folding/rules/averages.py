"""Sums and weighted averages over positions: pooling, means, interpolation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from ..arrays import Collapse, varying
from ..gauge import Facts, Gauge
from ..relations import Relations
from .base import MeanRole, Use, is_float, rule_for
from .carry import Carry, reduce_axes, varying_of
from .contraction import lay

aten = torch.ops.aten


@rule_for(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)
class AveragePool(Carry):
    """An average over a window passes a scale; a shift only where padding does not count as zeros."""

    def keeps_channels(self) -> bool:
        return True

    def fits(self, facts: Facts) -> bool:
        return super().fits(facts) and self.argument("divisor_override") is None

    def use(self, operand: Node, shift: np.ndarray | None, gauge: Gauge) -> Use:
        return Use.STOP if self._counts_zeros() else super().use(operand, shift, gauge)

    def settle(self, gauge: Gauge) -> np.ndarray:
        return gauge.no_shift(self.node) if self._counts_zeros() else super().settle(gauge)

    def arrange(self, numbers: np.ndarray, shape: torch.Size, collapse: Collapse) -> np.ndarray:
        return collapse(numbers, varying_of(numbers, range(-len(self.args[1]), 0)))

    def _counts_zeros(self) -> bool:
        return any(self.argument("padding")) and self.argument("count_include_pad")


_ADAPTIVE = {
    aten.adaptive_avg_pool1d.default: 1,
    aten.adaptive_avg_pool2d.default: 2,
    aten.adaptive_avg_pool3d.default: 3,
}


@rule_for(aten.mean.dim, aten.mean.default, *_ADAPTIVE)
class Mean(Carry):
    """An average over positions: ``mean(scale * x + shift) = scale * mean(x) + shift``; scales along them are equal."""

    def fits(self, facts: Facts) -> bool:
        return is_float(self.node) and super().fits(facts)

    def keeps_channels(self) -> bool:
        return True

    def arrange(self, numbers: np.ndarray, shape: torch.Size, collapse: Collapse) -> np.ndarray:
        if self.target in _ADAPTIVE:
            return collapse(numbers, varying_of(numbers, range(-_ADAPTIVE[self.target], 0)))
        return reduce_axes(self.node, numbers, collapse)


@rule_for(aten.sum.dim_IntList, aten.sum.default)
class Total(Carry):
    """A sum over n positions: ``sum(scale * x + shift) = scale * sum(x) + n * shift``, where n is known."""

    def fits(self, facts: Facts) -> bool:
        return is_float(self.node) and super().fits(facts)

    def use(self, operand: Node, shift: np.ndarray | None, gauge: Gauge) -> Use:
        return Use.STOP if self._count() is None else super().use(operand, shift, gauge)

    def arrange(self, numbers: np.ndarray, shape: torch.Size, collapse: Collapse) -> np.ndarray:
        return reduce_axes(self.node, numbers, collapse)

    def factor(self, operand: Node, gauge: Gauge) -> float:
        return float(self._count() or 1)

    def settle(self, gauge: Gauge) -> np.ndarray:
        count = self._count()
        return gauge.no_shift(self.node) if count is None else super().settle(gauge) * count

    def _count(self) -> int | None:
        """How many positions are added up; None if that is not known."""
        shape = self.args[0].meta["val"].shape
        sizes = [shape[axis] for axis in self.argument("dim") or range(len(shape))] if shape else []
        return math.prod(sizes) if all(isinstance(size, int) for size in sizes) else None


@rule_for(aten.einsum.default)
class EinsumOfOne(Total):
    """An einsum with one operand: its axes in another order, added up where the result has not their letter."""

    def operand(self) -> Node:
        return self.args[1][0]

    def fits(self, facts: Facts) -> bool:
        return len(self.args[1]) == 1 and self._letters() is not None and super().fits(facts)

    def arrange(self, numbers: np.ndarray, shape: torch.Size, collapse: Collapse) -> np.ndarray:
        before, after = self._letters() or ("", "")
        numbers = collapse(numbers, tuple(axis for axis in varying(numbers) if before[axis] not in after))
        return lay(numbers, tuple(before), tuple(after))

    def _count(self) -> int | None:
        before, after = self._letters() or ("", "")
        sizes = zip(before, self.operand().meta["val"].shape, strict=True)
        summed = [size for letter, size in sizes if letter not in after]
        return math.prod(summed) if all(isinstance(size, int) for size in summed) else None

    def _letters(self) -> tuple[str, str] | None:
        """The letters of the operand and of the result; None where they are not written out, or a diagonal is read."""
        before, arrow, after = self.args[0].replace(" ", "").partition("->")
        plain = arrow and before.isalpha() and (after.isalpha() or not after) and len(set(before)) == len(before)
        return (before, after) if plain else None


@rule_for(aten.cumsum.default)
class RunningTotal(Carry):
    """Sums over all positions up to each: a scale passes, a shift would grow from position to position."""

    def fits(self, facts: Facts) -> bool:
        return is_float(self.node) and super().fits(facts)

    def use(self, operand: Node, shift: np.ndarray | None, gauge: Gauge) -> Use:
        return Use.STOP

    def settle(self, gauge: Gauge) -> np.ndarray:
        return gauge.no_shift(self.node)

    def arrange(self, numbers: np.ndarray, shape: torch.Size, collapse: Collapse) -> np.ndarray:
        return collapse(numbers, varying_of(numbers, (self.args[1],)))


@rule_for(aten.nansum.default)
class TotalOfNumbers(RunningTotal):
    """A sum over those positions that hold a number: nobody knows how many shifts that would add."""

    mean = MeanRole.READS

    def arrange(self, numbers: np.ndarray, shape: torch.Size, collapse: Collapse) -> np.ndarray:
        return reduce_axes(self.node, numbers, collapse)


@rule_for(
    *(aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_nearest3d.vec),
    *(aten._upsample_nearest_exact1d.vec, aten._upsample_nearest_exact2d.vec, aten._upsample_nearest_exact3d.vec),
    *(aten.upsample_linear1d.vec, aten.upsample_bilinear2d.vec, aten.upsample_trilinear3d.vec),
    *(aten.upsample_bicubic2d.vec, aten._upsample_bilinear2d_aa.vec, aten._upsample_bicubic2d_aa.vec),
)
class Interpolate(Carry):
    """Weighted averages of neighbouring positions, the weights adding up to one."""

    def arrange(self, numbers: np.ndarray, shape: torch.Size, collapse: Collapse) -> np.ndarray:
        return collapse(numbers, tuple(axis for axis in varying(numbers) if axis >= 2))


@rule_for(aten.grid_sampler.default)
class GridSample(Carry):
    """Interpolation at computed places, which stay as they are; a border of zeros has no shift."""

    def relate(self, relations: Relations) -> Any:
        relations.pin(self.args[1], f"the places of {relations.gauge.describe(self.node)}")
        return super().relate(relations)

    def use(self, operand: Node, shift: np.ndarray | None, gauge: Gauge) -> Use:
        if operand is not self.args[0] or operand is self.args[1] or self._zeros_around():
            return Use.STOP
        return super().use(operand, shift, gauge)

    def settle(self, gauge: Gauge) -> np.ndarray:
        return gauge.no_shift(self.node) if self._zeros_around() else super().settle(gauge)

    def arrange(self, numbers: np.ndarray, shape: torch.Size, collapse: Collapse) -> np.ndarray:
        return collapse(numbers, tuple(axis for axis in varying(numbers) if axis >= 2))

    def _zeros_around(self) -> bool:
        return self.argument("padding_mode") == 0
