"""Adaptive Instance Normalization as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import adaptive_instance_norm, instance_statistics
from ..ops._layout import check_device
from ..ops.adaptive_instance_norm import check_samples
from ._running_norm import check_positive
from ._traced_as_one import Proxy, refuse_script, traced_as_one


class AdaptiveInstanceNorm(nn.Module):
    """AdaIN (Huang & Belongie, 2017, arXiv 1703.06868): the content with the style's mean and deviation.

    The normalisation stays at export. With one fixed style (:meth:`fix`), the multiplication by its deviation and the
    addition of its mean fold.

    Args:
        eps: added to variances.
        unbiased: divide variances by n − 1 instead of n; authors' programs differ.

    Shape:
        x, style: [B, C, ...], with any sizes behind C. Output: like x, ``alpha * result + (1 - alpha) * x``.

    Raises:
        TypeError, ValueError: an option, a dtype or a shape is not allowed.

    Example:
        >>> from normfuse.nn import AdaptiveInstanceNorm
        >>> content, style = torch.randn(2, 3, 8, 8), 2 * torch.randn(2, 3, 4, 4) + 1
        >>> y = AdaptiveInstanceNorm()(content, style)
        >>> y.shape, torch.allclose(y.mean((2, 3)), style.mean((2, 3)), atol=1e-5)
        (torch.Size([2, 3, 8, 8]), True)
    """

    __prepare_scriptable__ = refuse_script

    def __init__(self, *, eps: float = 1e-5, unbiased: bool = False) -> None:
        super().__init__()
        check_positive("eps", eps)
        self.eps = eps
        self.unbiased = unbiased
        self.register_buffer("style_mean", None)
        self.register_buffer("style_std", None)

    def forward(self, x: Tensor, style: Tensor | None = None, alpha: float | Tensor = 1.0) -> Tensor:
        if isinstance(x, Proxy):
            return traced_as_one(self, x, style, alpha)
        check_samples("x", x)
        if style is None:
            if self.style_mean is None:
                raise ValueError("style is missing; give one, or fix one with norm.fix(style)")
            mean, std = self.style_mean, self.style_std
        else:
            check_samples("style", style)
            if style.shape[:2] != x.shape[:2]:
                raise ValueError(
                    f"style of shape {tuple(style.shape)} does not fit x of shape {tuple(x.shape)}; "
                    "both need the same samples and channels"
                )
            check_device(x, "style", style)
            mean, std = instance_statistics(style, eps=self.eps, unbiased=self.unbiased)
        return adaptive_instance_norm(x, mean, std, alpha=alpha, eps=self.eps, unbiased=self.unbiased)

    @torch.no_grad()
    def fix(self, style: Tensor) -> AdaptiveInstanceNorm:
        """Keep the statistics of one style for forwards without one.

        Args:
            style: [1, C, ...], floating point.

        Returns:
            This module.

        Raises:
            TypeError: ``style`` is not floating.
            ValueError: ``style`` holds more than one sample, or has no positions.
        """
        check_samples("style", style)
        if style.shape[0] != 1:
            raise ValueError(f"style holds {style.shape[0]} samples; give one, [1, C, ...]")
        mean, std = instance_statistics(style, eps=self.eps, unbiased=self.unbiased)
        self.style_mean, self.style_std = mean[0], std[0]
        return self

    def extra_repr(self) -> str:
        return f"eps={self.eps}, unbiased={self.unbiased}"
