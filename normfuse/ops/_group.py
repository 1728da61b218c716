"""Statistics over all processes of a group, so that k ranks with rows of their own act like one with all rows.

One collective per direction. Quadratic means take C + 1 numbers: a column sum and the number of rows it stands for.
Means and variances take 2C + 1 of each rank forward, 2C backward. Ranks without a row take part with zeros.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as collectives

from ._layout import masked, mean_or, sum_squares

# Its name since PyTorch 2.13, which warns of the old one.
_all_gather = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor


def sum_in_group(group: dist.ProcessGroup, total: Tensor, count: Tensor | int) -> tuple[Tensor, Tensor]:
    """Sums over ``group`` of a [C] vector and of the number of rows in it.

    The collective runs in the background until somebody reads the result.
    """
    rows = count.to(total.dtype) if isinstance(count, Tensor) else total.new_full((), count)
    summed = collectives.all_reduce(torch.cat([total, rows[None]]), "sum", group)
    return summed[:-1], summed[-1]


def mean_square_in_group(
    group: dist.ProcessGroup, x: Tensor, pad_mask: Tensor | None, empty: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`mean_square` over the rows of all ranks' matrices."""
    total, count = sum_in_group(group, *sum_squares(x, pad_mask))
    return mean_or(total, count, empty), count


class _MomentsInGroup(torch.autograd.Function):
    """``x`` [R, C] of this rank, ``pad_mask`` [R] or None → mean [C], biased variance [C], rows [1] of all ranks."""

    @staticmethod
    def forward(ctx: Any, group: Any, x: Any, pad_mask: Any) -> Any:
        values, count = masked(x, pad_mask, -1)
        rows = count.to(x.dtype) if isinstance(count, Tensor) else x.new_full((), count)
        mean = values.sum(0) / rows.clamp(min=1)
        var = masked(x - mean, pad_mask, -1)[0].square().sum(0) / rows.clamp(min=1)
        # Around each rank's own mean first: sums of squares of all ranks would cancel where means are large.
        ranks = _all_gather(torch.cat([mean, var, rows[None]])[None], 0, group)
        means, variances, counts = ranks.split([x.shape[1], x.shape[1], 1], 1)
        total = counts.sum(0)
        shares = counts / total.clamp(min=1)
        mean = (shares * means).sum(0)
        var = (shares * (variances + (means - mean).square())).sum(0)
        ctx.save_for_backward(x, pad_mask, mean, total)
        ctx.group = group
        ctx.mark_non_differentiable(total)
        return mean, var, total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_mean: Any, grad_var: Any, _: Any) -> Any:
        x, pad_mask, mean, total = ctx.saved_tensors
        grad_mean, grad_var = collectives.all_reduce(torch.cat([grad_mean, grad_var]), "sum", ctx.group).chunk(2)
        slope = 2 * grad_var / total.clamp(min=1)
        grad_x = torch.addcmul(grad_mean / total.clamp(min=1), x - mean, slope)
        return None, masked(grad_x, pad_mask, -1)[0], None


def moments_in_group(group: dist.ProcessGroup, x: Tensor, pad_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [C], biased variance [C] and number [1] of the valid rows of all ranks' [R, C] matrices; 0 without a row.

    Mean and variance carry gradients: each rank gets that of the sum of all ranks' losses.
    """
    return _MomentsInGroup.apply(group, x, pad_mask)
