"""Region Normalization (Yu et al., 2020, arXiv 1911.10375): two regions of a picture, each by its own statistics."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ._cells import CellNorm
from ._layout import accumulation_dtype, cast

POOLS = ("sample", "batch")


def _plain(values: Tensor, inside: Tensor, weight: Tensor, bias: Tensor, eps: float, pool: str) -> Tensor:
    """``values`` [B, C, P] normalised in plain ATen operations by their regions, ``inside`` [B, P] or not."""
    # A one in the row of each pixel's region: products with it sum the pixels of a region, and hand each pixel its
    # region's numbers.
    regions = torch.stack([torch.logical_not(inside), inside], dim=1).to(values.dtype)
    deviation = values - _mean(values @ regions.mT, regions, pool) @ regions
    inv_std = torch.rsqrt(_mean(deviation.square() @ regions.mT, regions, pool) + eps)
    return torch.addcmul(bias.t() @ regions, deviation, (inv_std * weight.t()) @ regions)


def _mean(totals: Tensor, regions: Tensor, pool: str) -> Tensor:
    """Sums [B, C, 2] over pixels divided by their number; over all samples where they are pooled."""
    counts = regions.sum(2)[:, None]
    if pool == "batch":
        totals, counts = totals.sum(0, keepdim=True).expand_as(totals), counts.sum(0, keepdim=True)
    return totals / counts.clamp(min=1)


def region_norm(
    x: Tensor,
    mask: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    pool: str = "sample",
) -> Tensor:
    """Normalise the pixels inside and outside of ``mask`` by their own mean and (biased) variance per channel.

    Args:
        x: [B, C, H, W], floating.
        mask: [B, 1, h, w], bool or numbers (not 0: inside); resized to H×W by the nearest neighbour.
        weight, bias: [2, C], gain and shift outside (row 0) and inside (row 1); None stands for 1 and 0.
        eps: added to the variance.
        pool: statistics over each "sample" (the paper) or over the whole "batch" (the authors' program).

    Returns:
        A tensor of the shape and dtype of ``x``. A region without pixels has no effect.

    Raises:
        ValueError: a shape or ``pool`` is not allowed.
    """
    if pool not in POOLS:
        raise ValueError(f"pool={pool!r} is unknown; give {' or '.join(map(repr, POOLS))}")
    inside, acc = region_mask(x, mask), accumulation_dtype(x.dtype)
    weight = x.new_ones(2, x.shape[1], dtype=acc) if weight is None else cast(weight, acc)
    bias = torch.zeros_like(weight) if bias is None else cast(bias, acc)
    if torch.compiler.is_exporting() or x.numel() == 0:  # an exported program is made of plain operations
        y = _plain(cast(x, acc).flatten(2), inside.flatten(1), weight, bias, eps, pool)
        return cast(y.view(x.shape), x.dtype)
    group = 1 if pool == "sample" else 0
    return CellNorm.apply(x, inside[:, 0], weight, bias, None, 1, group, (1, 2, -1), None, 0, eps)[0]


def region_mask(x: Tensor, mask: Tensor) -> Tensor:
    """``mask`` as bool [B, 1, H, W] for ``x`` [B, C, H, W]."""
    if x.dim() != 4 or mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[0] != x.shape[0]:
        raise ValueError(
            f"x of shape {tuple(x.shape)} and mask of shape {tuple(mask.shape)} do not fit; "
            "give x [B, C, H, W] and mask [B, 1, h, w]"
        )
    inside = mask if mask.dtype == torch.bool else mask != 0
    if mask.shape[2:] == x.shape[2:]:
        return inside
    return F.interpolate(inside.to(x.dtype), size=x.shape[2:], mode="nearest") != 0
