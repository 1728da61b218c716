"""Region Normalization (Yu et al., 2020, arXiv 1911.10375): two regions of a picture, each by its own statistics."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ._layout import accumulation_dtype, cast, check_device, check_dtype, check_tensor, is_traced
from ._stat_groups import normalise_stat_groups

POOLS = ("sample", "batch")


def _plain(values: Tensor, inside: Tensor, weight: Tensor, bias: Tensor, eps: float, pool: str) -> Tensor:
    """``values`` [B, C, P] normalised in plain ATen operations by two regions.

    ``inside`` [B, P], from 0 to 1, is the share m of a pixel in the inner region, 1 − m that in the outer one. With the
    shares s of a region, n = Σs its size and N the number of all pixels:

        mean = Σ s x / n,   var = Σ s² (x − mean)² / n,   x̂ = Σ over regions of s (x − mean) / sqrt(var + eps')

    where eps' is eps, or eps · N / n where statistics are pooled over the batch: what normalising a picture with the
    other region filled by the mean comes to.
    """
    regions = torch.stack([1 - inside, inside], dim=1)
    counts, pixels = regions.sum(2)[:, None], inside.shape[1]
    if pool == "batch":
        counts, pixels = counts.sum(0, keepdim=True), pixels * inside.shape[0]
    counts = torch.where(counts == 0, 1, counts)

    def mean(totals: Tensor) -> Tensor:  # of [B, C, 2] sums over pixels
        return (totals.sum(0, keepdim=True) if pool == "batch" else totals) / counts

    deviation = (values[:, :, None] - mean(values @ regions.mT)[..., None]) * regions[:, None]
    added = eps * pixels / counts if pool == "batch" else eps
    normalised = (deviation * torch.rsqrt(mean(deviation.square().sum(3)) + added)[..., None]).sum(2)
    return torch.addcmul(bias.t() @ regions, normalised, weight.t() @ regions)


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
        mask: [B, 1, h, w], bool or integers (not 0: inside), or floating: the share, from 0 to 1, of each pixel in the
            inner region, used as it is. Resized to H×W by the nearest neighbour.
        weight: [2, C], gain outside (row 0) and inside (row 1); None stands for 1.
        bias: [2, C], likewise; None stands for 0.
        eps: added to the variance. Pooled over the batch it counts N / n times for a region of n of all N pixels, as in
            the authors' program.
        pool: statistics over each "sample" (the paper) or over the whole "batch" (the authors' program).

    Returns:
        A tensor of the shape and dtype of ``x``. A region without pixels has no effect.

    Raises:
        TypeError: a dtype is not allowed.
        ValueError: a shape, a device or ``pool`` is not allowed.

    Example:
        >>> from normfuse.ops import region_norm
        >>> mask = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
        >>> mask[:, :, 2:5, 2:5] = True
        >>> region_norm(torch.randn(2, 3, 8, 8), mask).shape
        torch.Size([2, 3, 8, 8])
    """
    if pool not in POOLS:
        raise ValueError(f"pool={pool!r} is unknown; give {' or '.join(map(repr, POOLS))}")
    check_dtype("x", x)
    inside, acc = region_mask(x, mask), accumulation_dtype(x.dtype)
    for name, vectors in (("weight", weight), ("bias", bias)):
        if vectors is None:
            continue
        check_tensor(name, vectors)
        if vectors.shape != (2, x.shape[1]):
            raise ValueError(
                f"{name} has shape {tuple(vectors.shape)}; x of shape {tuple(x.shape)} needs (2, {x.shape[1]}): a row "
                "for each region, a column for each channel"
            )
        check_device(x, name, vectors)
    plain = inside.dtype != torch.bool or x.numel() == 0
    weight = x.new_ones(2, x.shape[1], dtype=acc) if weight is None else cast(weight, acc)
    bias = torch.zeros_like(weight) if bias is None else cast(bias, acc)
    if plain or is_traced():  # a traced program is made of plain operations
        y = _plain(cast(x, acc).flatten(2), cast(inside, acc).flatten(1), weight, bias, eps, pool)
        return cast(y.view(x.shape), x.dtype)
    # Over the whole batch one group of samples, whose regions of n of all N pixels take eps · N / n.
    group, eps, eps_total = (0, 0.0, eps * inside.numel()) if pool == "batch" else (1, eps, 0.0)
    return normalise_stat_groups(
        x, inside[:, 0], weight, bias, None, 1, group, (1, 2, -1), None, 0, eps, 0.0, eps_total
    )[0]


def region_mask(x: Tensor, mask: Tensor) -> Tensor:
    """``mask`` as bool, or floating shares, [B, 1, H, W] for ``x`` [B, C, H, W]."""
    check_tensor("mask", mask)
    if mask.is_complex():
        raise TypeError(f"mask has dtype {mask.dtype}; give bool, integers, or floating shares from 0 to 1")
    if x.dim() != 4 or mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[0] != x.shape[0]:
        raise ValueError(
            f"x of shape {tuple(x.shape)} and mask of shape {tuple(mask.shape)} do not fit; "
            "give x [B, C, H, W] and mask [B, 1, h, w]"
        )
    check_device(x, "mask", mask)
    soft = mask.is_floating_point()
    inside = mask if soft or mask.dtype == torch.bool else mask != 0
    if mask.shape[2:] != x.shape[2:]:
        inside = F.interpolate(inside if soft else inside.to(x.dtype), size=x.shape[2:], mode="nearest")
        inside = inside if soft else inside != 0
    return inside
