"""Moving Average Batch Normalization (Yan et al., 2020, arXiv 2001.06838): no mean, statistics over a window of steps.

With q the per-channel mean of x² over the valid rows of a step and v the arithmetic mean of q over the last steps,
``y = weight * r * x / sqrt(v + eps) + bias``, where r is the ratio between the window's and the running statistic,
clamped. The backward pass smooths the mean of gradient times output over a window likewise.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ._group import sum_in_group
from ._layout import as_they_are, cast, check_input, gain_and_shift, masked, mean_or, other_dims, per_channel
from ._recompute import register_forward, statistics_of_this_run
from ._registry import library, register_operation
from .unified_norm import MAX_RATIO, RATIO_FREE_STEPS


class MovingAverageNormState(NamedTuple):
    """Statistics of one moving average batch normalisation, updated in place by training steps.

    Attributes:
        running_var: [C], running quadratic mean of the input; starts at 1.
        buffer_x2, buffer_gz: [W, C], windows of forward and backward statistics; start at 0.
        iters: [1], number of training steps so far.
    """

    running_var: Tensor
    buffer_x2: Tensor
    buffer_gz: Tensor
    iters: Tensor


def move_forward_statistics(
    q: Tensor, running_var: Tensor, buffer_x2: Tensor, iters: Tensor, warmup_iters: int, eps: float, momentum: float
) -> tuple[Tensor, Tensor]:
    """One step of the statistics, in place, from this step's quadratic mean ``q`` [C].

    A ``q`` that is not finite shows in the result but never enters a statistic. Returns ``stats`` [2, C] =
    (1/sqrt(v + eps), r), and the step's number, int64 [1].
    """
    window = buffer_x2.shape[0]
    t = iters.add_(1)
    usable = q.isfinite()
    buffer_x2.index_copy_(0, t % window, torch.where(usable, q, running_var)[None])
    var = torch.where((t <= window) | (t < warmup_iters) | ~usable, q, buffer_x2.mean(0))
    ratio = ((var + eps).sqrt() / (running_var + eps).sqrt()).clamp(1 / MAX_RATIO, MAX_RATIO)
    ratio = torch.where(t <= max(RATIO_FREE_STEPS, warmup_iters), 1.0, ratio)
    moved = torch.where(t == 1, var, momentum * running_var + (1 - momentum) * var)
    running_var.copy_(torch.where(usable, moved, running_var))
    return torch.stack([(var + eps).rsqrt(), ratio]), t.clone()


def move_gradient_statistics(mean_gz: Tensor, step: Tensor, buffer_gz: Tensor, warmup_iters: int) -> Tensor:
    """One step of the gradient's window, in place. Returns the multiple [C] of z to take from g."""
    window = buffer_gz.shape[0]
    buffer_gz.index_copy_(0, step % window, torch.where(mean_gz.isfinite(), mean_gz, buffer_gz.mean(0))[None])
    return torch.where((step <= window) | (step < warmup_iters), mean_gz, buffer_gz.mean(0))


_FORWARD = ("running_var", "buffer_x2", "iters")
_move_forward = register_forward(
    library,
    register_operation("moving_average_norm_statistics", move_forward_statistics, _FORWARD, in_library=False),
    _FORWARD,
)
_move_gradient = register_operation(
    "moving_average_norm_gradient_statistics", move_gradient_statistics, ("buffer_gz",), in_library=False
)


@torch.library.register_fake("normfuse::moving_average_norm_statistics")
@torch.library.register_fake("normfuse::moving_average_norm_statistics_once")
def _(q, *others):
    return q.new_empty(2, q.shape[0]), q.new_empty(1, dtype=torch.int64)


@torch.library.register_fake("normfuse::moving_average_norm_gradient_statistics")
def _(mean_gz, *others):
    return torch.empty_like(mean_gz)


class _MovingAverageNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, pad_mask, weight, bias, state, warmup_iters, eps, momentum, channel_dim, group):
        values, dims = x.to(weight.dtype), other_dims(x, channel_dim)
        square, count = masked(values.square(), pad_mask, channel_dim)
        reduce = as_they_are if group is None else partial(sum_in_group, group)
        q = mean_or(*reduce(square.sum(dims), count), state.running_var)
        moved = state.running_var, state.buffer_x2, state.iters
        if torch.compiler.is_compiling():
            stats, step = _move_forward(q, *moved, warmup_iters, eps, momentum)
        else:
            stats, step = move_forward_statistics(q, *statistics_of_this_run(moved), warmup_iters, eps, momentum)
        ctx.save_for_backward(x, weight, stats, step)
        # Not saved for backward: the backward pass reads and updates the window as it is then, on purpose.
        ctx.buffer_gz, ctx.warmup_iters, ctx.channel_dim = state.buffer_gz, warmup_iters, channel_dim
        ctx.reduce = reduce
        scale = per_channel(weight * stats[1] * stats[0], x, channel_dim)
        return torch.addcmul(per_channel(bias, x, channel_dim), values, scale).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y):
        x, weight, (inv_std, ratio), step = ctx.saved_tensors
        dims, count = other_dims(x, ctx.channel_dim), x.numel() // max(x.shape[ctx.channel_dim], 1)
        dy, values = grad_y.to(weight.dtype), x.to(weight.dtype)
        # With g = dy * weight * ratio and z = x * inv_std: sums of dy * ratio * z and of g * z, then (g - m * z) / std.
        grad_weight = (dy * values).sum(dims) * inv_std * ratio
        mean_gz = mean_or(*ctx.reduce(grad_weight * weight, count), torch.zeros_like(weight))
        multiple = _move_gradient(mean_gz, step, ctx.buffer_gz, ctx.warmup_iters)
        along, across = (
            per_channel(v, x, ctx.channel_dim) for v in (weight * ratio * inv_std, -multiple * inv_std.square())
        )
        grad_x = torch.addcmul(dy * along, values, across).to(x.dtype)
        return grad_x, None, grad_weight, dy.sum(dims), *[None] * 6


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
        weight, bias: [C]; None stands for 1 and 0.
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

    Raises:
        TypeError, ValueError: a dtype, shape, ``channel_dim`` or device does not match.
    """
    check_input(x, state.running_var.shape[0], channel_dim, pad_mask, state.running_var)
    weight, bias = gain_and_shift(weight, bias, state.running_var)
    if not training:
        scale = per_channel(weight * torch.rsqrt(state.running_var + eps), x, channel_dim)
        return cast(torch.addcmul(per_channel(bias, x, channel_dim), cast(x, bias.dtype), scale), x.dtype)
    return _MovingAverageNorm.apply(
        x, pad_mask, weight, bias, state, warmup_iters, eps, momentum, channel_dim, process_group
    )
