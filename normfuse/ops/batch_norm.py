"""Batch Normalization (Ioffe & Szegedy, 2015, arXiv 1502.03167) over valid rows, whole or in ghost batches."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ._group import moments_in_group
from ._layout import affine_map, cast, check_input, gain_and_shift, to_rows
from ._recompute import statistics_of_this_run
from ._stat_groups import move_running_statistics, normalise_stat_groups


class BatchNormState(NamedTuple):
    """Statistics of one batch normalisation, updated in place by training steps, on the input's device.

    Attributes:
        running_mean: [C], float32 (float64 for float64 input).
        running_var: like it.
        num_batches_tracked: int64, a scalar: training steps (ghost batches count one each).
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor


class BatchStatistics(NamedTuple):
    """Statistics of the K ghost batches of one step.

    Attributes:
        mean, var: [K, C]; the variance is the mean squared deviation (biased). Both carry gradients.
        count: int64 [K, 1], valid rows of each ghost batch.
    """

    mean: Tensor
    var: Tensor
    count: Tensor


def affine_by_statistics(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    channel_dim: int,
    floor: bool = False,
) -> Tensor:
    """``weight * (x - mean) / sqrt(var + eps) + bias`` with [C] vectors, as one multiplication and one addition.

    ``floor``: divide by ``sqrt(max(var, eps))`` instead.
    """
    scale = weight * torch.rsqrt(var.clamp(min=eps) if floor else var + eps)
    return affine_map(x, scale, bias - mean * scale, channel_dim)


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
    ghost_size: int | None = None,
    shortcut: Tensor | None = None,
    estimated: bool = False,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Batch normalisation of ``x`` over all dimensions but ``channel_dim``.

    Args:
        x: any shape with C channels along ``channel_dim``; float32, bfloat16, float16 or float64.
        weight: [C]; None stands for 1.
        bias: [C]; None stands for 0.
        state: statistics, updated in place in training. An empty batch moves nothing; a single row moves the
            variance towards 0. A channel whose statistic is not finite stays where it is.
        training: whether to normalise by the statistics of this batch; otherwise by the running ones, in plain ATen
            operations.
        pad_mask: bool, the shape of ``x`` without its channel dimension; True marks padding, which is normalised like
            the rest but left out of the statistics. Ignored in evaluation.
        momentum: share of the *new* value in each update of the running statistics, as in PyTorch; None: an average
            over all steps.
        eps: added to the variance, inside the square root.
        channel_dim: dimension of the channels.
        ghost_size: samples, along the first dimension, that are normalised on their own; a rest joins the last ones.
            None: one batch.
        shortcut: a scalar; ``shortcut * x`` is added in training.
        estimated: in training, the running statistics move first, the variance around the mean as it was, and are
            those that normalise. No gradient goes through them.
        process_group: take the statistics of a training step over the rows of all ranks of this group; every rank must
            then call, also one without rows. ``ghost_size`` counts for nothing then. None: over this process alone.

    Returns:
        A tensor of the shape and dtype of ``x``. Its gradient is exact, and can be differentiated in turn.

    Raises:
        TypeError, ValueError: a dtype, shape, ``channel_dim`` or device does not match.

    Example:
        >>> from normfuse.ops import BatchNormState, batch_norm
        >>> state = BatchNormState(torch.zeros(8), torch.ones(8), torch.tensor(0))
        >>> y = batch_norm(torch.randn(32, 8), None, None, state, training=True)
        >>> y.shape, int(state.num_batches_tracked)
        (torch.Size([32, 8]), 1)
    """
    if training:
        return batch_norm_with_statistics(
            x, weight, bias, state, pad_mask, momentum, eps, channel_dim, ghost_size, shortcut, estimated, process_group
        )[0]
    check_input(x, state.running_mean.shape[0], channel_dim, pad_mask, state.running_mean)
    weight, bias = gain_and_shift(weight, bias, state.running_mean)
    return affine_by_statistics(x, weight, bias, state.running_mean, state.running_var, eps, channel_dim)


def batch_norm_with_statistics(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, state: BatchNormState, pad_mask: Tensor | None = None,
    momentum: float | None = 0.1, eps: float = 1e-5, channel_dim: int = -1, ghost_size: int | None = None,
    shortcut: Tensor | None = None, estimated: bool = False, process_group: ProcessGroup | None = None,
    floor: bool = False,
) -> tuple[Tensor, BatchStatistics, BatchNormState]:  # fmt: skip
    """Training forward: the result, the statistics of each ghost batch, and the running ones after this step.

    The last are ``state`` itself, which this updates in place, except where a forward runs a second time under
    activation checkpointing. ``floor``: divide by ``sqrt(max(var, eps))``. Other arguments: see :func:`batch_norm`.
    """
    check_input(x, state.running_mean.shape[0], channel_dim, pad_mask, state.running_mean)
    weight, bias = gain_and_shift(weight, bias, state.running_mean)
    if shortcut is not None:
        shortcut = cast(shortcut, weight.dtype).reshape(1)
    if not torch.compiler.is_compiling():  # compiled code asks at run time
        state = BatchNormState(*statistics_of_this_run(tuple(state)))
    if process_group is not None:
        statistics = _statistics_in_group(
            process_group, cast(to_rows(x, channel_dim), weight.dtype), pad_mask, state, momentum, estimated
        )
        mean, var = (v[0] for v in statistics[:2])
        y = affine_by_statistics(x, weight, bias, mean, var, eps, channel_dim, floor)
        return (y if shortcut is None else y + cast(shortcut, x.dtype) * x), statistics, state
    y, stats, count = normalise_stat_groups(
        x, pad_mask, weight, bias, shortcut, channel_dim, ghost_size or 0, (1, 1, -1), (*state, estimated, momentum),
        0, 0.0 if floor else eps, eps if floor else 0.0,
    )  # fmt: skip
    return y, BatchStatistics(stats[0].squeeze(1), stats[1].squeeze(1), count), state


def _statistics_in_group(
    group: ProcessGroup, rows: Tensor, pad_mask: Tensor | None, state: BatchNormState, momentum: float | None,
    estimated: bool,
) -> BatchStatistics:  # fmt: skip
    """The statistics that normalise ``rows`` [R, C] of this rank, and a step of the running ones."""
    with torch.set_grad_enabled(torch.is_grad_enabled() and not estimated):
        mean, var, count = moments_in_group(group, rows, None if pad_mask is None else pad_mask.reshape(-1))
    move_running_statistics(mean.detach(), var.detach(), count, *state, estimated, momentum)
    if estimated:
        mean, var = state.running_mean.clone(), state.running_var.clone()
    return BatchStatistics(mean[None], var[None], count[None])
