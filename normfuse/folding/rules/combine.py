"""Operations that bring several values together."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch.fx import Node

from ..arrays import CannotCarry, Collapse, same_size, take_first, to_rank, varying
from ..gauge import Gauge
from .base import MAX_LOOKED_AT, MeanRole, Rule, Use, argument, is_float, rule_for

aten = torch.ops.aten


@rule_for(aten.add.Tensor, aten.sub.Tensor, aten.rsub.Tensor, aten.lerp.Scalar)
class Sum(Rule):
    """``y = c1 * x1 + c2 * x2``: both operands and the result share one scale; ``t_y = c1 * t_1 + c2 * t_2``."""

    mean = MeanRole.ADDS
    adds = True

    def matches(self, node: Node, gauge: Gauge) -> bool:
        same_dtype = all(is_float(x) and x.meta["val"].dtype == node.meta["val"].dtype for x in node.args[:2])
        return same_dtype and all(isinstance(factor, int | float) for factor in self._factors(node))

    def relate(self, node: Node, gauge: Gauge) -> None:
        gauge.matches.scale_of[node] = equate_all(node, node.args[:2], gauge)

    def use(self, node: Node, operand: Node, shift: np.ndarray | None, gauge: Gauge) -> Use:
        return Use.PASS if gauge.can_carry(node, operand, shift) else Use.STOP

    def carry(self, node: Node, operand: Node, numbers: np.ndarray, collapse: Collapse, gauge: Gauge) -> np.ndarray:
        return to_rank(numbers, node.meta["val"].dim())

    def factor(self, node: Node, operand: Node, gauge: Gauge) -> float:
        return sum(f for f, x in zip(self._factors(node), node.args[:2], strict=True) if x is operand)

    def settle(self, node: Node, gauge: Gauge) -> np.ndarray:
        first, second = (f * gauge.incoming(node, x) for f, x in zip(self._factors(node), node.args[:2], strict=True))
        return to_rank(first + second, node.meta["val"].dim())

    def _factors(self, node: Node) -> tuple[float, float]:
        alpha = argument(node, "alpha", 1)
        if node.target is aten.lerp.Scalar:
            return 1 - node.args[2], node.args[2]
        if node.target is aten.rsub.Tensor:
            return -alpha, 1
        return 1, -alpha if node.target is aten.sub.Tensor else alpha


def equate_all(node: Node, operands: Iterable[Node], gauge: Gauge) -> np.ndarray:
    """Require one scale for several operands that broadcast against each other; returns it for their result."""
    rank = node.meta["val"].dim()
    return equate([to_rank(gauge.scale(x), rank) for x in operands], gauge)


def equate(scales: list[np.ndarray], gauge: Gauge) -> np.ndarray:
    """Require that scales of the same rank are equal; returns what they are."""
    first, *others = scales
    for other in others:
        gauge.scales.equate(first, other)
        # After the equality nothing varies along an axis where either side has one number only.
        first = take_first(first, tuple(a for a in varying(first) if other.shape[a] == 1))
    return first


@rule_for(aten.neg.default)
class Negation(Rule):
    """``y = -x``: the scale stays, the shift changes sign."""

    mean = MeanRole.ADDS

    def matches(self, node: Node, gauge: Gauge) -> bool:
        return is_float(node)

    def relate(self, node: Node, gauge: Gauge) -> None:
        gauge.matches.scale_of[node] = gauge.scale(node.args[0])

    def use(self, node: Node, operand: Node, shift: np.ndarray | None, gauge: Gauge) -> Use:
        return Use.PASS

    def carry(self, node: Node, operand: Node, numbers: np.ndarray, collapse: Collapse, gauge: Gauge) -> np.ndarray:
        return numbers

    def factor(self, node: Node, operand: Node, gauge: Gauge) -> float:
        return -1.0

    def settle(self, node: Node, gauge: Gauge) -> np.ndarray:
        return -gauge.incoming(node, node.args[0])


@rule_for(aten.cat.default)
class Concatenation(Rule):
    """Along the channels: the numbers of the parts one after another. Along positions: one scale and one shift for all
    parts, which would differ from position to position otherwise.
    """

    mean = MeanRole.JOINS

    def matches(self, node: Node, gauge: Gauge) -> bool:
        return all(is_float(part) and part.meta["val"].dtype == node.meta["val"].dtype for part in node.args[0])

    def relate(self, node: Node, gauge: Gauge) -> None:
        parts = [gauge.scale(part) for part in node.args[0]]
        axis = self._axis(node)
        if self._along_channels(node, gauge):
            gauge.matches.scale_of[node] = self._join(node, parts, axis, gauge.require_equal)
            return
        for part in parts:
            gauge.require_equal(part, tuple(a for a in varying(part) if a == axis))
        gauge.matches.scale_of[node] = take_first(equate_all(node, node.args[0], gauge), (axis,))

    def use(self, node: Node, operand: Node, shift: np.ndarray | None, gauge: Gauge) -> Use:
        if self._along_channels(node, gauge):
            return Use.PASS
        if not gauge.can_carry(node, operand, shift):
            return Use.STOP
        return Use.PASS if all(part is operand for part in node.args[0]) else Use.JOIN

    def carry(self, node: Node, operand: Node, numbers: np.ndarray, collapse: Collapse, gauge: Gauge) -> np.ndarray:
        if self._along_channels(node, gauge):
            raise CannotCarry
        return collapse(numbers, tuple(a for a in varying(numbers) if a == self._axis(node)))

    def settle(self, node: Node, gauge: Gauge) -> np.ndarray:
        if not self._along_channels(node, gauge):
            return gauge.carried(node, node.args[0][0])

        def refuse(array: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
            raise CannotCarry

        return self._join(node, [gauge.incoming(node, part) for part in node.args[0]], self._axis(node), refuse)

    def _axis(self, node: Node) -> int:
        return argument(node, "dim") % node.meta["val"].dim()

    def _along_channels(self, node: Node, gauge: Gauge) -> bool:
        """Whether the parts' sizes are known and no part with several entries has one scale for all of them."""
        axis = self._axis(node)
        sizes = [part.meta["val"].shape[axis] for part in node.args[0]]
        if not all(isinstance(size, int) for size in sizes):
            return False
        scales = [gauge.scale(part) for part in node.args[0]]
        return any(s.shape[axis] != 1 for s in scales) and all(
            s.shape[axis] != 1 or size == 1 or gauge.is_fixed(part)
            for s, size, part in zip(scales, sizes, node.args[0], strict=True)
        )

    def _join(self, node: Node, parts: list[np.ndarray], axis: int, collapse: Collapse) -> np.ndarray:
        shape = list(np.broadcast_shapes(*((*p.shape[:axis], 1, *p.shape[axis + 1 :]) for p in parts)))
        full = []
        for part, source in zip(parts, node.args[0], strict=True):
            shape[axis] = int(source.meta["val"].shape[axis])
            full.append(np.broadcast_to(part, shape))
        return np.concatenate(full, axis)


@rule_for(aten.stack.default)
class Stack(Rule):
    """Parts along a new axis: each keeps its numbers."""

    def matches(self, node: Node, gauge: Gauge) -> bool:
        return all(is_float(part) and part.meta["val"].dtype == node.meta["val"].dtype for part in node.args[0])

    def relate(self, node: Node, gauge: Gauge) -> None:
        gauge.matches.scale_of[node] = self._stack(node, [gauge.scale(part) for part in node.args[0]])

    def use(self, node: Node, operand: Node, shift: np.ndarray | None, gauge: Gauge) -> Use:
        return Use.PASS

    def settle(self, node: Node, gauge: Gauge) -> np.ndarray:
        return self._stack(node, [gauge.incoming(node, part) for part in node.args[0]])

    def _stack(self, node: Node, parts: list[np.ndarray]) -> np.ndarray:
        shape = np.broadcast_shapes(*(part.shape for part in parts))
        return np.stack([np.broadcast_to(part, shape) for part in parts], argument(node, "dim"))


@rule_for(
    *(aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.where.self),
    *(aten.where.ScalarSelf, aten.where.ScalarOther),
)
class ZeroFill(Rule):
    """Zeros at computed positions: the scale passes, a shift does not."""

    mean = MeanRole.SCALES
    owns_constants = True

    def matches(self, node: Node, gauge: Gauge) -> bool:
        value, fill = self._value_and_fill(node, gauge)
        if not is_float(value) or gauge.program.is_constant(value) or value.meta["val"].dim() != node.meta["val"].dim():
            return False
        return value.meta["val"].dtype == node.meta["val"].dtype and is_zero(fill, gauge)

    def relate(self, node: Node, gauge: Gauge) -> None:
        gauge.matches.scale_of[node] = gauge.scale(self._value_and_fill(node, gauge)[0])

    def _value_and_fill(self, node: Node, gauge: Gauge) -> tuple[object, object]:
        if node.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
            return node.args[0], node.args[2]
        first, second = node.args[1:3]
        return (second, first) if is_zero(first, gauge) else (first, second)


@rule_for(aten.where.self, aten.maximum.default, aten.minimum.default)
class Choice(Rule):
    """One of two values at each position: they have one scale, and one shift; for an order, a positive scale."""

    def matches(self, node: Node, gauge: Gauge) -> bool:
        return all(is_float(x) and x.meta["val"].dtype == node.meta["val"].dtype for x in self._values(node))

    def relate(self, node: Node, gauge: Gauge) -> None:
        gauge.matches.scale_of[node] = equate_all(node, self._values(node), gauge)
        if node.target is not aten.where.self:
            gauge.scales.require_positive(gauge.matches.scale_of[node])

    def use(self, node: Node, operand: Node, shift: np.ndarray | None, gauge: Gauge) -> Use:
        if operand not in self._values(node):
            return Use.STOP
        return Use.PASS if all(value is operand for value in self._values(node)) else Use.JOIN

    def carry(self, node: Node, operand: Node, numbers: np.ndarray, collapse: Collapse, gauge: Gauge) -> np.ndarray:
        return to_rank(numbers, node.meta["val"].dim())

    def settle(self, node: Node, gauge: Gauge) -> np.ndarray:
        return gauge.carried(node, self._values(node)[0])

    def _values(self, node: Node) -> tuple[Node, ...]:
        return node.args[1:3] if node.target is aten.where.self else node.args[:2]


@rule_for(aten.mul.Tensor, aten.div.Tensor)
class Gate(Rule):
    """``y = x * m`` (or ``x / m``) with a computed m, which stays as it is: the scale passes, a shift does not.

    ``(s * f + t) * m = s * (f * m) + t * m``, and ``t * m`` is no constant.
    """

    mean = MeanRole.SCALES

    def matches(self, node: Node, gauge: Gauge) -> bool:
        return all(is_float(x) and x.meta["val"].dtype == node.meta["val"].dtype for x in node.args[:2])

    def relate(self, node: Node, gauge: Gauge) -> None:
        first, second = node.args[:2]
        fixed = [gauge.program.is_constant(x) or gauge.is_fixed(x) for x in (first, second)]
        swap = node.target is aten.mul.Tensor and fixed[0] and not fixed[1]
        scaled, gate = (second, first) if swap else (first, second)
        gauge.pin(gate, f"{gauge.describe(node)}, of which it is a factor")
        gauge.matches.scale_of[node] = to_rank(gauge.scale(scaled), node.meta["val"].dim())


@rule_for(aten.slice_scatter.default, aten.select_scatter.default, aten.index_copy.default, aten.scatter.src)
class Overwrite(Rule):
    """Some positions along an axis hold another value's entries: both have one scale, and one shift."""

    def matches(self, node: Node, gauge: Gauge) -> bool:
        base, written = self._values(node)
        if not all(is_float(x) and x.meta["val"].dtype == node.meta["val"].dtype for x in (base, written)):
            return False
        sizes = list(written.meta["val"].shape)
        if node.target is aten.select_scatter.default:
            sizes.insert(self._axis(node), 1)
        own = base.meta["val"].shape
        return all(axis == self._axis(node) or same_size(own[axis], size) for axis, size in enumerate(sizes))

    def relate(self, node: Node, gauge: Gauge) -> None:
        scales = [self.carry(node, x, gauge.scale(x), gauge.require_equal, gauge) for x in self._values(node)]
        gauge.matches.scale_of[node] = equate(scales, gauge)

    def use(self, node: Node, operand: Node, shift: np.ndarray | None, gauge: Gauge) -> Use:
        return Use.JOIN if operand in self._values(node) and gauge.can_carry(node, operand, shift) else Use.STOP

    def carry(self, node: Node, operand: Node, numbers: np.ndarray, collapse: Collapse, gauge: Gauge) -> np.ndarray:
        if node.target is aten.select_scatter.default and numbers.ndim < node.meta["val"].dim():
            return np.expand_dims(numbers, self._axis(node))
        return collapse(numbers, tuple(axis for axis in varying(numbers) if axis == self._axis(node)))

    def settle(self, node: Node, gauge: Gauge) -> np.ndarray:
        return gauge.carried(node, node.args[0])

    def _values(self, node: Node) -> tuple[Node, Node]:
        return node.args[0], argument(node, "src", argument(node, "source"))

    def _axis(self, node: Node) -> int:
        return argument(node, "dim") % node.meta["val"].dim()


@rule_for(aten.glu.default)
class GatedUnit(Rule):
    """``y = x1 * sigmoid(x2)`` of the two halves of a value: the first half's scale passes, the second is fixed."""

    def matches(self, node: Node, gauge: Gauge) -> bool:
        return is_float(node) and isinstance(node.meta["val"].shape[argument(node, "dim")], int)

    def relate(self, node: Node, gauge: Gauge) -> None:
        scale, axis = gauge.scale(node.args[0]), argument(node, "dim")
        size = int(node.meta["val"].shape[axis])
        values, gates = np.split(scale, [size], axis) if scale.shape[axis] != 1 else (scale, scale)
        gauge.scales.pin(gates, f"{gauge.describe(node)}, of which it is a factor")
        gauge.matches.scale_of[node] = values


def is_zero(value: object, gauge: Gauge) -> bool:
    """Whether a number or a tensor is zero everywhere."""
    if not isinstance(value, Node):
        return value == 0
    if value.target in (aten.zeros_like.default, aten.new_zeros.default):
        return True
    small = gauge.program.is_constant(value) and value.meta["val"].numel() <= MAX_LOOKED_AT
    return small and not bool(gauge.program.constant(value).any())
