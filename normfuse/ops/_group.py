"""Statistics over all processes of a group, so that k ranks with rows of their own act like one with all rows.

One collective of C + 1 numbers per direction: a column sum and the number of rows it stands for. Ranks without
a row take part with zeros.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as collectives

from ._layout import mean_or, sum_squares


def sum_in_group(group: dist.ProcessGroup, total: Tensor, count: Tensor | int) -> tuple[Tensor, Tensor]:
    """Sums over ``group`` of a [C] vector and of the number of rows in it.

    The collective runs in the background until somebody reads the result.
    """
    rows = count.to(total.dtype) if isinstance(count, Tensor) else total.new_full((), count)
    summed = collectives.all_reduce(torch.cat([total, rows[None]]), "sum", group)
    return summed[:-1], summed[-1]


def mean_square_in_group(group: dist.ProcessGroup, x: Tensor, pad_mask: Tensor | None, empty: Tensor) -> Tensor:
    """Mean of x² over the valid rows of all ranks' [R, C] matrices; ``empty`` where no row is valid."""
    return mean_or(*sum_in_group(group, *sum_squares(x, pad_mask)), empty)
