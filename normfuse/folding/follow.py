"""Numbers that the channels of one value hold, followed along the operations that read them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from torch.fx import Node

from .arrays import collapse_equal
from .gauge import Gauge
from .rules import Match


class Followed(NamedTuple):
    """What a value holds of numbers w, one for each channel of an earlier value: ``factor * w[channels] + shift``.

    Arrays of one shape, about the value's channels; lists of them where it is several values.
    """

    channels: Any
    factor: Any
    shift: Any

    @classmethod
    def along(cls, shape: tuple[int, ...]) -> Followed:
        """Where the numbers, as an array of this shape, are themselves."""
        return cls(np.arange(int(np.prod(shape))).reshape(shape), np.ones(shape), np.zeros(shape))

    def behind(self, rule: Match, operand: Node, gauge: Gauge) -> Followed:
        """The same of the result of an operation that reads the value. Raises :class:`CannotCarry`."""
        channels, factor, shift = (rule.carry(operand, numbers, collapse_equal, gauge) for numbers in self)
        if isinstance(factor, list):
            return Followed(channels, factor, shift)
        times, plus = rule.factor(operand, gauge), 0.0 if rule.coefficients is None else rule.coefficients.b
        return Followed(*np.broadcast_arrays(channels, factor * times, shift * times + plus))

    def become_zero(self, numbers: np.ndarray, where: np.ndarray | bool = True) -> bool:
        """Choose those of the numbers that make zeros of what the value holds there; False where none do."""
        free = where & (self.factor != 0)
        needed = -self.shift[free] / self.factor[free]
        numbers[self.channels[free]] = needed
        return not self.shift[where & ~free].any() and np.array_equal(numbers[self.channels[free]], needed)
