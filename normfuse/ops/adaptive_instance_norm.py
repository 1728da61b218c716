"""Adaptive Instance Normalization (Huang & Belongie, 2017, arXiv 1703.06868): content in the statistics of a style."""

from __future__ import annotations

import torch
from torch import Tensor

from ._layout import accumulation_dtype, cast


def instance_statistics(x: Tensor, *, eps: float = 1e-5, unbiased: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and ``sqrt(var + eps)`` of each sample and channel of ``x`` [B, C, ...], both [B, C], float32 or wider."""
    values = cast(x, accumulation_dtype(x.dtype)).flatten(2)
    var, mean = torch.var_mean(values, dim=2, correction=int(unbiased))
    return mean, torch.sqrt(var + eps)


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
    mean, std = instance_statistics(x, eps=eps, unbiased=unbiased)
    trailing = (1,) * (x.dim() - 2)
    mean, std, style_mean, style_std = (v.reshape(*v.shape, *trailing) for v in (mean, std, style_mean, style_std))
    y = torch.addcmul(style_mean, (cast(x, mean.dtype) - mean) / std, style_std)
    if not (isinstance(alpha, (int, float)) and alpha == 1):
        y = torch.lerp(cast(x, y.dtype), y, alpha)
    return cast(y, x.dtype)
