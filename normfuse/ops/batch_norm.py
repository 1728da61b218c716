"""Batch Normalization (Ioffe & Szegedy, 2015, arXiv 1502.03167) over valid rows, whole or in ghost batches.

Where every row is valid and there is one batch, PyTorch's own kernels do it. Masks and ghost batches go through one
function on [K, R, C] (K ghost batches of R rows), whose gradient is exact, also through the returned statistics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ._group import moments_in_group
from ._layout import accumulation_dtype, cast, check_input, from_rows, gain_and_shift, per_channel, to_rows
from ._recompute import register_forward, statistics_of_this_run
from ._registry import library, register_operation


class BatchNormState(NamedTuple):
    """Statistics of one batch normalisation, updated in place by training steps, on the input's device.

    Attributes:
        running_mean, running_var: [C], float32 (float64 for float64 input).
        num_batches_tracked: int64, a scalar: training steps (ghost batches count one each).
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor


class BatchStatistics(NamedTuple):
    """Statistics of the K ghost batches of one step.

    Attributes:
        mean, var: [K, C]; the variance is the mean squared deviation (biased). Both carry gradients.
        count: valid rows of each ghost batch, an int or [K, 1].
    """

    mean: Tensor
    var: Tensor
    count: Tensor | int


def affine_by_statistics(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float, channel_dim: int
) -> Tensor:
    """``weight * (x - mean) / sqrt(var + eps) + bias`` with [C] vectors, as one multiplication and one addition."""
    scale = weight * torch.rsqrt(var + eps)
    shift = bias - mean * scale
    y = torch.addcmul(per_channel(shift, x, channel_dim), cast(x, scale.dtype), per_channel(scale, x, channel_dim))
    return cast(y, x.dtype)


class _NormaliseByBatch(torch.autograd.Function):
    """``x`` [K, R, C], ``keep`` bool [K, R, 1] or None → y, mean [K, C], var [K, C]."""

    @staticmethod
    def forward(ctx, x, keep, weight, bias, eps):
        values = x.to(accumulation_dtype(x.dtype))
        if keep is None:
            count = max(x.shape[1], 1)
            mean = values.sum(1, keepdim=True) / count
            var = (values - mean).square_().sum(1, keepdim=True) / count
        else:
            count = keep.sum(1, keepdim=True).clamp(min=1)
            # Selecting instead of multiplying keeps a NaN in a padded row out of the sum.
            mean = torch.where(keep, values, 0.0).sum(1, keepdim=True) / count
            var = torch.where(keep, values - mean, 0.0).square_().sum(1, keepdim=True) / count
        inv_std = (var + eps).rsqrt()
        scale = weight * inv_std
        y = torch.addcmul(bias - mean * scale, values, scale).to(x.dtype)
        ctx.save_for_backward(x, keep, weight, mean, inv_std)
        return y, mean.squeeze(1), var.squeeze(1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y, grad_mean, grad_var):
        x, keep, weight, mean, inv_std = ctx.saved_tensors
        grad = grad_y.to(mean.dtype)
        deviation = x.to(mean.dtype) - mean
        grad_sum = grad.sum(1, keepdim=True)
        along = (grad * deviation).sum(1, keepdim=True) * inv_std
        count = max(x.shape[1], 1) if keep is None else keep.sum(1, keepdim=True).clamp(min=1)
        scale = weight * inv_std
        # The statistics depend on every valid row alike: a constant and a multiple of the row's deviation.
        slope = (2 * grad_var[:, None] - scale * inv_std * along) / count
        through = torch.addcmul((grad_mean[:, None] - scale * grad_sum) / count, deviation, slope)
        if keep is not None:
            through = torch.where(keep, through, 0.0)
        grad_x = torch.addcmul(through, grad, scale).to(x.dtype)
        return grad_x, None, along.sum((0, 1)), grad_sum.sum((0, 1)), None


class _Statistics(torch.autograd.Function):
    """Mean and variance [C] of ``x`` [R, C], which a kernel has found already, with their gradients."""

    @staticmethod
    def forward(ctx, x, mean, var):
        ctx.save_for_backward(x, mean)
        return mean.clone(), var.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_mean, grad_var):
        x, mean = ctx.saved_tensors
        slope = 2 * grad_var / x.shape[0]
        constant = grad_mean / x.shape[0] - mean * slope
        return torch.addcmul(constant, x.to(mean.dtype), slope).to(x.dtype), None, None


def normalise_by_batch(
    x: Tensor, pad_mask: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, BatchStatistics]:
    """Normalise each of K ghost batches by its own valid rows: ``x`` [K, R, C], ``pad_mask`` [K, R].

    Padded rows are normalised like the others. Where no row is valid, mean and variance are 0.
    """
    keep = None if pad_mask is None else torch.logical_not(pad_mask)[..., None]
    y, mean, var = _NormaliseByBatch.apply(x, keep, weight, bias, eps)
    return y, BatchStatistics(mean, var, x.shape[1] if keep is None else keep.sum(1))


def move_batch_statistics(
    mean: Tensor, var: Tensor, count: Tensor, running_mean: Tensor, running_var: Tensor,
    num_batches_tracked: Tensor, momentum: float | None,
) -> None:  # fmt: skip
    """K sequential updates of the running statistics, in place, by [K, C] statistics over [K, 1] valid rows.

    The variance enters unbiased, as in PyTorch. Ghost batches without a valid row, and channels whose statistic is
    not finite, move nothing. ``momentum=None`` averages over all steps so far.
    """
    if momentum is None:
        steps = torch.arange(1, mean.shape[0] + 1, device=mean.device)
        rate = 1.0 / (num_batches_tracked + steps).to(mean.dtype)[:, None]
    else:
        rate = mean.new_full((), momentum)
    unbiased = var * count.to(var.dtype) / (count - 1).clamp(min=1)
    usable = (count > 0) & mean.isfinite() & var.isfinite()
    rate = torch.where(usable, rate, 0.0)
    kept = (1 - rate).flip(0).cumprod(0).flip(0)  # what later steps leave of what was there before step k
    share = rate * torch.cat([kept[1:], torch.ones_like(kept[:1])])
    for running, new in ((running_mean, mean), (running_var, unbiased)):
        running.copy_(kept[0] * running + (share * torch.where(usable, new, 0.0)).sum(0))
    num_batches_tracked.add_(mean.shape[0])


_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_move_once = register_forward(
    library,
    register_operation("batch_norm_statistics", move_batch_statistics, _STATISTICS, in_library=False),
    _STATISTICS,
)


@torch.library.register_fake("normfuse::batch_norm_statistics")
@torch.library.register_fake("normfuse::batch_norm_statistics_once")
def _(*arguments):
    return None


def batch_statistics_step(statistics: BatchStatistics, state: BatchNormState, momentum: float | None) -> BatchNormState:
    """Update ``state`` in place, once per step also under activation checkpointing; returns the state after it."""
    mean, var = statistics.mean.detach(), statistics.var.detach()
    count = torch.as_tensor(statistics.count, device=mean.device).expand(mean.shape[0], 1)
    if torch.compiler.is_compiling():
        _move_once(mean, var, count, *state, momentum)
        return state
    own = BatchNormState(*statistics_of_this_run(tuple(state)))
    move_batch_statistics(mean, var, count, *own, momentum)
    return own


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    state: BatchNormState,
    *,
    training: bool,
    pad_mask: Tensor | None = None,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    channel_dim: int = -1,
    ghost_sizes: list[int] | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Batch normalisation of ``x`` over all dimensions but ``channel_dim``.

    Args:
        x: any shape with C channels along ``channel_dim``; float32, bfloat16, float16 or float64.
        weight, bias: [C]; None stands for 1 and 0.
        state: statistics, updated in place in training. An empty batch moves nothing; a single row moves the
            variance towards 0.
        training: whether to normalise by the statistics of this batch; otherwise by the running ones, in plain ATen
            operations.
        pad_mask: bool, the shape of ``x`` without its channel dimension; True marks padding, which is normalised like
            the rest but left out of the statistics. Ignored in evaluation.
        momentum: share of the *new* value in each update of the running statistics, as in PyTorch; None: an average
            over all steps.
        eps: added to the variance, inside the square root.
        channel_dim: dimension of the channels.
        ghost_sizes: sizes, along the first dimension, of the parts that are normalised on their own.
        process_group: take the statistics of a training step over the rows of all ranks of this group; every rank must
            then call, also one without rows. ``ghost_sizes`` count for nothing then. None: over this process alone.

    Returns:
        A tensor of the shape and dtype of ``x``. Its gradient is exact.

    Raises:
        TypeError, ValueError: a dtype, shape, ``channel_dim`` or device does not match.
    """
    check_input(x, state.running_mean.shape[0], channel_dim, pad_mask, state.running_mean)
    weight, bias = gain_and_shift(weight, bias, state.running_mean)
    if not training:
        return affine_by_statistics(x, weight, bias, state.running_mean, state.running_var, eps, channel_dim)
    sizes = [x.shape[0]] if ghost_sizes is None else ghost_sizes
    rows = x.numel() // max(x.shape[0] * x.shape[channel_dim], 1)  # of a sample
    plain = process_group is None and pad_mask is None and momentum is not None and min(sizes) * rows > 1
    if plain and not torch.compiler.is_compiling():
        running_mean, running_var, steps = statistics_of_this_run(tuple(state))
        steps.add_(len(sizes))
        second = channel_dim % x.dim() == 1  # where PyTorch wants the channels
        found = []
        for part in (x,) if len(sizes) == 1 else x.split(sizes):
            values = part if second else to_rows(part, channel_dim)
            moved = running_mean.clone(), running_var.clone()
            y = torch.nn.functional.batch_norm(values, *moved, weight, bias, True, momentum, eps)
            usable = moved[0].isfinite() & moved[1].isfinite()
            for running, new in zip((running_mean, running_var), moved, strict=True):
                running.copy_(torch.where(usable, new, running))
            found.append(y if second else from_rows(y, part, channel_dim))
        return found[0] if len(found) == 1 else torch.cat(found)
    y, statistics = batch_norm_with_statistics(x, weight, bias, pad_mask, eps, channel_dim, ghost_sizes, process_group)
    batch_statistics_step(statistics, state, momentum)
    return y


def batch_norm_with_statistics(
    x: Tensor, weight: Tensor, bias: Tensor, pad_mask: Tensor | None, eps: float, channel_dim: int,
    ghost_sizes: list[int] | None = None, process_group: ProcessGroup | None = None,
) -> tuple[Tensor, BatchStatistics]:  # fmt: skip
    """Training forward that moves nothing: the result, and the statistics of each ghost batch with their gradients."""
    rows = to_rows(x, channel_dim)
    if process_group is not None:
        mask = None if pad_mask is None else pad_mask.reshape(-1)
        mean, var, count = moments_in_group(process_group, cast(rows, weight.dtype), mask)
        y = affine_by_statistics(x, weight, bias, mean, var, eps, channel_dim)
        return y, BatchStatistics(mean[None], var[None], count[None])
    whole = pad_mask is None and (ghost_sizes is None or len(ghost_sizes) == 1)
    if whole and rows.shape[0] > 1 and not torch.compiler.is_compiling():
        y, mean, inv_std = torch.native_batch_norm(rows, weight, bias, None, None, True, 0.0, eps)
        mean, var = _Statistics.apply(rows, mean, (inv_std.square().reciprocal() - eps).clamp(min=0))
        return from_rows(y, x, channel_dim), BatchStatistics(
            mean[None], var[None], mean.new_full((1, 1), rows.shape[0])
        )
    mask = None if pad_mask is None else pad_mask.reshape(-1)
    sizes = [x.shape[0]] if ghost_sizes is None else ghost_sizes
    # Equal ghost batches at once, the last, which may be longer, on its own.
    per_sample = rows.shape[0] // max(x.shape[0], 1)
    equal = sum(sizes[:-1]) * per_sample
    parts, found = [], []
    for start, stop, count in ((0, equal, len(sizes) - 1), (equal, rows.shape[0], 1)):
        if count == 0:
            continue
        part = rows[start:stop].reshape(count, (stop - start) // count, rows.shape[1])
        part_mask = None if mask is None else mask[start:stop].reshape(part.shape[:2])
        y, statistics = normalise_by_batch(part, part_mask, weight, bias, eps)
        parts.append(y.flatten(0, 1))
        found.append(statistics._replace(count=torch.as_tensor(statistics.count, device=x.device).expand(count, 1)))
    y = from_rows(torch.cat(parts) if len(parts) > 1 else parts[0], x, channel_dim)
    if len(found) == 1:
        return y, found[0]
    return y, BatchStatistics(*(torch.cat([s[i] for s in found]) for i in range(3)))
