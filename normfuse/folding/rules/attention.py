"""Products of two computed values, attention's among them."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.fx import Node

from ..arrays import CannotCarry, Collapse, same_size, take_first, to_rank, varying
from ..gauge import Facts, Gauge
from ..operations import CASTS, COPIES, DROPOUTS, HANDED_ON, RESHAPES
from ..relations import MAX_FREE_ENTRIES, Relations
from .base import Match, Use, argument, is_float, rule_for
from .carry import varying_of
from .contraction import contraction_of, factors_of, lay
from .equations import ProductOfTwo

aten = torch.ops.aten
_SOFTMAX = (aten.softmax.int, aten._softmax.default)
_SAME = CASTS | COPIES | DROPOUTS | HANDED_ON


@rule_for(
    *(aten.matmul.default, aten.bmm.default, aten.mm.default, aten.linear.default, aten.einsum.default),
    *(aten.tensordot.default, aten.dot.default, aten.linalg_vecdot.default),
)
class Mixture(ProductOfTwo):
    """``y = P x`` with a computed P: scales along the axes that stay are multiplied. Those of averages are fixed.

    A constant P that mixes positions whose channels have scales is a value with scales of its own. A shift passes
    where each of the sums is weighted by a softmax over its positions, whose weights add up to one.
    """

    def fits(self, facts: Facts) -> bool:
        if self.argument("bias") is not None or contraction_of(self.node) is None:
            return False
        return all(is_float(factor) for factor in factors_of(self.node))

    def relate(self, relations: Relations) -> np.ndarray:
        factors = factors_of(self.node)
        is_constant, mixes = relations.gauge.program.is_constant, self.node in relations.gauge.options.mixing
        fixed = [(is_constant(x) and not mixes) or relations.is_fixed(x) for x in factors]
        at = self._averaged()
        if at is None and not any(fixed) and self.may_multiply(relations):
            return self.multiplied(relations)
        if at is None:
            at = 0 if fixed[1] and not fixed[0] else 1
        relations.pin(factors[1 - at], f"{relations.gauge.describe(self.node)}, of which it is a factor")
        return self.laid(at, relations.scale(factors[at]), relations.require_equal)

    def factors(self) -> tuple[Node, Node]:
        return factors_of(self.node)

    def may_multiply(self, relations: Relations) -> bool:
        sides = self._side_by_side(*map(relations.scale, self.factors()))
        shape = np.broadcast_shapes(*(side.shape for side in sides))
        return super().may_multiply(relations) and math.prod(shape) <= MAX_FREE_ENTRIES

    def multiplied(self, relations: Relations) -> np.ndarray:
        relations.equations.append(self.node)
        sides = [self.laid(at, relations.scale(x), take_first) for at, x in enumerate(self.factors())]
        return relations.scales.fresh(np.broadcast_shapes(*(side.shape for side in sides)))

    def sides(self, gauge: Gauge) -> tuple[np.ndarray, ...]:
        sides = self._side_by_side(*map(gauge.scale, (*self.factors(), self.node)))
        return tuple(np.broadcast_arrays(*sides))

    def _side_by_side(self, *numbers: np.ndarray) -> list[np.ndarray]:
        """Numbers about the factors, and perhaps the result, along all axes: their products are equal in each sum."""
        found = contraction_of(self.node)
        assert found is not None  # it matches
        names = tuple(dict.fromkeys(name for name in (*found.left, *found.right) if name))
        return [lay(own, axes, names) for own, axes in zip(numbers, found, strict=False)]

    def use(self, operand: Node, shift: np.ndarray | None, gauge: Gauge) -> Use:
        at, factors = self._averaged(), factors_of(self.node)
        if at is None or operand is not factors[at] or factors[0] is factors[1]:
            return Use.STOP
        return Use.PASS if gauge.can_carry(self.node, operand, shift) else Use.STOP

    def carry(self, operand: Node, numbers: np.ndarray, collapse: Collapse, gauge: Gauge) -> np.ndarray:
        at = self._averaged()
        if at is None or operand is not factors_of(self.node)[at]:
            raise CannotCarry
        return self.laid(at, numbers, collapse)

    def settle(self, gauge: Gauge) -> np.ndarray:
        at = self._averaged()
        return gauge.no_shift(self.node) if at is None else gauge.carried(self.node, factors_of(self.node)[at])

    def laid(self, at: int, numbers: np.ndarray, collapse: Collapse) -> np.ndarray:
        """Numbers about one factor, arranged as the result's: equal along all axes that are summed over."""
        found = contraction_of(self.node)
        assert found is not None  # it matches
        axes = (found.left, found.right)[at]
        numbers = collapse(numbers, tuple(a for a in varying(numbers) if axes[a] not in found.result))
        return lay(numbers, axes, found.result)

    def _averaged(self) -> int | None:
        """Which factor is averaged with the softmax that the other one is; None where neither is."""
        found, factors = contraction_of(self.node), factors_of(self.node)
        assert found is not None  # it matches
        summed = {*found.left, *found.right} - {*found.result, ""}
        for at, axes in enumerate((found.right, found.left)):
            own = (found.left, found.right)[at]
            shared = len(summed) == 1 and summed <= set(axes) and summed <= set(own)
            if shared and _adds_up_to_one(factors[1 - at], axes.index(next(iter(summed)))):
                return at
        return None


@rule_for(aten.scaled_dot_product_attention.default)
class Attention(Match):
    """Softmax-weighted sums of the values: the weights add up to one, so scale and shift of the values pass.

    With a mask a row can be masked entirely, where nothing adds up to one: then the shift stops, unless the mask is
    constant and has no such row. Queries, keys and the mask meet in the softmax and stay as they are.
    """

    def fits(self, facts: Facts) -> bool:
        return self.argument("dropout_p") == 0 and all(is_float(x) for x in self.args[:3])

    def relate(self, relations: Relations) -> np.ndarray:
        query, key, value = self.args[:3]
        reason = f"the comparison of queries with keys in {relations.gauge.describe(self.node)}"
        mask = self.argument("attn_mask")
        for operand in (query, key, *([mask] if mask is not None and is_float(mask) else [])):
            relations.pin(operand, reason)
        return self.carry(value, relations.scale(value), relations.require_equal, relations.gauge)

    def use(self, operand: Node, shift: np.ndarray | None, gauge: Gauge) -> Use:
        query, key, _value = self.args[:3]
        if operand in (query, key, self.argument("attn_mask")) or not self._rows_see_something(gauge):
            return Use.STOP
        return Use.PASS if gauge.can_carry(self.node, operand, shift) else Use.STOP

    def carry(self, operand: Node, numbers: np.ndarray, collapse: Collapse, gauge: Gauge) -> np.ndarray:
        query, _, value = self.args[:3]
        if operand is not value:
            raise CannotCarry
        numbers = collapse(numbers, varying_of(numbers, (-2,)))
        if self.argument("enable_gqa") and numbers.ndim > 2 and numbers.shape[-3] != 1:
            heads = query.meta["val"].shape[-3], value.meta["val"].shape[-3]
            if not all(isinstance(count, int) for count in heads):
                numbers = collapse(numbers, varying_of(numbers, (-3,)))
            else:
                numbers = np.repeat(numbers, heads[0] // heads[1], -3)
        return to_rank(numbers, self.value.dim())

    def settle(self, gauge: Gauge) -> np.ndarray:
        if not self._rows_see_something(gauge):
            return gauge.no_shift(self.node)
        return gauge.carried(self.node, self.args[2])

    def _rows_see_something(self, gauge: Gauge) -> bool:
        """Whether no row is masked altogether."""
        mask = self.argument("attn_mask")
        if mask is None:
            return True
        if not gauge.program.is_constant(mask):
            return False
        seen = gauge.program.constant(mask)
        seen = seen if seen.dtype == torch.bool else seen > -torch.inf
        return bool(seen.any(-1).all())


def _adds_up_to_one(node: Node, axis: int) -> bool:
    """Whether the entries along an axis are those of a softmax along it."""
    while node.op == "call_function" and node.target not in _SOFTMAX:
        if _is_divided_by_its_sum(node, axis):
            return True
        if node.target in _SAME and is_float(node) and not argument(node, "train", False):
            pass
        elif node.target is aten.transpose.int:
            rank = node.meta["val"].dim()
            first, second = (dim % rank for dim in node.args[1:3])
            axis = {first: second, second: first}.get(axis, axis)
        elif node.target is aten.mT.default:
            rank = node.meta["val"].dim()
            axis = {rank - 1: rank - 2, rank - 2: rank - 1}.get(axis, axis)
        elif node.target is aten.unsqueeze.default:
            new = node.args[1] % node.meta["val"].dim()
            if axis == new:
                return False
            axis -= axis > new
        elif node.target is aten.permute.default:
            axis = node.args[1][axis] % node.meta["val"].dim()
        elif node.target in RESHAPES:
            before, after = node.args[0].meta["val"].shape, node.meta["val"].shape
            if axis != len(after) - 1 or not before or not same_size(before[-1], after[-1]):
                return False
            axis = len(before) - 1
        else:
            return False
        node = node.args[0]
    return node.op == "call_function" and node.args[1] % node.meta["val"].dim() == axis


def _is_divided_by_its_sum(node: Node, axis: int) -> bool:
    """Whether a node is ``x / x.sum(axis, keepdim=True)``."""
    if node.target is not aten.div.Tensor or not isinstance(total := node.args[1], Node):
        return False
    if total.target is not aten.sum.dim_IntList or total.args[0] is not node.args[0] or not argument(total, "keepdim"):
        return False
    return [dim % node.meta["val"].dim() for dim in argument(total, "dim") or ()] == [axis]
