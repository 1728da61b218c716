"""The static norm that is closest to a dynamic one, in closed form from data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import MaskedBatchNorm, ProgressiveNorm, RepBatchNorm
from ..nn._running_norm import ChannelNorm, normalised_input
from ..nn.batch_norm import deviation_of
from ..nn.calibration import calibrate, keep_modes, run_batch
from ..ops._layout import to_rows

_CONSTANT = 1e-8  # share of the mean variance over channels below which a channel counts as constant
_SLOPE_OF_CONSTANTS = 0.1  # of the median slope: adds its square, 0.01, of a usual channel's variance


@contextmanager
def static_alone(norms: dict[str, ProgressiveNorm]) -> Iterator[None]:
    """Let evaluation run the static norms alone, as at λ = 0."""
    shares = {norm: norm.share for norm in norms.values()}
    try:
        for norm in shares:
            norm.share = 0.0
        yield
    finally:
        for norm, share in shares.items():
            norm.share = share


class _Moments:
    """Sums over valid rows of a static norm's input u and the original's output v, per channel, in float64."""

    def __init__(self, norm: ProgressiveNorm) -> None:
        channels, device = norm.static.num_features, norm.step.device
        self.sums = torch.zeros(5, channels, dtype=torch.float64, device=device)
        self.rows = torch.zeros((), dtype=torch.int64, device=device)

    def observe(self, norm: ProgressiveNorm, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        x, pad_mask = normalised_input(arguments, options)
        if pad_mask is None:
            pad_mask = norm.mask_for(x)
        static = norm.static
        u = static.rows_to_measure(x.detach().double())
        v = to_rows(norm.original(x).detach().double(), static.channel_dim)
        if pad_mask is not None:
            valid = torch.logical_not(pad_mask).reshape(-1)
            u, v = u[valid], v[valid]
        self.sums += torch.stack([t.sum(0) for t in (u, v, u * u, u * v, v * v)])
        self.rows += len(u)


@torch.no_grad()
def fit_static_norms(
    model: nn.Module,
    norms: dict[str, ProgressiveNorm],
    loader: Iterable[Any],
    *,
    max_batches: int | None,
    device: torch.device | str | None,
    fit: bool,
) -> dict[str, float]:
    """See :meth:`normfuse.convert.Conversion.calibrate`."""
    batches = list(loader if max_batches is None else islice(loader, max_batches))
    moments = {name: _Moments(norm) for name, norm in norms.items()}
    hooks = [norm.register_forward_pre_hook(moments[name].observe, with_kwargs=True) for name, norm in norms.items()]
    try:
        with keep_modes(model):
            model.eval()
            for batch in batches:
                run_batch(model, batch, None if device is None else torch.device(device))
    finally:
        for hook in hooks:
            hook.remove()
    if not batches:
        raise ValueError("loader gave no batch to calibrate with; give at least one")
    seen = {name: found for name, found in moments.items() if found.rows > 0}
    if not seen:
        raise ValueError("no norm saw a valid row; check the mask and that the model calls its norms")
    for name, found in seen.items():
        if not found.sums.isfinite().all():
            raise ValueError(f"the statistic of {name} is not finite; look at the weights and the data")
    explained = {name: 1 - _settle(norms[name].static, found, fit) for name, found in seen.items()}
    if fit:
        # Behind other static norms the inputs are no longer those of the originals. Statistics of what they are now
        # keep errors from adding up along the network.
        with static_alone(norms):
            calibrate(model, batches, device=device, progress=False)
    return explained


def _settle(static: ChannelNorm, moments: _Moments, fit: bool) -> float:
    mean, target, square, product, target_square = moments.sums / moments.rows
    var, target_var = ((s - m**2).clamp(min=0) for s, m in ((square, mean), (target_square, target)))
    return set_affine(
        static, mean, var, target, target_var, product - mean * target, fit=fit, rows=moments.rows.double()
    )


def set_affine(
    static: ChannelNorm,
    mean: Tensor,
    var: Tensor,
    target: Tensor,
    target_var: Tensor,
    covariance: Tensor,
    *,
    fit: bool = True,
    rows: Tensor | None = None,
) -> float:
    """Give a static norm the statistics of its input and, with ``fit``, the affine map that is closest to a target.

    A RepBatchNorm's shortcut becomes 0. Beside a weight that makes up for it, the statistics of a batch would change
    the difference of two large numbers.

    Args:
        static: changed in place.
        mean, var: of the input u, per channel.
        target, target_var: mean and variance of the target v.
        covariance: of u and v.
        fit: whether to set gain and shift as well.
        rows: how many rows the statistics are of, see :meth:`ChannelNorm.set_statistics`.

    Returns:
        What the best affine map leaves: its squared error over the variance of v, both summed over channels.
    """
    square = var + mean**2
    # A channel that never changes determines no slope: the shift alone then gives its value.
    slope = torch.where(var > 1e-12 * square, covariance / var, 0.0)
    left = (target_var - slope * covariance).clamp(min=0).sum()
    # Not 0 where the target is constant (a gain of 0), for folding has to divide by it somewhere.
    constant = target_var < _CONSTANT * target_var.mean()
    slope = torch.where(constant, _SLOPE_OF_CONSTANTS * slope.abs().median(), slope)
    shift = target - slope * mean
    centred = isinstance(static, MaskedBatchNorm)
    static.set_statistics(mean, var, rows)
    if fit:
        if isinstance(static, RepBatchNorm):
            static.alpha.zero_()
        static.weight.copy_(slope * deviation_of(static, static.running_var if centred else square))
        static.bias.copy_(shift + slope * mean if centred else shift)
    total = target_var.sum()
    return (left / total).item() if total > 0 else 0.0
