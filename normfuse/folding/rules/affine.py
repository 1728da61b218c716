"""Affine maps with constant coefficients: what a static norm is in evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch.fx import Node

from ..arrays import CannotCarry, Collapse, to_rank, varying
from .base import Rule, Use, argument, is_float, rule_for

if TYPE_CHECKING:
    from ..engine import Folding

aten = torch.ops.aten


class Coefficients(NamedTuple):
    """``original_out = a * original_in + b`` with arrays over the operand's channels (float64)."""

    operand: Node
    a: np.ndarray
    b: np.ndarray


@rule_for(
    aten.batch_norm.default,
    aten.addcmul.default,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.add.Tensor,
    aten.sub.Tensor,
)
class Affine(Rule):
    """``y = a * x + b`` with constants a and b per channel: y is to be the very same folded tensor as x.

    From ``x = s_x * f + t_x`` follows ``y = (a * s_x) * f + (a * t_x + b)``: demanded is the ratio
    ``s_y = a * s_x``, and the shift travels as ``t_y = a * t_x + b``. Where the demand cannot be met, the map stays,
    as ``f_y = (a * s_x / s_y) * f_x + (a * t_x + b - t_y) / s_y``, and its Add can give any shift.
    """

    owns_constants = True

    def matches(self, node: Node, fold: Folding) -> bool:
        coefficients = self._read(node, fold)
        if coefficients is None:
            return False
        fold.affine[node] = coefficients
        return True

    def relate(self, node: Node, fold: Folding) -> None:
        operand, a, b = fold.affine[node]
        inner = fold.scale(operand)
        shape = np.broadcast_shapes(inner.shape, a.shape, b.shape)
        if (a == 1).all():
            fold.scale_of[node] = np.broadcast_to(inner, shape)
            return
        fold.scale_of[node] = fold.scales.fresh(shape, stored=False)
        fold.demands.append(node)

    def chooses_shift(self, node: Node, fold: Folding) -> bool:
        return node in fold.kept

    def use(self, node: Node, operand: Node, shift: np.ndarray | None, fold: Folding) -> Use:
        return Use.ABSORB if node in fold.kept else Use.PASS

    def carry(self, node: Node, operand: Node, numbers: np.ndarray, collapse: Collapse, fold: Folding) -> np.ndarray:
        if node in fold.kept:
            raise CannotCarry
        return np.broadcast_to(numbers, np.broadcast_shapes(numbers.shape, fold.affine[node].a.shape))

    def factor(self, node: Node, operand: Node, fold: Folding) -> np.ndarray:
        return fold.affine[node].a

    def settle(self, node: Node, fold: Folding) -> np.ndarray:
        return fold.chosen_shift(node) if node in fold.kept else self.constant_part(node, fold)

    def constant_part(self, node: Node, fold: Folding) -> np.ndarray:
        """The shift that a map which stays gives to its result."""
        operand, a, b = fold.affine[node]
        return a * fold.incoming(node, operand) + b

    def rewrite(self, node: Node, fold: Folding) -> None:
        operand, a, b = fold.affine[node]
        if node not in fold.kept:
            fold.replace(node, operand)
            return
        s_x, s_y = fold.scales[fold.scale(operand)], fold.scales[fold.scale(node)]
        t_x, t_y = fold.incoming(node, operand), fold.shift_of[node]
        if (s_x == 1).all() and (s_y == 1).all() and not t_x.any() and not t_y.any():
            return
        result = fold.multiply(operand, a * s_x / s_y, before=node)
        fold.replace(node, fold.add(result, (a * t_x + b - t_y) / s_y, before=node))

    def _read(self, node: Node, fold: Folding) -> Coefficients | None:
        """The coefficients, or None where one of them is no constant per channel."""
        target = node.target
        if not is_float(node):
            return None
        if target is aten.batch_norm.default:
            return _batch_norm(node, fold)
        if target is aten.addcmul.default:
            shift, first, second = node.args[:3]
            if fold.program.is_constant(first):
                first, second = second, first
            if node.kwargs.get("value", 1) != 1:
                return None
            return _coefficients(node, first, second, shift, fold)
        left, right = node.args[:2]
        if target in (aten.mul.Tensor, aten.add.Tensor) and fold.program.is_constant(left):
            left, right = right, left
        if target is aten.mul.Tensor:
            return _coefficients(node, left, right, 0.0, fold)
        if target is aten.div.Tensor:
            return _coefficients(node, left, right, 0.0, fold, invert=True)
        if node.kwargs.get("alpha", 1) != 1:
            return None
        return _coefficients(node, left, 1.0, right, fold, negate=target is aten.sub.Tensor)


def _coefficients(
    node: Node,
    operand: object,
    a: object,
    b: object,
    fold: Folding,
    *,
    invert: bool = False,
    negate: bool = False,
) -> Coefficients | None:
    if not is_float(operand) or fold.program.is_constant(operand):
        return None
    value, result = operand.meta["val"], node.meta["val"]
    if value.dim() != result.dim() or value.dtype != result.dtype or not fold.same_shape(operand, node):
        return None
    factor, shift = (_per_channel(c, value.dim(), fold) for c in (a, b))
    if factor is None or shift is None:
        return None
    if invert:
        with np.errstate(divide="ignore"):
            factor = 1.0 / factor
    return Coefficients(operand, factor, -shift if negate else shift)


def _per_channel(coefficient: object, rank: int, fold: Folding) -> np.ndarray | None:
    """A number or a constant tensor that varies along one axis at most, as an array of the operand's rank."""
    if isinstance(coefficient, int | float):
        return np.full((1,) * rank, float(coefficient))
    if not fold.program.is_constant(coefficient) or not is_float(coefficient):
        return None
    if sum(size != 1 for size in coefficient.meta["val"].shape) > 1:
        return None
    array = fold.program.constant(coefficient).numpy()
    return to_rank(array, rank) if array.ndim <= rank and len(varying(array)) <= 1 else None


def _batch_norm(node: Node, fold: Folding) -> Coefficients | None:
    """``a = weight / sqrt(var + eps)``, ``b = bias - a * mean``, along axis 1."""
    operand = node.args[0]
    weight, bias, mean, var = (argument(node, n) for n in ("weight", "bias", "running_mean", "running_var"))
    if argument(node, "training") or mean is None or var is None:
        return None
    if not is_float(operand) or not all(c is None or fold.program.is_constant(c) for c in (weight, bias, mean, var)):
        return None
    with np.errstate(invalid="ignore"):
        a = 1.0 / np.sqrt(fold.program.constant(var).numpy() + argument(node, "eps"))
    if weight is not None:
        a = a * fold.program.constant(weight).numpy()
    b = -a * fold.program.constant(mean).numpy()
    if bias is not None:
        b = b + fold.program.constant(bias).numpy()
    rank = operand.meta["val"].dim()
    shape = (1, -1) + (1,) * (rank - 2)
    return Coefficients(operand, a.reshape(shape), b.reshape(shape))
