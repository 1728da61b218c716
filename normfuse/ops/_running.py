"""The training step of norms whose gradient is an approximation by running statistics: Unified and Power Norm, MABN.

What is different between them is a :class:`RunningNorm`: their operations, and which statistics these move.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ._derivatives import approximate_gradient, refuse_jit_trace
from ._group import sum_in_group
from ._layout import ChannelsLast, ThreeAxes
from ._nonfinite import rollback_unless, snapshot
from ._registry import register_forward, register_operation


@dataclass(frozen=True)
class RunningNorm:
    """The operations of a norm, as its autograd uses them.

    Attributes:
        name: for messages.
        layout: of what the operations work on.
        statistics: names, in its state, of the statistics that a forward moves.
        gradient_statistics: names of those that a backward moves.
        forward: the operation on (x, pad_mask, weight, bias, *statistics, *options), and where the norm takes a
            residual that and the place for the sum. Returns y, and two tensors for the backward.
        forward_recompute_safe: its form for compiled code.
        backward: the operation on (grad_y, x, weight, *the forward's two, *gradient_statistics, *backward_options),
            and where there is one the gradient of the sum. Returns the gradients of x, weight and bias.
        forward_in_group, backward_in_group: the same with a process group in front; the backward also returns the mean
            that it moved its statistics by.
        sound: of the forward's first tensor, whether the step was finite, by channel.
    """

    name: str
    layout: type[ChannelsLast] | type[ThreeAxes]
    statistics: tuple[str, ...]
    gradient_statistics: tuple[str, ...]
    forward: Callable[..., Any]
    forward_recompute_safe: Callable[..., Any]
    backward: Callable[..., Any]
    forward_in_group: Callable[..., Any]
    backward_in_group: Callable[..., Any]
    sound: Callable[[Tensor], Tensor]


def fake_gradients(grad_y: Tensor, x: Tensor, weight: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    """What a backward operation returns, empty."""
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


def fakes_of_window(counters: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What a forward and its step of the statistics return, empty: y, ``stats`` [2, C], and so many counters."""

    def move(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        return q.new_empty(2, q.shape[0]), q.new_empty(counters, dtype=torch.int64)

    return lambda x, pad_mask, weight, *_: (torch.empty_like(x), *move(weight)), move


def register_running_norm(
    prefix: str,
    *,
    name: str,
    layout: type[ChannelsLast] | type[ThreeAxes],
    statistics: tuple[str, ...],
    gradient_statistics: tuple[str, ...],
    forward: tuple[Callable[..., Any], Callable[..., Any]],
    backward: Callable[..., Any],
    move_forward: tuple[Callable[..., Any], Callable[..., Any]],
    move_gradient: tuple[Callable[..., Any], Callable[..., Any]],
    forward_by: Callable[..., Any],
    backward_by: Callable[..., Any],
    mean: Callable[..., Any],
    sound: Callable[[Tensor], Tensor],
    mutates: tuple[str, ...] = (),
) -> RunningNorm:
    """Register the operations ``<prefix>_forward`` and ``_backward``, and the steps of the statistics alone.

    References come with their fakes; a backward's is :func:`fake_gradients`. The steps alone are for synchronised
    training: ``forward_by(mean, move, ...)`` and ``backward_by(sum, move, ...)`` are the references with what they take
    sums and move statistics by, ``mean`` is the former over a group.
    """
    step, step_recompute_safe = register_forward(f"{prefix}_forward", *forward, statistics=statistics, mutates=mutates)
    gradient = register_operation(f"{prefix}_backward", backward, fake_gradients, mutates=gradient_statistics)
    _, move = register_forward(f"{prefix}_statistics", *move_forward, statistics=statistics, in_library=False)
    pull = register_operation(
        f"{prefix}_gradient_statistics", *move_gradient, mutates=gradient_statistics, in_library=False
    )
    return RunningNorm(
        name=name,
        layout=layout,
        statistics=statistics,
        gradient_statistics=gradient_statistics,
        forward=step,
        forward_recompute_safe=step_recompute_safe,
        backward=gradient,
        forward_in_group=lambda group, *given: forward_by(partial(mean, group), move, *given),
        backward_in_group=lambda group, *given: backward_by(partial(sum_in_group, group), pull, *given),
        sound=sound,
    )


class _Step(torch.autograd.Function):
    """Returns y, s (None without a residual), and what the backward needs besides x or s."""

    @staticmethod
    def forward(
        x: Any,
        pad_mask: Any,
        weight: Any,
        bias: Any,
        residual: Any,
        norm: Any,
        state: Any,
        options: Any,
        backward_options: Any,
        channel_dim: Any,
        group: Any,
    ) -> Any:
        layout = norm.layout(x, channel_dim)
        given = layout.to(x)
        mask = None if pad_mask is None else layout.mask(pad_mask)
        moved = tuple(getattr(state, name) for name in norm.statistics)
        skipped = getattr(state, "skipped_forwards", None)
        before = snapshot(skipped, moved)
        addend = () if residual is None else (layout.to(residual), torch.empty_like(given))
        arguments = given, mask, weight, bias, *moved, *options
        if group is not None:
            y, stats, kept = norm.forward_in_group(group, *arguments)
        elif torch.compiler.is_compiling():
            y, stats, kept = norm.forward_recompute_safe(*arguments, *addend)
        else:
            y, stats, kept = norm.forward(*arguments, *addend)
        rollback_unless(lambda: norm.sound(stats), skipped, moved, before)
        return layout.own(y), layout.own(addend[1]) if addend else None, stats, kept

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> Any:
        x, _, weight, _, residual, norm, state, _, backward_options, channel_dim, group = inputs
        _, s, stats, kept = output
        ctx.mark_non_differentiable(stats, kept)
        ctx.save_for_backward(x if residual is None else s, weight, stats, kept)
        # Not saved for backward: the backward pass reads and updates the state as it is then, on purpose.
        ctx.moved = tuple(getattr(state, name) for name in norm.gradient_statistics)
        ctx.skipped = getattr(state, "skipped_backwards", None)
        ctx.norm, ctx.options, ctx.layout, ctx.group = norm, backward_options, norm.layout(x, channel_dim), group
        ctx.set_materialize_grads(False)

    @staticmethod
    @approximate_gradient
    def backward(ctx: Any, grad_y: Any, grad_s: Any, *_: Any) -> Any:
        if grad_y is None:  # only s was used: nothing came through the norm
            return grad_s, None, None, None, grad_s, *[None] * 6
        x, weight, stats, kept = ctx.saved_tensors
        before = snapshot(ctx.skipped, ctx.moved)
        arguments = ctx.layout.to(grad_y), ctx.layout.to(x), weight, stats, kept, *ctx.moved, *ctx.options
        if ctx.group is not None:
            grad_x, grad_weight, grad_bias, mean = ctx.norm.backward_in_group(ctx.group, *arguments)
            sound = mean.isfinite  # not of this rank's sums: all ranks must agree
        else:
            others = () if grad_s is None else (ctx.layout.to(grad_s),)
            grad_x, grad_weight, grad_bias = ctx.norm.backward(*arguments, *others)

            def sound() -> Tensor:
                return grad_weight.isfinite() & grad_bias.isfinite()

        rollback_unless(sound, ctx.skipped, ctx.moved, before)
        grad_x = ctx.layout.back(grad_x)
        return grad_x, None, grad_weight, grad_bias, grad_x if ctx.needs_input_grad[4] else None, *[None] * 6

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        raise RuntimeError(
            f"torch.func.vmap cannot run {arguments[5].name} in training: all samples share its running statistics. "
            "Call norm.eval() first, or loop over the samples"
        )


def training_step(
    norm: RunningNorm,
    x: Tensor,
    pad_mask: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    state: Any,
    options: tuple[Any, ...],
    backward_options: tuple[Any, ...],
    channel_dim: int,
    group: ProcessGroup | None,
) -> tuple[Tensor, Tensor | None]:
    """y and s = x + residual (None without one), with gradients; moves ``state``.

    Over a ``group`` there is no residual: add it before.
    """
    refuse_jit_trace()
    y, s, *_ = _Step.apply(
        x, pad_mask, weight, bias, residual, norm, state, options, backward_options, channel_dim, group
    )
    return y, s
