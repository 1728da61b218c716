"""LayerNorm, RMSNorm and CRMSNorm, with the residual add in the same pass.

Their statistics come from each row, the channels of one position, so they stay in a deployed model; they are here
to be compared with the norms that do not, and because they are everywhere. With n channels, z is the row

- LayerNorm (Ba et al., 2016, arXiv 1607.06450): minus its mean, divided by sqrt(mean of that squared + eps);
- RMSNorm (Zhang and Sennrich, 2019, arXiv 1910.07467): divided by sqrt(Σx²/n + eps);
- CRMSNorm (Jiang et al., 2023, arXiv 2305.14858): divided by sqrt((Σx² + (Σx)²)/(n + 1) + eps), the RMSNorm of
  n + 1 channels with mean zero whose last one is left out, because it is minus the sum of the others,

and ``y = weight * z + bias``. ``residual`` is added first: s = x + residual is what is normalised, and the second
result. The channels are the last dimension. For backward, x (or s) and one or two numbers a row are kept.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _native
from ._derivatives import differentiated_again, plain_only
from ._layout import accumulation_dtype, cast, check_dtype, check_residual, check_vectors, like_input, rows_of
from ._registry import can_run_cpp_autograd, register_composition, register_operation

LAYER, RMS, CRMS = range(3)  # the kinds of row norm, as the kernels number them


def _mean_square(centred: Tensor, kind: int) -> Tensor:
    """[R, 1] numbers under the square root, without eps, of [R, n] rows that have lost their mean where they must."""
    if kind != CRMS:
        return centred.square().mean(-1, keepdim=True)
    return (centred.square().sum(-1, keepdim=True) + centred.sum(-1, keepdim=True).square()) / (centred.shape[-1] + 1)


def _centre_and_scale(s: Tensor, kind: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """[R, n] rows without the mean where that goes, and [R, 1]: 1/sqrt(... + eps) and mean."""
    values = rows_of(s)
    mean = values.mean(-1, keepdim=True)
    centred = values - mean if kind == LAYER else values
    return centred, (_mean_square(centred, kind) + eps).rsqrt(), mean


def row_norm_forward_reference(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, kind: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward in plain PyTorch on x [..., C] of R rows; ``weight`` and ``bias`` [C] are float32 (float64 for float64).

    Returns ``y`` like x; ``s`` = x + residual like x ([0] without a residual); ``stats`` [2, R], 1/sqrt(... + eps) and
    mean of each row, without the mean [1, R] for RMSNorm.
    """
    s = x if residual is None else x + residual
    centred, inv_std, mean = _centre_and_scale(s, kind, eps)
    y = centred * inv_std
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    stats = torch.cat([inv_std] if kind == RMS else [inv_std, mean], dim=1).t().contiguous()
    return like_input(y, x), x.new_empty(0) if residual is None else s, stats


def _gradients(
    grad_y: Tensor, grad_s: Tensor | None, s: Tensor, weight: Tensor | None, inv_std: Tensor, mean: Tensor, kind: int
) -> tuple[Tensor, Tensor, Tensor]:
    channels = s.shape[-1]
    values, dy = rows_of(s), rows_of(grad_y)
    z = (values - mean if kind == LAYER else values) * inv_std
    g = dy if weight is None else dy * weight
    along = (g * z).sum(-1, keepdim=True) / (channels + 1 if kind == CRMS else channels)
    grad = g - z * along
    if kind == LAYER:
        grad = grad - g.mean(-1, keepdim=True)
    elif kind == CRMS:
        grad = grad - mean * channels * inv_std * along
    grad = grad * inv_std
    if grad_s is not None:
        grad = grad + rows_of(grad_s)
    return like_input(grad, s), (dy * z).sum(0), dy.sum(0)


def row_norm_backward_reference(
    grad_y: Tensor, grad_s: Tensor | None, s: Tensor, weight: Tensor | None, stats: Tensor, kind: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients in plain PyTorch for s [..., C]; ``grad_s`` is that of the second result, None for zero.

    Returns ``grad_x`` like s, which is also the residual's, ``grad_weight`` [C] and ``grad_bias`` [C].
    """
    return _gradients(grad_y, grad_s, s, weight, stats[0, :, None], stats[-1, :, None], kind)


def row_norm_gradient(
    grad_y: Tensor, grad_s: Tensor | None, s: Tensor, weight: Tensor | None, kind: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The same from s itself, for a backward pass that is differentiated in turn."""
    return _gradients(grad_y, grad_s, s, weight, *_centre_and_scale(s, kind, eps)[1:], kind)


register_composition(row_norm_gradient)


def _fake_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, kind: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    stats = x.new_empty((1 if kind == RMS else 2, prod(x.shape[:-1])), dtype=accumulation_dtype(x.dtype))
    return torch.empty_like(x), x.new_empty(0) if residual is None else torch.empty_like(x), stats


_forward = register_operation("row_norm_forward", row_norm_forward_reference, _fake_forward)
_backward = register_operation(
    "row_norm_backward",
    row_norm_backward_reference,
    lambda grad_y, grad_s, s, weight, stats, kind: (
        torch.empty_like(s), stats.new_empty(s.shape[-1]), stats.new_empty(s.shape[-1]),
    ),
)  # fmt: skip


class _RowNorm(torch.autograd.Function):
    """Autograd of the two operations, on contiguous tensors. Keeps x or s, the weight and ``stats`` for backward."""

    @staticmethod
    def forward(ctx: Any, x: Any, residual: Any, weight: Any, bias: Any, kind: Any, eps: Any) -> Any:
        y, s, stats = _forward(x, residual, weight, bias, kind, eps)
        ctx.save_for_backward(x if residual is None else s, weight, stats)
        ctx.kind, ctx.eps, ctx.has_bias = kind, eps, bias is not None
        ctx.set_materialize_grads(False)
        return y if residual is None else (y, s)

    @staticmethod
    def backward(ctx: Any, grad_y: Any, grad_s: Any = None) -> Any:
        if grad_y is None:  # only s was used
            return grad_s, grad_s, *[None] * 4
        s, weight, stats = ctx.saved_tensors
        grad_y, grad_s = grad_y.contiguous(), None if grad_s is None else grad_s.contiguous()
        if differentiated_again():
            grad_x, grad_weight, grad_bias = row_norm_gradient(grad_y, grad_s, s, weight, ctx.kind, ctx.eps)
        else:
            grad_x, grad_weight, grad_bias = _backward(grad_y, grad_s, s, weight, stats, ctx.kind)
        return (
            grad_x,
            grad_x if ctx.needs_input_grad[1] else None,
            None if weight is None else grad_weight,
            grad_bias if ctx.has_bias else None,
            *[None] * 2,
        )


def _plain(s: Tensor, weight: Tensor | None, bias: Tensor | None, kind: int, eps: float) -> Tensor:
    """What an exported program holds: torch's own operation, or CRMSNorm's formula."""
    own = kind != CRMS and all(vector is None or vector.dtype == s.dtype for vector in (weight, bias))
    dtype = s.dtype if own else accumulation_dtype(s.dtype)
    values = cast(s, dtype)
    weight = None if weight is None else cast(weight, dtype)
    bias = None if bias is None else cast(bias, dtype)
    shape = values.shape[-1:]
    if kind == LAYER:
        y = F.layer_norm(values, shape, weight, bias, eps)
    elif kind == RMS:
        y = F.rms_norm(values, shape, weight, eps)
    else:
        y = values * torch.rsqrt(_mean_square(values, kind) + eps)
        y = y if weight is None else y * weight
    return cast(y, s.dtype)


def _row_norm(
    kind: int, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    eps: float | None, unit_offset: bool, fused: bool,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    check_dtype("x", x)
    check_vectors(x, weight=weight, bias=bias)
    check_residual(x, residual)
    acc = accumulation_dtype(x.dtype)
    eps = torch.finfo(acc).eps if eps is None else eps
    if unit_offset and weight is not None:
        weight = 1 + cast(weight, acc)
    if not fused or plain_only(x):
        s = x if residual is None else x + residual
        y = _plain(s, weight, bias, kind, eps)
        return y if residual is None else (y, s)
    weight = None if weight is None else cast(weight, acc).contiguous()
    bias = None if bias is None else cast(bias, acc).contiguous()
    if can_run_cpp_autograd(x):
        result = _native.autograd.row_norm(x, weight, bias, residual, None, kind, eps)
        return result[0] if residual is None else tuple(result)
    residual = None if residual is None else residual.contiguous()
    return _RowNorm.apply(x.contiguous(), residual, weight, bias, kind, eps)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    unit_offset: bool = False,
    fused: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm over the last dimension: ``weight * (s - mean) / sqrt(var + eps) + bias`` with s = x + residual.

    Computed in float32 (float64 for float64 input) and rounded once. A bfloat16 or float16 s is rounded before it is
    normalised, as ``x + residual`` would be. Differentiable as often as torch's own, also under torch.func; from the
    second time on in plain ATen operations.

    Args:
        x: any shape with C channels in the last dimension; float32, bfloat16, float16 or float64.
        weight: [C] in any floating dtype; None stands for 1.
        bias: [C] in any floating dtype; None stands for 0.
        residual: like x; added to it first.
        eps: added to the variance, inside the square root.
        unit_offset: the gain is ``1 + weight``, as in Gemma, instead of ``weight``.
        fused: False computes the same in plain ATen operations, which ``torch.export`` and folding know.

    Returns:
        y, of the shape and dtype of x; with ``residual`` the pair (y, s). Gradients flow through both.

    Raises:
        TypeError: the dtype of x is not supported.
        ValueError: a shape or device does not match, or ``residual`` is not like x.

    Example:
        >>> from normfuse.ops import layer_norm
        >>> layer_norm(torch.tensor([[1.0, 3.0]]), eps=0.0)
        tensor([[-1.,  1.]])
    """
    return _row_norm(LAYER, x, residual, weight, bias, eps, unit_offset, fused)


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    eps: float | None = 1e-6,
    unit_offset: bool = False,
    fused: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm over the last dimension: ``weight * s / sqrt(mean of s² + eps)`` with s = x + residual.

    Else as :func:`layer_norm`.

    Args:
        x: any shape with C channels in the last dimension; float32, bfloat16, float16 or float64.
        weight: [C] in any floating dtype; None stands for 1.
        residual: like x; added to it first.
        eps: added to the mean square, inside the square root; None takes that of the dtype computed in, as torch
            does.
        unit_offset: the gain is ``1 + weight``, as in Gemma, instead of ``weight``.
        fused: False computes the same in plain ATen operations, which ``torch.export`` and folding know.

    Returns:
        y, of the shape and dtype of x; with ``residual`` the pair (y, s). Gradients flow through both.

    Raises:
        TypeError: the dtype of x is not supported.
        ValueError: a shape or device does not match, or ``residual`` is not like ``x``.

    Example:
        >>> from normfuse.ops import rms_norm
        >>> rms_norm(torch.tensor([[3.0, 4.0]]), eps=0.0)
        tensor([[0.8485, 1.1314]])
    """
    return _row_norm(RMS, x, residual, weight, None, eps, unit_offset, fused)


def crms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    eps: float | None = 1e-5,
    unit_offset: bool = False,
    fused: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """CRMSNorm over the last dimension: ``weight * s / sqrt((Σs² + (Σs)²)/(C + 1) + eps)`` with s = x + residual.

    That is RMSNorm of C + 1 channels with mean zero, of which x holds the first C. Else as :func:`rms_norm`.

    Args:
        x: any shape with C channels in the last dimension; float32, bfloat16, float16 or float64.
        weight: [C] in any floating dtype; None stands for 1.
        residual: like x; added to it first.
        eps: added to the mean square, inside the square root; None: ``torch.finfo(dtype).eps`` of the dtype computed
            in.
        unit_offset: the gain is ``1 + weight``, as in Gemma, instead of ``weight``.
        fused: False computes the same in plain ATen operations, which ``torch.export`` and folding know.

    Returns:
        y, of the shape and dtype of x; with ``residual`` the pair (y, s). Gradients flow through both.

    Raises:
        TypeError: the dtype of x is not supported.
        ValueError: a shape or device does not match, or ``residual`` is not like ``x``.

    Example:
        >>> from normfuse.ops import crms_norm
        >>> crms_norm(torch.tensor([[1.0, -1.0]]), eps=0.0)  # the third channel is 0
        tensor([[ 1.2247, -1.2247]])
    """
    return _row_norm(CRMS, x, residual, weight, None, eps, unit_offset, fused)
