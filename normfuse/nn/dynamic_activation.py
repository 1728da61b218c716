"""Dynamic Tanh and Dynamic erf: in the place of a norm, without statistics."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..ops import dynamic_erf, dynamic_tanh
from ..ops._layout import is_exporting
from ._running_norm import check_count, check_width
from ._traced_as_one import Proxy, refuse_script, traced_as_one


class _DynamicActivation(nn.Module):
    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        num_features: int,
        alpha: float = 0.5,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("num_features", num_features, 1)
        if not math.isfinite(alpha):
            raise ValueError(f"alpha={alpha} is not allowed; give a finite number such as 0.5")
        self.num_features = num_features
        self._starts = {"alpha": float(alpha), "weight": 1.0, "bias": 0.0}
        self.alpha = nn.Parameter(torch.full((), float(alpha), device=device, dtype=dtype))
        self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return traced_as_one(self, x)
        check_width(x, self.num_features, "num_features")
        # Exported programs hold plain ATen operations.
        return self._apply_curve(x, fused=self.training and not is_exporting())

    def _apply_curve(self, x: Tensor, fused: bool) -> Tensor:
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Set every parameter back to its value before training."""
        for name, start in self._starts.items():
            nn.init.constant_(self.get_parameter(name), start)

    def extra_repr(self) -> str:
        return str(self.num_features)


class DyT(_DynamicActivation):
    """Dynamic Tanh (Zhu et al., 2025, arXiv 2503.10622): ``weight * tanh(alpha * x) + bias``.

    Gain and shift fold into the weights that read the result, and alpha into a weight before it; the tanh stays. In
    training it has kernels of its own, one pass forward and one backward. In evaluation it is plain ATen operations.

    Args:
        num_features: size of the last dimension, C.
        alpha: start value of the learned scalar.
        device: of the parameters; None: PyTorch's default.
        dtype: of the parameters; None: PyTorch's default.

    Shape:
        x: [..., C], float32, bfloat16, float16 or float64. Output: like x.

    Raises:
        TypeError, ValueError: an argument has a type, shape or value that is not allowed.

    Example:
        >>> from normfuse.nn import DyT
        >>> DyT(64, alpha=0.5)(torch.randn(2, 5, 64)).abs().max() <= 1
        tensor(True)
    """

    def _apply_curve(self, x: Tensor, fused: bool) -> Tensor:
        return dynamic_tanh(x, self.alpha, self.weight, self.bias, fused=fused)


class Derf(_DynamicActivation):
    """Dynamic erf (Chen et al., 2025, arXiv 2512.10938): ``weight * erf(alpha * x + shift) + bias``.

    Folds and trains like :class:`DyT`; the erf stays.

    Args:
        num_features: size of the last dimension, C.
        alpha: start value of the learned factor, a scalar.
        shift: start value of the learned shift inside the erf, a scalar.
        device: of the parameters; None: PyTorch's default.
        dtype: of the parameters; None: PyTorch's default.

    Shape:
        x: [..., C], float32, bfloat16, float16 or float64. Output: like x.

    Raises:
        TypeError, ValueError: an argument has a type, shape or value that is not allowed.

    Example:
        >>> from normfuse.nn import Derf
        >>> Derf(64)(torch.randn(2, 5, 64)).shape
        torch.Size([2, 5, 64])
    """

    def __init__(
        self,
        num_features: int,
        alpha: float = 0.5,
        shift: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, alpha, device=device, dtype=dtype)
        self._starts["shift"] = float(shift)
        self.shift = nn.Parameter(torch.full((), float(shift), device=device, dtype=dtype))

    def _apply_curve(self, x: Tensor, fused: bool) -> Tensor:
        return dynamic_erf(x, self.alpha, self.shift, self.weight, self.bias, fused=fused)
