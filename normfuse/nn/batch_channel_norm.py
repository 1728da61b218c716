"""Batch-Channel Normalization, and the estimated statistics that it uses for micro-batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops._layout import cast
from ._running_norm import ChannelOptions, check_count, check_fraction
from ._traced_as_one import Proxy, refuse_script, traced_as_one
from .batch_norm import MaskedBatchNorm

if TYPE_CHECKING:
    from typing_extensions import Unpack

#: What the batch half of :class:`BatchChannelNorm` adds to its variance.
BATCH_EPS = 1e-5


class EstimatedBatchNorm(MaskedBatchNorm):
    """Batch Normalization by running statistics in training too (Qiao et al., 2019, arXiv 1911.09738).

    A training forward first updates the statistics (the variance is taken around the old mean), then normalises by
    them. No gradient flows through them. ``momentum``, the share of the new value, is changed during training, see
    :func:`set_momentum`. Options and shapes: :class:`MaskedBatchNorm`, without ``ghost_size``.

    Args:
        num_features: number of channels C.
        eps: added to the variance, inside the square root.
        momentum: share of the new value in each update, a number.
        **options: further ones of :class:`MaskedBatchNorm`.

    Raises:
        TypeError, ValueError: an option has a type or value that is not allowed; ``ghost_size`` is one of those.

    Example:
        >>> from normfuse.nn import EstimatedBatchNorm
        >>> norm = EstimatedBatchNorm(8, momentum=0.1)
        >>> _ = norm(torch.ones(4, 8))  # by running statistics, which move first
        >>> norm.running_mean[0]
        tensor(0.1000)
    """

    def __init__(  # type: ignore[misc]  # some options have another default here
        self, num_features: int, eps: float = 1e-5, momentum: float = 0.1, **options: Unpack[ChannelOptions]
    ) -> None:
        if options.get("ghost_size") is not None:
            raise ValueError("ghost_size makes no difference to estimated statistics; leave it out")
        super().__init__(num_features, eps, momentum, **options)

    def set_statistics(self, mean: Tensor, var: Tensor, rows: Tensor | None = None) -> None:
        super().set_statistics(mean, var)  # its variance is biased in training too

    def forward(self, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        if isinstance(x, Proxy):
            return traced_as_one(self, x, pad_mask)
        return self._normalise(x, pad_mask, estimated=True)


def set_momentum(model: nn.Module, momentum: float) -> int:
    """Set the moving rate of every :class:`EstimatedBatchNorm` in ``model``, usually with the learning rate's schedule.

    Args:
        model: changed in place.
        momentum: share of the new value, from 0 to 1.

    Returns:
        The number of norms.

    Raises:
        ValueError: ``momentum`` is not allowed, or there is no such norm.

    Example:
        >>> from normfuse.nn import EstimatedBatchNorm, set_momentum
        >>> set_momentum(nn.Sequential(EstimatedBatchNorm(8), nn.ReLU()), 0.01)
        1
    """
    check_fraction("momentum", momentum, "new")
    norms = [module for module in model.modules() if isinstance(module, EstimatedBatchNorm)]
    if not norms:
        raise ValueError(f"model of class {type(model).__name__} has no EstimatedBatchNorm")
    for norm in norms:
        norm.momentum = momentum
    return len(norms)


class BatchChannelNorm(nn.Module):
    """Batch-Channel Normalization (Qiao et al., 2019, arXiv 1911.09738): batch norm, then group norm.

    The batch half has a gain and shift per channel, the group half one pair per *group*. Use it after convolutions with
    :func:`weight_standardization`. In evaluation the batch half folds; the group half is computed from each sample and
    stays.

    Args:
        num_features: number of channels C, along dimension 1.
        num_groups: of the group half, a divisor of C.
        estimated: for micro-batches: the batch half uses estimated statistics (:class:`EstimatedBatchNorm`).
        eps: of the group half. The batch half always uses 1e-5, as in the authors' program.
        momentum: share of the new value in the batch half's statistics.
        ghost_size: see :class:`MaskedBatchNorm`.
        device: of the parameters; None: PyTorch's default.
        dtype: of the parameters; None: PyTorch's default.

    Shape:
        x: [N, C, ...]; output like x.

    Raises:
        ValueError: ``num_groups`` does not divide the channels, or another option is not allowed.

    Example:
        >>> from normfuse.nn import BatchChannelNorm
        >>> BatchChannelNorm(64, num_groups=16)(torch.randn(2, 64, 7, 7)).shape
        torch.Size([2, 64, 7, 7])
    """

    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        num_features: int,
        num_groups: int = 32,
        *,
        estimated: bool = False,
        eps: float = 1e-5,
        momentum: float = 0.1,
        ghost_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("num_groups", num_groups, 1)
        half = EstimatedBatchNorm if estimated else MaskedBatchNorm
        self.batch_norm = half(
            num_features, BATCH_EPS, momentum, channel_dim=1, ghost_size=ghost_size, device=device, dtype=dtype
        )
        if num_features % num_groups:
            raise ValueError(
                f"num_groups={num_groups} is not allowed with {num_features} channels; give a divisor of them"
            )
        self.num_groups = num_groups
        self.eps = eps
        self.group_weight = nn.Parameter(torch.ones(num_groups, device=device, dtype=dtype))
        self.group_bias = nn.Parameter(torch.zeros(num_groups, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Set the statistics back, gains to 1, shifts to 0."""
        self.batch_norm.reset_parameters()
        nn.init.ones_(self.group_weight)
        nn.init.zeros_(self.group_bias)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return traced_as_one(self, x)
        x = self.batch_norm(x)
        width = x.shape[1] // self.num_groups
        weight, bias = (cast(p, x.dtype).repeat_interleave(width) for p in (self.group_weight, self.group_bias))
        return F.group_norm(x, self.num_groups, weight, bias, self.eps)

    def extra_repr(self) -> str:
        return f"num_groups={self.num_groups}"
