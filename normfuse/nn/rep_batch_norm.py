"""Batch Normalization with a shortcut of its own, which evaluation merges into one affine map."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..ops._layout import affine_map, cast, gain_and_shift
from ._running_norm import ChannelOptions
from ._traced_as_one import Proxy, traced_as_one
from .batch_norm import MaskedBatchNorm

if TYPE_CHECKING:
    from typing_extensions import Unpack


class RepBatchNorm(MaskedBatchNorm):
    """Re-parametrised Batch Normalization (Guo et al., 2024, arXiv 2405.11582): ``BatchNorm(x) + alpha * x``.

    In evaluation it is ``y = a * x + b`` with ``a = weight / sqrt(running_var + eps) + alpha`` and
    ``b = bias - weight * running_mean / sqrt(running_var + eps)``: one multiplication and one addition, which fold into
    nearby weights.

    Args:
        num_features: number of channels C.
        eps: added to the variance, inside the square root.
        momentum: see :class:`MaskedBatchNorm`, as the other options.
        affine: whether to learn ``weight`` and ``bias``, both [C].
        **options: ``channel_dim``, ``ghost_size``, ``device`` and ``dtype`` of :class:`MaskedBatchNorm`.

    Attributes:
        alpha: the learned weight of the shortcut, a scalar; starts at 1.

    Shape:
        x: any, with C channels along ``channel_dim``; float32, bfloat16 or float16 (float64 in a float64 module).
        pad_mask: the shape of x without its channel dimension, bool, True = padding: left out of the statistics.
        Output: like x.

    Example:
        >>> from normfuse.nn import RepBatchNorm
        >>> norm = RepBatchNorm(64).eval()
        >>> x = torch.randn(2, 5, 64)
        >>> torch.allclose(norm(x), 2 * x, atol=1e-4)  # mean 0, variance 1, and the shortcut of weight 1
        True
    """

    def __init__(  # type: ignore[misc]  # some options have another default here
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        **options: Unpack[ChannelOptions],
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, **options)
        self.alpha = nn.Parameter(torch.ones((), device=options.get("device"), dtype=options.get("dtype")))

    def reset_parameters(self) -> None:
        """Set the statistics back, weight and ``alpha`` to 1, the bias to 0."""
        super().reset_parameters()
        nn.init.ones_(self.alpha)

    def forward(self, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        if isinstance(x, Proxy):
            return traced_as_one(self, x, pad_mask)
        if self.training:
            return self._normalise(x, pad_mask, shortcut=self.alpha)
        self.check_input(x, pad_mask)
        # Written as one affine map: a sum of two branches would leave a product and a sum that nothing absorbs.
        weight, bias = gain_and_shift(self.weight, self.bias, self.running_mean)
        scale = weight * torch.rsqrt(self.running_var + self.eps)
        shift = bias - self.running_mean * scale
        return affine_map(x, scale + cast(self.alpha, scale.dtype), shift, self.channel_dim)
