"""Powers of a value: the only operations whose result's scale is no multiple of the operand's."""

from __future__ import annotations

import numpy as np
import torch
from torch.fx import Node

from ..arrays import Collapse, take_first, to_rank
from ..gauge import Facts, Gauge
from ..operations import EXPONENTS
from ..relations import Relations
from ..weight_edits import WeightEdits
from .base import Use, is_float, rule_for
from .carry import reduce_axes
from .equations import Equation

aten = torch.ops.aten
_EXPONENTS = {**EXPONENTS, aten.mul.Tensor: 2.0}  # a product of a value by itself
_EACH = 0  # how mse_loss says that squares are neither averaged nor added up


@rule_for(aten.pow.Tensor_Scalar, *_EXPONENTS)
class Power(Equation):
    """``(s * x)^p = s^p * x^p``; for a p that is no integer the scale is positive.

    Where a shift has nowhere else to go, a square subtracts it, which is one operation:
    ``(s * x + t)^2 = s^2 * (x - (-t / s))^2``.
    """

    def operand(self) -> Node:
        """The value that is raised."""
        return self.args[0]

    def fits(self, facts: Facts) -> bool:
        if self.node in facts.options.fixed_equations or not is_float(self.node) or not is_float(self.args[0]):
            return False
        if self.target is aten.mul.Tensor:
            return self.args[0] is self.args[1]
        return self.args[0].meta["val"].dtype == self.value.dtype and self.power != 0

    @property
    def power(self) -> float:
        """The power to which the operand is raised."""
        return self.args[1] if self.target is aten.pow.Tensor_Scalar else _EXPONENTS.get(self.target, 2.0)

    def relate(self, relations: Relations) -> np.ndarray:
        scale = relations.scale(self.operand())
        result = relations.scales.fresh(scale.shape)
        if self.power % 1:
            relations.scales.require_positive(scale)
            relations.scales.require_positive(result)
        relations.equations.append(self.node)
        return result

    def sides(self, gauge: Gauge) -> tuple[np.ndarray, ...]:
        scale = gauge.scale(self.operand())
        return np.zeros_like(scale), scale, gauge.scale(self.node)  # the first one is one

    def last_resort(self) -> Use:
        return Use.ABSORB if self.power == 2 else Use.STOP

    def use(self, operand: Node, shift: np.ndarray | None, gauge: Gauge) -> Use:
        return Use.ABSORB if self.node in gauge.shifts.bent else Use.STOP

    def rewrite(self, edits: WeightEdits) -> None:
        gauge, operand = edits.gauge, self.operand()
        before = self.subtracted(gauge)
        after = (before - gauge.incoming(self.node, operand)) / gauge.scales[gauge.scale(operand)]
        if (after != before).any():
            new = edits.apply(aten.mse_loss.default, operand, after, _EACH, name="subtracted", before=self.node)
            edits.replace(self.node, new)

    def subtracted(self, gauge: Gauge) -> np.ndarray:
        """What is subtracted before the power is taken, as an array over the operand."""
        return gauge.no_shift(self.operand())


@rule_for(aten.var.dim, aten.var.correction, aten.var.default)
class Variance(Power):
    """``var(s * x + t) = s^2 * var(x)`` over positions, s being equal along them; of a shift nothing is left."""

    def relate(self, relations: Relations) -> np.ndarray:
        scale = reduce_axes(self.node, relations.scale(self.operand()), relations.require_equal)
        relations.equations.append(self.node)
        return relations.scales.fresh(scale.shape)

    def sides(self, gauge: Gauge) -> tuple[np.ndarray, ...]:
        scale = reduce_axes(self.node, gauge.scale(self.operand()), take_first)
        return np.zeros_like(scale), scale, gauge.scale(self.node)

    def last_resort(self) -> Use:
        return Use.STOP

    def use(self, operand: Node, shift: np.ndarray | None, gauge: Gauge) -> Use:
        return Use.ABSORB if gauge.can_carry(self.node, operand, shift) else Use.STOP

    def carry(self, operand: Node, numbers: np.ndarray, collapse: Collapse, gauge: Gauge) -> np.ndarray:
        return reduce_axes(self.node, numbers, collapse)

    def rewrite(self, edits: WeightEdits) -> None:
        pass


@rule_for(aten.mse_loss.default)
class SquaredDifference(Power):
    """``(x - c)^2`` with constants c, which take a shift: ``(s * x + t - c)^2 = s^2 * (x - (c - t) / s)^2``."""

    owns_constants = True

    def fits(self, facts: Facts) -> bool:
        value, constant = self.args[:2]
        if self.argument("reduction") != _EACH or not super().fits(facts) or facts.program.is_constant(value):
            return False
        return facts.program.is_constant(constant) and constant.meta["val"].dim() <= value.meta["val"].dim()

    def last_resort(self) -> Use:
        return Use.STOP

    def use(self, operand: Node, shift: np.ndarray | None, gauge: Gauge) -> Use:
        return Use.ABSORB if operand is self.operand() else Use.STOP

    def subtracted(self, gauge: Gauge) -> np.ndarray:
        return to_rank(gauge.program.constant(self.args[1]).numpy(), self.value.dim())
