"""What replaces a norm without any statistics: a bounded function of the scaled input.

Dynamic Tanh (Zhu et al., 2025, arXiv 2503.10622) and Dynamic erf (Chen et al., 2025, arXiv 2512.10938).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._layout import cast


def dynamic_tanh(x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``weight * tanh(alpha * x) + bias`` over the last dimension; ``alpha`` is a scalar, the others [C]."""
    alpha, weight, bias = (cast(p, x.dtype) for p in (alpha, weight, bias))
    return torch.addcmul(bias, torch.tanh(alpha * x), weight)


def dynamic_erf(x: Tensor, alpha: Tensor, shift: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``weight * erf(alpha * x + shift) + bias`` over the last dimension; ``alpha``, ``shift`` scalars, others [C]."""
    alpha, shift, weight, bias = (cast(p, x.dtype) for p in (alpha, shift, weight, bias))
    return torch.addcmul(bias, torch.erf(alpha * x + shift), weight)
