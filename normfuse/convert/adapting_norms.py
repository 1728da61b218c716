"""BatchNorms whose statistics adapt to the data that they meet."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..nn._running_norm import check_count, check_fraction, check_positive
from ..nn.batch_norm import deviation_of
from ..ops._layout import accumulation_dtype, check_pad_mask, is_exporting


class AdaptingNorm(nn.Module):
    """Base of what :func:`adapt` puts around a BatchNorm, whose own statistics are those of the source data.

    The BatchNorm, of whatever class, computes the result and is always in evaluation mode. Where other statistics than
    its own are to be used, its input is rescaled so that it gives what they would have given.

    Shape:
        x: as for the BatchNorm; output like x.
        pad_mask: the shape of x without its channel dimension, bool, True = padding: left out of all statistics,
            normalised like the rest.
    """

    #: Why the adapted statistics cannot become constants.
    refusal: str | None = None
    #: Why :func:`normfuse.nn.calibrate` takes no model with it.
    calibration_refusal = "follows the data that it meets: call normfuse.convert.freeze(model) first"

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        self.norm = norm
        self.train(norm.training)

    def train(self, mode: bool = True) -> AdaptingNorm:
        super().train(mode)
        self.norm.eval()
        return self

    @property
    def channel_dim(self) -> int:
        return getattr(self.norm, "channel_dim", 1)

    def _instances(self, x: Tensor, pad_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``x`` as [samples, channels, positions] in a dtype for statistics; the valid ones [samples, 1, positions]."""
        check_pad_mask(x, self.channel_dim, pad_mask)
        x = x.movedim(self.channel_dim, 1)
        values = (x.flatten(2) if x.dim() > 2 else x[..., None]).to(accumulation_dtype(x.dtype))
        if pad_mask is None:
            return values, None
        return values, torch.logical_not(pad_mask).reshape(values.shape[0], 1, values.shape[2])

    def _normalise(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        """What the norm gives with other statistics, [channels] or [samples, channels]."""
        norm = self.norm
        scale = deviation_of(norm, norm.running_var) / deviation_of(norm, var)
        shift = norm.running_mean - mean * scale
        shape = [1] * x.dim()
        shape[0], shape[self.channel_dim] = -1, scale.shape[-1]
        return norm(torch.addcmul(shift.view(shape), x.to(scale.dtype), scale.view(shape)).to(x.dtype))

    def settle(self) -> bool:
        """Give the adapted statistics to the BatchNorm; whether there are any."""
        raise NotImplementedError


class AlphaBatchNorm(AdaptingNorm):
    """α-BN (You et al., 2021, arXiv 2110.04065): statistics mixed from the source's and those of each batch.

        mean = (1 - test_weight) * running_mean + test_weight * mean of the batch

    and the variance, unbiased, likewise. Gradients flow through the statistics of the batch. :func:`freeze` mixes with
    the statistics of all rows seen, as if they were one batch.

    Args:
        norm: the BatchNorm with the source's statistics.
        test_weight: share of the batch, from 0 to 1.

    Attributes:
        seen_rows: number of rows so far.
        seen_mean: their mean, [C].
        seen_var: their biased variance, [C].

    Example:
        >>> from normfuse.convert import AlphaBatchNorm
        >>> norm = AlphaBatchNorm(nn.BatchNorm1d(8), test_weight=1.0)  # the batch alone
        >>> bool(norm(torch.randn(32, 8) + 5).mean().abs() < 1e-5)
        True
    """

    seen_rows: Tensor
    seen_mean: Tensor
    seen_var: Tensor

    def __init__(self, norm: _BatchNorm, test_weight: float = 0.1) -> None:
        super().__init__(norm)
        check_fraction("test_weight", test_weight, "batch's")
        self.test_weight = test_weight
        self.register_buffer("seen_rows", torch.zeros((), dtype=torch.int64, device=norm.running_mean.device))
        self.register_buffer("seen_mean", torch.zeros_like(norm.running_mean))
        self.register_buffer("seen_var", torch.zeros_like(norm.running_var))

    def _mixed(self, mean: Tensor, var: Tensor, rows: int | Tensor) -> tuple[Tensor, Tensor]:
        """The statistics to use, from mean and biased variance of ``rows`` rows."""
        norm, weight = self.norm, self.test_weight
        if isinstance(rows, Tensor):
            weight = weight * (rows > 0).to(mean.dtype)
        return norm.running_mean.lerp(mean, weight), norm.running_var.lerp(_unbiased(var, rows), weight)

    def forward(self, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        values, keep = self._instances(x, pad_mask)
        if values.shape[0] * values.shape[2] == 0:
            return self.norm(x)
        mean, var, rows = _moments(values, keep, (0, 2))
        mean, var = mean.to(self.seen_mean), var.to(self.seen_var)
        if not is_exporting():
            self._see(mean.detach(), var.detach(), rows)
        return self._normalise(x, *self._mixed(mean, var, rows))

    @torch.no_grad()
    def _see(self, mean: Tensor, var: Tensor, rows: int | Tensor) -> None:
        self.seen_rows = self.seen_rows + rows
        share = rows / self.seen_rows.clamp(min=1).to(mean.dtype)
        spread = (1 - share) * (mean - self.seen_mean).square()
        self.seen_var = self.seen_var.lerp(var + spread, share)
        self.seen_mean = self.seen_mean.lerp(mean, share)

    @torch.no_grad()
    def settle(self) -> bool:
        rows = int(self.seen_rows)
        if rows:
            mean, var = self._mixed(self.seen_mean, self.seen_var, rows)
            self.norm.running_mean.copy_(mean)
            self.norm.running_var.copy_(var)
        return rows > 0

    def extra_repr(self) -> str:
        return f"test_weight={self.test_weight}"


class DecayingBatchNorm(AdaptingNorm):
    """Running statistics that follow the data ever more slowly (OSUDA, Liu et al., 2021, arXiv 2106.12497).

    Batch k, from 0 on, moves them by its share, and is normalised by what they are then:

        running = (1 - share) * running + share * batch,   share = rate * exp(-decay * k)

    The variance of the batch is unbiased. Gradients do not flow through the statistics.

    Args:
        norm: the BatchNorm with the source's statistics, which are moved.
        rate: share of the first batch, from 0 to 1.
        decay: positive; 0.1 makes the share a third after eleven batches.

    Attributes:
        batches: number of batches so far.

    Example:
        >>> from normfuse.convert import DecayingBatchNorm
        >>> norm = DecayingBatchNorm(nn.BatchNorm1d(8), rate=0.5)
        >>> _ = norm(torch.ones(4, 8))
        >>> int(norm.batches), norm.norm.running_mean[0]
        (1, tensor(0.5000))
    """

    def __init__(self, norm: _BatchNorm, rate: float = 0.1, decay: float = 0.05) -> None:
        super().__init__(norm)
        check_fraction("rate", rate, "batch's")
        check_positive("decay", decay)
        self.rate, self.decay = rate, decay
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64, device=norm.running_mean.device))

    def forward(self, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        if not is_exporting():
            self._follow(*self._instances(x.detach(), pad_mask))
        return self.norm(x)

    @torch.no_grad()
    def _follow(self, values: Tensor, keep: Tensor | None) -> None:
        if values.shape[0] * values.shape[2] == 0:
            return
        mean, var, rows = _moments(values, keep, (0, 2))
        seen = rows > 0 if isinstance(rows, Tensor) else True
        share = self.rate * torch.exp(-self.decay * self.batches.to(mean.dtype)) * seen
        norm, unbiased = self.norm, _unbiased(var, rows)
        # New tensors: the graphs of earlier batches hold the old ones.
        norm.running_mean = norm.running_mean.lerp(mean.to(norm.running_mean), share.to(norm.running_mean))
        norm.running_var = norm.running_var.lerp(unbiased.to(norm.running_var), share.to(norm.running_var))
        self.batches += seen

    def settle(self) -> bool:
        return bool(self.batches > 0)

    def extra_repr(self) -> str:
        return f"rate={self.rate}, decay={self.decay}"


class UnMixBatchNorm(AdaptingNorm):
    """UnMix-TNS (Tomar et al., 2024, arXiv 2401.08328): each sample's statistics, from components that follow data.

    The source's statistics are spread over K components. With a sample's own mean m and biased variance v over its
    positions, and p = softmax over components of cos(m, component means) / temperature,

        means = (1 - p) * component means + p * m,   variances = (1 - p) * component variances + p * v

    and the sample is normalised by the statistics of that mixture. Components move by ``p * (m - component mean)``,
    averaged over samples, times ``1 - (1 - momentum) ** (samples / 64)``; variances likewise. Gradients flow through
    the sample's statistics, but not through p. Input [B, C] has no positions to take statistics over: it is normalised
    by the source's alone, and nothing moves.

    Args:
        norm: the BatchNorm with the source's statistics.
        components: K, at least 2.
        momentum: from 0 to 1, how far 64 samples move the components.
        temperature: positive.
        generator: for the random part of the components' first means.

    Attributes:
        means: [K, C], of the components.
        vars: [K, C], of the components.

    Example:
        >>> from normfuse.convert import UnMixBatchNorm
        >>> UnMixBatchNorm(nn.BatchNorm2d(8), components=4)(torch.randn(2, 8, 5, 5)).shape
        torch.Size([2, 8, 5, 5])
    """

    refusal = (
        "UnMix-TNS computes statistics from each sample, so there are no constants to freeze or to fold; export the "
        'model as it is, or adapt with method="alpha" or method="decay"'
    )

    means: Tensor
    vars: Tensor

    def __init__(
        self,
        norm: _BatchNorm,
        components: int = 16,
        momentum: float = 0.1,
        temperature: float = 0.07,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(norm)
        check_count("components", components, 2)
        check_fraction("momentum", momentum, "new")
        check_positive("temperature", temperature)
        self.momentum, self.temperature = momentum, temperature
        mean, var = norm.running_mean, norm.running_var
        device = mean.device if generator is None else generator.device
        noise = torch.randn(components, mean.numel(), generator=generator, device=device, dtype=mean.dtype)
        # Half of the variance is within the components, half between their means.
        spread = math.sqrt(0.5 * components / (components - 1)) * var.sqrt()
        self.register_buffer("means", mean + spread * noise.to(mean.device))
        self.register_buffer("vars", (0.5 * var).expand(components, -1).clone())

    def forward(self, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        values, keep = self._instances(x, pad_mask)
        if values.numel() == 0 or x.dim() == 2:
            return self.norm(x)
        mean, var, rows = _moments(values.to(self.means), keep, (2,))
        likeness = nn.functional.cosine_similarity(mean.detach()[:, None], self.means, dim=-1)
        p = torch.softmax(likeness / self.temperature, dim=1)[..., None]
        means, vars_ = self.means.lerp(mean[:, None], p), self.vars.lerp(var[:, None], p)
        mixed = means.mean(1)
        mixed_var = vars_.mean(1) + (means - mixed[:, None]).square().mean(1)
        if not is_exporting():
            # Samples without a valid position count for nothing.
            seen = rows[:, None, None] > 0 if isinstance(rows, Tensor) else torch.ones_like(p[:, :1], dtype=torch.bool)
            count = seen.sum()
            rate = 1 - (1 - self.momentum) ** (count.to(means.dtype) / 64)
            share = seen.to(means.dtype) / count.clamp(min=1)
            # New tensors: the graph holds the old ones.
            self.means = self.means.lerp((share * means.detach()).sum(0), rate)
            self.vars = self.vars.lerp((share * vars_.detach()).sum(0), rate)
        return self._normalise(x, mixed, mixed_var)

    def extra_repr(self) -> str:
        return f"components={self.means.shape[0]}, momentum={self.momentum}, temperature={self.temperature}"


def _moments(values: Tensor, keep: Tensor | None, dims: tuple[int, ...]) -> tuple[Tensor, Tensor, int | Tensor]:
    """Mean, biased variance and number of the valid values along ``dims``; 0 where there is none."""
    if keep is None:
        var, mean = torch.var_mean(values, dim=dims, correction=0)
        return mean, var, math.prod(values.shape[dim] for dim in dims)
    rows = keep.sum(dims).squeeze(-1)
    count = keep.sum(dims, keepdim=True).clamp(min=1)
    # Selecting instead of multiplying keeps a NaN in padding out of the sums.
    mean = torch.where(keep, values, 0.0).sum(dims, keepdim=True) / count
    var = torch.where(keep, values - mean, 0.0).square().sum(dims, keepdim=True) / count
    return mean.squeeze(dims), var.squeeze(dims), rows


def _unbiased(var: Tensor, rows: int | Tensor) -> Tensor:
    if isinstance(rows, Tensor):
        return var * (rows.to(var.dtype) / (rows - 1).clamp(min=1))
    return var * (rows / torch.sym_max(rows - 1, 1))
