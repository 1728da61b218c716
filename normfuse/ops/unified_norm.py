"""Unified Normalization (Yang et al., 2022, arXiv 2208.01313): an affine map once trained.

With q the per-channel mean of x² over the valid rows of a step, the forward pass normalises by the geometric
mean of q over the last steps (a window), the backward pass smooths the mean of gradient times output over a
window likewise and compensates for the ratio ``r`` between the window's statistic and the running one. The
window is skipped in a step whose window looks like it holds an outlier (``outlier_filtration``).

Everything per channel follows from the column sums Σx², Σdy and Σdy·x, so that counters, windows and the skip
decision stay on the device: no step waits for the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import _native
from ._group import mean_square_in_group
from ._layout import (
    ChannelsLast,
    add_into,
    affine_map,
    as_they_are,
    check_input,
    check_residual,
    gain_and_shift,
    like_input,
    mean_or,
    mean_square,
    rows_of,
)
from ._recompute import state_of_this_run
from ._registry import can_run_cpp_autograd
from ._running import fakes_of_window, register_running_norm, training_step

MAX_RATIO = 5.0  # r is clamped to [1 / MAX_RATIO, MAX_RATIO]
RATIO_FREE_STEPS = 1000  # r is 1 for at least that many steps


class UnifiedNormState(NamedTuple):
    """Statistics of one Unified Norm, updated in place by training steps.

    Vectors and windows are float32 (float64 for float64 input), counters int64, all on the input's device.

    Attributes:
        running_var: [C], running quadratic mean of the input; starts at 1.
        ema_gz: [C], running mean of gradient times output; starts at 0.
        buffer_x2: [Wf, C], window of forward statistics; starts at 0.
        buffer_gz: [Wb, C], window of backward statistics; starts at 0.
        iters: [1], number of training steps so far.
        skip_counter: [1], number of steps whose forward statistic was filtered out as an outlier.
        skipped_forwards: None, or [1], number of forward passes rolled back because something was not
            finite. Where None, such passes move the channels that are finite.
        skipped_backwards: None, or [1], number of backward passes, likewise.
    """

    running_var: Tensor
    ema_gz: Tensor
    buffer_x2: Tensor
    buffer_gz: Tensor
    iters: Tensor
    skip_counter: Tensor
    skipped_forwards: Tensor | None = None
    skipped_backwards: Tensor | None = None


def move_forward_statistics(
    q: Tensor,
    count: Tensor,
    running_var: Tensor,
    buffer_x2: Tensor,
    iters: Tensor,
    skip_counter: Tensor,
    warmup_iters: int,
    outlier_filtration: bool,
    eps: float,
    momentum: float,
) -> tuple[Tensor, Tensor]:
    """One step of the statistics, in place, from the quadratic mean ``q`` [C] of this step's ``count`` rows, a scalar.

    A ``q`` that is not finite shows in the results but never enters a statistic, and a step without a row is none: it
    moves nothing. Returns ``stats`` [2, C] = (1/sqrt(var + eps), r), and ``step`` int64 [2] = (t, skip), with t = 0
    for a step without a row.
    """
    window, channels = buffer_x2.shape
    counted = (count > 0).reshape(1)
    t = iters.add_(counted)
    slot = t % window
    usable = q.isfinite() & counted

    entries = buffer_x2.index_copy(0, slot, q[None])
    geometric_mean = entries.log().mean(0).exp()
    unusual = ~usable
    skip = torch.full_like(t, window <= 1, dtype=torch.bool)
    # The spread of one number is undefined: nothing can be called an outlier then.
    if outlier_filtration and window * channels > 1:
        spread = buffer_x2.sqrt().var()
        far_off = (entries.mean(0) - geometric_mean > spread * window).any()
        outlier = counted & (t >= warmup_iters) & far_off
        unusual = unusual | outlier
        skip = skip | outlier
        skip_counter.add_(outlier)
    entry = torch.where(counted, torch.where(unusual, running_var, q), buffer_x2[slot][0])
    buffer_x2.index_copy_(0, slot, entry[None])

    var = torch.where((t <= window) | (t < warmup_iters) | skip | ~usable, q, geometric_mean)
    ratio = ((var + eps).sqrt() / (running_var + eps).sqrt()).clamp(1 / MAX_RATIO, MAX_RATIO)
    ratio = torch.where((t <= max(RATIO_FREE_STEPS, warmup_iters)) | skip | ~counted, 1.0, ratio)
    running_var.copy_(torch.where(usable, momentum * running_var + (1 - momentum) * var, running_var))
    return torch.stack([(var + eps).rsqrt(), ratio]), torch.cat([torch.where(counted, t, 0), skip.to(t.dtype)])


def move_gradient_statistics(
    mean_gz: Tensor, step: Tensor, ema_gz: Tensor, buffer_gz: Tensor, warmup_iters: int, momentum: float
) -> Tensor:
    """One step of the gradient statistics, in place, from this step's mean of g·z [C].

    A mean that is not finite never enters a statistic, nor does one of a step without a row. Returns the multiple [C]
    of z to take from g.
    """
    window = buffer_gz.shape[0]
    t, skip = step[:1], step[1:] != 0
    slot, counted = t % window, t != 0
    usable = mean_gz.isfinite() & counted
    entry = torch.where(counted, torch.where(skip | ~usable, ema_gz, mean_gz), buffer_gz[slot][0])
    buffer_gz.index_copy_(0, slot, entry[None])
    smoothed = torch.where((t <= window) | (t < warmup_iters) | skip, mean_gz, buffer_gz.mean(0))
    ema_gz.copy_(torch.where(usable, momentum * ema_gz + (1 - momentum) * smoothed, ema_gz))
    return torch.where(skip & usable, smoothed, ema_gz)


def _forward_on_rows(
    mean_square: Callable, move: Callable, x: Tensor, pad_mask: Tensor | None, weight: Tensor, bias: Tensor,
    running_var: Tensor, *others: object,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    values = rows_of(x)
    stats, step = move(*mean_square(values, pad_mask, running_var), running_var, *others)
    return like_input(weight * (values * stats[0]) + bias, x), stats, step


def _backward_on_rows(
    reduce: Callable, move: Callable, grad_y: Tensor, x: Tensor, weight: Tensor, stats: Tensor, *others: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inv_std, ratio = stats[0], stats[1]
    dy, z = rows_of(grad_y), rows_of(x) * inv_std
    g = dy * weight * ratio
    total, count = reduce((g * z).sum(0), z.shape[0])
    mean_gz = mean_or(total, count, torch.zeros_like(inv_std))
    grad_x = (g - move(mean_gz, *others) * z) * inv_std
    return like_input(grad_x, x), (dy * ratio * z).sum(0), dy.sum(0), mean_gz


def unified_norm_forward_reference(
    x: Tensor,
    pad_mask: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_var: Tensor,
    buffer_x2: Tensor,
    iters: Tensor,
    skip_counter: Tensor,
    warmup_iters: int,
    outlier_filtration: bool,
    eps: float,
    momentum: float,
    residual: Tensor | None = None,
    s: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Training forward in plain PyTorch for x [..., C] of R rows and pad_mask [R]; moves the statistics.

    With ``residual`` like x, x + residual is what is normalised, and written to ``s``. Returns ``y`` like x, and what
    :func:`move_forward_statistics` returns.
    """
    x = add_into(x, residual, s)
    return _forward_on_rows(
        mean_square, move_forward_statistics, x, pad_mask, weight, bias, running_var, buffer_x2, iters,
        skip_counter, warmup_iters, outlier_filtration, eps, momentum,
    )  # fmt: skip


def unified_norm_backward_reference(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    stats: Tensor,
    step: Tensor,
    ema_gz: Tensor,
    buffer_gz: Tensor,
    warmup_iters: int,
    momentum: float,
    grad_s: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The paper's backward formulas in plain PyTorch for grad_y and x [..., C].

    Updates ``ema_gz`` and ``buffer_gz`` in place. ``grad_s``, the gradient that x has from elsewhere, is added to its
    gradient from here. Returns ``grad_x`` like x, ``grad_weight`` [C] and ``grad_bias`` [C].
    """
    grad_x, grad_weight, grad_bias, _ = _backward_on_rows(
        as_they_are, move_gradient_statistics, grad_y, x, weight, stats, step, ema_gz, buffer_gz, warmup_iters,
        momentum,
    )  # fmt: skip
    return grad_x if grad_s is None else grad_x + grad_s, grad_weight, grad_bias


_fake_forward, _fake_move = fakes_of_window(2)
_NORM = register_running_norm(
    "unified_norm",
    name="Unified Norm",
    layout=ChannelsLast,
    statistics=("running_var", "buffer_x2", "iters", "skip_counter"),
    gradient_statistics=("ema_gz", "buffer_gz"),
    forward=(unified_norm_forward_reference, _fake_forward),
    backward=unified_norm_backward_reference,
    move_forward=(move_forward_statistics, _fake_move),
    move_gradient=(move_gradient_statistics, lambda mean_gz, *_: torch.empty_like(mean_gz)),
    forward_by=_forward_on_rows,
    backward_by=_backward_on_rows,
    mean=mean_square_in_group,
    sound=lambda stats: stats[0] > 0,
    mutates=("s",),
)


def unified_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    state: UnifiedNormState,
    *,
    training: bool,
    pad_mask: Tensor | None = None,
    warmup_iters: int = 4000,
    outlier_filtration: bool = False,
    eps: float = 1e-5,
    momentum: float = 0.9,
    channel_dim: int = -1,
    process_group: ProcessGroup | None = None,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Unified Normalization of ``x`` over all dimensions but ``channel_dim``.

    In training the forward pass updates ``state.running_var``, ``buffer_x2``, ``iters`` and ``skip_counter``
    in place, the backward pass ``ema_gz`` and ``buffer_gz``; the gradient of ``x`` is the paper's
    approximation. In evaluation it is ``y = weight * x / sqrt(running_var + eps) + bias`` in plain ATen
    operations.

    Args:
        x: any shape with C channels along ``channel_dim``; float32, bfloat16, float16 or float64.
        weight: [C] in any floating dtype; None stands for 1.
        bias: [C] in any floating dtype; None stands for 0.
        state: statistics in float32 (float64 when x is float64), see :class:`UnifiedNormState`. The window
            sizes are those of its buffers.
        training: whether to use and update the statistics of this batch.
        pad_mask: bool, the shape of ``x`` without its channel dimension; True marks padding, which is
            normalised like the rest but left out of the forward statistic. Ignored in evaluation.
        warmup_iters: steps that use the statistic of the batch alone.
        outlier_filtration: skip the window in steps whose window holds an outlier.
        eps: added to the quadratic mean, inside the square root.
        momentum: share of the old value in each update of the running statistics.
        channel_dim: dimension of the channels.
        process_group: take the statistics of a training step over all ranks of this group; every rank must
            then call, also one without rows. None: over this process alone.
        residual: like ``x``; added to it first, s = x + residual, in the same pass.

    Returns:
        A tensor of the shape and dtype of ``x``; with ``residual`` the pair of that and s, which is what was
        normalised. Gradients flow through both.

    Raises:
        TypeError: a dtype is not supported or does not match.
        ValueError: a shape, ``channel_dim`` or a device does not match, or ``residual`` is not like ``x``.

    Example:
        >>> from normfuse.ops import UnifiedNormState, unified_norm
        >>> count = torch.zeros(1, dtype=torch.int64)
        >>> state = UnifiedNormState(
        ...     torch.ones(8), torch.zeros(8), torch.zeros(4, 8), torch.zeros(4, 8), count, torch.zeros_like(count)
        ... )
        >>> y = unified_norm(torch.randn(32, 8), None, None, state, training=True)
        >>> y.shape, int(state.iters)
        (torch.Size([32, 8]), 1)
    """
    check_input(x, state.running_var.shape[0], channel_dim, pad_mask, state.running_var)
    check_residual(x, residual)
    fused = training and process_group is None
    if residual is not None and not fused:
        x = x + residual
    weight, bias = gain_and_shift(weight, bias, state.running_var)
    if not training:
        y = affine_map(x, weight * torch.rsqrt(state.running_var + eps), bias, channel_dim)
        return y if residual is None else (y, x)
    state = state_of_this_run(state, _NORM.statistics)
    if fused and can_run_cpp_autograd(x, channel_dim, state.skipped_forwards):
        result = _native.autograd.unified_norm(
            x, weight, bias, residual, pad_mask, state.running_var, state.buffer_x2, state.iters, state.skip_counter,
            state.ema_gz, state.buffer_gz, warmup_iters, outlier_filtration, eps, momentum,
        )  # fmt: skip
        return result[0] if residual is None else tuple(result)
    options = warmup_iters, outlier_filtration, eps, momentum
    y, s = training_step(
        _NORM, x, pad_mask, weight, bias, residual if fused else None, state, options, (warmup_iters, momentum),
        channel_dim, process_group,
    )  # fmt: skip
    return y if residual is None else (y, s if fused else x)
