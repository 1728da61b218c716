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
_LERP = (aten.lerp.Scalar, aten.lerp.Tensor)


class Coefficients(NamedTuple):
    """``original_out = a * original_in + b`` with arrays over the operand's channels (float64)."""

    operand: Node
    a: np.ndarray
    b: np.ndarray


@rule_for(
    *(aten.batch_norm.default, aten.instance_norm.default, aten.addcmul.default, aten.addcdiv.default),
    *(aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.rsub.Tensor, aten.rsub.Scalar),
    *_LERP,
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
        if not is_float(node):
            return None
        if node.target in (aten.batch_norm.default, aten.instance_norm.default):
            return _batch_norm(node, fold)
        products = _products(node)
        factors = {x for product in products for x in product if isinstance(x, Node)}
        computed = [x for x in factors if not fold.program.is_constant(x)]
        if len(computed) != 1 or not is_float(computed[0]):
            return None
        (operand,), value, result = computed, computed[0].meta["val"], node.meta["val"]
        if value.dim() != result.dim() or value.dtype != result.dtype or not fold.same_shape(operand, node):
            return None
        a = b = np.zeros((1,) * value.dim())
        for product in products:
            constant = _product([x for x in product if x is not operand], value.dim(), fold)
            if constant is None or product.count(operand) > 1:
                return None
            a, b = (a + constant, b) if operand in product else (a, b + constant)
        several = sum(operand in product for product in products) > 1 and node.target not in _LERP
        return None if several or max(len(varying(a)), len(varying(b))) > 1 else Coefficients(operand, a, b)


class Inverse(NamedTuple):
    """One over a number or a constant."""

    value: object


def _products(node: Node) -> list[list[object]]:
    """An operation as a sum of products of tensors and numbers."""
    first, second, *more = node.args
    alpha, value = argument(node, "alpha", 1), argument(node, "value", 1)
    if node.target is aten.mul.Tensor:
        return [[first, second]]
    if node.target is aten.div.Tensor:
        return [[first, Inverse(second)]]
    if node.target is aten.add.Tensor:
        return [[first], [second, alpha]]
    if node.target is aten.sub.Tensor:
        return [[first], [second, -alpha]]
    if node.target in (aten.rsub.Tensor, aten.rsub.Scalar):
        return [[second], [first, -alpha]]
    if node.target is aten.addcmul.default:
        return [[first], [second, more[0], value]]
    if node.target is aten.addcdiv.default:
        return [[first], [second, Inverse(more[0]), value]]
    return [[first], [first, more[0], -1.0], [second, more[0]]]  # lerp: x + weight * (y - x)


def _product(factors: list[object], rank: int, fold: Folding) -> np.ndarray | None:
    """The product of constants along one axis at most, as an array of the operand's rank; None where one is not."""
    result = np.ones((1,) * rank)
    for factor in factors:
        inverse = isinstance(factor, Inverse)
        number = _per_channel(factor.value if inverse else factor, rank, fold)
        if number is None:
            return None
        with np.errstate(divide="ignore", invalid="ignore"):
            result = result / number if inverse else result * number
    return result if len(varying(result)) <= 1 else None


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
    measures = argument(node, "training") or argument(node, "use_input_stats")
    if measures or mean is None or var is None:
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
