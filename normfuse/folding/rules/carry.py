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
from ..gauge import Facts, Gauge
from ..nodes import tensors_of
from ..operations import EXPANSIONS, PERMUTATIONS, RESHAPES, SPLITS, SQUEEZES
from ..relations import Relations
from ..weight_edits import WeightEdits
from .base import Match, MeanRole, Use, argument, is_float, match, rule_for

aten = torch.ops.aten


class Carry(Match):
    """One operand's channels, rearranged by :meth:`arrange`."""

    mean = MeanRole.MOVES
    moves = True

    def operand(self) -> Node:
        return self.args[0]

    def fits(self, facts: Facts) -> bool:
        return is_float(self.operand())

    def relate(self, relations: Relations) -> Any:
        operand = self.operand()
        return self.carry(operand, relations.scale(operand), relations.require_equal, relations.gauge)

    def use(self, operand: Node, shift: np.ndarray | None, gauge: Gauge) -> Use:
        if operand is not self.operand():
            return Use.ABSORB  # only its shape is read
        return Use.PASS if gauge.can_carry(self.node, operand, shift) else Use.STOP

    def source(self, gauge: Gauge) -> Node:
        """The value whose elements the result has."""
        return self.operand()

    def arranged(self, source: Node, numbers: np.ndarray, collapse: Collapse, gauge: Gauge) -> np.ndarray:
        """Numbers about the source's channels, arranged as the result's."""
        return self.carry(source, numbers, collapse, gauge)

    def carry(self, operand: Node, numbers: np.ndarray, collapse: Collapse, gauge: Gauge) -> Any:
        if not numbers.ndim:  # of a single number, whose axis 0 may be named all the same
            return numbers.reshape((1,) * tensors_of(self.node)[0].dim())
        return self.arrange(numbers, operand.meta["val"].shape, collapse)

    def arrange(self, numbers: np.ndarray, shape: torch.Size, collapse: Collapse) -> Any:
        raise NotImplementedError

    def settle(self, gauge: Gauge) -> Any:
        operand = self.operand()
        return gauge.carried(self.node, operand)


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
    :data:`normfuse.folding.opposites.GROWTH` asks costs no digits: both pass.
    """

    def keeps_channels(self) -> bool:
        return True

    def fits(self, facts: Facts) -> bool:
        dropping = self.argument("train", False)  # of the kinds of dropout only
        return not dropping and is_float(self.node) and super().fits(facts)

    def arrange(self, numbers: np.ndarray, shape: torch.Size, collapse: Collapse) -> np.ndarray:
        return numbers

    def rewrite(self, edits: WeightEdits) -> None:
        # A copy can be what makes a later view possible; nothing else here changes a value of the same dtype.
        copies = self.target in (aten.contiguous.default, aten.clone.default)
        before, after = self.operand().meta["val"], self.value
        if not copies and (before.dtype, before.device) == (after.dtype, after.device):
            edits.replace(self.node, self.operand())


@rule_for(*RESHAPES, *SQUEEZES)
class Reshape(Carry):
    """Elements in the same order under another shape; see :func:`normfuse.folding.arrays.reshape`."""

    def arrange(self, numbers: np.ndarray, shape: torch.Size, collapse: Collapse) -> np.ndarray:
        return reshape(numbers, shape, self.value.shape, collapse)


@rule_for(*PERMUTATIONS)
class Permute(Carry):
    """The same axes in another order."""

    def arrange(self, numbers: np.ndarray, shape: torch.Size, collapse: Collapse) -> np.ndarray:
        if self.target is aten.permute.default:
            return numbers.transpose(self.args[1])
        if self.target is aten.transpose.int:
            return numbers.swapaxes(*self.args[1:3])
        if self.target in (aten.mT.default, aten.mH.default, aten.adjoint.default):
            return numbers.swapaxes(-1, -2)
        if self.target in (aten.movedim.int, aten.movedim.intlist):
            return np.moveaxis(numbers, *self.args[1:3])
        return numbers.T


@rule_for(*EXPANSIONS)
class Expand(Carry):
    """Repetition along axes of size one, where nothing varies."""

    def arrange(self, numbers: np.ndarray, shape: torch.Size, collapse: Collapse) -> np.ndarray:
        return to_rank(numbers, self.value.dim())


@rule_for(aten.repeat.default)
class Repeat(Carry):
    """Whole copies one after another: the numbers repeat where they vary, by a known count."""

    def arrange(self, numbers: np.ndarray, shape: torch.Size, collapse: Collapse) -> np.ndarray:
        repeats = self.args[1]
        numbers = to_rank(numbers, len(repeats))
        unknown = tuple(axis for axis in varying(numbers) if not isinstance(repeats[axis], int))
        numbers = collapse(numbers, unknown)
        return np.tile(numbers, [repeats[a] if numbers.shape[a] != 1 else 1 for a in range(numbers.ndim)])


@rule_for(aten.slice.Tensor)
class Slice(Carry):
    """A range along one axis; where scales vary along it, the range must be known."""

    reads_part = True

    def arrange(self, numbers: np.ndarray, shape: torch.Size, collapse: Collapse) -> np.ndarray:
        axis = self.argument("dim") % numbers.ndim
        start, end, step = (self.argument(name) for name in ("start", "end", "step"))
        if numbers.shape[axis] == 1:
            return numbers
        if not all(bound is None or isinstance(bound, int) for bound in (start, end, step)):
            return collapse(numbers, (axis,))
        return numbers[(slice(None),) * axis + (slice(start, end, step),)]


@rule_for(aten.select.int)
class Select(Carry):
    """One entry along an axis, which goes."""

    reads_part = True

    def arrange(self, numbers: np.ndarray, shape: torch.Size, collapse: Collapse) -> np.ndarray:
        axis, position = self.args[1] % numbers.ndim, self.args[2]
        if numbers.shape[axis] != 1 and not isinstance(position, int):
            numbers = collapse(numbers, (axis,))
        return numbers.take(0 if numbers.shape[axis] == 1 else position, axis)


@rule_for(*SPLITS)
class Split(Carry):
    """Consecutive pieces along one axis; `unbind` also drops the axis."""

    reads_part = True

    def arrange(self, numbers: np.ndarray, shape: torch.Size, collapse: Collapse) -> list[np.ndarray]:
        axis = self.argument("dim") % numbers.ndim
        pieces = self.value
        if self.target is aten.unbind.int:
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

    def source(self, gauge: Gauge) -> Node:
        several = self.args[0]
        return gauge.matches.of[several].source(gauge)

    def arranged(self, source: Node, numbers: np.ndarray, collapse: Collapse, gauge: Gauge) -> np.ndarray:
        several = self.args[0]
        return gauge.matches.of[several].carry(source, numbers, collapse, gauge)[self.args[1]]

    def fits(self, facts: Facts) -> bool:
        several = self.args[0]
        found = match(several, facts) if isinstance(several.meta.get("val"), list | tuple) else None
        return found is not None and found.moves

    def use(self, operand: Node, shift: np.ndarray | None, gauge: Gauge) -> Use:
        return Use.PASS

    def carry(self, operand: Node, numbers: Any, collapse: Collapse, gauge: Gauge) -> np.ndarray:
        return numbers[self.args[1]]


@rule_for(aten.roll.default)
class Roll(Carry):
    """Entries along some axes in a rotated order."""

    def arrange(self, numbers: np.ndarray, shape: torch.Size, collapse: Collapse) -> np.ndarray:
        shifts, dims = self.args[1], self.argument("dims")
        if not dims:  # rotates the flattened tensor
            return collapse(numbers, varying(numbers))
        moved = [(s, d) for s, d in zip(shifts, dims, strict=True) if numbers.shape[d] != 1]
        numbers = collapse(numbers, tuple(d % numbers.ndim for s, d in moved if not isinstance(s, int)))
        known = [(s, d) for s, d in moved if isinstance(s, int)]
        return np.roll(numbers, [s for s, _ in known], [d for _, d in known])


@rule_for(aten.pixel_shuffle.default)
class PixelShuffle(Carry):
    """r² neighbouring channels become positions of one channel: their scales are equal."""

    def arrange(self, numbers: np.ndarray, shape: torch.Size, collapse: Collapse) -> np.ndarray:
        numbers = collapse(numbers, tuple(axis for axis in varying(numbers) if axis >= numbers.ndim - 2))
        if numbers.shape[-3] == 1:
            return numbers
        grouped = numbers.reshape(*numbers.shape[:-3], -1, self.args[1] ** 2, 1, 1)
        return collapse(grouped, (grouped.ndim - 3,)).squeeze(-3)


@rule_for(aten.pixel_unshuffle.default)
class PixelUnshuffle(Carry):
    """The positions of one channel become r² neighbouring channels."""

    def arrange(self, numbers: np.ndarray, shape: torch.Size, collapse: Collapse) -> np.ndarray:
        numbers = collapse(numbers, tuple(axis for axis in varying(numbers) if axis >= numbers.ndim - 2))
        return numbers if numbers.shape[-3] == 1 else np.repeat(numbers, self.args[1] ** 2, -3)


@rule_for(aten.constant_pad_nd.default, aten.pad.default)
class Pad(Carry):
    """Padding with zeros keeps scales but no shift (the border has none); copies of border values keep both."""

    def fits(self, facts: Facts) -> bool:
        return super().fits(facts) and (self._copies() or not self.argument("value"))

    def _copies(self) -> bool:
        amounts = self.argument("pad")
        nothing = all(isinstance(amount, int) and amount <= 0 for amount in amounts)
        return nothing or (self.target is aten.pad.default and self.argument("mode") != "constant")

    def use(self, operand: Node, shift: np.ndarray | None, gauge: Gauge) -> Use:
        return super().use(operand, shift, gauge) if self._copies() else Use.STOP

    def settle(self, gauge: Gauge) -> np.ndarray:
        return super().settle(gauge) if self._copies() else gauge.no_shift(self.node)

    def arrange(self, numbers: np.ndarray, shape: torch.Size, collapse: Collapse) -> np.ndarray:
        amounts = list(self.argument("pad"))  # two for each axis, from the last one on
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
