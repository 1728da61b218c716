"""Batch-Channel Normalization, and the estimated statistics that it uses for micro-batches."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops._group import sum_in_group
from ..ops._layout import cast, check_input, gain_and_shift, masked, mean_or, other_dims, per_channel
from ..ops._recompute import statistics_of_this_run
from ..ops.batch_norm import affine_by_statistics
from ._running_norm import check_count, check_fraction
from .batch_norm import MaskedBatchNorm


class EstimatedBatchNorm(MaskedBatchNorm):
    """Batch Normalization by running statistics in training too (Qiao et al., 2019, arXiv 1911.09738).

    A training forward first moves the statistics (the variance around the mean as it was before), then normalises by
    them; no gradient goes through them. ``momentum``, the share of the new value, is set from outside as training
    goes on, see :func:`set_momentum`. Options and shapes: :class:`MaskedBatchNorm`, without ``ghost_size``.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1, **options: object) -> None:
        if options.get("ghost_size") is not None:
            raise ValueError("ghost_size makes no difference to estimated statistics; leave it out")
        super().__init__(num_features, eps, momentum, **options)

    def set_statistics(self, mean: Tensor, var: Tensor, rows: Tensor | None = None) -> None:
        super().set_statistics(mean, var)  # its variance is biased in training too

    def forward(self, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        if not self.training:
            return super().forward(x, pad_mask)
        check_input(x, self.num_features, self.channel_dim, pad_mask, self.running_mean)
        mean, var = self._move(x.detach(), pad_mask)
        weight, bias = gain_and_shift(self.weight, self.bias, mean)
        return affine_by_statistics(x, weight, bias, mean, var, self.eps, self.channel_dim)

    @torch.no_grad()
    def _move(self, x: Tensor, pad_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        running = tuple(self.state)
        if not torch.compiler.is_compiling():
            running = statistics_of_this_run(running)
        running_mean, running_var, steps = running
        dims = other_dims(x, self.channel_dim)
        deviation = x.to(running_mean.dtype) - per_channel(running_mean, x, self.channel_dim)
        deviation, count = masked(deviation, pad_mask, self.channel_dim)
        sums = torch.cat([deviation.sum(dims), deviation.square().sum(dims)])
        group = self.group_to_share_with()
        if group is not None:
            sums, count = sum_in_group(group, sums, count)
        zero = torch.zeros_like(running_mean)
        change, var = mean_or(sums, count, torch.cat([zero, running_var])).chunk(2)
        usable = change.isfinite() & var.isfinite()
        running_mean.add_(torch.where(usable, change, zero), alpha=self.momentum)
        running_var.add_(torch.where(usable, var - running_var, zero), alpha=self.momentum)
        steps.add_(1)
        return running_mean.clone(), running_var.clone()


def set_momentum(model: nn.Module, momentum: float) -> int:
    """Set the moving rate of every :class:`EstimatedBatchNorm` in ``model``, usually with the learning rate's schedule.

    Args:
        model: changed in place.
        momentum: share of the new value, from 0 to 1.

    Returns:
        The number of norms.

    Raises:
        ValueError: ``momentum`` is not allowed, or there is no such norm.
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

    The batch half has a gain and shift per channel, the group half one pair per *group*. It is meant to stand behind
    convolutions with :func:`weight_standardization`. In evaluation the batch half folds; the group half is computed
    from each sample and stays.

    Args:
        num_features: number of channels C, along dimension 1.
        num_groups: of the group half, a divisor of C.
        estimated: for micro-batches: the batch half uses estimated statistics (:class:`EstimatedBatchNorm`).
        eps: of both halves.
        momentum: share of the new value in the batch half's statistics.
        ghost_size: see :class:`MaskedBatchNorm`.
        device, dtype: of the parameters.

    Shape:
        x: [N, C, ...]; output like x.

    Raises:
        ValueError: ``num_groups`` does not divide the channels, or another option is not allowed.
    """

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
            num_features, eps, momentum, channel_dim=1, ghost_size=ghost_size, device=device, dtype=dtype
        )
        if num_features % num_groups:
            raise ValueError(
                f"num_groups={num_groups} is not allowed with {num_features} channels; give a divisor of them"
            )
        self.num_groups = num_groups
        self.eps = eps
        self.group_weight = nn.Parameter(torch.ones(num_groups, device=device, dtype=dtype))
        self.group_bias = nn.Parameter(torch.zeros(num_groups, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        x = self.batch_norm(x)
        width = x.shape[1] // self.num_groups
        weight, bias = (cast(p, x.dtype).repeat_interleave(width) for p in (self.group_weight, self.group_bias))
        return F.group_norm(x, self.num_groups, weight, bias, self.eps)

    def extra_repr(self) -> str:
        return f"num_groups={self.num_groups}"
