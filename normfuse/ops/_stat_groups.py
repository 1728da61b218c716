"""Batch normalisation and its kin on statistics groups: the operations and their autograd.

:mod:`._stat_group_references` says what they compute.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._derivatives import differentiated_again, refuse_jit_trace, transformed
from ._layout import ThreeAxes, accumulation_dtype
from ._registry import register_forward, register_operation
from ._stat_group_references import (
    MoveBelowTransforms,
    batch_norm_backward_reference,
    batch_norm_forward_reference,
    batch_norm_on_stat_groups,
    group_count,
    move_batch_statistics,
    own_statistics,
    stat_group_norm_forward_reference,
)

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def _fake_forward(x: Tensor, wanted: bool, group_size: int, sets: int) -> tuple[Tensor, Tensor, Tensor]:
    groups = group_count(x.shape[0], group_size)
    stats = x.new_empty((3, groups, sets, x.shape[1]), dtype=accumulation_dtype(x.dtype))
    return torch.empty_like(x) if wanted else x.new_empty(0), stats, x.new_empty((groups, sets), dtype=torch.int64)


_own = register_operation(
    "stat_group_norm_forward",
    stat_group_norm_forward_reference,
    lambda x, mask, weight, bias, shortcut, group_size, *_: _fake_forward(
        x, weight is not None, group_size, 1 if mask is None else 2
    ),
)
_batch, _batch_recompute_safe = register_forward(
    "batch_norm_forward",
    batch_norm_forward_reference,
    lambda x, mask, weight, bias, shortcut, mean, var, tracked, group_size, *_: _fake_forward(x, True, group_size, 1),
    statistics=STATISTICS,
)
_backward = register_operation(
    "batch_norm_backward",
    batch_norm_backward_reference,
    lambda grad_y, grad_mean, grad_var, x, mask, weight, shortcut, stats, *_: (
        torch.empty_like(x), torch.empty_like(stats[0]), torch.empty_like(stats[0]),
    ),
)  # fmt: skip
_, _move_recompute_safe = register_forward(
    "batch_norm_statistics", move_batch_statistics, lambda *_: None, statistics=STATISTICS, in_library=False
)


def move_running_statistics(*arguments: Any) -> None:
    """:func:`move_batch_statistics` alone: of a process group, or of a batch that is normalised elsewhere."""
    if torch.compiler.is_compiling():
        _move_recompute_safe(*arguments)
    elif transformed():
        MoveBelowTransforms.apply(*arguments)
    else:
        move_batch_statistics(*arguments)


class _StatGroupNorm(torch.autograd.Function):
    """Autograd of the operations; what it takes and returns, see :func:`normalise_stat_groups`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Any,
        mask: Any,
        weight: Any,
        bias: Any,
        shortcut: Any,
        channel_dim: Any,
        group: Any,
        vectors: Any,
        running: Any,
        correction: Any,
        eps: Any,
        floor: Any,
        eps_total: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        layout = ThreeAxes(x, channel_dim)
        x3 = layout.to(x)
        group_size = group * (x3.shape[0] // x.shape[0]) if group and x.numel() else 0
        gain, shift = (None if v is None else v.reshape(vectors).contiguous() for v in (weight, bias))
        given = x3, None if mask is None else layout.mask(mask), gain, shift, shortcut
        if running is None:
            y, stats, count = _own(*given, group_size, correction, eps, eps_total)
        else:
            *state, estimated, momentum = running
            forward = _batch_recompute_safe if torch.compiler.is_compiling() else _batch
            y, stats, count = forward(*given, *state, group_size, estimated, momentum, eps, floor)
        ctx.save_for_backward(x, mask, weight, shortcut, stats, count)
        ctx.layout, ctx.vectors, ctx.root = layout, vectors, (eps, floor, eps_total)
        ctx.options = group_size, running is None, correction, running is not None and running[3]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(count)
        return (y if weight is None else layout.own(y)), stats, count

    @staticmethod
    def backward(ctx: Any, grad_y: Any, grad_stats: Any, _: Any) -> Any:
        x, mask, weight, shortcut, stats, count = ctx.saved_tensors
        group_size, regions, correction, estimated = ctx.options
        x3, mask = ctx.layout.to(x), None if mask is None else ctx.layout.mask(mask)
        gain = torch.zeros_like(stats[0, :1, :1]) if weight is None else weight.reshape(ctx.vectors).contiguous()
        grad = torch.zeros_like(x3) if weight is None or grad_y is None else ctx.layout.to(grad_y)
        grad_mean, grad_var = (None, None) if grad_stats is None else (grad_stats[0], grad_stats[1])
        backward = _backward
        if differentiated_again():
            backward = batch_norm_backward_reference
            if not estimated:  # these carry no gradient
                stats = own_statistics(x3, mask, group_size, regions, correction, *ctx.root)
        grad_x, grad_weight, grad_bias = backward(
            grad, grad_mean, grad_var, x3, mask, gain, shortcut, stats, count, *ctx.options, ctx.root[1]
        )
        grad_shortcut = None
        if ctx.needs_input_grad[4]:
            grad_shortcut = (grad_weight / stats[2] + stats[0] * grad_bias).sum()[None]
        vectors = [
            g.sum_to_size(gain.shape).view(weight.shape) if needed else None
            for g, needed in zip((grad_weight, grad_bias), ctx.needs_input_grad[2:4], strict=True)
        ]
        return ctx.layout.back(grad_x), None, *vectors, grad_shortcut, *[None] * 8


def normalise_stat_groups(
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shortcut: Tensor | None,
    channel_dim: int,
    group: int,
    vectors: tuple[int, int, int] | None,
    running: tuple[Tensor, Tensor, Tensor, bool, float | None] | None,
    correction: int,
    eps: float,
    floor: float = 0.0,
    eps_total: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operations on ``x`` of any layout, with gradients.

    ``weight`` and ``bias`` can be viewed as ``vectors`` [K or 1, N or 1, C]; None: statistics alone, and y is empty.
    ``group`` samples of x make a group; 0: all. ``running`` is (running_mean, running_var, num_batches_tracked,
    estimated, momentum) of batch normalisation; None: there are no running statistics. ``floor`` is for the
    former, ``eps_total`` for the latter.

    Returns ``y`` like x; ``stats`` [3, K, N, C], whose first two, mean and variance, carry gradients; ``count`` [K, N].
    """
    if not transformed():
        refuse_jit_trace()
        return _StatGroupNorm.apply(
            x, mask, weight, bias, shortcut, channel_dim, group, vectors, running, correction, eps, floor, eps_total
        )
    layout = ThreeAxes(x, channel_dim, in_memory=False)
    x3 = layout.to(x)
    group_size = group * (x3.shape[0] // x.shape[0]) if group and x.numel() else 0
    gain, shift = (None if v is None else v.reshape(vectors) for v in (weight, bias))
    given = x3, None if mask is None else layout.mask(mask), gain, shift, shortcut
    if running is None:
        y, stats, count = stat_group_norm_forward_reference(*given, group_size, correction, eps, eps_total)
    else:
        *state, estimated, momentum = running
        move = MoveBelowTransforms.apply
        y, stats, count = batch_norm_on_stat_groups(
            move, *given, tuple(state), group_size, estimated, momentum, eps, floor
        )
    return (y if weight is None else layout.back(y)), stats, count
