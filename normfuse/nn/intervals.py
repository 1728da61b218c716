"""Interval bounds through a norm, for certified training (Gowal et al., 2018, arXiv 1810.12715)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..ops._layout import accumulation_dtype, gain_and_shift, mean_or, per_channel, to_rows
from ._running_norm import ChannelNorm, split_ghosts
from .batch_channel_norm import EstimatedBatchNorm
from .batch_norm import MaskedBatchNorm, deviation_of
from .power_norm import PowerNorm
from .rep_batch_norm import RepBatchNorm


def norm_bounds(
    norm: nn.Module, lower: Tensor, upper: Tensor, *, clean: Tensor | None = None, pad_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Bounds of ``norm(x)`` for all x between ``lower`` and ``upper``, where the norm is one affine map per channel.

    With ``y = a * x + b`` the centre becomes ``a * centre + b`` and the radius ``|a| * radius``. The bounds are exact,
    and gradients flow to ``lower``, ``upper``, the parameters and ``clean``.

    Args:
        norm: a BatchNorm of PyTorch or a norm of this package with running statistics; a RepBatchNorm is one map.
        lower: the smallest inputs, whatever shape the norm takes.
        upper: the largest ones, of the same shape.
        clean: the undisturbed input, with as many samples. In training the statistics are those that the forward with
            ``clean`` normalises by (during warm-up); running statistics do not move. Not used in evaluation.
        pad_mask: leaves rows of ``clean`` out.

    Returns:
        The lower and the upper bound, like the inputs.

    Raises:
        TypeError: ``norm`` computes something from each input, or is of a class derived from a BatchNorm with a
            forward of its own. ValueError: ``clean`` is missing in training.

    Example:
        >>> from normfuse.nn import norm_bounds
        >>> lower, upper = norm_bounds(nn.BatchNorm1d(8).eval(), torch.zeros(1, 8), torch.ones(1, 8))
        >>> bool((lower <= upper).all())
        True
    """
    channel_dim = getattr(norm, "channel_dim", 1)
    # A class derived from a BatchNorm may do anything besides, an activation for instance.
    known = type(norm).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward) or hasattr(norm, "channel_dim")
    affine = isinstance(norm, ChannelNorm) or (isinstance(norm, _BatchNorm) and known)
    if not affine or (isinstance(norm, PowerNorm) and norm.group_num):
        raise TypeError(
            f"{type(norm).__name__} computes more than an affine map with constant coefficients, or may; give a norm "
            "with running statistics (PowerNorm with group_num=None)"
        )
    centred = isinstance(norm, (_BatchNorm, MaskedBatchNorm))
    if norm.training or (isinstance(norm, _BatchNorm) and norm.running_mean is None):
        if clean is None:
            raise ValueError(f"{type(norm).__name__} is in training: give clean, the undisturbed input")
        sizes = split_ghosts(clean, getattr(norm, "ghost_size", None))
        if len(sizes) > 1:
            return _of_ghosts(norm, sizes, lower, upper, clean, pad_mask)
        mean, var = _statistics(clean, channel_dim, pad_mask, centred)
        if isinstance(norm, EstimatedBatchNorm):
            mean, var = _moved(norm, mean.detach(), var.detach())
    else:
        var = norm.running_phi if isinstance(norm, PowerNorm) else norm.running_var
        mean = norm.running_mean if centred else torch.zeros_like(var)
    weight, bias = gain_and_shift(norm.weight, norm.bias, var)
    scale = weight / deviation_of(norm, var)
    shift = bias - mean * scale
    if isinstance(norm, RepBatchNorm):
        scale = scale + norm.alpha.to(scale.dtype)
    scale, shift = (per_channel(v, lower, channel_dim).to(lower.dtype) for v in (scale, shift))
    centre, radius = torch.addcmul(shift, (lower + upper) / 2, scale), (upper - lower) / 2 * scale.abs()
    return centre - radius, centre + radius


def _of_ghosts(
    norm: nn.Module, sizes: list[int], lower: Tensor, upper: Tensor, clean: Tensor, pad_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Every ghost batch by its own statistics."""
    masks = [None] * len(sizes) if pad_mask is None else pad_mask.split(sizes)
    parts = zip(lower.split(sizes), upper.split(sizes), clean.split(sizes), masks, strict=True)
    found = [norm_bounds(norm, low, high, clean=x, pad_mask=mask) for low, high, x, mask in parts]
    lowest, highest = (torch.cat(bounds) for bounds in zip(*found, strict=True))
    return lowest, highest


def _moved(norm: EstimatedBatchNorm, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """The running statistics as a training forward with these of its batch would move them."""
    rate = 1 / (norm.num_batches_tracked + 1).to(var.dtype) if norm.momentum is None else norm.momentum
    change = mean - norm.running_mean
    return norm.running_mean + rate * change, norm.running_var + rate * (var + change.square() - norm.running_var)


def _statistics(clean: Tensor, channel_dim: int, pad_mask: Tensor | None, centred: bool) -> tuple[Tensor, Tensor]:
    rows = to_rows(clean, channel_dim).to(accumulation_dtype(clean.dtype))
    keep = rows.new_ones(rows.shape[0], 1, dtype=torch.bool) if pad_mask is None else ~pad_mask.reshape(-1, 1)
    zero = torch.zeros_like(rows[:1].sum(0))
    mean = mean_or(torch.where(keep, rows, 0.0).sum(0), keep.sum(), zero) if centred else zero
    return mean, mean_or(torch.where(keep, rows - mean, 0.0).square().sum(0), keep.sum(), zero)
