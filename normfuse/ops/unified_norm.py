"""Unified Normalization (Yang et al., 2022, arXiv 2208.01313): an affine map once trained.

With q the per-channel mean of x² over the valid rows of a step, the forward pass normalises by the geometric
mean of q over the last steps (a window), the backward pass smooths the mean of gradient times output over a
window likewise and compensates for the ratio ``r`` between the window's statistic and the running one. The
window is skipped in a step whose window looks like it holds an outlier (``outlier_filtration``).

Everything per channel follows from the column sums Σx², Σdy and Σdy·x, so that counters, windows and the skip
decision stay on the device: no step waits for the host.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._layout import accumulation_dtype, cast, check_input, from_rows, mean_square, per_channel, to_rows
from ._recompute import register_forward, statistics_of_this_run
from ._registry import library, register_operation

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
    """

    running_var: Tensor
    ema_gz: Tensor
    buffer_x2: Tensor
    buffer_gz: Tensor
    iters: Tensor
    skip_counter: Tensor


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Training forward in plain PyTorch on a [R, C] matrix; updates the last four tensors in place.

    Returns ``y`` [R, C] in x's dtype, ``stats`` [2, C] = (1/sqrt(var + eps), r), and ``step``
    int64 [2] = (t, skip).
    """
    window, channels = buffer_x2.shape
    values = x.to(accumulation_dtype(x.dtype))
    t = iters.add_(1)
    slot = t % window

    q = mean_square(values, pad_mask, empty=running_var)
    entries = buffer_x2.index_copy(0, slot, q[None])
    geometric_mean = entries.log().mean(0).exp()
    entry = q
    skip = torch.full_like(t, window <= 1, dtype=torch.bool)
    # The spread of one number is undefined: nothing can be called an outlier then.
    if outlier_filtration and window * channels > 1:
        spread = buffer_x2.sqrt().var()
        far_off = (entries.mean(0) - geometric_mean > spread * window).any()
        outlier = (t >= warmup_iters) & far_off
        entry = torch.where(outlier, running_var, q)
        skip = skip | outlier
        skip_counter.add_(outlier)
    buffer_x2.index_copy_(0, slot, entry[None])

    var = torch.where((t <= window) | (t < warmup_iters) | skip, q, geometric_mean)
    ratio = ((var + eps).sqrt() / (running_var + eps).sqrt()).clamp(1 / MAX_RATIO, MAX_RATIO)
    ratio = torch.where((t <= max(RATIO_FREE_STEPS, warmup_iters)) | skip, 1.0, ratio)
    running_var.mul_(momentum).add_((1 - momentum) * var)

    inv_std = (var + eps).rsqrt()
    y = weight * (values * inv_std) + bias
    return y.to(x.dtype), torch.stack([inv_std, ratio]), torch.cat([t, skip.to(t.dtype)])


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
) -> tuple[Tensor, Tensor, Tensor]:
    """The paper's backward formulas in plain PyTorch on [R, C] matrices.

    Updates ``ema_gz`` and ``buffer_gz`` in place. Returns ``grad_x`` [R, C] in x's dtype, ``grad_weight`` [C]
    and ``grad_bias`` [C].
    """
    acc = accumulation_dtype(x.dtype)
    window = buffer_gz.shape[0]
    inv_std, ratio = stats[0], stats[1]
    t, skip = step[:1], step[1:] != 0
    slot = t % window
    dy = grad_y.to(acc)
    z = x.to(acc) * inv_std

    g = dy * weight * ratio
    mean_gz = (g * z).sum(0) / max(x.shape[0], 1)
    buffer_gz.index_copy_(0, slot, torch.where(skip, ema_gz, mean_gz)[None])
    smoothed = torch.where((t <= window) | (t < warmup_iters) | skip, mean_gz, buffer_gz.mean(0))
    ema_gz.mul_(momentum).add_((1 - momentum) * smoothed)

    grad_x = (g - torch.where(skip, smoothed, ema_gz) * z) * inv_std
    return grad_x.to(x.dtype), (dy * ratio * z).sum(0), dy.sum(0)


_FORWARD_STATISTICS = ("running_var", "buffer_x2", "iters", "skip_counter")
_forward = register_operation("unified_norm_forward", unified_norm_forward_reference, mutates=_FORWARD_STATISTICS)
_forward_once = register_forward(library, _forward, _FORWARD_STATISTICS)
_backward = register_operation(
    "unified_norm_backward", unified_norm_backward_reference, mutates=("ema_gz", "buffer_gz")
)


@torch.library.register_fake("normfuse::unified_norm_forward")
@torch.library.register_fake("normfuse::unified_norm_forward_once")
def _(x, pad_mask, weight, bias, running_var, *others):
    stats = running_var.new_empty(2, x.shape[1])
    return torch.empty_like(x), stats, running_var.new_empty(2, dtype=torch.int64)


@torch.library.register_fake("normfuse::unified_norm_backward")
def _(grad_y, x, weight, *others):
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


class _UnifiedNorm(torch.autograd.Function):
    """Autograd of the two operations. Keeps x as rows, three [C] vectors and two numbers for backward."""

    @staticmethod
    def forward(ctx, x, pad_mask, weight, bias, state, warmup_iters, outlier_filtration, eps, momentum, channel_dim):
        rows = to_rows(x, channel_dim)
        rows_mask = None if pad_mask is None else pad_mask.reshape(-1)
        forward = _forward_once if torch.compiler.is_compiling() else _forward
        y, stats, step = forward(
            rows, rows_mask, weight, bias, state.running_var, state.buffer_x2, state.iters, state.skip_counter,
            warmup_iters, outlier_filtration, eps, momentum,
        )  # fmt: skip
        ctx.save_for_backward(rows, weight, stats, step)
        # Not saved for backward: the backward pass reads and updates the state as it is then, on purpose.
        ctx.ema_gz, ctx.buffer_gz = state.ema_gz, state.buffer_gz
        ctx.warmup_iters, ctx.momentum, ctx.channel_dim = warmup_iters, momentum, channel_dim
        return from_rows(y, x, channel_dim)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y):
        rows, weight, stats, step = ctx.saved_tensors
        grad_rows, grad_weight, grad_bias = _backward(
            to_rows(grad_y, ctx.channel_dim), rows, weight, stats, step, ctx.ema_gz, ctx.buffer_gz,
            ctx.warmup_iters, ctx.momentum,
        )  # fmt: skip
        grad_x = from_rows(grad_rows, grad_y, ctx.channel_dim)
        return grad_x, None, grad_weight, grad_bias, *[None] * 6


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
) -> Tensor:
    """Unified Normalization of ``x`` over all dimensions but ``channel_dim``.

    In training the forward pass updates ``state.running_var``, ``buffer_x2``, ``iters`` and ``skip_counter``
    in place, the backward pass ``ema_gz`` and ``buffer_gz``; the gradient of ``x`` is the paper's
    approximation. In evaluation it is ``y = weight * x / sqrt(running_var + eps) + bias`` in plain ATen
    operations.

    Args:
        x: any shape with C channels along ``channel_dim``; float32, bfloat16, float16 or float64.
        weight, bias: [C] in any floating dtype; None stands for 1 and 0.
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

    Returns:
        A tensor of the shape and dtype of ``x``.

    Raises:
        TypeError: a dtype is not supported or does not match.
        ValueError: a shape, ``channel_dim`` or a device does not match.
    """
    check_input(x, state.running_var.shape[0], channel_dim, pad_mask, state.running_var)
    acc = state.running_var.dtype
    weight = torch.ones_like(state.running_var) if weight is None else cast(weight, acc)
    bias = torch.zeros_like(state.running_var) if bias is None else cast(bias, acc)
    if not training:
        scale = per_channel(weight * torch.rsqrt(state.running_var + eps), x, channel_dim)
        y = torch.addcmul(per_channel(bias, x, channel_dim), cast(x, acc), scale)
        return cast(y, x.dtype)
    if not torch.compiler.is_compiling():
        own = statistics_of_this_run(tuple(getattr(state, name) for name in _FORWARD_STATISTICS))
        state = state._replace(**dict(zip(_FORWARD_STATISTICS, own, strict=True)))
    return _UnifiedNorm.apply(
        x, pad_mask, weight, bias, state, warmup_iters, outlier_filtration, eps, momentum, channel_dim
    )
