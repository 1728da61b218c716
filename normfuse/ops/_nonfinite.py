"""Steps that leave no trace: a batch or a gradient that is not finite, when the user asks for that.

Without asking, a number that is not finite never enters a statistic: its channel stays where it was while the
others move. What is here takes the whole step back and counts it, on the device, with operations on vectors of
length C.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Statistics = tuple[Tensor, ...]


def snapshot(counter: Tensor | None, statistics: Statistics) -> Statistics:
    """Copies of ``statistics`` for :func:`rollback_unless`; nothing when ``counter`` is None."""
    return () if counter is None else tuple(tensor.clone() for tensor in statistics)


def rollback_unless(
    sound: Callable[[], Tensor], counter: Tensor | None, statistics: Statistics, before: Statistics
) -> None:
    """Set ``statistics`` back to ``before`` and add one to ``counter`` [1], unless all of ``sound()`` is true.

    Without a counter nothing is computed.
    """
    if counter is None:
        return
    keep = sound().all()
    for tensor, old in zip(statistics, before, strict=True):
        tensor.copy_(torch.where(keep, tensor, old))
    counter.add_(torch.logical_not(keep))
