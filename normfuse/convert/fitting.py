"""The static norm that is closest to a dynamic one, in closed form from data."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import some_of
from ..nn import ProgressiveNorm
from ..nn._affine_fit import paired_rows, set_affine
from ..nn._running_norm import ChannelNorm, normalised_input
from ..nn.calibration import calibrate, keep_modes, run_batch


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
        u, v = paired_rows(norm.static, x.double(), norm.original(x).double(), pad_mask)
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
    if idle := [name for name in norms if name not in seen]:
        warnings.warn(
            f"{len(idle)} of {len(norms)} norms saw no valid row and are not fitted: {some_of(idle)}. Calibrate with "
            "data that reaches them, or leave them out with `where`",
            RuntimeWarning,
            stacklevel=4,
        )
    for name, found in seen.items():
        if not found.sums.isfinite().all():
            raise ValueError(f"the statistic of {name} is not finite; look at the weights and the data")
    explained = {name: 1 - _settle(norms[name].static, found, fit).item() for name, found in seen.items()}
    if fit:
        # Behind other static norms the inputs are no longer those of the originals. Statistics of what they are now
        # keep errors from adding up along the network.
        with static_alone(norms):
            calibrate(model, batches, device=device, progress=False)
    return explained


def _settle(static: ChannelNorm, moments: _Moments, fit: bool) -> Tensor:
    mean, target, square, product, target_square = moments.sums / moments.rows
    var, target_var = ((s - m**2).clamp(min=0) for s, m in ((square, mean), (target_square, target)))
    return set_affine(
        static, mean, var, target, target_var, product - mean * target, fit=fit, rows=moments.rows.double()
    )
