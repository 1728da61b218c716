"""Region Normalization (Yu et al., 2020, arXiv 1911.10375): two regions of a picture, each by its own statistics."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ._layout import accumulation_dtype, cast

POOLS = ("sample", "batch")


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
    inside = region_mask(x, mask).flatten(1)
    values = cast(x, accumulation_dtype(x.dtype)).flatten(2)
    # [B, 2, HW]: products with it sum the pixels of each region, and hand each pixel its region's numbers.
    regions = torch.stack([torch.logical_not(inside), inside], dim=1).to(values.dtype)

    def mean_of(pixels: Tensor) -> Tensor:
        total, count = pixels @ regions.mT, regions.sum(2)[:, None]
        if pool == "batch":
            total, count = total.sum(0, keepdim=True), count.sum(0, keepdim=True)
        return (total / count.clamp(min=1)).expand(x.shape[0], -1, -1)

    deviation = values - mean_of(values) @ regions
    scale = torch.rsqrt(mean_of(deviation.square()) + eps)
    if weight is not None:
        scale = scale * cast(weight, scale.dtype).t()
    y = deviation * (scale @ regions)
    if bias is not None:
        y = y + cast(bias, scale.dtype).t() @ regions
    return cast(y.view(x.shape), x.dtype)


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
