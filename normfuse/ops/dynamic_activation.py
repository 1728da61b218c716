"""What replaces a norm without any statistics: a bounded function of the scaled input, with gain and shift.

Dynamic Tanh (Zhu et al., 2025, arXiv 2503.10622) and Dynamic erf (Chen et al., 2025, arXiv 2512.10938):
``y = weight * f(u) + bias`` with ``u = alpha * x + shift``, where f is tanh (without a shift) or erf. The channels are
the last dimension. One pass over memory forward and one backward, in which f is computed again: for backward, x and the
parameters are kept.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _native
from ._derivatives import differentiated_again, plain_only
from ._layout import (
    accumulation_dtype,
    cast,
    check_device,
    check_dtype,
    check_tensor,
    check_vectors,
    like_input,
    rows_of,
)
from ._registry import can_run_cpp_autograd, register_composition, register_operation

TANH, ERF = range(2)  # the curves, as the kernels number them


def _argument(x: Tensor, alpha: Tensor, shift: Tensor | None) -> Tensor:
    return alpha * x if shift is None else alpha * x + shift


def dynamic_activation_forward_reference(
    x: Tensor, alpha: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, curve: int
) -> Tensor:
    """Forward in plain PyTorch on ``x`` [..., C]; returns ``y``, like x.

    ``alpha`` and ``shift`` are scalars, ``weight`` and ``bias`` [C], all float32 (float64 for float64).
    """
    u = _argument(x.to(accumulation_dtype(x.dtype)), alpha, shift)
    return torch.addcmul(bias, torch.tanh(u) if curve == TANH else torch.erf(u), weight).to(x.dtype)


def dynamic_activation_backward_reference(
    grad_y: Tensor, x: Tensor, alpha: Tensor, shift: Tensor | None, weight: Tensor, curve: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients in plain PyTorch.

    ``grad_x`` is like x, those of ``alpha`` and ``shift`` (also without one) are scalars, ``grad_weight`` and
    ``grad_bias`` [C].
    """
    values, dy = rows_of(x), rows_of(grad_y)
    u = _argument(values, alpha, shift)
    if curve == TANH:
        f = torch.tanh(u)
        slope = 1 - f.square()
    else:
        f, slope = torch.erf(u), 2 / math.sqrt(math.pi) * torch.exp(-u.square())
    g = dy * weight * slope
    return like_input(alpha * g, x), (g * values).sum(), g.sum(), (dy * f).sum(0), dy.sum(0)


def dynamic_activation_gradient(
    grad_y: Tensor, x: Tensor, alpha: Tensor, shift: Tensor | None, weight: Tensor, curve: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same for a backward pass that is differentiated in turn."""
    return dynamic_activation_backward_reference(grad_y, x, alpha, shift, weight, curve)


register_composition(dynamic_activation_gradient)
_forward = register_operation(
    "dynamic_activation_forward", dynamic_activation_forward_reference, lambda x, *_: torch.empty_like(x)
)
_backward = register_operation(
    "dynamic_activation_backward",
    dynamic_activation_backward_reference,
    lambda grad_y, x, alpha, shift, weight, curve: (
        torch.empty_like(x), weight.new_empty(()), weight.new_empty(()), torch.empty_like(weight),
        torch.empty_like(weight),
    ),
)  # fmt: skip


class _DynamicActivation(torch.autograd.Function):
    """Autograd of the two operations, on a contiguous x. Keeps x and the parameters for backward."""

    @staticmethod
    def forward(ctx: Any, x: Any, alpha: Any, shift: Any, weight: Any, bias: Any, curve: Any) -> Any:
        ctx.save_for_backward(x, alpha, shift, weight)
        ctx.curve = curve
        return _forward(x, alpha, shift, weight, bias, curve)

    @staticmethod
    def backward(ctx: Any, grad_y: Any) -> Any:
        run = dynamic_activation_gradient if differentiated_again() else _backward
        x, alpha, shift, weight = ctx.saved_tensors
        gradients = run(grad_y.contiguous(), x, alpha, shift, weight, ctx.curve)
        grad_x, grad_alpha, grad_shift, grad_weight, grad_bias = gradients
        return grad_x, grad_alpha, None if shift is None else grad_shift, grad_weight, grad_bias, None


def _check(x: Tensor, scalars: dict[str, Tensor | None], vectors: dict[str, Tensor]) -> None:
    check_dtype("x", x)
    check_vectors(x, **vectors)
    for name, scalar in scalars.items():
        if scalar is None:
            continue
        check_tensor(name, scalar)
        if scalar.numel() != 1:
            raise ValueError(f"{name} has shape {tuple(scalar.shape)}; it must hold one number")
        check_device(x, name, scalar)


def _dynamic_activation(
    curve: int, x: Tensor, alpha: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, fused: bool
) -> Tensor:
    _check(x, {"alpha": alpha, "shift": shift}, {"weight": weight, "bias": bias})
    if not fused or plain_only(x):
        alpha, weight, bias = (cast(p, x.dtype) for p in (alpha, weight, bias))
        u = _argument(x, alpha, None if shift is None else cast(shift, x.dtype))
        return torch.addcmul(bias, torch.tanh(u) if curve == TANH else torch.erf(u), weight)
    acc = accumulation_dtype(x.dtype)
    alpha, shift = (None if p is None else cast(p, acc) for p in (alpha, shift))
    alpha, shift = (p.reshape(()) if p is not None and p.dim() else p for p in (alpha, shift))
    weight, bias = (cast(p, acc).contiguous() for p in (weight, bias))
    step = _native.autograd.dynamic_activation if can_run_cpp_autograd(x) else _DynamicActivation.apply
    return step(x.contiguous(), alpha, shift, weight, bias, curve)


def dynamic_tanh(x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor, *, fused: bool = True) -> Tensor:
    """``weight * tanh(alpha * x) + bias`` over the last dimension.

    Computed in float32 (float64 for float64 input) and rounded once. Differentiable any number of times, also under
    torch.func; from the second time on in plain ATen operations.

    Args:
        x: any shape with C channels in the last dimension; float32, bfloat16, float16 or float64.
        alpha: one number, in any floating dtype.
        weight: [C] in any floating dtype.
        bias: [C] in any floating dtype.
        fused: False computes it in plain ATen operations in the dtype of x, which ``torch.export`` and folding know.

    Returns:
        A tensor of the shape and dtype of x.

    Raises:
        TypeError: the dtype of x is not supported.
        ValueError: a shape or device does not match.

    Example:
        >>> from normfuse.ops import dynamic_tanh
        >>> dynamic_tanh(torch.zeros(1, 2), torch.tensor(0.5), torch.ones(2), torch.ones(2))
        tensor([[1., 1.]])
    """
    return _dynamic_activation(TANH, x, alpha, None, weight, bias, fused)


def dynamic_erf(x: Tensor, alpha: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, *, fused: bool = True) -> Tensor:
    """``weight * erf(alpha * x + shift) + bias`` over the last dimension; ``shift`` is one number like ``alpha``.

    Else as :func:`dynamic_tanh`.

    Args:
        x: any shape with C channels in the last dimension; float32, bfloat16, float16 or float64.
        alpha: one number, in any floating dtype.
        shift: one number, likewise.
        weight: [C] in any floating dtype.
        bias: [C] in any floating dtype.
        fused: False computes it in plain ATen operations in the dtype of x, which ``torch.export`` and folding
            know.

    Returns:
        A tensor of the shape and dtype of x.

    Raises:
        TypeError: the dtype of x is not supported.
        ValueError: a shape or device does not match.

    Example:
        >>> from normfuse.ops import dynamic_erf
        >>> dynamic_erf(torch.zeros(1, 2), torch.tensor(0.5), torch.tensor(0.0), torch.ones(2), torch.ones(2))
        tensor([[1., 1.]])
    """
    return _dynamic_activation(ERF, x, alpha, shift, weight, bias, fused)
