"""A gain and a shift for each channel of each head, behind a norm that has none."""

from __future__ import annotations

from torch import Tensor, nn


class HeadAffine(nn.Module):
    """``x * weight + bias``, whose shapes broadcast against the last axes of ``x``.

    Args:
        weight: copied; such as [heads, 1, C] for x [..., heads, tokens, C].
        bias: likewise; None: no shift.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.weight.to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, bias={self.bias is not None}"
