"""Operations that move elements without computing: the result's channels are the operand's, rearranged.

Scale and shift go along: ``op(scale * x + shift) = op(scale) * op(x) + op(shift)``. Where the operation would mix or
drop an axis along which the scale varies, the scales along that axis are required to be equal.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from ..arrays import Collapse, reshape, same_size, to_rank, varying
from ..gauge import Gauge
from ..weight_edits import WeightEdits
from .base import MeanRole, Rule, Use, argument, is_float, rule_for

aten = torch.ops.aten


class Carry(Rule):
    """One operand's channels, rearranged by :meth:`arrange`."""

    mean = MeanRole.MOVES
    moves = True

    def operand(self, node: Node) -> Node:
        return node.args[0]

    def matches(self, node: Node, gauge: Gauge) -> bool:
        return is_float(self.operand(node))

    def relate(self, node: Node, gauge: Gauge) -> None:
        operand = self.operand(node)
        gauge.matches.scale_of[node] = self.carry(node, operand, gauge.scale(operand), gauge.require_equal, gauge)

    def use(self, node: Node, operand: Node, shift: np.ndarray | None, gauge: Gauge) -> Use:
        if operand is not self.operand(node):
            return Use.ABSORB  # only its shape is read
        return Use.PASS if gauge.can_carry(node, operand, shift) else Use.STOP

    def source(self, node: Node, gauge: Gauge) -> Node:
        """The value whose elements the result has."""
        return self.operand(node)

    def arranged(self, node: Node, source: Node, numbers: np.ndarray, collapse: Collapse, gauge: Gauge) -> np.ndarray:
        """Numbers about the source's channels, arranged as the result's."""
        return self.carry(node, source, numbers, collapse, gauge)

    def carry(self, node: Node, operand: Node, numbers: np.ndarray, collapse: Collapse, gauge: Gauge) -> Any:
        return self.arrange(node, numbers, operand.meta["val"].shape, collapse)

    def arrange(self, node: Node, numbers: np.ndarray, shape: torch.Size, collapse: Collapse) -> Any:
        raise NotImplementedError

    def settle(self, node: Node, gauge: Gauge) -> Any:
        operand = self.operand(node)
        return gauge.carried(node, operand)


@rule_for(
    aten.dropout.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten._to_copy.default,
)
class Identity(Carry):
    """The same values: ``original_out = original_in``. Dropout only in evaluation, casts only between floats.

    A cast to fewer digits rounds ``x / scale`` instead of x. The relative error of that is the same for any scale, as
    in every other operation of that dtype (a power of two gives the very same digits), and a shift that is as small as
    :data:`normfuse.folding.settle.GROWTH` asks costs no digits: both pass.
    """

    def keeps_channels(self, node: Node) -> bool:
        return True

    def matches(self, node: Node, gauge: Gauge) -> bool:
        dropping = argument(node, "train", False)  # of the kinds of dropout only
        return not dropping and is_float(node) and super().matches(node, gauge)

    def arrange(self, node: Node, numbers: np.ndarray, shape: torch.Size, collapse: Collapse) -> np.ndarray:
        return numbers

    def rewrite(self, node: Node, edits: WeightEdits) -> None:
        # A copy can be what makes a later view possible; nothing else here changes a value of the same dtype.
        copies = node.target in (aten.contiguous.default, aten.clone.default)
        before, after = self.operand(node).meta["val"], node.meta["val"]
        if not copies and (before.dtype, before.device) == (after.dtype, after.device):
            edits.replace(node, self.operand(node))


@rule_for(
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.reshape_as.default,
    aten.view_as.default,
    aten.flatten.using_ints,
    aten.ravel.default,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
)
class Reshape(Carry):
    """Elements in the same order under another shape; see :func:`normfuse.folding.arrays.reshape`."""

    def arrange(self, node: Node, numbers: np.ndarray, shape: torch.Size, collapse: Collapse) -> np.ndarray:
        return reshape(numbers, shape, node.meta["val"].shape, collapse)


@rule_for(
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.numpy_T.default,
    aten.mT.default,
    aten.adjoint.default,
    aten.mH.default,
    aten.movedim.int,
    aten.movedim.intlist,
)
class Permute(Carry):
    """The same axes in another order."""

    def arrange(self, node: Node, numbers: np.ndarray, shape: torch.Size, collapse: Collapse) -> np.ndarray:
        if node.target is aten.permute.default:
            return numbers.transpose(node.args[1])
        if node.target is aten.transpose.int:
            return numbers.swapaxes(*node.args[1:3])
        if node.target in (aten.mT.default, aten.mH.default, aten.adjoint.default):
            return numbers.swapaxes(-1, -2)
        if node.target in (aten.movedim.int, aten.movedim.intlist):
            return np.moveaxis(numbers, *node.args[1:3])
        return numbers.T


@rule_for(aten.expand.default, aten.expand_as.default, aten.broadcast_to.default)
class Expand(Carry):
    """Repetition along axes of size one, where nothing varies."""

    def arrange(self, node: Node, numbers: np.ndarray, shape: torch.Size, collapse: Collapse) -> np.ndarray:
        return to_rank(numbers, node.meta["val"].dim())


@rule_for(aten.repeat.default)
class Repeat(Carry):
    """Whole copies one after another: the numbers repeat where they vary, by a known count."""

    def arrange(self, node: Node, numbers: np.ndarray, shape: torch.Size, collapse: Collapse) -> np.ndarray:
        repeats = node.args[1]
        numbers = to_rank(numbers, len(repeats))
        unknown = tuple(axis for axis in varying(numbers) if not isinstance(repeats[axis], int))
        numbers = collapse(numbers, unknown)
        return np.tile(numbers, [repeats[a] if numbers.shape[a] != 1 else 1 for a in range(numbers.ndim)])


@rule_for(aten.slice.Tensor)
class Slice(Carry):
    """A range along one axis; where scales vary along it, the range must be known."""

    reads_part = True

    def arrange(self, node: Node, numbers: np.ndarray, shape: torch.Size, collapse: Collapse) -> np.ndarray:
        axis = argument(node, "dim") % numbers.ndim
        start, end, step = (argument(node, name) for name in ("start", "end", "step"))
        if numbers.shape[axis] == 1:
            return numbers
        if not all(bound is None or isinstance(bound, int) for bound in (start, end, step)):
            return collapse(numbers, (axis,))
        return numbers[(slice(None),) * axis + (slice(start, end, step),)]


@rule_for(aten.select.int)
class Select(Carry):
    """One entry along an axis, which goes."""

    reads_part = True

    def arrange(self, node: Node, numbers: np.ndarray, shape: torch.Size, collapse: Collapse) -> np.ndarray:
        axis, position = node.args[1] % numbers.ndim, node.args[2]
        if numbers.shape[axis] != 1 and not isinstance(position, int):
            numbers = collapse(numbers, (axis,))
        return numbers.take(0 if numbers.shape[axis] == 1 else position, axis)


@rule_for(
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
    aten.tensor_split.sections,
    aten.tensor_split.indices,
)
class Split(Carry):
    """Consecutive pieces along one axis; `unbind` also drops the axis."""

    reads_part = True

    def arrange(self, node: Node, numbers: np.ndarray, shape: torch.Size, collapse: Collapse) -> list[np.ndarray]:
        axis = argument(node, "dim") % numbers.ndim
        pieces = node.meta["val"]
        if node.target is aten.unbind.int:
            whole = numbers.shape[axis] == 1
            return [numbers.take(0 if whole else position, axis) for position in range(len(pieces))]
        sizes = [piece.shape[axis] for piece in pieces]
        if numbers.shape[axis] != 1 and not all(isinstance(size, int) for size in sizes):
            numbers = collapse(numbers, (axis,))
        if numbers.shape[axis] == 1:
            return [numbers] * len(pieces)
        return np.split(numbers, np.cumsum(sizes)[:-1], axis)


@rule_for(operator.getitem)
class Piece(Carry):
    """One result of an operation that has several."""

    reads_part = True

    def source(self, node: Node, gauge: Gauge) -> Node:
        several = node.args[0]
        return gauge.matches.rule_of[several].source(several, gauge)

    def arranged(self, node: Node, source: Node, numbers: np.ndarray, collapse: Collapse, gauge: Gauge) -> np.ndarray:
        several = node.args[0]
        return gauge.matches.rule_of[several].carry(several, source, numbers, collapse, gauge)[node.args[1]]

    def matches(self, node: Node, gauge: Gauge) -> bool:
        return isinstance(gauge.matches.scale_of.get(node.args[0]), list)

    def use(self, node: Node, operand: Node, shift: np.ndarray | None, gauge: Gauge) -> Use:
        return Use.PASS

    def carry(self, node: Node, operand: Node, numbers: Any, collapse: Collapse, gauge: Gauge) -> np.ndarray:
        return numbers[node.args[1]]


@rule_for(aten.roll.default)
class Roll(Carry):
    """Entries along some axes in a rotated order."""

    def arrange(self, node: Node, numbers: np.ndarray, shape: torch.Size, collapse: Collapse) -> np.ndarray:
        shifts, dims = node.args[1], argument(node, "dims")
        if not dims:  # rotates the flattened tensor
            return collapse(numbers, varying(numbers))
        moved = [(s, d) for s, d in zip(shifts, dims, strict=True) if numbers.shape[d] != 1]
        numbers = collapse(numbers, tuple(d % numbers.ndim for s, d in moved if not isinstance(s, int)))
        known = [(s, d) for s, d in moved if isinstance(s, int)]
        return np.roll(numbers, [s for s, _ in known], [d for _, d in known])


@rule_for(aten.pixel_shuffle.default)
class PixelShuffle(Carry):
    """r² neighbouring channels become positions of one channel: their scales are equal."""

    def arrange(self, node: Node, numbers: np.ndarray, shape: torch.Size, collapse: Collapse) -> np.ndarray:
        numbers = collapse(numbers, tuple(axis for axis in varying(numbers) if axis >= numbers.ndim - 2))
        if numbers.shape[-3] == 1:
            return numbers
        grouped = numbers.reshape(*numbers.shape[:-3], -1, node.args[1] ** 2, 1, 1)
        return collapse(grouped, (grouped.ndim - 3,)).squeeze(-3)


@rule_for(aten.pixel_unshuffle.default)
class PixelUnshuffle(Carry):
    """The positions of one channel become r² neighbouring channels."""

    def arrange(self, node: Node, numbers: np.ndarray, shape: torch.Size, collapse: Collapse) -> np.ndarray:
        numbers = collapse(numbers, tuple(axis for axis in varying(numbers) if axis >= numbers.ndim - 2))
        return numbers if numbers.shape[-3] == 1 else np.repeat(numbers, node.args[1] ** 2, -3)


@rule_for(aten.constant_pad_nd.default, aten.pad.default)
class Pad(Carry):
    """Padding with zeros keeps scales but no shift (the border has none); copies of border values keep both."""

    def matches(self, node: Node, gauge: Gauge) -> bool:
        return super().matches(node, gauge) and (self._copies(node) or not argument(node, "value"))

    def _copies(self, node: Node) -> bool:
        amounts = argument(node, "pad")
        nothing = all(isinstance(amount, int) and amount <= 0 for amount in amounts)
        return nothing or (node.target is aten.pad.default and argument(node, "mode") != "constant")

    def use(self, node: Node, operand: Node, shift: np.ndarray | None, gauge: Gauge) -> Use:
        return super().use(node, operand, shift, gauge) if self._copies(node) else Use.STOP

    def settle(self, node: Node, gauge: Gauge) -> np.ndarray:
        return super().settle(node, gauge) if self._copies(node) else gauge.no_shift(node)

    def arrange(self, node: Node, numbers: np.ndarray, shape: torch.Size, collapse: Collapse) -> np.ndarray:
        amounts = list(argument(node, "pad"))  # two for each axis, from the last one on
        moved = {numbers.ndim - 1 - at // 2 for at, amount in enumerate(amounts) if not same_size(amount, 0)}
        return collapse(numbers, tuple(axis for axis in varying(numbers) if axis in moved))


def reduce_axes(node: Node, numbers: np.ndarray, collapse: Collapse) -> np.ndarray:
    """Follow a reduction over the node's `dim`, with or without `keepdim`; without `dim` over all axes."""
    dims = argument(node, "dim")
    dims = [dims] if isinstance(dims, int) else dims or list(range(numbers.ndim))
    numbers = collapse(numbers, varying_of(numbers, dims))
    if argument(node, "keepdim"):
        return numbers
    return np.squeeze(numbers, tuple(d % numbers.ndim for d in dims))


def varying_of(numbers: np.ndarray, dims: Iterable[int]) -> tuple[int, ...]:
    """Those of some axes along which the numbers vary."""
    wanted = {dim % numbers.ndim for dim in dims}
    return tuple(axis for axis in varying(numbers) if axis in wanted)
