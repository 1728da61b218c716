"""Operations that keep order or sign: extremes over positions, and ReLU in every spelling."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.fx import Node

from ..arrays import Collapse
from .base import Rule, Use, argument, is_float, rule_for
from .carry import Carry, reduce_axes, varying_of

if TYPE_CHECKING:
    from ..engine import Folding

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
_COMPARISONS = (aten.gt.Scalar, aten.ge.Scalar, aten.lt.Scalar, aten.le.Scalar)


class Rising(Carry):
    """What takes positive scales only."""

    alike = False

    def relate(self, node: Node, fold: Folding) -> None:
        super().relate(node, fold)
        scales = fold.scale_of[node]
        for scale in scales if isinstance(scales, list) else [scales]:
            fold.scales.require_positive(scale)


@rule_for(
    *(aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default),
    *(aten.amax.default, aten.amin.default, aten.max.default, aten.min.default),
)
class Maximum(Rising):
    """``max(s * x + t) = s * max(x) + t`` for positive s, equal along the positions; padding counts as -infinity."""

    def arrange(self, node: Node, numbers: np.ndarray, shape: torch.Size, collapse: Collapse) -> np.ndarray:
        if node.target in _POOLS:
            return collapse(numbers, varying_of(numbers, range(-_POOLS[node.target], 0)))
        if node.target in _KEEPS_AXIS:
            return collapse(numbers, varying_of(numbers, (argument(node, "dim"),)))
        return reduce_axes(node, numbers, collapse)


@rule_for(
    *(aten.max_pool1d_with_indices.default, aten.max_pool2d_with_indices.default),
    *(aten.max_pool3d_with_indices.default, aten.adaptive_max_pool1d.default, aten.adaptive_max_pool2d.default),
    *(aten.adaptive_max_pool3d.default, aten.max.dim, aten.min.dim, aten.aminmax.default, aten.median.dim),
    *(aten.nanmedian.dim, aten.kthvalue.default),
    *_KEEPS_AXIS,
)
class Ranked(Maximum):
    """Values chosen by their order, with the places where they were, which no scale or shift changes."""

    def carry(
        self, node: Node, operand: Node, numbers: np.ndarray, collapse: Collapse, fold: Folding
    ) -> list[np.ndarray]:
        result = super().carry(node, operand, numbers, collapse, fold)
        places = np.zeros((1,) * result.ndim, numbers.dtype)
        return [result if value.is_floating_point() else places for value in node.meta["val"]]


class Homogeneous(Rising):
    """``f(s * x) = s * f(x)`` for positive s: a positive scale passes, a shift does not."""

    owns_constants = True

    def use(self, node: Node, operand: Node, shift: np.ndarray | None, fold: Folding) -> Use:
        return Use.STOP

    def settle(self, node: Node, fold: Folding) -> np.ndarray:
        return fold.no_shift(node)

    def arrange(self, node: Node, numbers: np.ndarray, shape: torch.Size, collapse: Collapse) -> np.ndarray:
        return numbers


@rule_for(
    *(aten.relu.default, aten.leaky_relu.default, aten.abs.default, aten.prelu.default, aten.rrelu.default),
    *(aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default, aten.hardtanh.default),
    *(aten.clamp.Tensor, aten.clamp_min.Tensor, aten.clamp_max.Tensor, aten.threshold.default),
)
class Bend(Homogeneous):
    """ReLU and its like. Slopes are constant, bounds are zero or infinite."""

    _BOUNDS = ("min", "max", "min_val", "max_val", "threshold", "value")

    def matches(self, node: Node, fold: Folding) -> bool:
        slope = argument(node, "weight")
        if not super().matches(node, fold) or argument(node, "training"):
            return False
        if slope is not None and not fold.program.is_constant(slope):
            return False
        same_shape = node.meta["val"].dim() == node.args[0].meta["val"].dim()
        return same_shape and all(is_bound(argument(node, name), fold) for name in self._BOUNDS)


@rule_for(aten.maximum.default, aten.minimum.default)
class BendAtConstant(Homogeneous):
    """The larger, or the smaller, of a value and zeros."""

    def operand(self, node: Node) -> Node:
        return node.args[0]

    def matches(self, node: Node, fold: Folding) -> bool:
        value, bound = node.args
        same_shape = is_float(value) and node.meta["val"].dim() == value.meta["val"].dim()
        return same_shape and not fold.program.is_constant(value) and is_bound(bound, fold)


@rule_for(*_COMPARISONS)
class Sign(Rule):
    """Which values are above zero: a positive scale does not matter, a shift does."""

    def matches(self, node: Node, fold: Folding) -> bool:
        return is_float(node.args[0]) and node.args[1] == 0

    def relate(self, node: Node, fold: Folding) -> None:
        fold.scales.require_positive(fold.scale(node.args[0]))


def is_bound(bound: object, fold: Folding) -> bool:
    """Whether a bound is the same for every positive scale: none, zero or infinite, everywhere."""
    if bound is None:
        return True
    if isinstance(bound, int | float):
        return bound == 0 or math.isinf(bound)
    if not fold.program.is_constant(bound) or bound.meta["val"].numel() > MAX_BOUNDS:
        return False
    value = fold.program.constant(bound)
    return bool(((value == 0) | value.isinf()).all())


# Constants with more entries are not looked at.
MAX_BOUNDS = 1 << 22
