"""Statistics from data, with frozen weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from ..ops._layout import accumulation_dtype, sum_squares, to_rows
from ..ops.power_norm import group_scaling
from ._running_norm import RunningNorm, normalised_input
from .power_norm import PowerNorm


class _Sums:
    """Σx² over the valid rows that one norm has seen, on its device, in float64."""

    def __init__(self, norm: RunningNorm) -> None:
        self.total = torch.zeros(norm.num_features, dtype=torch.float64, device=norm.ema_gz.device)
        self.rows = torch.zeros((), dtype=torch.int64, device=norm.ema_gz.device)

    def observe(self, norm: RunningNorm, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        x, pad_mask = normalised_input(arguments, options)
        values = to_rows(x.detach(), norm.channel_dim).to(accumulation_dtype(x.dtype))
        if isinstance(norm, PowerNorm):
            values, _ = group_scaling(values, norm.group_num or 0, norm.eps)
        total, rows = sum_squares(values, None if pad_mask is None else pad_mask.reshape(-1))
        self.total += total
        self.rows += rows
        # A first step of training: the norm divides by the statistic of this batch, whatever it held before.
        norm.iters.zero_()


def run_batch(model: nn.Module, batch: Any, device: torch.device | None) -> None:
    """Call ``model`` with a batch: a tensor, a tuple or list that begins with the input, or a mapping of arguments."""

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) and device is not None else value

    if isinstance(batch, Mapping):
        model(**{name: moved(value) for name, value in batch.items()})
    else:
        model(moved(batch[0] if isinstance(batch, (tuple, list)) else batch))


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
    """Set the forward statistics of every Unified and Power Norm from data; weights stay as they are.

    The quadratic mean over all valid rows of all batches, weighted by rows, becomes ``running_var`` or
    ``running_phi`` (and every entry of ``buffer_x2``). While it runs, norms divide by the statistic of the
    batch, as in the first steps of training, and the rest of the model is in evaluation mode (no dropout).
    Step counters, gradient statistics and the modes of all modules are afterwards what they were before.
    A norm that never runs keeps its statistics. Norms of :func:`convert_sync` sum over their process group at
    the end; ranks may have different numbers of batches. Use it after :func:`normfuse.convert.swap_norms`, after
    loading weights without statistics, or when data has changed.

    Args:
        model: changed in place.
        loader: batches, each a tensor, a tuple or list whose first entry is the input, or a mapping of
            keyword arguments.
        max_batches: stop after that many; None: all.
        device: where to move batches; None: leave them.
        progress: show a progress bar.

    Returns:
        The number of batches seen.

    Raises:
        ValueError: there is no norm, no batch, no valid row for a norm, or a statistic that is not finite. The
            model's statistics are then as before.
    """
    norms = {name: m for name, m in model.named_modules() if isinstance(m, RunningNorm)}
    if not norms:
        raise ValueError(f"model of class {type(model).__name__} has no UnifiedNorm or PowerNorm to calibrate")
    before = {norm: {name: b.clone() for name, b in norm.named_buffers()} for norm in norms.values()}
    sums = {norm: _Sums(norm) for norm in norms.values()}
    hooks = [norm.register_forward_pre_hook(sums[norm].observe, with_kwargs=True) for norm in norms.values()]
    options = {norm: (norm.warmup_iters, norm.synchronised, norm.ghost_size) for norm in norms.values()}
    batches = 0
    try:
        with keep_modes(model), _bar(loader, max_batches) if progress else nullcontext() as bar:
            model.eval()
            for norm in norms.values():
                norm.train()
                norm.warmup_iters, norm.synchronised, norm.ghost_size = max(norm.warmup_iters, 1), False, None
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
        for norm, (warmup_iters, synchronised, ghost_size) in options.items():
            norm.warmup_iters, norm.synchronised, norm.ghost_size = warmup_iters, synchronised, ghost_size
            for name, value in before[norm].items():
                norm.get_buffer(name).copy_(value)
    alone = all(norm.group_to_share_with() is None for norm in norms.values())
    if batches == 0 and alone:  # another rank may have some
        raise ValueError("loader gave no batch to calibrate with; give at least one")
    _commit(norms, sums)
    return batches


def _bar(loader: Iterable[Any], max_batches: int | None) -> Progress:
    length = len(loader) if hasattr(loader, "__len__") else None
    known = [count for count in (length, max_batches) if count is not None]
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    bar = Progress(*columns)
    bar.add_task("calibrating", total=min(known) if known else None)
    return bar


def _commit(norms: dict[str, RunningNorm], sums: dict[RunningNorm, _Sums]) -> None:
    statistics = {}
    for name, norm in norms.items():
        group = norm.group_to_share_with()
        if group is not None:
            dist.all_reduce(sums[norm].total, group=group)
            dist.all_reduce(sums[norm].rows, group=group)
        rows = sums[norm].rows.item()
        mean = sums[norm].total / max(rows, 1)
        if not mean.isfinite().all():
            raise ValueError(f"the statistic of {name or 'the norm'} is not finite; look at the weights and the data")
        if rows:
            statistics[norm] = mean
    if not statistics:
        raise ValueError("no norm of the model saw a valid row; check pad_mask and that the model calls its norms")
    for norm, mean in statistics.items():
        for name in ("running_var", "running_phi", "buffer_x2"):
            if hasattr(norm, name):
                norm.get_buffer(name).copy_(mean)
