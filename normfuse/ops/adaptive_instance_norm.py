"""Adaptive Instance Normalization (Huang & Belongie, 2017, arXiv 1703.06868): content in the statistics of a style."""

from __future__ import annotations

import torch
from torch import Tensor

from ._derivatives import transformed
from ._layout import accumulation_dtype, cast, check_device, check_dtype, check_tensor, is_traced
from ._stat_groups import normalise_stat_groups


def _centred(x: Tensor, eps: float, unbiased: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Deviations [B, C, rest], mean and ``sqrt(var + eps)`` [B, C, 1] of each sample and channel."""
    values = cast(x, accumulation_dtype(x.dtype)).flatten(2)
    mean = values.mean(2, keepdim=True)
    deviation = values - mean
    length = torch.linalg.vector_norm(deviation, dim=2, keepdim=True)
    return deviation, mean, torch.sqrt(length.square() / (values.shape[2] - int(unbiased)) + eps)


def _fused(x: Tensor, fused: bool) -> bool:
    """Whether the kernels do it: an exported program is made of plain operations."""
    return fused and x.numel() > 0 and not is_traced() and not transformed()


def check_samples(name: str, x: Tensor) -> None:
    """Raise unless the argument called ``name`` is floating and has samples, channels and positions."""
    check_dtype(name, x)
    if x.dim() < 3:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; give [B, C, ...] with at least one dimension behind C")


def instance_statistics(
    x: Tensor, *, eps: float = 1e-5, unbiased: bool = False, fused: bool = True
) -> tuple[Tensor, Tensor]:
    """Mean and ``sqrt(var + eps)`` of each sample and channel.

    Args:
        x: [B, C, ...], floating point.
        eps: added to the variance.
        unbiased: divide the variance by n − 1 instead of n.
        fused: False computes the same in plain ATen operations.

    Returns:
        The two, [B, C] each, in float32 or wider.

    Raises:
        TypeError, ValueError: a dtype or shape is not allowed.

    Example:
        >>> from normfuse.ops import instance_statistics
        >>> instance_statistics(torch.ones(1, 2, 4, 4), eps=0.0)
        (tensor([[1., 1.]]), tensor([[0., 0.]]))
    """
    check_samples("x", x)
    if not _fused(x, fused):
        _, mean, std = _centred(x, eps, unbiased)
        return mean.squeeze(2), std.squeeze(2)
    _, stats, _ = normalise_stat_groups(x, None, None, None, None, 1, 1, None, None, int(unbiased), eps)
    return stats[0].squeeze(1), torch.sqrt(stats[1].squeeze(1) + eps)


def adaptive_instance_norm(
    x: Tensor,
    style_mean: Tensor,
    style_std: Tensor,
    *,
    alpha: float | Tensor = 1.0,
    eps: float = 1e-5,
    unbiased: bool = False,
    fused: bool = True,
) -> Tensor:
    """``style_std * (x - mean(x)) / std(x) + style_mean`` per sample and channel, blended with ``x`` by ``alpha``.

    Args:
        x: [B, C, ...], the content.
        style_mean: [B, C] or [C].
        style_std: [B, C] or [C].
        alpha: share of the result; the rest is ``x``.
        eps: added to the variance.
        unbiased: divide the variance by n − 1 instead of n. Authors' programs differ.
        fused: False computes the same in plain ATen operations.

    Returns:
        A tensor of the shape and dtype of ``x``.

    Raises:
        TypeError, ValueError: a dtype, shape or device does not match.

    Example:
        >>> from normfuse.ops import adaptive_instance_norm
        >>> y = adaptive_instance_norm(torch.randn(2, 3, 8, 8), torch.zeros(3), torch.ones(3))
        >>> bool(y.mean((2, 3)).abs().max() < 1e-5)
        True
    """
    check_samples("x", x)
    for name, vector in (("style_mean", style_mean), ("style_std", style_std)):
        check_tensor(name, vector)
        if vector.shape not in (x.shape[:2], x.shape[1:2]):
            raise ValueError(
                f"{name} has shape {tuple(vector.shape)}; x of shape {tuple(x.shape)} needs {tuple(x.shape[:2])} or "
                f"{tuple(x.shape[1:2])}"
            )
        check_device(x, name, vector)
    whole = isinstance(alpha, (int, float)) and alpha == 1
    if _fused(x, fused) and (not isinstance(alpha, Tensor) or alpha.numel() == 1):
        return _adaptive_instance_norm(x, style_mean, style_std, None if whole else alpha, eps, unbiased)
    deviation, _, std = _centred(x, eps, unbiased)
    style_mean, style_std = style_mean[..., None], style_std[..., None]
    if style_std.dim() < 3:  # one style for all: on its own, its part is a map with constants, which folds
        y = torch.addcmul(style_mean, deviation / std, style_std)
    else:
        y = torch.addcmul(style_mean, deviation, style_std / std)
    y = y.unflatten(2, x.shape[2:]) if x.dim() > 3 else y
    if not whole:
        y = torch.lerp(cast(x, y.dtype), y, alpha)
    return cast(y, x.dtype)


def _adaptive_instance_norm(
    x: Tensor, mean: Tensor, std: Tensor, alpha: float | Tensor | None, eps: float, unbiased: bool
) -> Tensor:
    acc = accumulation_dtype(x.dtype)
    mean, std, shortcut = cast(mean, acc), cast(std, acc), None
    if alpha is not None:  # alpha (std z + mean) + (1 - alpha) x
        alpha = torch.as_tensor(alpha, dtype=acc, device=x.device).reshape(1)
        mean, std, shortcut = alpha * mean, alpha * std, 1 - alpha
    samples = 1 if std.dim() < 2 else std.shape[0]
    return normalise_stat_groups(x, None, std, mean, shortcut, 1, 1, (samples, 1, -1), None, int(unbiased), eps)[0]
