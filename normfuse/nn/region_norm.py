"""Region Normalization (Yu et al., 2020, arXiv 1911.10375) for inpainting: basic and learnable. Both stay at export."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import region_norm
from ..ops._layout import cast, check_device, check_dtype
from ..ops.region_norm import POOLS
from ._running_norm import check_choice, check_count, check_positive
from ._traced_as_one import Proxy, refuse_script, traced_as_one


class RegionNorm(nn.Module):
    """Basic Region Normalization, RN-B (Yu et al., 2020, arXiv 1911.10375).

    ``y = x̂ * (1 + weight[r]) + bias[r]``, where r is the region of a pixel (inside or outside of the mask) and x̂ is
    normalised by the mean and variance of that region.

    Args:
        num_features: number of channels C.
        eps: added to the variance; pooled over the batch, N / n times for a region of n of all N pixels, as in the
            authors' program.
        pool: statistics over each "sample" (the paper) or over the whole "batch" (the authors' program).
        shift_everywhere: add the sum of both shifts to every pixel, as the authors' program does; otherwise each
            region has its own.
        device: of ``weight`` and ``bias`` [2, C], zero at first; row 0 outside of the mask, row 1 inside.
        dtype: of ``weight`` and ``bias``.

    Shape:
        x: [B, C, H, W]. mask: [B, 1, h, w], bool or integers (not 0: inside), or floating shares from 0 to 1, used as
        they are; resized to H×W. Output like x.

    Raises:
        TypeError, ValueError: an option or a shape is not allowed.

    Example:
        >>> from normfuse.nn import RegionNorm
        >>> x, hole = torch.randn(2, 8, 16, 16), torch.zeros(2, 1, 16, 16, dtype=torch.bool)
        >>> hole[:, :, 4:8, 4:8] = True
        >>> RegionNorm(8)(x, hole).shape
        torch.Size([2, 8, 16, 16])
    """

    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        pool: str = "sample",
        shift_everywhere: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("num_features", num_features, 1)
        check_positive("eps", eps)
        check_choice("pool", pool, POOLS)
        self.num_features = num_features
        self.eps = eps
        self.pool = pool
        self.shift_everywhere = shift_everywhere
        self.weight = nn.Parameter(torch.zeros(2, num_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(2, num_features, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Set gains and shifts to 0, where they start."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return traced_as_one(self, x, mask)
        bias = self.bias.sum(0).expand(2, -1) if self.shift_everywhere else self.bias
        return region_norm(x, mask, 1 + self.weight, bias, eps=self.eps, pool=self.pool)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, pool={self.pool!r}, shift_everywhere={self.shift_everywhere}"


class LearnableRegionNorm(nn.Module):
    """Region Normalization with learned regions, RN-L (Yu et al., 2020, arXiv 1911.10375).

    ``map = sigmoid(conv([mean over channels; maximum over channels]))``, the region is ``map >= threshold`` (without
    gradient), and ``y = x̂ * (1 + gain(map)) + shift(map)`` with one convolution each, pixel by pixel. The first
    convolution has no bias.

    Args:
        threshold: from 0 to 1.
        kernel_size: of the three convolutions, odd.
        eps: see :class:`RegionNorm`.
        pool: see :class:`RegionNorm`.
        device: of the convolutions; None: PyTorch's default.
        dtype: of the convolutions; None: PyTorch's default.

    Shape:
        x: [B, C, H, W] with any C. Output like x.

    Raises:
        TypeError, ValueError: an option or a shape is not allowed.

    Example:
        >>> from normfuse.nn import LearnableRegionNorm
        >>> LearnableRegionNorm()(torch.randn(2, 8, 16, 16)).shape
        torch.Size([2, 8, 16, 16])
    """

    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        *,
        threshold: float = 0.8,
        kernel_size: int = 7,
        eps: float = 1e-5,
        pool: str = "sample",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold={threshold} is not allowed; give a number from 0 to 1")
        check_count("kernel_size", kernel_size, 1)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} is even; give an odd one, which keeps the size")
        check_positive("eps", eps)
        check_choice("pool", pool, POOLS)
        self.threshold = threshold
        self.eps = eps
        self.pool = pool

        def conv(channels: int, bias: bool = True) -> nn.Conv2d:
            return nn.Conv2d(channels, 1, kernel_size, padding=kernel_size // 2, bias=bias, device=device, dtype=dtype)

        self.attention, self.gain, self.shift = conv(2, bias=False), conv(1), conv(1)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return traced_as_one(self, x)
        check_dtype("x", x)
        if x.dim() != 4 or x.shape[1] == 0:
            raise ValueError(f"x has shape {tuple(x.shape)}; give [B, C, H, W] with at least one channel")
        own = self.attention.weight
        check_device(x, "the weights of the convolutions", own)
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1)
        region_map = torch.sigmoid(self.attention(cast(pooled, own.dtype)))
        y = region_norm(x, region_map.detach() >= self.threshold, eps=self.eps, pool=self.pool)
        gain, shift = (cast(conv(region_map), x.dtype) for conv in (self.gain, self.shift))
        return torch.addcmul(shift, y, 1 + gain)

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}, eps={self.eps}, pool={self.pool!r}"
