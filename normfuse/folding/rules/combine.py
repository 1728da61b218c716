"""Operations that bring several values together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch.fx import Node

from ..arrays import CannotCarry, Collapse, take_first, to_rank, varying
from ..gauge import Facts, Gauge
from ..operations import SUMS, filled_with
from ..relations import Relations
from .base import MAX_LOOKED_AT, Match, MeanRole, Use, is_float, rule_for
from .equations import ProductOfTwo

aten = torch.ops.aten


@rule_for(*SUMS)
class Sum(Match):
    """``y = c1 * x1 + c2 * x2``: both operands and the result share one scale; ``t_y = c1 * t_1 + c2 * t_2``."""

    mean = MeanRole.ADDS
    adds = True

    def fits(self, facts: Facts) -> bool:
        same_dtype = all(is_float(x) and x.meta["val"].dtype == self.value.dtype for x in self.args[:2])
        return same_dtype and all(isinstance(factor, int | float) for factor in self._factors())

    def relate(self, relations: Relations) -> np.ndarray:
        return equate_all(self.node, self.args[:2], relations)

    def use(self, operand: Node, shift: np.ndarray | None, gauge: Gauge) -> Use:
        return Use.PASS if gauge.can_carry(self.node, operand, shift) else Use.STOP

    def carry(self, operand: Node, numbers: np.ndarray, collapse: Collapse, gauge: Gauge) -> np.ndarray:
        return to_rank(numbers, self.value.dim())

    def factor(self, operand: Node, gauge: Gauge) -> float:
        return sum(f for f, x in zip(self._factors(), self.args[:2], strict=True) if x is operand)

    def settle(self, gauge: Gauge) -> np.ndarray:
        first, second = (f * gauge.incoming(self.node, x) for f, x in zip(self._factors(), self.args[:2], strict=True))
        return to_rank(first + second, self.value.dim())

    def _factors(self) -> tuple[float, float]:
        alpha = self.argument("alpha", 1)
        if self.target is aten.lerp.Scalar:
            return 1 - self.args[2], self.args[2]
        if self.target is aten.rsub.Tensor:
            return -alpha, 1
        return 1, -alpha if self.target is aten.sub.Tensor else alpha


def equate_all(node: Node, operands: Iterable[Node], relations: Relations) -> np.ndarray:
    """Require one scale for several operands that broadcast against each other; returns it for their result."""
    rank = node.meta["val"].dim()
    return equate([to_rank(relations.scale(x), rank) for x in operands], relations)


def equate(scales: list[np.ndarray], relations: Relations) -> np.ndarray:
    """Require that scales of the same rank are equal; returns what they are."""
    first, *others = scales
    for other in others:
        relations.scales.equate(first, other)
        # After the equality nothing varies along an axis where either side has one number only.
        first = take_first(first, tuple(a for a in varying(first) if other.shape[a] == 1))
    return first


@rule_for(aten.neg.default)
class Negation(Match):
    """``y = -x``: the scale stays, the shift changes sign."""

    mean = MeanRole.ADDS

    def fits(self, facts: Facts) -> bool:
        return is_float(self.node)

    def relate(self, relations: Relations) -> np.ndarray:
        return relations.scale(self.args[0])

    def use(self, operand: Node, shift: np.ndarray | None, gauge: Gauge) -> Use:
        return Use.PASS

    def carry(self, operand: Node, numbers: np.ndarray, collapse: Collapse, gauge: Gauge) -> np.ndarray:
        return numbers

    def factor(self, operand: Node, gauge: Gauge) -> float:
        return -1.0

    def settle(self, gauge: Gauge) -> np.ndarray:
        return -gauge.incoming(self.node, self.args[0])


@rule_for(aten.cat.default)
class Concatenation(Match):
    """Concatenation, along the channels or along positions.

    Along the channels: the numbers of the parts one after another. Along positions: one scale and one shift for all
    parts, which would differ from position to position otherwise.
    """

    mean = MeanRole.JOINS

    def fits(self, facts: Facts) -> bool:
        return all(is_float(part) and part.meta["val"].dtype == self.value.dtype for part in self.args[0])

    def relate(self, relations: Relations) -> np.ndarray:
        parts = [relations.scale(part) for part in self.args[0]]
        axis = self._axis()
        if self._along_channels(relations.gauge):
            return self._join(parts, axis, relations.require_equal)
        for part in parts:
            relations.require_equal(part, tuple(a for a in varying(part) if a == axis))
        return take_first(equate_all(self.node, self.args[0], relations), (axis,))

    def use(self, operand: Node, shift: np.ndarray | None, gauge: Gauge) -> Use:
        if self._along_channels(gauge):
            return Use.PASS
        if not gauge.can_carry(self.node, operand, shift):
            return Use.STOP
        return Use.PASS if all(part is operand for part in self.args[0]) else Use.JOIN

    def carry(self, operand: Node, numbers: np.ndarray, collapse: Collapse, gauge: Gauge) -> np.ndarray:
        if self._along_channels(gauge):
            raise CannotCarry
        return collapse(numbers, tuple(a for a in varying(numbers) if a == self._axis()))

    def settle(self, gauge: Gauge) -> np.ndarray:
        if not self._along_channels(gauge):
            return gauge.carried(self.node, self.args[0][0])

        def refuse(array: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
            raise CannotCarry

        return self._join([gauge.incoming(self.node, part) for part in self.args[0]], self._axis(), refuse)

    def parts(self, numbers: np.ndarray, gauge: Gauge) -> list[tuple[Node, np.ndarray]]:
        if not self._along_channels(gauge):
            return []
        sizes = [int(part.meta["val"].shape[self._axis()]) for part in self.args[0]]
        slices = np.split(numbers, np.cumsum(sizes)[:-1], self._axis())
        return _distinct(self.args[0], slices, gauge)

    def _axis(self) -> int:
        return self.argument("dim") % self.value.dim()

    def _along_channels(self, gauge: Gauge) -> bool:
        """Whether the parts' sizes are known, and the scales of one that is computed differ along the axis.

        Or those of a parameter, where every other part has a scale for each entry as well, or a fixed one: a parameter
        could have scales for positions, too.
        """
        axis = self._axis()
        sizes = [part.meta["val"].shape[axis] for part in self.args[0]]
        if not all(isinstance(size, int) for size in sizes):
            return False
        varying_parts = [part for part in self.args[0] if gauge.scale(part).shape[axis] != 1]
        computed = [part for part in self.args[0] if not gauge.program.is_constant(part)]
        free = any(part in computed for part in varying_parts)
        return bool(varying_parts) and all(
            part in varying_parts or size == 1 or (part in computed if free else gauge.is_fixed(part))
            for size, part in zip(sizes, self.args[0], strict=True)
        )

    def _join(self, parts: list[np.ndarray], axis: int, collapse: Collapse) -> np.ndarray:
        shape = list(np.broadcast_shapes(*((*p.shape[:axis], 1, *p.shape[axis + 1 :]) for p in parts)))
        full = []
        for part, source in zip(parts, self.args[0], strict=True):
            shape[axis] = int(source.meta["val"].shape[axis])
            full.append(np.broadcast_to(part, shape))
        return np.concatenate(full, axis)


def _distinct(parts: Sequence[Node], numbers: Sequence[np.ndarray], gauge: Gauge) -> list[tuple[Node, np.ndarray]]:
    """The parts with their numbers; none where a part has several, or more than its channels can have."""
    found: dict[Node, np.ndarray] = {}
    for part, own in zip(parts, numbers, strict=True):
        if own.shape != gauge.scale(part).shape or not np.array_equal(found.setdefault(part, own), own):
            return []
    return list(found.items())


@rule_for(aten.stack.default)
class Stack(Match):
    """Parts along a new axis: each keeps its numbers."""

    def fits(self, facts: Facts) -> bool:
        return all(is_float(part) and part.meta["val"].dtype == self.value.dtype for part in self.args[0])

    def relate(self, relations: Relations) -> np.ndarray:
        return self._stack([relations.scale(part) for part in self.args[0]])

    def use(self, operand: Node, shift: np.ndarray | None, gauge: Gauge) -> Use:
        return Use.PASS

    def settle(self, gauge: Gauge) -> np.ndarray:
        return self._stack([gauge.incoming(self.node, part) for part in self.args[0]])

    def parts(self, numbers: np.ndarray, gauge: Gauge) -> list[tuple[Node, np.ndarray]]:
        axis = self.argument("dim") % self.value.dim()
        return _distinct(
            self.args[0], [part.squeeze(axis) for part in np.split(numbers, len(self.args[0]), axis)], gauge
        )

    def _stack(self, parts: list[np.ndarray]) -> np.ndarray:
        shape = np.broadcast_shapes(*(part.shape for part in parts))
        return np.stack([np.broadcast_to(part, shape) for part in parts], self.argument("dim"))


@rule_for(
    *(aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.where.self),
    *(aten.where.ScalarSelf, aten.where.ScalarOther),
)
class ZeroFill(Match):
    """Zeros at computed positions: the scale passes, a shift does not."""

    mean = MeanRole.SCALES
    owns_constants = True

    def fits(self, facts: Facts) -> bool:
        value, fill = self._value_and_fill(facts)
        if not is_float(value) or facts.program.is_constant(value) or value.meta["val"].dim() != self.value.dim():
            return False
        return value.meta["val"].dtype == self.value.dtype and self.fills(fill, facts)

    def fills(self, fill: object, facts: Facts) -> bool:
        """Whether the rule covers what stands at these positions."""
        return is_zero(fill, facts)

    def relate(self, relations: Relations) -> np.ndarray:
        return relations.scale(self._value_and_fill(relations.gauge)[0])

    def _value_and_fill(self, facts: Facts) -> tuple[object, object]:
        if self.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
            return self.args[0], self.args[2]
        first, second = self.args[1:3]
        return (second, first) if self.fills(first, facts) else (first, second)


@rule_for(
    *(aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.where.self),
    *(aten.where.ScalarSelf, aten.where.ScalarOther),
)
class InfiniteFill(ZeroFill):
    """Infinities at computed positions, which a maximum is not to find: positive scales pass, and any shift."""

    mean = MeanRole.READS

    def fills(self, fill: object, facts: Facts) -> bool:
        return is_infinite(fill, facts)

    def relate(self, relations: Relations) -> np.ndarray:
        scale = super().relate(relations)
        relations.scales.require_positive(scale)
        return scale

    def use(self, operand: Node, shift: np.ndarray | None, gauge: Gauge) -> Use:
        return Use.PASS if operand is self._value_and_fill(gauge)[0] else Use.STOP

    def carry(self, operand: Node, numbers: np.ndarray, collapse: Collapse, gauge: Gauge) -> np.ndarray:
        return numbers

    def settle(self, gauge: Gauge) -> np.ndarray:
        return gauge.carried(self.node, self._value_and_fill(gauge)[0])


@rule_for(
    *(aten.index_fill.int_Scalar, aten.scatter.value, aten.index_put.default, aten.tril.default, aten.triu.default),
)
class ZeroPlaces(ZeroFill):
    """Zeros at places that are told by their numbers, of channels perhaps."""

    mean = MeanRole.READS

    def _value_and_fill(self, facts: Facts) -> tuple[object, object]:
        return self.args[0], self.argument("values", self.argument("value", 0))


@rule_for(aten.where.self, aten.maximum.default, aten.minimum.default)
class Choice(Match):
    """One of two values at each position: they have one scale, and one shift; for an order, a positive scale."""

    def fits(self, facts: Facts) -> bool:
        return all(is_float(x) and x.meta["val"].dtype == self.value.dtype for x in self._values())

    def relate(self, relations: Relations) -> np.ndarray:
        scale = equate_all(self.node, self._values(), relations)
        if self.target is not aten.where.self:
            relations.scales.require_positive(scale)
        return scale

    def use(self, operand: Node, shift: np.ndarray | None, gauge: Gauge) -> Use:
        if operand not in self._values():
            return Use.STOP
        return Use.PASS if all(value is operand for value in self._values()) else Use.JOIN

    def carry(self, operand: Node, numbers: np.ndarray, collapse: Collapse, gauge: Gauge) -> np.ndarray:
        return to_rank(numbers, self.value.dim())

    def settle(self, gauge: Gauge) -> np.ndarray:
        return gauge.carried(self.node, self._values()[0])

    def _values(self) -> tuple[Node, ...]:
        return self.args[1:3] if self.target is aten.where.self else self.args[:2]


@rule_for(aten.mul.Tensor, aten.div.Tensor)
class Gate(ProductOfTwo):
    """``y = x * m`` (or ``x / m``) with a computed m: scales are multiplied, a shift stops.

    ``(s * f + t) * m = s * (f * m) + t * m``, and ``t * m`` is no constant. Masks, counts and sizes have no scale.
    """

    mean = MeanRole.SCALES

    def fits(self, facts: Facts) -> bool:
        floats = [x for x in self.args[:2] if is_float(x)]
        one_passes = self.target is aten.mul.Tensor or self.args[0] in floats
        computed = all(isinstance(x, Node) for x in self.args[:2])
        return computed and one_passes and bool(floats) and {x.meta["val"].dtype for x in floats} == {self.value.dtype}

    def divides_by(self, operand: Node) -> bool:
        return self.target is aten.div.Tensor and operand is self.args[1]

    def relate(self, relations: Relations) -> np.ndarray:
        first, second = self.args[:2]
        is_constant = relations.gauge.program.is_constant
        fixed = [not is_float(x) or is_constant(x) or relations.is_fixed(x) for x in (first, second)]
        if not any(fixed) and self.may_multiply(relations):
            return self.multiplied(relations)
        swap = self.target is aten.mul.Tensor and fixed[0] and not fixed[1]
        scaled, gate = (second, first) if swap else (first, second)
        relations.pin(gate, f"{relations.gauge.describe(self.node)}, of which it is a factor")
        return to_rank(relations.scale(scaled), self.value.dim())

    def factors(self) -> tuple[Node, Node]:
        return self.args[0], self.args[1]

    @property
    def power(self) -> float:
        return -1.0 if self.target is aten.div.Tensor else 1.0

    def laid(self, at: int, numbers: np.ndarray, collapse: Collapse) -> np.ndarray:
        return to_rank(numbers, self.value.dim())


@rule_for(aten.glu.default)
class GatedUnit(Match):
    """``y = x1 * sigmoid(x2)`` of the two halves of a value: the first half's scale passes, the second is fixed."""

    def fits(self, facts: Facts) -> bool:
        return is_float(self.node) and isinstance(self.value.shape[self.argument("dim")], int)

    def relate(self, relations: Relations) -> np.ndarray:
        scale, axis = relations.scale(self.args[0]), self.argument("dim")
        size = int(self.value.shape[axis])
        values, gates = np.split(scale, [size], axis) if scale.shape[axis] != 1 else (scale, scale)
        relations.scales.pin(gates, f"{relations.gauge.describe(self.node)}, of which it is a factor")
        return values


def is_zero(value: object, facts: Facts) -> bool:
    """Whether a number or a tensor is zero everywhere."""
    if not isinstance(value, Node):
        return value == 0
    if filled_with(value) == 0:
        return True
    small = facts.program.is_constant(value) and value.meta["val"].numel() <= MAX_LOOKED_AT
    return small and not bool(facts.program.constant(value).any())


def is_infinite(value: object, facts: Facts) -> bool:
    """Whether a number or a tensor is infinite everywhere."""
    if not isinstance(value, Node):
        return isinstance(value, float) and math.isinf(value)
    if (number := filled_with(value)) is not None:
        return math.isinf(number)
    small = facts.program.is_constant(value) and 0 < value.meta["val"].numel() <= MAX_LOOKED_AT
    return small and bool(facts.program.constant(value).isinf().all())
