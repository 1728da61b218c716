"""Operations that keep order or sign: extremes over positions, and ReLU in every spelling."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from ..arrays import Collapse
from ..gauge import Facts, Gauge
from ..operations import BOUNDS, COMPARISONS, SLOPES, filled_with
from ..relations import Relations
from ..weight_edits import WeightEdits
from .base import MAX_LOOKED_AT, Match, MeanRole, Use, is_float, rule_for
from .carry import Carry, reduce_axes, varying_of

aten = torch.ops.aten
_POOLS = {  # how many of the last axes they reduce
    aten.max_pool1d.default: 1,
    aten.max_pool2d.default: 2,
    aten.max_pool3d.default: 3,
    aten.max_pool1d_with_indices.default: 1,
    aten.max_pool2d_with_indices.default: 2,
    aten.max_pool3d_with_indices.default: 3,
    aten.adaptive_max_pool1d.default: 1,
    aten.adaptive_max_pool2d.default: 2,
    aten.adaptive_max_pool3d.default: 3,
}
_KEEPS_AXIS = (aten.topk.default, aten.sort.default, aten.sort.stable, aten.cummax.default, aten.cummin.default)


class Rising(Carry):
    """What takes positive scales only."""

    mean = MeanRole.READS

    def relate(self, relations: Relations) -> Any:
        scales = super().relate(relations)
        for scale in scales if isinstance(scales, list) else [scales]:
            relations.scales.require_positive(scale)
        return scales


@rule_for(
    *(aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default),
    *(aten.amax.default, aten.amin.default, aten.max.default, aten.min.default),
    *(aten.quantile.scalar, aten.nanquantile.scalar),
)
class Maximum(Rising):
    """``max(s * x + t) = s * max(x) + t`` for positive s, equal along the positions; padding counts as -infinity."""

    def keeps_channels(self) -> bool:
        return True

    def arrange(self, numbers: np.ndarray, shape: torch.Size, collapse: Collapse) -> np.ndarray:
        if self.target in _POOLS:
            return collapse(numbers, varying_of(numbers, range(-_POOLS[self.target], 0)))
        if self.target in _KEEPS_AXIS:
            return collapse(numbers, varying_of(numbers, (self.argument("dim"),)))
        return reduce_axes(self.node, numbers, collapse)


@rule_for(
    *(aten.max_pool1d_with_indices.default, aten.max_pool2d_with_indices.default),
    *(aten.max_pool3d_with_indices.default, aten.adaptive_max_pool1d.default, aten.adaptive_max_pool2d.default),
    *(aten.adaptive_max_pool3d.default, aten.max.dim, aten.min.dim, aten.aminmax.default, aten.median.dim),
    *(aten.nanmedian.dim, aten.kthvalue.default),
    *_KEEPS_AXIS,
)
class Ranked(Maximum):
    """Values chosen by their order, with the places where they were, which no scale or shift changes."""

    def keeps_channels(self) -> bool:
        return False

    def carry(self, operand: Node, numbers: np.ndarray, collapse: Collapse, gauge: Gauge) -> list[np.ndarray]:
        result = super().carry(operand, numbers, collapse, gauge)
        places = np.zeros((1,) * result.ndim, numbers.dtype)
        return [result if value.is_floating_point() else places for value in self.value]


@rule_for(aten.std.dim, aten.std.correction, aten.std.default)
class Deviation(Rising):
    """``std(s * x + t) = s * std(x)`` over positions for positive s, equal along them; of a shift nothing is left."""

    def use(self, operand: Node, shift: np.ndarray | None, gauge: Gauge) -> Use:
        return Use.ABSORB if gauge.can_carry(self.node, operand, shift) else Use.STOP

    def settle(self, gauge: Gauge) -> np.ndarray:
        return gauge.no_shift(self.node)

    def arrange(self, numbers: np.ndarray, shape: torch.Size, collapse: Collapse) -> np.ndarray:
        return reduce_axes(self.node, numbers, collapse)


class Homogeneous(Rising):
    """``f(s * x) = s * f(x)`` for positive s: a positive scale passes, a shift does not."""

    owns_constants = True

    def use(self, operand: Node, shift: np.ndarray | None, gauge: Gauge) -> Use:
        return Use.STOP

    def settle(self, gauge: Gauge) -> np.ndarray:
        return gauge.no_shift(self.node)

    def arrange(self, numbers: np.ndarray, shape: torch.Size, collapse: Collapse) -> np.ndarray:
        return numbers


_BOUNDS = ("min", "max", "min_val", "max_val", "threshold", "value")


@rule_for(*SLOPES)
class Slope(Homogeneous):
    """Two slopes that meet at zero, which are constant."""

    def fits(self, facts: Facts) -> bool:
        slope = self.argument("weight")
        if not super().fits(facts) or self.argument("training"):
            return False
        return slope is None or facts.program.is_constant(slope)


@rule_for(
    *BOUNDS,
    *(aten.relu.default, aten.clamp.Tensor, aten.clamp_min.Tensor, aten.clamp_max.Tensor),
    *(aten.maximum.default, aten.minimum.default),
)
class Bend(Homogeneous):
    """ReLU and its like, with bounds that are zero or infinite.

    Where a shift has nowhere else to go, the bound takes it: ``max(s * x + t, 0) = s * max(x, -t / s) + t``.
    """

    def fits(self, facts: Facts) -> bool:
        value, bounds = self.args[0], self._bounds()
        if not is_float(value) or facts.program.is_constant(value) or value.meta["val"].dtype != self.value.dtype:
            return False
        return value.meta["val"].dim() == self.value.dim() and all(is_bound(bound, facts) for bound in bounds)

    def last_resort(self) -> Use:
        return Use.PASS if self._side() is not None else Use.STOP

    def use(self, operand: Node, shift: np.ndarray | None, gauge: Gauge) -> Use:
        return Use.PASS if self.node in gauge.shifts.bent else Use.STOP

    def settle(self, gauge: Gauge) -> np.ndarray:
        return gauge.carried(self.node, self.args[0]) if self.node in gauge.shifts.bent else gauge.no_shift(self.node)

    def rewrite(self, edits: WeightEdits) -> None:
        gauge = edits.gauge
        if self.node in gauge.shifts.bent and gauge.shifts.of[self.node].any():
            bound = -gauge.shifts.of[self.node] / gauge.scales[gauge.scale(self.node)]
            edits.replace(self.node, edits.apply(self._side(), self.args[0], bound, name="bound", before=self.node))

    def _bounds(self) -> list[object]:
        if self.target in (aten.maximum.default, aten.minimum.default):
            return [self.args[1]]
        return [self.argument(name) for name in _BOUNDS]

    def _side(self) -> object:
        """The operation with a bound of its own for every channel; None where there is none."""
        if self.target is aten.threshold.default:
            return aten.maximum.default if all(map(_is_number_zero, self.args[1:3])) else None
        if self.target is aten.relu.default:
            return aten.maximum.default
        low, high = (self.argument(f"{side}_val", self.argument(side)) for side in ("min", "max"))
        if self.target in (aten.maximum.default, aten.minimum.default):
            low, high = (self.args[1], None) if self.target is aten.maximum.default else (None, self.args[1])
        if high in (None, math.inf) and _is_number_zero(low):
            return aten.maximum.default
        return aten.minimum.default if low in (None, -math.inf) and _is_number_zero(high) else None


@rule_for(*COMPARISONS)
class Sign(Match):
    """Which values are above zero: a positive scale does not matter, a shift does."""

    def fits(self, facts: Facts) -> bool:
        return is_float(self.args[0]) and self.args[1] == 0

    def relate(self, relations: Relations) -> None:
        relations.scales.require_positive(relations.scale(self.args[0]))


def is_bound(bound: object, facts: Facts) -> bool:
    """Whether a bound is the same for every positive scale: none, zero or infinite, everywhere."""
    if bound is None:
        return True
    bound = bound if (number := filled_with(bound)) is None else number
    if isinstance(bound, int | float):
        return bound == 0 or math.isinf(bound)
    if not facts.program.is_constant(bound) or bound.meta["val"].numel() > MAX_LOOKED_AT:
        return False
    value = facts.program.constant(bound)
    return bool(((value == 0) | value.isinf()).all())


def _is_number_zero(bound: object) -> bool:
    return isinstance(bound, int | float) and bound == 0
