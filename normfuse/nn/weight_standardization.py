"""Weights that are centred or standardised in every forward, as parametrisations of torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ._running_norm import check_choice, check_positive
from ._traced_as_one import refuse_script

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
FORMS = ("std", "variance")


class _PerFilter(nn.Module):
    """A weight seen one output filter at a time: statistics over every axis but ``dim``."""

    __prepare_scriptable__ = refuse_script

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def axes(self, weight: Tensor) -> tuple[int, ...]:
        return tuple(axis for axis in range(weight.dim()) if axis != self.dim)


class CenteredWeight(_PerFilter):
    """``W - mean(W)`` per output filter; see :func:`center_weight`."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight - weight.mean(self.axes(weight), keepdim=True)


class StandardizedWeight(_PerFilter):
    """``(W - mean) / std`` per output filter; see :func:`weight_standardization`."""

    def __init__(self, dim: int, eps: float, form: str) -> None:
        super().__init__(dim)
        self.eps = eps
        self.form = form

    def forward(self, weight: Tensor) -> Tensor:
        axes = self.axes(weight)
        centered = weight - weight.mean(axes, keepdim=True)
        count = max(weight.numel() // weight.shape[self.dim] - 1, 1)
        var = centered.square().sum(axes, keepdim=True) / count
        if self.form == "variance":
            return centered * torch.rsqrt(var + self.eps)
        # The root of 0 has no gradient; a filter of equal weights stays 0 either way.
        std = torch.where(var > 0, var, 1.0).sqrt() * (var > 0)
        return centered / (std + self.eps)

    def extra_repr(self) -> str:
        return f"eps={self.eps}, form={self.form!r}"


def output_axis(module: nn.Module, name: str) -> int:
    """The axis of a module's weight that holds its output channels.

    Raises:
        ValueError: ``name`` is no weight of at least two dimensions, or belongs to a grouped transposed convolution.
    """
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor) or weight.dim() < 2:
        raise ValueError(
            f"{type(module).__name__}.{name} is not a weight with an input and an output dimension; "
            "give a linear layer or a convolution"
        )
    if not isinstance(module, _TRANSPOSED):
        return 0
    if module.groups > 1:
        raise ValueError(
            f"{type(module).__name__} has groups={module.groups}: an output filter is not a slice of its weight; "
            "use one group"
        )
    return 1


def center_weight(module: nn.Module, name: str = "weight") -> nn.Module:
    """Replace the weight W of ``module`` by ``W - mean(W)`` (mean per output filter), as MABN needs.

    Args:
        module: a linear layer or a convolution; changed in place.
        name: of the weight.

    Returns:
        ``module``. ``torch.nn.utils.parametrize.remove_parametrizations`` makes the result a plain weight; exported
        programs hold it as one.

    Raises:
        ValueError: see :func:`output_axis`.

    Example:
        >>> from normfuse.nn import center_weight
        >>> convolution = center_weight(nn.Conv2d(3, 8, 3))
        >>> bool(convolution.weight.mean((1, 2, 3)).abs().max() < 1e-6)
        True
    """
    parametrize.register_parametrization(module, name, CenteredWeight(output_axis(module, name)))
    return module


def weight_standardization(
    module: nn.Module, name: str = "weight", *, eps: float = 1e-5, form: str = "std"
) -> nn.Module:
    """Replace the weight of ``module`` by its standardised form (Qiao et al., 2019, arXiv 1903.10520).

    Per output filter, with the *unbiased* variance: ``(W - mean) / (std + eps)`` or, with ``form="variance"``,
    ``(W - mean) / sqrt(var + eps)``.

    Args:
        module: a linear layer or a convolution; changed in place.
        name: of the weight.
        eps: the eps of these formulas; positive.
        form: "std" or "variance".

    Returns:
        ``module``; exported programs hold the standardised weight, into which norms fold.

    Raises:
        ValueError: an option is not allowed, or see :func:`output_axis`.

    Example:
        >>> from normfuse.nn import weight_standardization
        >>> layer = weight_standardization(nn.Linear(16, 4))
        >>> bool(layer.weight.mean(1).abs().max() < 1e-6)
        True
    """
    check_positive("eps", eps)
    check_choice("form", form, FORMS)
    parametrize.register_parametrization(module, name, StandardizedWeight(output_axis(module, name), eps, form))
    return module
