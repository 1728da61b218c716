"""Arrays over channels: one number per channel, broadcastable to the tensor they speak of.

Scale variables, shifts and channel numbers are all held as arrays of the tensor's rank in which an axis has size one
where nothing varies (batch, sequence) and the tensor's size where something does (channels, heads). An operation that
moves elements moves these arrays in the same way; `collapse` is asked wherever variation along an axis cannot be kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

Size: TypeAlias = "int | torch.SymInt"
Collapse = Callable[[np.ndarray, tuple[int, ...]], np.ndarray]


class CannotCarry(Exception):
    """The numbers vary along an axis that the operation does not keep apart."""


def same_size(a: Size, b: Size) -> bool:
    """Whether two sizes are equal for every admissible value of the dynamic dimensions."""
    return statically_known_true(a == b)


def collapse_equal(array: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Drop the variation along `axes` when there is none; otherwise raise :class:`CannotCarry`."""
    first = take_first(array, axes)
    if not np.array_equal(np.broadcast_to(first, array.shape), array):
        raise CannotCarry
    return first


def take_first(array: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """The first entry along each of `axes`, kept as an axis of size one."""
    for axis in axes:
        array = array.take([0], axis)
    return array


def varying(array: np.ndarray) -> tuple[int, ...]:
    """The axes along which the array has more than one entry."""
    return tuple(axis for axis, size in enumerate(array.shape) if size != 1)


def to_rank(array: np.ndarray, rank: int) -> np.ndarray:
    """Prepend axes of size one, as broadcasting does."""
    return array.reshape((1,) * (rank - array.ndim) + array.shape)


def without_leading_ones(array: np.ndarray) -> np.ndarray:
    """Drop leading axes of size one, which say nothing."""
    while array.ndim > 1 and array.shape[0] == 1:
        array = array[0]
    return array


def keep_axis(array: np.ndarray, axis: int, size: int, collapse: Collapse) -> np.ndarray:
    """The entries along one axis as a vector of `size` numbers; other variation is collapsed."""
    axis %= array.ndim
    others = tuple(a for a in varying(array) if a != axis)
    return np.broadcast_to(collapse(array, others).ravel(), (size,))


def along_axis(vector: np.ndarray, axis: int, rank: int) -> np.ndarray:
    """A vector laid along `axis` of an array of the given rank."""
    shape = [1] * rank
    shape[axis] = len(vector)
    return vector.reshape(shape)


def reshape(array: np.ndarray, old: Sequence[Size], new: Sequence[Size], collapse: Collapse) -> np.ndarray:
    """Follow a tensor's reshape from shape `old` to shape `new`.

    Both shapes are cut into the smallest groups of axes with equal products. A group without variation keeps none; a
    group of known sizes is reshaped; variation inside a group with an unknown size is collapsed.
    """
    result: list[int] = []
    for old_axes, new_axes in axis_groups(old, new):
        inside = tuple(axis for axis in old_axes if array.shape[axis] != 1)
        kept_whole = len(old_axes) == len(new_axes) == 1
        if inside and not kept_whole:
            if all(isinstance(old[axis], int) for axis in old_axes):
                full = [old[axis] if axis in old_axes else size for axis, size in enumerate(array.shape)]
                array = np.broadcast_to(array, full)
                result += [int(new[axis]) for axis in new_axes]
                continue
            array = collapse(array, inside)
            inside = ()
        result += [int(new[axis]) if inside else 1 for axis in new_axes]
    return np.ascontiguousarray(array).reshape(result)


def axis_groups(old: Sequence[Size], new: Sequence[Size]) -> list[tuple[range, range]]:
    """Cut two shapes with the same number of elements into small groups of axes with equal products."""
    groups: list[tuple[range, range]] = []
    i = j = 0
    while i < len(old) and j < len(new):
        start_i, start_j = i, j
        product_old, product_new = old[i], new[j]
        i, j = i + 1, j + 1
        while not same_size(product_old, product_new) and (i < len(old) or j < len(new)):
            # Equality is proven for all sizes; which side to extend is only a guess from the example's sizes.
            if j == len(new) or (i < len(old) and example_size(product_old) <= example_size(product_new)):
                product_old = product_old * old[i]
                i += 1
            else:
                product_new = product_new * new[j]
                j += 1
        groups.append((range(start_i, i), range(start_j, j)))
    groups.append((range(i, len(old)), range(j, len(new))))  # what is left has size one
    return groups


def example_size(size: Size) -> int:
    """A size, for a dynamic dimension that of the example."""
    hint = size if isinstance(size, int) else size.node.hint
    return 1 if hint is None else int(hint)


class GroupMeans:
    """The means of groups of a tensor's entries, which are subtracted from it; the tensor comes in pieces.

    Args:
        groups: of the tensor's rank. Along the axes where it has more than one entry it numbers the groups; -1 is no
            group. Along the others, every position has means of its own.
    """

    def __init__(self, groups: np.ndarray) -> None:
        self._axes = varying(groups)
        numbers = torch.from_numpy(groups.ravel().copy())
        self._count = int(numbers.max()) + 2
        self._numbers = torch.where(numbers < 0, self._count - 1, numbers)  # the last group's mean counts as zero
        self._sums: torch.Tensor | None = None
        #: Whether groups go across the first axis, so that `add` has to see every piece before `subtract`.
        self.across_rows = 0 in self._axes

    def add(self, part: torch.Tensor, rows: slice) -> None:
        """Count in the piece of the tensor that holds these rows of its first axis."""
        entries, numbers = self._entries(part, rows)
        if self._sums is None:
            self._sums = entries.new_zeros(self._count, entries.shape[1])
        self._sums.index_add_(0, numbers, entries)

    def subtract(self, part: torch.Tensor, rows: slice) -> None:
        """Subtract the means from a piece, in place."""
        if not self.across_rows:
            self._sums = None
            self.add(part, rows)
        assert self._sums is not None
        sizes = torch.bincount(self._numbers, minlength=self._count).clamp(min=1)
        means = self._sums / sizes[:, None]
        means[-1] = 0.0
        entries, numbers = self._entries(part, rows)
        moved = (entries - means[numbers]).reshape(part.movedim(self._axes, self._front).shape)
        part.copy_(moved.movedim(self._front, self._axes))

    @property
    def _front(self) -> tuple[int, ...]:
        return tuple(range(len(self._axes)))

    def _entries(self, part: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """A piece as [entries that are grouped, positions], and the group of each entry."""
        entries = part.movedim(self._axes, self._front).flatten(0, max(len(self._axes) - 1, 0))
        return entries.reshape(len(entries), -1), self._numbers[rows] if self.across_rows else self._numbers


def subtract_means(tensor: torch.Tensor, groups: np.ndarray) -> torch.Tensor:
    """A tensor less the mean of each group of its entries, see :class:`GroupMeans`."""
    shape = torch.broadcast_shapes(tensor.shape, groups.shape)
    result = tensor.expand(shape).clone()
    means = GroupMeans(groups)
    means.add(result, slice(None))
    means.subtract(result, slice(None))
    return result
