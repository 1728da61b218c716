"""Power Normalization (Shen et al., 2020, arXiv 2003.07845): batch normalisation by a running quadratic mean.

After the warm-up the forward pass divides by the running quadratic mean of earlier steps, and the backward
pass uses a running estimate of the mean of gradient times output: neither needs a statistic of the current
batch before it writes its result. The optional group scaling in front is an RMS normalisation of each row
over groups of channels; it is dynamic and cannot be folded away, ``group_num=0`` switches it off.

Everything per channel follows from the column sums of x², dy and dy·x (x after the group scaling), so that
counters and statistics stay on the device: no step waits for the host.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import rms_norm

from .. import _native
from ._group import mean_square_in_group
from ._layout import (
    ChannelsLast,
    add_into,
    as_they_are,
    cast,
    check_input,
    check_residual,
    gain_and_shift,
    like_input,
    mean_or,
    mean_square,
    per_channel,
    rows_of,
)
from ._recompute import state_of_this_run
from ._registry import can_run_cpp_autograd
from ._running import register_running_norm, training_step


class PowerNormState(NamedTuple):
    """Statistics of one Power Norm, updated in place by training steps.

    Vectors are float32 (float64 for float64 input), the counter int64, all on the device of the input.

    Attributes:
        running_phi: [C], running quadratic mean of the (group-scaled) input; starts at 1.
        ema_gz: [C], running sum that estimates the mean of gradient times output; starts at 0.
        iters: [1], number of training steps so far.
        skipped_forwards: None, or [1], number of forward passes rolled back because something was not
            finite. Where None, such passes move the channels that are finite.
        skipped_backwards: None, or [1], number of backward passes, likewise.
    """

    running_phi: Tensor
    ema_gz: Tensor
    iters: Tensor
    skipped_forwards: Tensor | None = None
    skipped_backwards: Tensor | None = None


def scale_groups(values: Tensor, row_scale: Tensor) -> Tensor:
    """``values`` [R, C] times ``row_scale`` [R, G], each factor over its group of C / G channels."""
    return values * row_scale.repeat_interleave(values.shape[1] // row_scale.shape[1], dim=1)


def _group_mean(values: Tensor, group_num: int) -> Tensor:
    """Means [R, G] of the groups of channels of ``values`` [R, C]."""
    return values.reshape(values.shape[0], group_num, values.shape[1] // group_num).mean(-1)


def group_scaling(values: Tensor, group_num: int, eps: float) -> tuple[Tensor, Tensor]:
    """``values`` [R, C] after the group scaling, and its factors [R, group_num] ([0]: ``group_num`` is 0, off)."""
    if not group_num:
        return values, values.new_empty(0)
    row_scale = (_group_mean(values.square(), group_num) + eps).rsqrt()
    return scale_groups(values, row_scale), row_scale


def group_scaling_gradient(grad: Tensor, values: Tensor, row_scale: Tensor, group_num: int) -> Tensor:
    """Gradient of the group scaling's input, from that of its result ``values``."""
    if not group_num:
        return grad
    along = scale_groups(values, _group_mean(grad * values, group_num))
    return scale_groups(grad - along, row_scale)


def move_forward_statistics(
    q: Tensor, count: Tensor, running_phi: Tensor, iters: Tensor, warmup_iters: int, eps: float, alpha_fwd: float
) -> Tensor:
    """One step of the statistics, in place, from the quadratic mean ``q`` [C] of this step's ``count`` rows, a scalar.

    A ``q`` that is not finite shows in the results but never enters a statistic, and a step without a row moves
    nothing. Returns [2, C] = (1/sqrt of what z is divided by, 1/sqrt(q + eps)).
    """
    counted = (count > 0).reshape(1)
    t = iters + 1
    iters.add_(counted)
    inv_batch = (q + eps).rsqrt()
    inv_used = torch.where(t <= warmup_iters, inv_batch, (running_phi + eps).rsqrt())
    steps = t.to(q.dtype)  # the quotient of two integer tensors would be float32, whatever q is
    averaged = torch.where(t < warmup_iters, running_phi * ((steps - 1) / steps) + q / steps, running_phi)
    running_phi.copy_(torch.where(q.isfinite() & counted, alpha_fwd * averaged + (1 - alpha_fwd) * q, running_phi))
    return torch.stack([inv_used, inv_batch])


def move_gradient_statistics(mean_az: Tensor, ema_gz: Tensor) -> None:
    """One step of ``ema_gz``, in place, from this step's mean of a·z [C], unless that is not finite."""
    ema_gz.add_(torch.where(mean_az.isfinite(), mean_az, 0.0))


def _forward_on_rows(
    mean: Callable, move: Callable, x: Tensor, pad_mask: Tensor | None, weight: Tensor, bias: Tensor,
    running_phi: Tensor, iters: Tensor, warmup_iters: int, group_num: int, eps: float, group_eps: float,
    alpha_fwd: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    values, row_scale = group_scaling(rows_of(x), group_num, group_eps)
    q, count = mean(values, pad_mask, running_phi)
    mean_all, _ = mean_square(values, None, empty=torch.zeros_like(running_phi))
    mean_all = torch.where(count > 0, mean_all, torch.nan)
    moved = move(q, count, running_phi, iters, warmup_iters, eps, alpha_fwd)
    y = weight * (values * moved[0]) + bias
    return like_input(y, x), torch.cat([moved, mean_all[None]]), row_scale


def _backward_on_rows(
    reduce: Callable, move: Callable, grad_y: Tensor, x: Tensor, weight: Tensor, stats: Tensor, row_scale: Tensor,
    ema_gz: Tensor, group_num: int, alpha_bkw: float, paper: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    inv_used, inv_batch = stats[0], stats[1]
    dy, values = rows_of(grad_y), rows_of(x)
    if group_num:
        values = scale_groups(values, row_scale)
    z = values * inv_used
    a = dy * weight - (1 - alpha_bkw) * ema_gz * z
    total, count = reduce((a * z).sum(0), z.shape[0])
    # The gradient does not wait for these sums: where they come from other ranks, it hides the way.
    grad = group_scaling_gradient(a * (inv_used if paper else inv_batch), values, row_scale, group_num)
    grad_weight, grad_bias = (dy * z).sum(0), dy.sum(0)
    mean_az = mean_or(total, count, torch.zeros_like(ema_gz))
    move(torch.where(stats[2].isnan(), torch.nan, mean_az), ema_gz)
    return like_input(grad, x), grad_weight, grad_bias, mean_az


def power_norm_forward_reference(
    x: Tensor,
    pad_mask: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_phi: Tensor,
    iters: Tensor,
    warmup_iters: int,
    group_num: int,
    eps: float,
    group_eps: float,
    alpha_fwd: float,
    residual: Tensor | None = None,
    s: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Training forward in plain PyTorch for x [..., C] and pad_mask [R], R rows; moves ``running_phi`` and ``iters``.

    With ``residual`` like x, x + residual is what is normalised, and written to ``s``. Returns ``y`` like x;
    ``stats`` [3, C] = (1/sqrt of what z was divided by, 1/sqrt(q + eps), mean over all rows of the squared
    group-scaled input, NaN where no row is valid, so that the backward moves nothing); ``row_scale`` [R, group_num],
    the factors of the group scaling ([0] when ``group_num`` is 0, which switches it off).
    """
    x = add_into(x, residual, s)
    return _forward_on_rows(
        mean_square, move_forward_statistics, x, pad_mask, weight, bias, running_phi, iters, warmup_iters,
        group_num, eps, group_eps, alpha_fwd,
    )  # fmt: skip


def power_norm_backward_reference(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    stats: Tensor,
    row_scale: Tensor,
    ema_gz: Tensor,
    group_num: int,
    alpha_bkw: float,
    paper: bool,
    grad_s: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The approximate gradient in plain PyTorch for grad_y and x [..., C]; updates ``ema_gz`` in place.

    ``grad_s``, the gradient that x has from elsewhere, is added to its
    gradient from here. Returns ``grad_x`` like x, ``grad_weight`` [C] and ``grad_bias`` [C].
    """
    grad_x, grad_weight, grad_bias, _ = _backward_on_rows(
        as_they_are, move_gradient_statistics, grad_y, x, weight, stats, row_scale, ema_gz, group_num, alpha_bkw,
        paper,
    )  # fmt: skip
    return grad_x if grad_s is None else grad_x + grad_s, grad_weight, grad_bias


def _fake_forward(
    x: Tensor, pad_mask: Tensor | None, weight: Tensor, bias: Tensor, running_phi: Tensor, iters: Tensor,
    warmup_iters: int, group_num: int, *_: object,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    row_scale = weight.new_empty((prod(x.shape[:-1]), group_num) if group_num else (0,))
    return torch.empty_like(x), weight.new_empty(3, x.shape[-1]), row_scale


_NORM = register_running_norm(
    "power_norm",
    name="Power Norm",
    layout=ChannelsLast,
    statistics=("running_phi", "iters"),
    gradient_statistics=("ema_gz",),
    forward=(power_norm_forward_reference, _fake_forward),
    backward=power_norm_backward_reference,
    move_forward=(move_forward_statistics, lambda q, *_: q.new_empty(2, q.shape[0])),
    move_gradient=(move_gradient_statistics, lambda *_: None),
    forward_by=_forward_on_rows,
    backward_by=_backward_on_rows,
    mean=mean_square_in_group,
    sound=lambda stats: stats[1] > 0,
    mutates=("s",),
)


def scale_channel_groups(x: Tensor, group_num: int, eps: float, dim: int) -> Tensor:
    """The group scaling of ``x`` with its channels along ``dim``, in plain ATen operations."""
    groups = x.movedim(dim, -1).unflatten(-1, (group_num, -1))
    return rms_norm(groups, groups.shape[-1:], eps=eps).flatten(-2).movedim(-1, dim)


def _evaluate(
    x: Tensor, weight: Tensor, bias: Tensor, running_phi: Tensor, group_num: int, group_eps: float, eps: float, dim: int
) -> Tensor:
    values = cast(x, running_phi.dtype)
    if group_num:
        values = scale_channel_groups(values, group_num, group_eps, dim)
    scale = per_channel(weight * torch.rsqrt(running_phi + eps), x, dim)
    return cast(torch.addcmul(per_channel(bias, x, dim), values, scale), x.dtype)


def power_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    state: PowerNormState,
    *,
    training: bool,
    pad_mask: Tensor | None = None,
    group_num: int | None = 1,
    alpha_fwd: float = 0.9,
    alpha_bkw: float = 0.9,
    warmup_iters: int = 10000,
    eps: float = 1e-5,
    backward: str = "reference",
    channel_dim: int = -1,
    process_group: ProcessGroup | None = None,
    residual: Tensor | None = None,
    group_eps: float = 1e-5,
) -> Tensor | tuple[Tensor, Tensor]:
    """Power Normalization of ``x`` over all dimensions but ``channel_dim``.

    In training the forward pass updates ``state.running_phi`` and ``iters`` in place, the backward pass
    ``ema_gz``; the gradient of ``x`` is the paper's approximation. In evaluation it is the group scaling
    followed by ``y = weight * x / sqrt(running_phi + eps) + bias``, in plain ATen operations.

    Args:
        x: any shape with C channels along ``channel_dim``; float32, bfloat16, float16 or float64.
        weight: [C] in any floating dtype; None stands for 1.
        bias: [C] in any floating dtype; None stands for 0.
        state: statistics in float32 (float64 when x is float64), see :class:`PowerNormState`.
        training: whether to use and update the statistics of this batch.
        pad_mask: bool, the shape of ``x`` without its channel dimension; True marks padding, which is
            normalised like the rest but left out of the forward statistic. Ignored in evaluation.
        group_num: number of channel groups of the group scaling, a divisor of C; None or 0 switches it off.
        alpha_fwd: share of the old value in each update of ``running_phi``.
        alpha_bkw: one minus the weight of ``ema_gz`` in the gradient.
        warmup_iters: steps that normalise by the statistic of the batch.
        eps: added to ``running_phi`` and the batch's quadratic mean, inside the square root.
        backward: "reference" divides the gradient by the statistic of the batch, as the authors' program
            does; "paper" by the statistic that the forward pass used, as their paper says.
        channel_dim: dimension of the channels.
        process_group: take the statistics of a training step over all ranks of this group; every rank must
            then call, also one without rows. None: over this process alone.
        residual: like ``x``; added to it first, s = x + residual, in the same pass.
        group_eps: added to the mean square of the group scaling, whatever ``eps`` is, as in the authors' program.

    Returns:
        A tensor of the shape and dtype of ``x``; with ``residual`` the pair of that and s, which is what was
        normalised. Gradients flow through both.

    Raises:
        TypeError: a dtype is not supported or does not match.
        ValueError: a shape, ``channel_dim``, ``group_num``, ``backward`` or a device does not match, or ``residual``
            is not like ``x``.

    Example:
        >>> from normfuse.ops import PowerNormState, power_norm
        >>> state = PowerNormState(torch.ones(8), torch.zeros(8), torch.zeros(1, dtype=torch.int64))
        >>> y = power_norm(torch.randn(32, 8), None, None, state, training=True)
        >>> y.shape, int(state.iters)
        (torch.Size([32, 8]), 1)
    """
    channels = state.running_phi.shape[0]
    check_input(x, channels, channel_dim, pad_mask, state.running_phi)
    check_options(channels, group_num, backward)
    check_residual(x, residual)
    groups = group_num or 0
    fused = training and process_group is None
    if residual is not None and not fused:
        x = x + residual
    weight, bias = gain_and_shift(weight, bias, state.running_phi)
    if not training:
        y = _evaluate(x, weight, bias, state.running_phi, groups, group_eps, eps, channel_dim)
        return y if residual is None else (y, x)
    paper = backward == "paper"
    state = state_of_this_run(state, _NORM.statistics)
    options = warmup_iters, groups, eps, group_eps, alpha_fwd
    if fused and can_run_cpp_autograd(x, channel_dim, state.skipped_forwards):
        result = _native.autograd.power_norm(
            x,
            weight,
            bias,
            residual,
            pad_mask,
            state.running_phi,
            state.iters,
            state.ema_gz,
            *options,
            alpha_bkw,
            paper,
        )
        return result[0] if residual is None else tuple(result)
    y, s = training_step(
        _NORM, x, pad_mask, weight, bias, residual if fused else None, state, options, (groups, alpha_bkw, paper),
        channel_dim, process_group,
    )  # fmt: skip
    return y if residual is None else (y, s if fused else x)


def check_options(channels: int, group_num: int | None, backward: str) -> None:
    """Raise ValueError for options of :func:`power_norm` that fit no input of ``channels`` channels."""
    if group_num is not None and (group_num < 0 or (group_num > 0 and channels % group_num)):
        raise ValueError(
            f"group_num={group_num} is not allowed with {channels} channels; "
            "give a positive divisor of the number of channels, or None to switch the group scaling off"
        )
    if backward not in ("reference", "paper"):
        raise ValueError(f'backward={backward!r} is unknown; give "reference" or "paper"')
