"""What the autograd functions share: results that are no views, transforms of torch.func, second derivatives."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation acts on what runs now.

    Norms with an exact gradient are then plain operations, which every transform knows.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def refuse_jit_trace() -> None:
    """Raise if ``torch.jit.trace`` records what runs now, a training step in Python."""
    if torch.jit.is_tracing():
        raise RuntimeError("torch.jit.trace cannot record a training step of a norm: call model.eval() before tracing")


def plain_only(x: Tensor) -> bool:
    """Whether only plain operations know what ``x`` is or what acts on it: transforms, parts of several processes."""
    return transformed() or type(x).__name__ == "DTensor"


def differentiated_again() -> bool:
    """Inside a backward pass: whether its result is to be differentiated (``create_graph=True``)."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def without_view(rearrange: Callable[..., Tensor], result: Tensor, *options: object) -> Tensor:
    """``rearrange(result, *options)``, which shares memory with ``result`` alone, as a tensor that is no view.

    What an autograd function returns can be changed in place, by an activation say, unless it is a view.
    """
    if torch.compiler.is_compiling():  # which knows no way but a copy; the compiler fuses it with what comes next
        moved = rearrange(result, *options)
        return moved if moved is result else moved.clone()
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return rearrange(result, *options)


def why_not_again(norm: str) -> str:
    """Why an approximate gradient is not differentiated."""
    return (
        f"the gradient of {norm} is an approximation by running statistics, not the derivative of its forward pass, "
        "so it has no derivative (create_graph=True). For gradient penalties and Hessian products take a norm whose "
        "gradient is exact, such as MaskedBatchNorm or LayerNorm, or call norm.eval() first"
    )


class _Refusal(torch.autograd.Function):
    """Hands a gradient on; refuses to be differentiated. What it depends on makes it part of the graph."""

    generate_vmap_rule = True

    @staticmethod
    def forward(reason: Any, gradient: Any, *depends_on: Any) -> Any:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> Any:
        ctx.reason = inputs[0]

    @staticmethod
    def backward(ctx: Any, _: Any) -> Any:
        raise RuntimeError(ctx.reason)


def approximate_gradient(backward: Callable) -> Callable:
    """Decorator of a backward with ``ctx.norm``, whose first saved tensor is what it normalised."""

    @wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not differentiated_again():
            return results
        depends_on = [grad for grad in (*grads, ctx.saved_tensors[0]) if grad is not None]
        reason = why_not_again(ctx.norm.name)
        return tuple(None if r is None else _Refusal.apply(reason, r, *depends_on) for r in results)

    return run


class _CopyBelowTransforms(torch.autograd.Function):
    @staticmethod
    def forward(target: Any, value: Any) -> Any:
        return target.copy_(value).clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> Any:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, _: Any) -> Any:
        return None, None

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        return None

    @staticmethod
    def vmap(info: Any, in_dims: Any, target: Any, value: Any) -> Any:
        if in_dims[0] is None:
            raise RuntimeError(
                "torch.func.vmap cannot move a buffer that all samples share: call eval() first, or give each sample "
                "its own (torch.func.stack_module_state)"
            )
        value = value if in_dims[1] is None else value.movedim(in_dims[1], 0)
        return target.movedim(in_dims[0], 0).copy_(value).clone(), 0


def copy_into(target: Tensor, value: Tensor) -> None:
    """``target.copy_(value)`` of a buffer, which transforms of torch.func refuse."""
    if transformed():
        _CopyBelowTransforms.apply(target, value.detach())
    else:
        target.copy_(value)
