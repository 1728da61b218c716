"""LayerNorm, RMSNorm and CRMSNorm as modules: torch's own, with fused kernels in training and a residual add."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import crms_norm, layer_norm, rms_norm
from ._running_norm import check_width
from ._traced_as_one import Proxy, refuse_script, traced_as_one


def _channels(normalized_shape: int | Sequence[int]) -> tuple[int]:
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if len(shape) != 1 or shape[0] < 1:
        raise ValueError(
            f"normalized_shape={normalized_shape!r} is not allowed; give the number of channels, one positive int: "
            "only the last dimension is normalised"
        )
    return shape


class _RowNorm:
    """What the three share, in front of torch's module: the gain's convention, and the check of x."""

    __prepare_scriptable__ = refuse_script

    unit_offset = False
    weight: Tensor | None
    normalized_shape: tuple[int, ...]
    eps: Any
    training: bool

    def _use_unit_offset(self, unit_offset: bool) -> None:
        self.unit_offset = unit_offset
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the gain to 1 (with ``unit_offset``: the weight to 0) and the bias to 0."""
        super().reset_parameters()  # type: ignore[misc]  # torch's
        if self.unit_offset and self.weight is not None:
            nn.init.zeros_(self.weight)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if isinstance(x, Proxy):
            return traced_as_one(self, x, residual)
        check_width(x, self.normalized_shape[0], "normalized_shape")
        return self._normalise(x, residual=residual, eps=self.eps, unit_offset=self.unit_offset, fused=self.training)

    def _normalise(self, x: Tensor, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
        raise NotImplementedError

    def extra_repr(self) -> str:
        described = super().extra_repr()  # type: ignore[misc]  # torch's
        return described + (", unit_offset=True" if self.unit_offset else "")


class LayerNorm(_RowNorm, nn.LayerNorm):
    """``torch.nn.LayerNorm`` over the last dimension, with its own training kernels and a fused residual addition.

    ``y = norm(x)``, or ``y, s = norm(x, residual)`` with s = x + residual and y the norm of s; gradients flow through
    both. In evaluation it is an addition and torch's ``layer_norm``, and exports and folds like these.

    Args:
        normalized_shape: number of channels C (an int, or a sequence of one).
        eps: added to the variance, inside the square root.
        elementwise_affine: whether to learn ``weight`` [C].
        bias: whether to learn ``bias`` [C] with it.
        unit_offset: use the gain ``1 + weight``; the weight then starts at 0.
        device: of the parameters; None: PyTorch's default.
        dtype: of the parameters; None: PyTorch's default.

    Shape:
        x, residual: any, with C channels last; float32, bfloat16, float16 or float64.
        Output: like x; two of them with ``residual``.

    Raises:
        TypeError, ValueError: an argument has a type, shape or value that is not allowed.

    Example:
        >>> from normfuse.nn import LayerNorm
        >>> x, skip = torch.randn(2, 5, 64), torch.randn(2, 5, 64)
        >>> y, s = LayerNorm(64)(x, skip)  # s = x + skip, y is its norm
        >>> torch.equal(s, x + skip), torch.allclose(y, nn.LayerNorm(64)(s), atol=1e-5)
        (True, True)
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        unit_offset: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(_channels(normalized_shape), eps, elementwise_affine, bias, device, dtype)
        self._use_unit_offset(unit_offset)

    def _normalise(self, x: Tensor, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
        return layer_norm(x, self.weight, self.bias, **options)


class RMSNorm(_RowNorm, nn.RMSNorm):
    """``torch.nn.RMSNorm`` over the last dimension, with its own training kernels and a fused residual addition.

    ``y = norm(x)``, or ``y, s = norm(x, residual)`` with s = x + residual and y the norm of s; gradients flow through
    both. In evaluation it is an addition and torch's ``rms_norm``, and exports and folds like these.

    Args:
        normalized_shape: number of channels C (an int, or a sequence of one).
        eps: added to the mean square, inside the square root; None takes that of float32 (float64 for float64
            input), as torch does.
        elementwise_affine: whether to learn ``weight`` [C].
        unit_offset: the gain is ``1 + weight``, as in Gemma; the weight then starts at 0.
        device: of the parameters; None: PyTorch's default.
        dtype: of the parameters; None: PyTorch's default.

    Shape:
        x, residual: any, with C channels last; float32, bfloat16, float16 or float64.
        Output: like x; two of them with ``residual``.

    Raises:
        TypeError, ValueError: an argument has a type, shape or value that is not allowed.

    Example:
        >>> from normfuse.nn import RMSNorm
        >>> x = torch.randn(2, 5, 64)
        >>> torch.allclose(RMSNorm(64)(x), nn.RMSNorm(64)(x), atol=1e-5)
        True
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        *,
        unit_offset: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(_channels(normalized_shape), eps, elementwise_affine, device, dtype)
        self._use_unit_offset(unit_offset)

    def _normalise(self, x: Tensor, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
        return rms_norm(x, self.weight, **options)


class CRMSNorm(RMSNorm):
    """Compressed RMSNorm (Jiang et al., 2023, arXiv 2305.14858): of C + 1 channels with mean zero, from C.

    The last channel is minus the sum of the others, so it is not stored: ``weight * x / sqrt((Σx² + (Σx)²)/(C + 1) +
    eps)``. ``normalized_shape`` is C, one less than the width with that channel. In evaluation it is that formula in
    ATen operations. ``eps`` is 1e-5 by default, as in the LayerNorm that it replaces. All else is as in
    :class:`RMSNorm`.

    Args:
        normalized_shape: number of channels C (an int, or a sequence of one).
        eps: added to the mean square, inside the square root; None: ``torch.finfo(dtype).eps`` of the dtype computed
            in.
        elementwise_affine: whether to learn ``weight`` [C].
        unit_offset: use the gain ``1 + weight``; the weight then starts at 0.
        device: of the parameters; None: PyTorch's default.
        dtype: of the parameters; None: PyTorch's default.

    Example:
        >>> from normfuse.nn import CRMSNorm
        >>> x = torch.randn(5, 8)
        >>> whole = torch.cat([x, -x.sum(-1, keepdim=True)], -1)  # nine channels with mean zero
        >>> torch.allclose(CRMSNorm(8)(x), torch.nn.functional.layer_norm(whole, (9,))[:, :8], atol=1e-5)
        True
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = 1e-5,
        elementwise_affine: bool = True,
        *,
        unit_offset: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, unit_offset=unit_offset, device=device, dtype=dtype)

    def _normalise(self, x: Tensor, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
        return crms_norm(x, self.weight, **options)
