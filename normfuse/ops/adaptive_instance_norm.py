"""Adaptive Instance Normalization (Huang & Belongie, 2017, arXiv 1703.06868): content in the statistics of a style."""

from __future__ import annotations

import torch
from torch import Tensor

from ._layout import accumulation_dtype, cast


def _centred(x: Tensor, eps: float, unbiased: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Deviations [B, C, rest], mean and ``sqrt(var + eps)`` [B, C, 1] of each sample and channel."""
    values = cast(x, accumulation_dtype(x.dtype)).flatten(2)
    mean = values.mean(2, keepdim=True)
    deviation = values - mean
    length = torch.linalg.vector_norm(deviation, dim=2, keepdim=True)
    return deviation, mean, torch.sqrt(length.square() / (values.shape[2] - int(unbiased)) + eps)


def instance_statistics(x: Tensor, *, eps: float = 1e-5, unbiased: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and ``sqrt(var + eps)`` of each sample and channel of ``x`` [B, C, ...], both [B, C], float32 or wider."""
    _, mean, std = _centred(x, eps, unbiased)
    return mean.squeeze(2), std.squeeze(2)


def adaptive_instance_norm(
    x: Tensor,
    style_mean: Tensor,
    style_std: Tensor,
    *,
    alpha: float | Tensor = 1.0,
    eps: float = 1e-5,
    unbiased: bool = False,
) -> Tensor:
    """``style_std * (x - mean(x)) / std(x) + style_mean`` per sample and channel, blended with ``x`` by ``alpha``.

    Args:
        x: [B, C, ...], the content.
        style_mean, style_std: [B, C] or [C].
        alpha: share of the result; the rest is ``x``.
        eps: added to the variance.
        unbiased: divide the variance by n − 1 instead of n. Authors' programs differ.

    Returns:
        A tensor of the shape and dtype of ``x``.
    """
    deviation, _, std = _centred(x, eps, unbiased)
    style_mean, style_std = style_mean[..., None], style_std[..., None]
    if style_std.dim() < 3:  # one style for all: on its own, its part is a map with constants, which folds
        y = torch.addcmul(style_mean, deviation / std, style_std)
    else:
        y = torch.addcmul(style_mean, deviation, style_std / std)
    y = y.unflatten(2, x.shape[2:]) if x.dim() > 3 else y
    if not (isinstance(alpha, (int, float)) and alpha == 1):
        y = torch.lerp(cast(x, y.dtype), y, alpha)
    return cast(y, x.dtype)
