"""Dynamic norms that cancel: a norm that measures each token divides by a number that later norms do not see.

RMSNorm is ``x / r`` with one positive number r per token. Where everything that reads it is homogeneous, what follows
is the same but for powers of r, until norms measure it again and divide them out. The first norm then changes nothing
but the weight of the later norms' eps. Published for one family of models by adapters as FlashNorm, proposition 3
(Graef et al., 2024, arXiv 2407.09577); here the program is followed value by value.
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch.fx import Node

from .arrays import axis_groups, same_size
from .gauge import Gauge
from .nodes import argument, computes_number, is_float, module_of, operation_name
from .operations import (
    BIASES,
    BOUNDS,
    CASTS,
    COMPARISONS,
    CONVOLUTIONS,
    COPIES,
    DROPOUTS,
    EXPANSIONS,
    EXPONENTS,
    FACTORS,
    HANDED_ON,
    PERMUTATIONS,
    REARRANGED,
    REDUCTIONS,
    RESHAPES,
    SLOPES,
    SPLITS,
    SQUEEZES,
    SUMS,
    filled_with,
)
from .rules.carry import Permute
from .rules.contraction import contraction_of, factors_of

aten = torch.ops.aten


class Factor(NamedTuple):
    """A positive factor per token that a value has without the norm.

    Attributes:
        degree: the power of the norm's own factor that it is.
        tokens: the axes along which it varies, in the order of the norm's axes.
        order: what has rearranged tokens since. Two factors are the same only if this is the same.
    """

    degree: float
    tokens: tuple[int, ...]
    order: tuple[object, ...] = ()


class Stops(Exception):
    """A reader sees the factor; says which."""


Carried = Factor | None | list[Factor | None]
_SAME = {
    *SLOPES - {aten.prelu.default},  # whose weight may be computed
    *(aten.relu.default, aten.neg.default, aten.triu.default, aten.tril.default),
    *COPIES,
    *DROPOUTS,
    *HANDED_ON,
}
# A bound under a length is an eps of the same kind as a norm's.
_LARGEST_EPS = 1e-4


def cancelling_norms(gauge: Gauge) -> tuple[dict[Node, list[Node]], dict[Node, str]]:
    """The norms whose division nothing sees, with what measures again behind each, and why others are seen.

    To be called when streams are centred, and before the program is rewritten: RMSNorms cancel, and LayerNorms of what
    has a mean of zero, if neither adds a shift.
    """
    norms = [
        node
        for node in gauge.matches.dynamic
        if node.target is aten.rms_norm.default
        or (node in gauge.centring.without_mean and not gauge.matches.of[node].shift(gauge).any())
    ]
    program = gauge.program
    order = {node: position for position, node in enumerate(program.graph.nodes)}
    cancelled: dict[Node, list[Node]] = {}
    kept: dict[Node, str] = {}
    for norm in sorted(norms, key=order.__getitem__, reverse=True):  # what a later norm passes on, an earlier one may
        try:
            cancelled[norm] = _Walk(norm, cancelled, order, gauge).ends
        except Stops as reason:
            kept[norm] = str(reason)
    return cancelled, kept


class _Walk:
    """From a norm on along everything that has its factor.

    Attributes:
        ends: the norms that divide the factor out.
    """

    def __init__(
        self,
        norm: Node,
        cancelled: dict[Node, list[Node]],
        order: dict[Node, int],
        gauge: Gauge,
    ) -> None:
        self._cancelled, self._program = cancelled, gauge.program
        self.ends: list[Node] = []
        measured = _normalised(norm)
        tokens = tuple(
            a for a, size in enumerate(norm.meta["val"].shape) if a not in measured and not same_size(size, 1)
        )
        self._carried: dict[Node, Carried] = {norm: Factor(1.0, tokens)}
        queue, queued = [(order[user], user) for user in norm.users], set(norm.users)
        heapq.heapify(queue)
        while queue:
            _, node = heapq.heappop(queue)
            if node.op == "output":
                raise Stops("the model's output shows its scale")
            if not gauge.reads_values(node):
                continue
            result = self._behind(node)
            if isinstance(result, Factor) and not result.degree:
                self.ends.append(node)
                result = None
            self._carried[node] = result
            for user in node.users if result is not None else ():
                if user not in queued:
                    queued.add(user)
                    heapq.heappush(queue, (order[user], user))
        if not self.ends:
            raise Stops("nothing behind it measures again")

    def _of(self, value: object) -> Carried:
        return self._carried.get(value) if isinstance(value, Node) else None

    def _behind(self, node: Node) -> Carried:
        """The factor that the result of an operation has."""
        target, first = node.target, node.args[0] if node.args else None
        having = [operand for operand in node.all_input_nodes if self._of(operand) is not None]
        factor = self._of(first)
        if not having:
            return None
        if target is operator.getitem:
            return factor[node.args[1]] if isinstance(factor, list) else factor
        if target in (aten.cat.default, aten.stack.default):
            return self._joined(node)
        if target in FACTORS:
            return self._product(node)
        if target in (aten.mul.Tensor, aten.div.Tensor):
            return self._scaled(node)
        if target in SUMS:
            return self._sum(node)
        if target in (aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther):
            return self._chosen(node)
        if having != [first] or not isinstance(factor, Factor):
            raise self._stops(node)
        if target in (aten.rms_norm.default, aten.layer_norm.default):
            if node in self._cancelled:
                return factor
            if set(_normalised(node)) & set(factor.tokens):
                raise Stops(f"{self._describe(node)} measures several tokens together")
            self.ends.append(node)
            return None
        if computes_number(node):
            raise self._stops(node)
        if target in _SAME and not argument(node, "train", False) and not argument(node, "training", False):
            return factor
        if target in CASTS and is_float(node):
            return factor
        if target in BOUNDS:
            return self._bounded(node, factor)
        if target is aten.prelu.default and self._program.is_constant(node.args[1]):
            return factor
        if target is aten.pow.Tensor_Scalar or target in EXPONENTS:
            return factor._replace(degree=factor.degree * EXPONENTS.get(target, node.args[-1]))
        if target in COMPARISONS | {aten.eq.Scalar, aten.ne.Scalar} and node.args[1] == 0:
            return None
        if target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor) and self._is_zero(node.args[2]):
            return _behind_broadcast(node, first, factor)
        return self._moved(node, first, factor)

    def _moved(self, node: Node, operand: Node, factor: Factor) -> Carried:
        target, rank = node.target, operand.meta["val"].dim()
        if not rank and target not in RESHAPES | SQUEEZES | EXPANSIONS:
            raise self._stops(node)  # which may name an axis of a number
        if target in PERMUTATIONS:
            probe = np.zeros(range(2, rank + 2))  # every axis is known by its size
            sizes = Permute(node).arrange(probe, torch.Size(probe.shape), _no_collapse).shape
            return factor._replace(tokens=tuple(sizes.index(axis + 2) for axis in factor.tokens))
        if target in RESHAPES | SQUEEZES:
            return _reshaped(node, operand, factor)
        if target in EXPANSIONS:
            return _behind_broadcast(node, operand, factor)
        if target in REARRANGED or target is aten.cumsum.default:
            dims = argument(node, "dims", argument(node, "dim"))
            if dims is None or dims == []:
                raise self._stops(node, "mixes tokens")
            axes = {axis % rank for axis in ([dims] if isinstance(dims, int) else dims)}
            if target is aten.cumsum.default and axes & set(factor.tokens):
                raise self._stops(node, "mixes tokens")
            return factor._replace(order=(*factor.order, node)) if axes & set(factor.tokens) else factor
        if target in SPLITS:
            axis = argument(node, "dim") % rank
            pieces: list[Factor | None] = [
                factor._replace(order=(*factor.order, (node, i))) if axis in factor.tokens else factor
                for i in range(len(node.meta["val"]))
            ]
            gone = (axis,) if target is aten.unbind.int else ()
            return [None if piece is None else _without_axes(piece, gone) for piece in pieces]
        if target is aten.select.int:
            axis = node.args[1] % rank
            if axis in factor.tokens:
                factor = factor._replace(order=(*factor.order, node))
            return _without_axes(factor, (axis,))
        if target in REDUCTIONS:
            dims = argument(node, "dim")
            reduced = tuple(axis % rank for axis in ([dims] if isinstance(dims, int) else dims or range(rank)))
            if set(reduced) & set(factor.tokens) or argument(node, "ord") == 0:
                raise self._stops(node, "mixes tokens")
            return factor if argument(node, "keepdim") else _without_axes(factor, reduced)
        if target in CONVOLUTIONS:
            return self._convolution(node, factor)
        raise self._stops(node)

    def _product(self, node: Node) -> Factor:
        """A product with one factor that has none, not summed over tokens."""
        bias = argument(node, BIASES[node.target]) if node.target in BIASES else None
        if bias is not None and not self._is_zero(bias):
            raise Stops(f"{self._describe(node)} adds a bias")
        found, factors = contraction_of(node), factors_of(node)
        carried = [self._of(factor) for factor in factors]
        if found is None or sum(c is not None for c in carried) != 1:
            raise self._stops(node)
        at = 0 if carried[0] is not None else 1
        names, factor = (found.left, found.right)[at], carried[at]
        assert isinstance(factor, Factor)
        tokens = [names[axis] for axis in factor.tokens]
        if not all(name and name in found.result for name in tokens):
            raise self._stops(node, "mixes tokens")
        return factor._replace(tokens=tuple(found.result.index(name) for name in tokens))

    def _convolution(self, node: Node, factor: Factor) -> Factor:
        weight, bias, padding = (argument(node, name) for name in ("weight", "bias", "padding"))
        if bias is not None and not self._is_zero(bias):
            raise Stops(f"{self._describe(node)} adds a bias")
        single = all(size == 1 for size in weight.meta["val"].shape[2:]) and not any(padding)
        if not single or 1 in factor.tokens or weight.meta["val"].dim() != node.meta["val"].dim():
            raise self._stops(node, "mixes tokens")
        strided = any(step != 1 for step in argument(node, "stride"))
        return factor._replace(order=(*factor.order, node)) if strided else factor

    def _scaled(self, node: Node) -> Factor:
        """A product of two values, or a quotient: degrees add up, or are subtracted."""
        sign = -1.0 if node.target is aten.div.Tensor else 1.0
        result: Factor | None = None
        for operand, power in zip(node.args[:2], (1.0, sign), strict=True):
            factor = self._of(operand)
            if factor is None:
                continue
            aligned = _behind_broadcast(node, operand, self._single(node, factor))
            aligned = aligned._replace(degree=aligned.degree * power)
            if result is None:
                result = aligned
            elif (result.tokens, result.order) != (aligned.tokens, aligned.order):
                raise Stops(f"{self._describe(node)} multiplies different tokens")
            else:
                result = result._replace(degree=result.degree + aligned.degree)
        assert result is not None
        return result

    def _sum(self, node: Node) -> Factor:
        return self._alike(node, node.args[:2])

    def _chosen(self, node: Node) -> Factor:
        return self._alike(node, node.args[1:3], others=node.args[:1])

    def _joined(self, node: Node) -> Factor:
        axis = argument(node, "dim") % node.meta["val"].dim()
        if node.target is aten.stack.default:
            factor = self._alike(node, node.args[0], aligned=False)
            return factor._replace(tokens=tuple(a + (a >= axis) for a in factor.tokens))
        parts = [self._of(part) for part in node.args[0] if not self._is_zero(part)]
        factors = [part for part in parts if isinstance(part, Factor)]
        if len(factors) == len(parts) and any(axis in part.tokens for part in factors):
            if len({(part.degree, part.tokens) for part in factors}) > 1:
                raise Stops(f"{self._describe(node)} joins values of different degrees")
            return factors[0]._replace(order=(node,))
        return self._alike(node, node.args[0], aligned=False)

    def _alike(
        self, node: Node, operands: Iterable[object], *, others: Iterable[object] = (), aligned: bool = True
    ) -> Factor:
        """The factor that all operands have which are not zero."""
        if any(self._of(other) is not None for other in others):
            raise self._stops(node)
        found: set[Factor] = set()
        for operand in operands:
            if self._is_zero(operand):
                continue
            factor = self._of(operand)
            if factor is None:
                raise Stops(f"{self._describe(node)} adds or joins a value of another scale")
            factor = self._single(node, factor)
            found.add(_behind_broadcast(node, operand, factor) if aligned else factor)
        if len(found) != 1:
            raise Stops(f"{self._describe(node)} brings values of different scales together")
        return found.pop()

    def _bounded(self, node: Node, factor: Factor) -> Factor:
        names = ("min", "max", "min_val", "max_val", "threshold", "value")
        bounds = [bound for name in names if (bound := argument(node, name)) is not None]
        if not all(isinstance(bound, int | float) for bound in bounds):
            raise self._stops(node)
        measured = node.args[0].target is aten.linalg_vector_norm.default and node.target is aten.clamp_min.default
        if all(bound == 0 or abs(bound) == float("inf") for bound in bounds):
            return factor
        if measured and 0 < bounds[0] <= _LARGEST_EPS:
            return factor
        raise self._stops(node)

    def _single(self, node: Node, factor: Carried) -> Factor:
        if not isinstance(factor, Factor):
            raise self._stops(node)
        return factor

    def _is_zero(self, value: object) -> bool:
        if not isinstance(value, Node):
            return value == 0
        if filled_with(value) == 0:
            return True
        return self._program.is_constant(value) and not bool(self._program.constant(value).any())

    def _stops(self, node: Node, what: str = "sees its scale") -> Stops:
        return Stops(f"{self._describe(node)} {what}")

    def _describe(self, node: Node) -> str:
        path = module_of(node)[0]
        return f"{operation_name(node)} in {path}" if path else operation_name(node)


def _normalised(norm: Node) -> tuple[int, ...]:
    rank = norm.meta["val"].dim()
    return tuple(range(rank - len(argument(norm, "normalized_shape")), rank))


def _behind_broadcast(node: Node, operand: Node, factor: Factor) -> Factor:
    """The factor's axes in a result that may have more of them in front."""
    added = node.meta["val"].dim() - operand.meta["val"].dim()
    return factor._replace(tokens=tuple(axis + added for axis in factor.tokens))


def _without_axes(factor: Factor, axes: tuple[int, ...]) -> Factor:
    """The factor's axes once some others, or axes of which one entry is left, have gone."""
    left = (token for token in factor.tokens if token not in axes)
    return factor._replace(tokens=tuple(token - sum(axis < token for axis in axes) for token in left))


def _reshaped(node: Node, operand: Node, factor: Factor) -> Factor:
    old, new = operand.meta["val"].shape, node.meta["val"].shape
    places: dict[int, tuple[int, ...]] = {}
    order = factor.order
    for before, after in axis_groups(old, new):
        axes = [axis for axis in before if not same_size(old[axis], 1)]
        result = tuple(axis for axis in after if not same_size(new[axis], 1))
        varying = [axis for axis in axes if axis in factor.tokens]
        if varying and not (len(axes) == len(result) == 1):  # other axes, or tokens in another shape
            which = tuple((axes.index(axis), factor.tokens.index(axis)) for axis in varying)
            order = (*order, which, tuple(str(old[axis]) for axis in axes), tuple(str(new[axis]) for axis in result))
        for axis in varying:
            places[axis] = result if axis == varying[0] else ()
    return Factor(factor.degree, tuple(a for axis in factor.tokens for a in places.get(axis, ())), order)


def _no_collapse(array: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    return array
