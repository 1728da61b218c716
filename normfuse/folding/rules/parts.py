"""Operations that pick, repeat or reorder elements by position: windows, indices, channel shuffles."""

from __future__ import annotations

import numpy as np
import torch
from torch.fx import Node

from ..arrays import Collapse, varying
from ..gauge import Facts, Gauge
from .base import Use, is_float, rule_for
from .carry import Carry, varying_of

aten = torch.ops.aten


@rule_for(aten.flip.default)
class Flip(Carry):
    """Entries along some axes in reverse order."""

    def arrange(self, numbers: np.ndarray, shape: torch.Size, collapse: Collapse) -> np.ndarray:
        return np.flip(numbers, tuple(dim % numbers.ndim for dim in self.args[1]))


@rule_for(aten.narrow.default)
class Narrow(Carry):
    """A range along one axis, given by its start and length."""

    def arrange(self, numbers: np.ndarray, shape: torch.Size, collapse: Collapse) -> np.ndarray:
        _, axis, start, length = self.args
        axis %= numbers.ndim
        if numbers.shape[axis] == 1:
            return numbers
        if not (isinstance(start, int) and isinstance(length, int)):
            return collapse(numbers, (axis,))
        start %= numbers.shape[axis] + (start >= 0)
        return numbers.take(range(start, start + length), axis)


@rule_for(aten.repeat_interleave.self_int)
class RepeatEach(Carry):
    """Each entry along one axis several times, or each of the flattened tensor."""

    def arrange(self, numbers: np.ndarray, shape: torch.Size, collapse: Collapse) -> np.ndarray:
        repeats, axis = self.argument("repeats"), self.argument("dim")
        if axis is None:
            return collapse(numbers, varying(numbers)).reshape(1)
        axis %= numbers.ndim
        if numbers.shape[axis] != 1 and not isinstance(repeats, int):
            numbers = collapse(numbers, (axis,))
        return numbers if numbers.shape[axis] == 1 else np.repeat(numbers, repeats, axis)


@rule_for(aten.repeat_interleave.self_Tensor)
class RepeatByCounts(Carry):
    """Each entry along one axis as often as a tensor says; where scales vary along it, the tensor is constant."""

    def carry(self, operand: Node, numbers: np.ndarray, collapse: Collapse, gauge: Gauge) -> np.ndarray:
        repeats, axis = self.argument("repeats"), self.argument("dim")
        if axis is None:
            return collapse(numbers, varying(numbers)).reshape(1)
        axis %= numbers.ndim
        if not gauge.program.is_constant(repeats):
            numbers = collapse(numbers, varying_of(numbers, (axis,)))
        if numbers.shape[axis] == 1:
            return numbers
        return np.repeat(numbers, gauge.program.constant(repeats).numpy(), axis)


@rule_for(aten.diff.default)
class Difference(Carry):
    """Each entry along an axis less the one before: a scale passes, and of a shift nothing is left."""

    def fits(self, facts: Facts) -> bool:
        ends = self.argument("prepend"), self.argument("append")
        return ends == (None, None) and is_float(self.node) and super().fits(facts)

    def use(self, operand: Node, shift: np.ndarray | None, gauge: Gauge) -> Use:
        axis = self.argument("dim") % self.value.dim()
        if self.argument("n") > 0:
            return Use.ABSORB if shift is None or shift.shape[axis] == 1 else Use.STOP
        return super().use(operand, shift, gauge)

    def settle(self, gauge: Gauge) -> np.ndarray:
        return gauge.no_shift(self.node) if self.argument("n") > 0 else super().settle(gauge)

    def arrange(self, numbers: np.ndarray, shape: torch.Size, collapse: Collapse) -> np.ndarray:
        return collapse(numbers, varying_of(numbers, (self.argument("dim"),)))


@rule_for(aten.channel_shuffle.default)
class ChannelShuffle(Carry):
    """Channels of g groups in turns."""

    def arrange(self, numbers: np.ndarray, shape: torch.Size, collapse: Collapse) -> np.ndarray:
        if numbers.shape[1] == 1:
            return numbers
        grouped = numbers.reshape(numbers.shape[0], self.args[1], -1, *numbers.shape[2:])
        return np.ascontiguousarray(grouped.swapaxes(1, 2)).reshape(numbers.shape)


@rule_for(aten.unfold.default)
class Windows(Carry):
    """Overlapping ranges along one axis, each of which becomes the last axis."""

    def arrange(self, numbers: np.ndarray, shape: torch.Size, collapse: Collapse) -> np.ndarray:
        _, axis, size, step = self.args
        axis %= numbers.ndim
        if numbers.shape[axis] != 1 and not all(isinstance(number, int) for number in (size, step)):
            numbers = collapse(numbers, (axis,))
        if numbers.shape[axis] == 1:
            return numbers[..., None]
        windows = np.lib.stride_tricks.sliding_window_view(numbers, size, axis)
        return windows[(slice(None),) * axis + (slice(None, None, step),)]


@rule_for(aten.im2col.default)
class Patches(Carry):
    """Windows of an image: the entries of a window become neighbouring channels. Padding has no shift."""

    def use(self, operand: Node, shift: np.ndarray | None, gauge: Gauge) -> Use:
        return Use.STOP if any(self.argument("padding")) else super().use(operand, shift, gauge)

    def settle(self, gauge: Gauge) -> np.ndarray:
        return gauge.no_shift(self.node) if any(self.argument("padding")) else super().settle(gauge)

    def arrange(self, numbers: np.ndarray, shape: torch.Size, collapse: Collapse) -> np.ndarray:
        numbers = collapse(numbers, varying_of(numbers, (-1, -2))).squeeze(-1)
        return numbers if numbers.shape[-2] == 1 else np.repeat(numbers, int(np.prod(self.argument("kernel_size"))), -2)


@rule_for(aten.col2im.default)
class Overlaps(Carry):
    """Windows added up where they overlap, which takes equal scales within a window and no shift."""

    def use(self, operand: Node, shift: np.ndarray | None, gauge: Gauge) -> Use:
        return Use.STOP

    def settle(self, gauge: Gauge) -> np.ndarray:
        return gauge.no_shift(self.node)

    def arrange(self, numbers: np.ndarray, shape: torch.Size, collapse: Collapse) -> np.ndarray:
        numbers = collapse(numbers, varying_of(numbers, (-1,)))
        if numbers.shape[-2] != 1:
            window = int(np.prod(self.argument("kernel_size")))
            numbers = numbers.reshape(*numbers.shape[:-2], -1, window, 1)
            numbers = collapse(numbers, varying_of(numbers, (-2,))).squeeze(-2)
        return numbers[..., None]


@rule_for(aten.diagonal.default)
class Diagonal(Carry):
    """The entries at which two axes have the same position, as the last axis."""

    def arrange(self, numbers: np.ndarray, shape: torch.Size, collapse: Collapse) -> np.ndarray:
        offset, *axes = (self.argument(name) for name in ("offset", "dim1", "dim2"))
        axes = [axis % numbers.ndim for axis in axes]
        if not all(isinstance(shape[axis], int) for axis in axes):
            numbers = collapse(numbers, varying_of(numbers, axes))
        if all(numbers.shape[axis] == 1 for axis in axes):
            return np.diagonal(numbers, 0, *axes)
        full = [shape[axis] if axis in axes else size for axis, size in enumerate(numbers.shape)]
        return np.diagonal(np.broadcast_to(numbers, full), offset, *axes)


class Chosen(Carry):
    """Entries along some axes, chosen by tensors of indices. Where the scales differ, the choice must be constant."""

    def carry(self, operand: Node, numbers: np.ndarray, collapse: Collapse, gauge: Gauge) -> np.ndarray:
        chosen = self.indices(numbers.ndim)
        axes = self.indexed(chosen)
        constant = all(index is None or gauge.program.is_constant(index) for index in chosen)
        if not constant or any(not isinstance(operand.meta["val"].shape[axis], int) for axis in axes):
            numbers = collapse(numbers, varying_of(numbers, axes))
        if not varying_of(numbers, axes):
            return numbers[tuple(self._nothing(index) for index in self._without_masks(chosen))]
        shape = operand.meta["val"].shape
        full = [int(shape[axis]) if axis in axes else size for axis, size in enumerate(numbers.shape)]
        index = tuple(slice(None) if i is None else gauge.program.constant(i).numpy() for i in chosen)
        return np.broadcast_to(numbers, full)[index]

    def indices(self, rank: int) -> list[Node | None]:
        """What each axis in turn is indexed by; a mask stands for as many axes as it has."""
        raise NotImplementedError

    def indexed(self, chosen: list[Node | None]) -> tuple[int, ...]:
        """The axes that are indexed."""
        return tuple(axis for axis, index in enumerate(self._without_masks(chosen)) if index is not None)

    def _without_masks(self, chosen: list[Node | None]) -> list[Node | None]:
        spread: list[Node | None] = []
        for index in chosen:
            masks = index is not None and index.meta["val"].dtype in (torch.bool, torch.uint8)
            spread += [index] * (index.meta["val"].dim() if index is not None and masks else 1)
        return spread

    def _nothing(self, index: Node | None) -> slice | np.ndarray:
        """An index of an axis of size one that gives as many axes as the tensor does."""
        if index is None:
            return slice(None)
        mask = index.meta["val"].dtype in (torch.bool, torch.uint8)
        return np.zeros((1,) if mask else (1,) * index.meta["val"].dim(), np.int64)


@rule_for(aten.index.Tensor)
class Index(Chosen):
    """``x[:, i, j]`` with tensors of indices."""

    def fits(self, facts: Facts) -> bool:
        return super().fits(facts) and any(index is not None for index in self.args[1])

    def indices(self, rank: int) -> list[Node | None]:
        return list(self.args[1])


@rule_for(aten.index_select.default)
class IndexSelect(Chosen):
    """Chosen entries along one axis."""

    def fits(self, facts: Facts) -> bool:
        one = self.args[2].meta["val"].dim() == 1 and is_float(self.args[0]) and self.args[0].meta["val"].dim() > 0
        return one and super().fits(facts)

    def indices(self, rank: int) -> list[Node | None]:
        return [None] * (self.args[1] % rank) + [self.args[2]]


@rule_for(aten.gather.default, aten.take_along_dim.default)
class Gather(Carry):
    """One entry along an axis, chosen at each position: the scales along it are equal."""

    def fits(self, facts: Facts) -> bool:
        same_rank = is_float(self.args[0]) and 0 < self.args[0].meta["val"].dim() == self.value.dim()
        return same_rank and self.argument("dim") is not None

    def arrange(self, numbers: np.ndarray, shape: torch.Size, collapse: Collapse) -> np.ndarray:
        axis, result = self.argument("dim") % numbers.ndim, self.value.shape
        cut = [a for a in varying(numbers) if a != axis and not isinstance(result[a], int)]
        numbers = collapse(numbers, (*varying_of(numbers, (axis,)), *cut))
        return numbers[tuple(slice(None) if size == 1 else slice(result[a]) for a, size in enumerate(numbers.shape))]
