"""The per-channel affine map that is closest to another norm, in closed form from moments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops._layout import to_rows
from ._running_norm import ChannelNorm
from .batch_norm import MaskedBatchNorm, deviation_of
from .rep_batch_norm import RepBatchNorm

_CONSTANT = 1e-8  # share of the mean variance over channels below which a channel counts as constant
_SLOPE_OF_CONSTANTS = 0.1  # of the median slope: adds its square, 0.01, of a usual channel's variance


def paired_rows(static: ChannelNorm, x: Tensor, y: Tensor, pad_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Valid rows, each [rows, C], of what ``static`` normalises of ``x`` and of another norm's output ``y``."""
    u, v = static.rows_to_measure(x.detach()), to_rows(y.detach(), static.channel_dim)
    if pad_mask is None:
        return u, v
    valid = torch.logical_not(pad_mask).reshape(-1)
    return u[valid], v[valid]


def _fill(parameter: Tensor, value: Tensor) -> None:
    """``parameter.copy_(value)``, also where processes keep a part of it each, as ``fully_shard`` leaves it."""
    if type(parameter).__name__ == "DTensor":
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = parameter
        value = distribute_tensor(value.to(parameter.dtype), sharded.device_mesh, sharded.placements)
    parameter.copy_(value)


@torch.no_grad()
def set_affine(
    static: ChannelNorm,
    mean: Tensor,
    var: Tensor,
    target: Tensor,
    target_var: Tensor,
    covariance: Tensor,
    *,
    fit: bool = True,
    rows: Tensor | None = None,
) -> Tensor:
    """Give a static norm the statistics of its input and, with ``fit``, the affine map that is closest to a target.

    A RepBatchNorm's shortcut becomes 0. Beside a weight that makes up for it, the statistics of a batch would change
    the difference of two large numbers.

    Args:
        static: changed in place.
        mean: of the input u, per channel.
        var: of the input u, per channel.
        target: mean of the target v.
        target_var: variance of the target v.
        covariance: of u and v.
        fit: whether to set gain and shift as well.
        rows: how many rows the statistics are of, see :meth:`ChannelNorm.set_statistics`.

    Returns:
        What the best affine map leaves, a scalar: its squared error over the variance of v, both summed over channels.
    """
    square = var + mean**2
    # A channel that never changes determines no slope: the shift alone then gives its value.
    slope = torch.where(var > 1e-12 * square, covariance / var, 0.0)
    left = (target_var - slope * covariance).clamp(min=0).sum()
    # Not 0 where the target is constant (a gain of 0), for folding has to divide by it somewhere.
    constant = target_var < _CONSTANT * target_var.mean()
    slope = torch.where(constant, _SLOPE_OF_CONSTANTS * slope.abs().median(), slope)
    shift = target - slope * mean
    centred = isinstance(static, MaskedBatchNorm)
    static.set_statistics(mean, var, rows)
    if fit:
        if isinstance(static, RepBatchNorm):
            static.alpha.zero_()
        _fill(static.weight, slope * deviation_of(static, static.running_var if centred else square))
        _fill(static.bias, shift + slope * mean if centred else shift)
    total = target_var.sum()
    return torch.where(total > 0, left / total, 0.0)
