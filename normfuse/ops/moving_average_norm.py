"""Moving Average Batch Normalization (Yan et al., 2020, arXiv 2001.06838): no mean, statistics over a window of steps.

With q the per-channel mean of x² over the valid rows of a step and v the arithmetic mean of q over the last steps,
``y = weight * r * x / sqrt(v + eps) + bias``, where r is the ratio between the window's and the running statistic,
clamped. The backward pass smooths the mean of gradient times output over a window likewise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ._group import sum_in_group
from ._layout import ThreeAxes, affine_map, as_they_are, check_input, gain_and_shift, masked, mean_or
from ._recompute import state_of_this_run
from ._running import fakes_of_window, register_running_norm, training_step
from .unified_norm import MAX_RATIO, RATIO_FREE_STEPS


class MovingAverageNormState(NamedTuple):
    """Statistics of one moving average batch normalisation, updated in place by training steps.

    Attributes:
        running_var: [C], running quadratic mean of the input; starts at 1.
        buffer_x2: [W, C], window of forward statistics; starts at 0.
        buffer_gz: [W, C], window of backward statistics; starts at 0.
        iters: [1], number of training steps so far.
    """

    running_var: Tensor
    buffer_x2: Tensor
    buffer_gz: Tensor
    iters: Tensor


def move_forward_statistics(
    q: Tensor, count: Tensor, running_var: Tensor, buffer_x2: Tensor, iters: Tensor, warmup_iters: int, eps: float,
    momentum: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One step of the statistics, in place, from the quadratic mean ``q`` [C] of ``count`` numbers, a scalar.

    A ``q`` that is not finite shows in the result but never enters a statistic, and a step without numbers moves
    nothing. Returns ``stats`` [2, C] = (1/sqrt(v + eps), r), and the step's number, int64 [1], 0 without numbers.
    """
    window = buffer_x2.shape[0]
    counted = (count > 0).reshape(1)
    t = iters.add_(counted)
    slot, usable = t % window, q.isfinite() & counted
    entry = torch.where(counted, torch.where(usable, q, running_var), buffer_x2[slot][0])
    buffer_x2.index_copy_(0, slot, entry[None])
    var = torch.where((t <= window) | (t < warmup_iters) | ~usable, q, buffer_x2.mean(0))
    ratio = ((var + eps).sqrt() / (running_var + eps).sqrt()).clamp(1 / MAX_RATIO, MAX_RATIO)
    ratio = torch.where((t <= max(RATIO_FREE_STEPS, warmup_iters)) | ~counted, 1.0, ratio)
    moved = momentum * running_var + (1 - momentum) * var
    running_var.copy_(torch.where(usable, moved, running_var))
    return torch.stack([(var + eps).rsqrt(), ratio]), torch.where(counted, t, 0)


def move_gradient_statistics(mean_gz: Tensor, step: Tensor, buffer_gz: Tensor, warmup_iters: int) -> Tensor:
    """One step of the gradient's window, in place. Returns the multiple [C] of z to take from g."""
    window = buffer_gz.shape[0]
    slot, counted = step % window, step != 0
    entry = torch.where(counted, torch.where(mean_gz.isfinite(), mean_gz, buffer_gz.mean(0)), buffer_gz[slot][0])
    buffer_gz.index_copy_(0, slot, entry[None])
    return torch.where(counted & ((step <= window) | (step < warmup_iters)), mean_gz, buffer_gz.mean(0))


def _forward_on_stat_groups(
    reduce: Callable, move: Callable, x: Tensor, pad_mask: Tensor | None, weight: Tensor, bias: Tensor,
    running_var: Tensor, *others: object,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    values = x.to(weight.dtype)
    square, count = masked(values.square(), pad_mask, 1)
    total, count = reduce(square.sum((0, 2)), count)
    q = mean_or(total, count, running_var)
    stats, step = move(q, torch.as_tensor(count, device=q.device), running_var, *others)
    scale = weight * stats[1] * stats[0]
    return torch.addcmul(bias[:, None], values, scale[:, None]).to(x.dtype), stats, step


def _backward_on_stat_groups(
    reduce: Callable, move: Callable, grad_y: Tensor, x: Tensor, weight: Tensor, stats: Tensor, *others: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inv_std, ratio = stats
    dy, values = grad_y.to(weight.dtype), x.to(weight.dtype)
    # With g = dy * weight * ratio and z = x * inv_std: sums of dy * ratio * z and of g * z, then (g - m * z) / std.
    grad_weight = (dy * values).sum((0, 2)) * inv_std * ratio
    total, count = reduce(grad_weight * weight, x.shape[0] * x.shape[2])
    mean_gz = mean_or(total, count, torch.zeros_like(weight))
    along, across = weight * ratio * inv_std, -move(mean_gz, *others) * inv_std.square()
    grad_x = torch.addcmul(dy * along[:, None], values, across[:, None]).to(x.dtype)
    return grad_x, grad_weight, dy.sum((0, 2)), mean_gz


def moving_average_norm_forward_reference(
    x: Tensor,
    pad_mask: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_var: Tensor,
    buffer_x2: Tensor,
    iters: Tensor,
    warmup_iters: int,
    eps: float,
    momentum: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Training forward in plain PyTorch for x [S, C, P] and pad_mask [S, P]; moves the statistics.

    Returns ``y`` like x, and what :func:`move_forward_statistics` returns.
    """
    return _forward_on_stat_groups(
        as_they_are, move_forward_statistics, x, pad_mask, weight, bias, running_var, buffer_x2, iters, warmup_iters,
        eps, momentum,
    )  # fmt: skip


def moving_average_norm_backward_reference(
    grad_y: Tensor, x: Tensor, weight: Tensor, stats: Tensor, step: Tensor, buffer_gz: Tensor, warmup_iters: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The paper's backward formulas in plain PyTorch for grad_y and x [S, C, P]; moves ``buffer_gz``.

    Returns ``grad_x`` like x, ``grad_weight`` [C] and ``grad_bias`` [C].
    """
    return _backward_on_stat_groups(
        as_they_are, move_gradient_statistics, grad_y, x, weight, stats, step, buffer_gz, warmup_iters
    )[:3]


_fake_forward, _fake_move = fakes_of_window(1)
_NORM = register_running_norm(
    "moving_average_norm",
    name="Moving Average Batch Normalization",
    layout=ThreeAxes,
    statistics=("running_var", "buffer_x2", "iters"),
    gradient_statistics=("buffer_gz",),
    forward=(moving_average_norm_forward_reference, _fake_forward),
    backward=moving_average_norm_backward_reference,
    move_forward=(move_forward_statistics, _fake_move),
    move_gradient=(move_gradient_statistics, lambda mean_gz, *_: torch.empty_like(mean_gz)),
    forward_by=_forward_on_stat_groups,
    backward_by=_backward_on_stat_groups,
    mean=sum_in_group,
    sound=lambda stats: stats[0] > 0,
)


def moving_average_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    state: MovingAverageNormState,
    *,
    training: bool,
    pad_mask: Tensor | None = None,
    warmup_iters: int = 100,
    eps: float = 1e-5,
    momentum: float = 0.98,
    channel_dim: int = -1,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Moving average batch normalisation of ``x`` over all dimensions but ``channel_dim``.

    In training the gradient of ``x`` is the paper's approximation. In evaluation it is
    ``y = weight * x / sqrt(running_var + eps) + bias`` in plain ATen operations.

    Args:
        x: any shape with C channels along ``channel_dim``; float32, bfloat16, float16 or float64.
        weight: [C]; None stands for 1.
        bias: [C]; None stands for 0.
        state: see :class:`MovingAverageNormState`; updated in place.
        training: whether to use and update the statistics of this batch.
        pad_mask: bool, the shape of ``x`` without its channel dimension; True marks padding, which is left out of the
            forward statistic. Ignored in evaluation.
        warmup_iters: steps that use the statistics of the batch alone.
        eps: added to the quadratic mean, inside the square root.
        momentum: share of the old value in each update of ``running_var``.
        channel_dim: dimension of the channels.
        process_group: take the statistics of a training step over all ranks of this group; every rank must then call,
            also one without rows. None: over this process alone.

    Returns:
        A tensor of the shape and dtype of ``x``.

    Raises:
        TypeError, ValueError: a dtype, shape, ``channel_dim`` or device does not match.

    Example:
        >>> from normfuse.ops import MovingAverageNormState, moving_average_norm
        >>> window, count = torch.zeros(16, 8), torch.zeros(1, dtype=torch.int64)
        >>> state = MovingAverageNormState(torch.ones(8), window, window.clone(), count)
        >>> y = moving_average_norm(torch.randn(32, 8), None, None, state, training=True)
        >>> y.shape, int(state.iters)
        (torch.Size([32, 8]), 1)
    """
    check_input(x, state.running_var.shape[0], channel_dim, pad_mask, state.running_var)
    weight, bias = gain_and_shift(weight, bias, state.running_var)
    if not training:
        return affine_map(x, weight * torch.rsqrt(state.running_var + eps), bias, channel_dim)
    state = state_of_this_run(state, _NORM.statistics)
    options = warmup_iters, eps, momentum
    return training_step(
        _NORM, x, pad_mask, weight, bias, None, state, options, (warmup_iters,), channel_dim, process_group
    )[0]
