"""Time-dependent LayerNorm for diffusion models."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops._layout import accumulation_dtype, cast, check_device, check_dtype, check_tensor
from ._running_norm import check_count, check_positive
from ._traced_as_one import Proxy, refuse_script, traced_as_one


class TimeRamp(nn.Module):
    """One number per channel that moves from ``end`` to ``start`` along a sigmoid of time.

    ``s = sigmoid(t * (slope + 1) + offset)``, ``value = end + s * (start - end)``. All four are [C]; slope and offset
    start at 0 and want no weight decay.
    """

    def __init__(self, num_features: int, value: float, device: object, dtype: object) -> None:
        super().__init__()
        #: What ``start`` and ``end`` are at first: 1 for a gain, 0 for a shift.
        self.neutral = value
        for name, start in (("slope", 0.0), ("offset", 0.0), ("start", value), ("end", value)):
            self.register_parameter(name, nn.Parameter(torch.full((num_features,), start, device=device, dtype=dtype)))

    def reset_parameters(self) -> None:
        """Set slope and offset to 0, ``start`` and ``end`` to what they are at first."""
        for parameter, start in (
            (self.slope, 0.0),
            (self.offset, 0.0),
            (self.start, self.neutral),
            (self.end, self.neutral),
        ):
            nn.init.constant_(parameter, start)

    def forward(self, t: Tensor) -> Tensor:
        """[..., C] for times [...]."""
        s = torch.sigmoid(torch.addcmul(self.offset, t[..., None].to(self.slope.dtype), self.slope + 1))
        return torch.lerp(self.end, self.start, s)


class OffsetRMSNorm(nn.Module):
    """``weight * x / (rms(x) + eps)`` over the last dimension: eps is added outside of the root.

    Args:
        num_features: size of the last dimension, C.
        eps: added to the root of the mean square.
        device, dtype: of ``weight`` [C], ones at first.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Set the gain to 1."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return divide_by_rms(x, self.eps) * cast(self.weight, x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


def divide_by_rms(x: Tensor, eps: float) -> Tensor:
    """``x / (rms(x) + eps)`` over the last dimension, computed in float32 or wider and rounded once."""
    wide = cast(x, accumulation_dtype(x.dtype))
    # The length's gradient is 0 at the origin, where that of a square root is infinite.
    rms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True) / math.sqrt(x.shape[-1])
    return cast(wide / (rms + eps), x.dtype)


class TimeDependentLayerNorm(nn.Module):
    """LayerNorm whose gain and shift follow the time step (DiMR, Liu et al., 2024, arXiv 2406.09416).

    Gain and shift are :class:`TimeRamp` of ``t = log_snr / 4``. The normalisation stays at export; for a fixed time
    :meth:`at` gives a plain norm, whose gain and shift fold.

    Args:
        num_features: size of the last dimension, C.
        eps: added to the variance; with ``rms`` to the root mean square itself, ``x / (rms + eps)``, as in the authors'
            program. None: 1e-5, with ``rms`` 1e-8.
        rms: divide by the root mean square only; there is no shift then.
        device: of the parameters; None: PyTorch's default.
        dtype: of the parameters; None: PyTorch's default.

    Shape:
        x: [B, ..., C]. log_snr: [B], the logarithm of the signal-to-noise ratio of each sample. Output like x.

    Raises:
        TypeError, ValueError: an option or a shape is not allowed.

    Example:
        >>> from normfuse.nn import TimeDependentLayerNorm
        >>> norm = TimeDependentLayerNorm(64)
        >>> norm(torch.randn(2, 5, 64), torch.tensor([0.5, -3.0])).shape
        torch.Size([2, 5, 64])
        >>> norm.at(0.5)
        LayerNorm((64,), eps=1e-05, elementwise_affine=True, bias=True)
    """

    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        num_features: int,
        *,
        eps: float | None = None,
        rms: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("num_features", num_features, 1)
        if eps is None:
            eps = 1e-8 if rms else 1e-5
        check_positive("eps", eps)
        self.num_features = num_features
        self.eps = eps
        self.gain = TimeRamp(num_features, 1.0, device, dtype)
        self.shift = None if rms else TimeRamp(num_features, 0.0, device, dtype)

    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return traced_as_one(self, x, log_snr)
        check_dtype("x", x)
        check_tensor("log_snr", log_snr)
        if log_snr.is_complex():
            raise TypeError(f"log_snr has dtype {log_snr.dtype}; give floating or whole numbers")
        if log_snr.dim() != 1 or x.dim() == 0 or log_snr.shape[0] != x.shape[0] or x.shape[-1] != self.num_features:
            raise ValueError(
                f"x of shape {tuple(x.shape)} and log_snr of shape {tuple(log_snr.shape)} do not fit; "
                f"give x [B, ..., {self.num_features}] and log_snr [B]"
            )
        check_device(x, "log_snr", log_snr)
        check_device(x, "gain.slope", self.gain.slope)
        t = log_snr / 4
        shape = (x.shape[0], *(1,) * (x.dim() - 2), self.num_features)
        gain = cast(self.gain(t), x.dtype).reshape(shape)
        if self.shift is None:
            return divide_by_rms(x, self.eps) * gain
        shift = cast(self.shift(t), x.dtype).reshape(shape)
        return torch.addcmul(shift, F.layer_norm(x, (self.num_features,), eps=self.eps), gain)

    @torch.no_grad()
    def at(self, log_snr: float) -> nn.LayerNorm | OffsetRMSNorm:
        """The plain norm that this one is at a fixed time, with a copy of its gain and shift.

        Args:
            log_snr: the time, as the logarithm of the signal-to-noise ratio.

        Returns:
            A LayerNorm, or with ``rms`` an RMS norm with ``x / (rms + eps)``; in this module's dtype, on its device.
        """
        like = self.gain.start
        t = torch.tensor(log_snr / 4, device=like.device, dtype=like.dtype)
        options = {"eps": self.eps, "device": like.device, "dtype": like.dtype}
        norm = (OffsetRMSNorm if self.shift is None else nn.LayerNorm)(self.num_features, **options)
        norm.weight.copy_(self.gain(t))
        if self.shift is not None:
            norm.bias.copy_(self.shift(t))
        return norm.train(self.training)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, rms={self.shift is None}"
