"""Statistics from data, with frozen weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ..ops._layout import masked
from ._running_norm import ChannelNorm, normalised_input, running_norms


class _Moments:
    """Number, mean and summed squared deviation of the valid rows that one norm has seen, on its device, in float64."""

    def __init__(self, norm: ChannelNorm) -> None:
        device = next(norm.buffers()).device
        self.rows = torch.zeros((), dtype=torch.float64, device=device)
        self.mean = torch.zeros(norm.num_features, dtype=torch.float64, device=device)
        self.squares = torch.zeros_like(self.mean)

    def observe(self, norm: ChannelNorm, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        x, pad_mask = normalised_input(arguments, options)
        values = norm.rows_to_measure(x.detach().double())
        pad_mask = None if pad_mask is None else pad_mask.reshape(-1)
        kept, count = masked(values, pad_mask, -1)
        rows = torch.as_tensor(count, dtype=torch.float64, device=values.device)
        mean = kept.sum(0) / rows.clamp(min=1)
        squares = masked(values - mean, pad_mask, -1)[0].square().sum(0)
        share = rows / (self.rows + rows).clamp(min=1)
        self.squares += squares + self.rows * share * (mean - self.mean).square()
        self.mean += share * (mean - self.mean)
        self.rows += rows
        # The norm is in evaluation mode and divides by this batch's statistics, as in a first step of training.
        if rows > 0:
            norm.set_statistics(mean, squares / rows)

    def share_with(self, group: ProcessGroup) -> None:
        """Those of all ranks."""
        total, weighted = self.rows.clone(), self.rows * self.mean
        for tensor in (total, weighted):
            dist.all_reduce(tensor, group=group)
        mean = weighted / total.clamp(min=1)
        self.squares += self.rows * (self.mean - mean).square()
        dist.all_reduce(self.squares, group=group)
        self.rows, self.mean = total, mean


def run_batch(model: nn.Module, batch: Any, device: torch.device | None) -> None:
    """Call ``model`` with a batch: a tensor, a mapping of arguments, or a tuple or list that begins with either."""

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) and device is not None else value

    given = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if isinstance(given, Mapping):
        model(**{name: moved(value) for name, value in given.items()})
    else:
        model(moved(given))


@contextmanager
def keep_modes(model: nn.Module) -> Iterator[None]:
    """Leave every module of ``model`` in the mode, training or evaluation, in which it was."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def calibrate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    max_batches: int | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> int:
    """Set the forward statistics of every norm that keeps running ones from data; weights stay as they are.

    The new statistics are those of all valid rows of all batches together: mean and variance in the BatchNorm family
    (unbiased, as in training; not for EstimatedBatchNorm), the quadratic mean in UnifiedNorm, PowerNorm and
    MovingAverageBatchNorm (also in every entry of ``buffer_x2``). While it runs, norms use the statistics of the batch,
    as in the first steps of training, and the model is in evaluation mode (no dropout). Step counters, gradient
    statistics and the modes of all modules are afterwards what they were before. A norm that does not run keeps its
    statistics. In a DomainSplitNorm only the chosen domain runs, so call :func:`choose_domain` and calibrate once per
    domain, with its data. Norms of :func:`convert_sync` sum over their process group at the end; ranks may have
    different numbers of batches.

    Use it after :func:`normfuse.convert.swap_norms`, after loading weights without statistics, or when data has
    changed. BatchNorms of PyTorch are not changed; use ``torch.optim.swa_utils.update_bn`` for them.

    Args:
        model: changed in place.
        loader: batches, each a tensor or a mapping of keyword arguments, or a tuple or list that begins with either.
        max_batches: stop after that many; None: all.
        device: where to move batches; None: leave them.
        progress: show a progress bar.

    Returns:
        The number of batches seen.

    Raises:
        ValueError: there is no norm, no batch, no valid row for any norm, a statistic that is not finite, or a norm
            of :func:`normfuse.convert.adapt`. The model's statistics are then as before.

    Example:
        >>> from normfuse.nn import UnifiedNorm, calibrate
        >>> model = nn.Sequential(nn.Linear(4, 8), UnifiedNorm(8))
        >>> calibrate(model, [torch.randn(32, 4) for _ in range(3)], progress=False)
        3
    """
    norms = running_norms(model, "to calibrate", "torch.optim.swa_utils.update_bn")
    for name, module in model.named_modules():
        if hasattr(module, "calibration_refusal"):
            raise ValueError(f"{name} ({type(module).__name__}) {module.calibration_refusal}")
    before = {norm: {name: b.clone() for name, b in norm.named_buffers()} for norm in norms.values()}
    moments = {norm: _Moments(norm) for norm in norms.values()}
    hooks = [norm.register_forward_pre_hook(moments[norm].observe, with_kwargs=True) for norm in norms.values()]
    batches = 0
    try:
        with keep_modes(model), _bar(loader, max_batches) if progress else nullcontext() as bar:
            model.eval()
            for batch in loader:
                if batches == max_batches:
                    break
                run_batch(model, batch, None if device is None else torch.device(device))
                batches += 1
                if bar is not None:
                    bar.advance(bar.task_ids[0])
    finally:
        for hook in hooks:
            hook.remove()
        for norm, buffers in before.items():
            for name, value in buffers.items():
                norm.get_buffer(name).copy_(value)
    alone = all(norm.group_to_share_with() is None for norm in norms.values())
    if batches == 0 and alone:  # another rank may have some
        raise ValueError("loader gave no batch to calibrate with; give at least one")
    _commit(norms, moments)
    return batches


def _bar(loader: Any, max_batches: int | None) -> Progress:
    length = len(loader) if hasattr(loader, "__len__") else None
    known = [count for count in (length, max_batches) if count is not None]
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    bar = Progress(*columns)
    bar.add_task("calibrating", total=min(known) if known else None)
    return bar


def _commit(norms: dict[str, ChannelNorm], moments: dict[ChannelNorm, _Moments]) -> None:
    for name, norm in norms.items():
        found = moments[norm]
        group = norm.group_to_share_with()
        if group is not None:
            found.share_with(group)
        if not (found.mean.isfinite() & found.squares.isfinite()).all():
            raise ValueError(f"the statistic of {name} is not finite; look at the weights and the data")
    seen = {norm: found for norm, found in moments.items() if found.rows > 0}
    if not seen:
        raise ValueError("no norm of the model saw a valid row; check pad_mask and that the model calls its norms")
    for norm, found in seen.items():
        norm.set_statistics(found.mean, found.squares / found.rows, rows=found.rows)
