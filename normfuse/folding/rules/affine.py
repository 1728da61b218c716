"""Affine maps with constant coefficients: what a static norm is in evaluation."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch.fx import Node

from ..arrays import CannotCarry, Collapse, same_size, take_first, to_rank, varying
from ..gauge import Facts, Gauge
from ..nodes import tensors_of
from ..operations import EXPANSIONS, filled_with
from ..relations import Relations
from ..weight_edits import WeightEdits
from .base import MAX_LOOKED_AT, Coefficients, Match, MeanRole, Use, argument, is_float, rule_for

aten = torch.ops.aten
_LERP = (aten.lerp.Scalar, aten.lerp.Tensor)


@rule_for(
    *(aten.batch_norm.default, aten.instance_norm.default, aten.addcmul.default, aten.addcdiv.default),
    *(aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.rsub.Tensor, aten.rsub.Scalar),
    *_LERP,
)
class Affine(Match):
    """``y = a * x + b`` with constants a and b per channel: y is to be the very same folded tensor as x.

    From ``x = s_x * f + t_x`` follows ``y = (a * s_x) * f + (a * t_x + b)``: demanded is the ratio
    ``s_y = a * s_x``, and the shift travels as ``t_y = a * t_x + b``. Where the demand cannot be met, the map stays,
    as ``f_y = (a * s_x / s_y) * f_x + (a * t_x + b - t_y) / s_y``, and its Add can give any shift.
    """

    owns_constants = True
    mean = MeanRole.MAPS

    @classmethod
    def of(cls, node: Node, facts: Facts) -> Affine | None:
        coefficients = _read(node, facts)
        return None if coefficients is None else cls(node, coefficients)

    @property
    def map(self) -> Coefficients:
        assert self.coefficients is not None
        return self.coefficients

    def relate(self, relations: Relations) -> np.ndarray | None:
        operand, a, b = self.map
        if why := relations.gauge.untouched(self.node):
            relations.pin(operand, why)
            return relations.fixed(self.node, why)
        inner = relations.scale(operand)
        shape = np.broadcast_shapes(inner.shape, a.shape, b.shape)
        return relations.scales.fresh(shape, stored=False) if self.asks_ratio else np.broadcast_to(inner, shape)

    def chooses_shift(self, gauge: Gauge) -> bool:
        return self.node in gauge.solution.kept and not gauge.untouched(self.node)

    def use(self, operand: Node, shift: np.ndarray | None, gauge: Gauge) -> Use:
        if gauge.untouched(self.node):
            return Use.STOP
        return Use.ABSORB if self.node in gauge.solution.kept else Use.PASS

    def carry(self, operand: Node, numbers: np.ndarray, collapse: Collapse, gauge: Gauge) -> np.ndarray:
        if self.node in gauge.solution.kept:
            raise CannotCarry
        return np.broadcast_to(numbers, np.broadcast_shapes(numbers.shape, self.map.a.shape))

    def factor(self, operand: Node, gauge: Gauge) -> np.ndarray:
        return self.map.a

    def settle(self, gauge: Gauge) -> np.ndarray:
        return gauge.chosen_shift(self.node) if self.node in gauge.solution.kept else self.constant_part(gauge)

    def constant_part(self, gauge: Gauge) -> np.ndarray:
        """The shift that a map which stays gives to its result."""
        operand, a, b = self.map
        if gauge.untouched(self.node):
            return gauge.no_shift(self.node)
        return a * gauge.incoming(self.node, operand) + b

    def rewrite(self, edits: WeightEdits) -> None:
        gauge = edits.gauge
        operand, a, b = self.map
        if self.node not in gauge.solution.kept:
            edits.replace(self.node, operand)
            return
        s_x, s_y = gauge.scales[gauge.scale(operand)], gauge.scales[gauge.scale(self.node)]
        t_x, t_y = gauge.incoming(self.node, operand), gauge.shifts.of[self.node]
        if (s_x == 1).all() and (s_y == 1).all() and not t_x.any() and not t_y.any():
            return
        result = edits.multiply(operand, a, s_x / s_y, before=self.node)
        edits.replace(self.node, edits.add(result, (a * t_x + b - t_y) / s_y, before=self.node))


def _read(node: Node, facts: Facts) -> Coefficients | None:
    """The coefficients, or None where one of them is no constant per channel."""
    if not is_float(node):
        return None
    if node.target in (aten.batch_norm.default, aten.instance_norm.default):
        return _batch_norm(node, facts)
    products = [[_unexpanded(factor, facts) for factor in product] for product in _products(node)]
    factors = {x for product in products for x in product if isinstance(x, Node)}
    computed = [x for x in factors if not facts.program.is_constant(x)]
    if len(computed) != 1 or not is_float(computed[0]):
        return None
    (operand,), value, result = computed, computed[0].meta["val"], node.meta["val"]
    if value.dim() != result.dim() or value.dtype != result.dtype or not _same_shape(operand, node):
        return None
    a = b = np.zeros((1,) * value.dim())
    for product in products:
        constant = _product([x for x in product if x is not operand], value.dim(), facts)
        if constant is None or product.count(operand) > 1:
            return None
        a, b = (a + constant, b) if operand in product else (a, b + constant)
    several = sum(operand in product for product in products) > 1 and node.target not in _LERP
    if node.target in (aten.add.Tensor, aten.sub.Tensor) and not np.isfinite(b).all():
        return None  # a mask
    return None if several or max(len(varying(a)), len(varying(b))) > 1 else Coefficients(operand, a, b)


def _unexpanded(factor: object, facts: Facts) -> object:
    """The constant or number that is expanded to a size known at run time only: it broadcasts to the operand's too."""
    if isinstance(factor, Inverse):
        return Inverse(_unexpanded(factor.value, facts))
    if (number := filled_with(factor)) is not None:
        return number
    source = factor
    while isinstance(source, Node) and source.target in EXPANSIONS:
        source = source.args[0]
    return source if facts.program.is_constant(source) else factor


def _same_shape(a: Node, b: Node) -> bool:
    shapes = (a.meta["val"].shape, b.meta["val"].shape)
    return all(same_size(x, y) for x, y in zip(*shapes, strict=True))


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


def _product(factors: list[object], rank: int, facts: Facts) -> np.ndarray | None:
    """The product of constants along one axis at most, as an array of the operand's rank; None where one is not."""
    result = np.ones((1,) * rank)
    for factor in factors:
        inverse = isinstance(factor, Inverse)
        number = _per_channel(factor.value if isinstance(factor, Inverse) else factor, rank, facts)
        if number is None:
            return None
        with np.errstate(divide="ignore", invalid="ignore"):
            result = result / number if inverse else result * number
    return result if len(varying(result)) <= 1 else None


def _per_channel(coefficient: object, rank: int, facts: Facts) -> np.ndarray | None:
    """A number or a constant tensor that varies along one axis at most, as an array of the operand's rank."""
    if isinstance(coefficient, int | float):
        return np.full((1,) * rank, float(coefficient))
    if not facts.program.is_constant(coefficient) or not tensors_of(coefficient):
        return None
    shape = coefficient.meta["val"].shape
    repeats = sum(size != 1 for size in shape) > 1
    if repeats and math.prod(shape) > MAX_LOOKED_AT:
        return None
    array = facts.program.constant(coefficient).double().numpy()
    if repeats:  # one number for each channel, which the model has written out for every position
        array = take_first(array, tuple(axis for axis in range(array.ndim) if _repeats(array, axis)))
    return to_rank(array, rank) if array.ndim <= rank and len(varying(array)) <= 1 else None


def _repeats(array: np.ndarray, axis: int) -> bool:
    return bool((array == array.take([0], axis)).all())


def _batch_norm(node: Node, facts: Facts) -> Coefficients | None:
    """``a = weight / sqrt(var + eps)``, ``b = bias - a * mean``, along axis 1."""
    operand = node.args[0]
    weight, bias, mean, var = (argument(node, n) for n in ("weight", "bias", "running_mean", "running_var"))
    measures = argument(node, "training") or argument(node, "use_input_stats")
    if measures or mean is None or var is None:
        return None
    if not is_float(operand) or not all(c is None or facts.program.is_constant(c) for c in (weight, bias, mean, var)):
        return None
    with np.errstate(invalid="ignore"):
        a = 1.0 / np.sqrt(facts.program.constant(var).numpy() + argument(node, "eps"))
    if weight is not None:
        a = a * facts.program.constant(weight).numpy()
    b = -a * facts.program.constant(mean).numpy()
    if bias is not None:
        b = b + facts.program.constant(bias).numpy()
    rank = operand.meta["val"].dim()
    shape = (1, -1) + (1,) * (rank - 2)
    return Coefficients(operand, a.reshape(shape), b.reshape(shape))
