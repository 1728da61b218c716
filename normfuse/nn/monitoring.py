"""What the statistics of norms do during training: recorded, stored, and a warning when a layer goes astray."""

from __future__ import annotations

import json
import math
import warnings
from itertools import count
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from ..files import Output
from ..ops._layout import accumulation_dtype, mean_square
from ..ops._recompute import is_second_run
from ..ops._registry import library
from ._running_norm import ChannelNorm, given_to_norm, running_norms

FIELDS = ("step", "batch", "running", "ratio", "ratio_low", "ratio_high", "skips", "gradient", "finite")
_SETTLED = 20  # steps until running statistics have left their start value behind: 0.9 ** 20 = 0.12
_FORMAT = "normfuse-statistics"


Statistics = tuple[Tensor | None, Tensor, Tensor | None, Tensor, list[Tensor]]


def _statistics(norm: ChannelNorm) -> Statistics:
    """Running mean, running variance or quadratic mean, gradient statistic, step counter, counters of skips."""

    def first(*names: str) -> Tensor | None:
        return next((norm._buffers[name] for name in names if norm._buffers.get(name) is not None), None)

    counters = [first(name) for name in ("skip_counter", "skipped_forwards", "skipped_backwards")]
    return (
        first("running_mean"), first("running_var", "running_phi"), first("ema_gz", "buffer_gz"),
        first("iters", "num_batches_tracked"), [counter for counter in counters if counter is not None],
    )  # fmt: skip


def _measure(
    norm: ChannelNorm, x: Tensor, pad_mask: Tensor | None, residual: Tensor | None, running_mean: Tensor | None,
    running: Tensor, gradient: Tensor | None, steps: Tensor, counters: list[Tensor],
) -> Tensor:  # fmt: skip
    """The numbers of :data:`FIELDS` as one small float64 tensor on the norm's device."""
    x = x if residual is None else x + residual
    values = norm.rows_to_measure(x.detach().to(accumulation_dtype(x.dtype)))
    if running_mean is not None:
        values = values - running_mean
    q, _ = mean_square(values, None if pad_mask is None else pad_mask.reshape(-1), empty=running)
    ratio = (q + norm.eps) / (running + norm.eps)
    skips = sum((counter.sum() for counter in counters), torch.zeros_like(steps).sum())
    finite = q.isfinite().all() & running.isfinite().all()
    size = q.new_full((), math.nan)
    if gradient is not None:
        finite = finite & gradient.isfinite().all()
        size = (gradient if gradient.dim() == 1 else gradient.mean(0)).square().mean().sqrt()  # of a window's mean
    numbers = (
        steps.sum() + 1, q.mean(), running.mean(), ratio.log().mean().exp(), ratio.amin(), ratio.amax(), skips, size,
        finite,
    )  # fmt: skip
    return torch.stack([number.to(torch.float64) for number in numbers])


_WATCHES: WeakValueDictionary[int, Monitor] = WeakValueDictionary()
_numbers = count()

# Compiled code watches through an operation: it must run in every step, not once while the code is traced. Its
# ticket is declared to change, or nothing would keep an operation without results in the graph. Python runs in it,
# which a captured CUDA graph would not repeat.
library.define(
    "observe(Tensor(a!) ticket, Tensor x, Tensor? pad_mask, Tensor? residual, Tensor? running_mean, Tensor running, "
    "Tensor? gradient, Tensor steps, Tensor[] counters, int watch, str name) -> ()",
    tags=(torch.Tag.cudagraph_unsafe,),
)


@torch.library.impl(library, "observe", "CompositeExplicitAutograd")
def _observe(
    ticket: Tensor, x: Tensor, pad_mask: Tensor | None, residual: Tensor | None, running_mean: Tensor | None,
    running: Tensor, gradient: Tensor | None, steps: Tensor, counters: list[Tensor], watch: int, name: str,
) -> None:  # fmt: skip
    monitor = _WATCHES.get(watch)
    if monitor is not None:
        monitor.observe(name, x, pad_mask, residual, running_mean, running, gradient, steps, counters)


@torch.library.register_fake("normfuse::observe")
def _(*arguments: object) -> None:
    return None


class Monitor:
    """Records of the norms of a model, see :func:`monitor`.

    Args:
        model: the model; hooks record its norms.
        every: training steps between two records.
        drift: ratio of batch and running statistic above which there is a warning.

    Example:
        >>> from normfuse.nn import UnifiedNorm, monitor
        >>> model = nn.Sequential(UnifiedNorm(8))
        >>> with monitor(model, every=1) as watch:
        ...     _ = model(torch.randn(4, 8))
        >>> watch.to_json()["layers"]["0"]["step"]
        [1]
    """

    def __init__(self, model: nn.Module, every: int, drift: float) -> None:
        self.every = every
        self.drift = drift
        self._records: dict[str, list[list[float]]] = {}
        self._waiting: dict[str, list[Tensor]] = {}
        self._warned: set[tuple[str, str]] = set()
        self._calls: dict[str, int] = {}
        self._number = next(_numbers)
        _WATCHES[self._number] = self
        self._norms = running_norms(model, "to watch")
        for name in self._norms:
            self._records[name], self._waiting[name], self._calls[name] = [], [], 0
        self._hooks = [
            norm.register_forward_pre_hook(_hook(self._number, name, norm), with_kwargs=True)
            for name, norm in self._norms.items()
        ]

    def observe(self, name: str, x: Tensor, pad_mask: Tensor | None, residual: Tensor | None, *statistics: Any) -> None:
        """Record the next step of a norm, if it is due. Norms call this; users do not.

        Args:
            name: of the norm in the model.
            x: what it is given.
            pad_mask: as the norm takes it.
            residual: as the norm takes it.
            *statistics: the norm's running ones, as they are before the step.
        """
        if is_second_run():
            return
        self._calls[name] += 1
        if (self._calls[name] - 1) % self.every:
            return
        self._collect(name)
        with torch.no_grad():
            record = _measure(self._norms[name], x, pad_mask, residual, *statistics)
        # On its way while training goes on; it is read when the next record is made, long after it arrived.
        host = torch.empty_like(record, device="cpu", pin_memory=record.is_cuda)
        host.copy_(record, non_blocking=True)
        self._waiting[name].append(host)

    def _collect(self, name: str) -> None:
        waiting, self._waiting[name] = self._waiting[name], []
        for record in waiting:
            numbers = record.tolist()
            self._records[name].append(numbers)
            self._judge(name, dict(zip(FIELDS, numbers, strict=True)))

    def _judge(self, name: str, record: dict[str, float]) -> None:
        step = int(record["step"])
        if not record["finite"]:
            self._warn(name, "finite", f"{name}: a statistic of step {step} is not finite")
        elif step > _SETTLED and not 1 / self.drift <= record["ratio"] <= self.drift:
            self._warn(
                name, "drift",
                f"{name}: in step {step} the batch's statistic is {record['ratio']:.3g} times the running one "
                f"(bound: {self.drift:g}); evaluation will differ from training. Lower the learning rate, lengthen "
                "the warm-up or run calibrate",
            )  # fmt: skip

    def _warn(self, name: str, kind: str, message: str) -> None:
        if (name, kind) not in self._warned:
            self._warned.add((name, kind))
            warnings.warn(message, RuntimeWarning, stacklevel=2)

    def to_json(self) -> dict[str, Any]:
        """The records so far.

        ``layers`` maps each norm's name to lists of equal length, one for each of ``step`` (training step of the
        norm), ``batch`` and ``running`` (mean over channels of the batch's and the running statistic: the quadratic
        mean, or in the BatchNorm family the mean squared deviation from the running mean, which a mean that moves
        away raises too, and the running variance), ``ratio``, ``ratio_low`` and ``ratio_high`` (geometric mean,
        smallest and largest over channels of the quotient of the two), ``skips`` (outliers and skipped passes so
        far), ``gradient`` (root mean square of ``ema_gz``, or of the mean of MABN's ``buffer_gz``) and ``finite``.
        Numbers that are not finite, and the gradient statistic of norms without one, are null. Waits for the device.

        Returns:
            A JSON-ready dictionary.
        """
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        for name in self._records:
            self._collect(name)
        layers = {}
        for name, records in self._records.items():
            columns = list(zip(*records, strict=True)) if records else [()] * len(FIELDS)
            layers[name] = {
                field: [_plain(field, v) for v in column] for field, column in zip(FIELDS, columns, strict=True)
            }
        return {"format": _FORMAT, "version": 1, "every": self.every, "layers": layers}

    def save(self, path: str | Path) -> None:
        """Write :meth:`to_json` to a file, which ``normfuse plot`` draws.

        Args:
            path: of the file; it appears when it is complete.

        Raises:
            OutputError: the file cannot be written.
        """
        with Output(path) as output:
            output.staged.write_text(json.dumps(self.to_json(), allow_nan=False))
            output.publish()

    def close(self) -> None:
        """Stop recording; the records stay."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        _WATCHES.pop(self._number, None)  # compiled code keeps the hooks

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _hook(watch: int, name: str, watched: ChannelNorm) -> Any:
    """The forward hook of one norm. It holds no monitor, which would keep compiled code from being used again."""
    ticket = torch.zeros((), dtype=torch.int64, device=_statistics(watched)[1].device)

    def hook(norm: ChannelNorm, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        if not norm.training:
            return
        x, pad_mask, residual = given_to_norm(arguments, options)
        statistics = _statistics(norm)
        if torch.compiler.is_compiling():
            residual = None if residual is None else residual.detach()
            torch.ops.normfuse.observe(ticket, x.detach(), pad_mask, residual, *statistics, watch, name)
        elif watch in _WATCHES:
            _WATCHES[watch].observe(name, x, pad_mask, residual, *statistics)

    return hook


def _plain(field: str, value: float) -> float | int | bool | None:
    if field == "finite":
        return bool(value)
    if value - value != 0:
        return None
    return int(value) if field in ("step", "skips") else value


def monitor(model: nn.Module, *, every: int = 50, drift: float = 10.0) -> Monitor:
    """Watch every norm in ``model`` that keeps running statistics during training.

    Every ``every`` training steps the batch statistic of each norm is measured (one pass over its input) and copied to
    the host without waiting; other steps only count. A ``RuntimeWarning``, once per layer and kind, says that a
    statistic is not finite or, after the first 20 steps, that batch and running statistic differ by more than a factor
    ``drift``. It is given with the next record, or by :meth:`Monitor.to_json`. Compiled models are recorded without a
    graph break, if the monitor was created before compiling; CUDA graphs are split at the norms.

    Args:
        model: gets hooks; nothing else changes.
        every: training steps between two records, at least 1.
        drift: largest allowed ratio of batch and running statistic (geometric mean over channels), or its inverse;
            above 1.

    Returns:
        A :class:`Monitor`, with ``to_json``, ``save`` and ``close``; also a context manager.

    Raises:
        ValueError: there is no norm to watch, or an option is out of range.

    Example:
        >>> from normfuse.nn import UnifiedNorm, monitor
        >>> model = nn.Sequential(nn.Linear(4, 8), UnifiedNorm(8))
        >>> watch = monitor(model, every=1)
        >>> _ = model(torch.randn(3, 4))
        >>> sorted(watch.to_json()["layers"])
        ['1']
        >>> watch.close()
    """
    if every < 1:
        raise ValueError(f"every={every} is not allowed; give a number of steps of at least 1")
    if not drift > 1:
        raise ValueError(f"drift={drift} is not allowed; give a quotient above 1, such as 10")
    return Monitor(model, every, drift)
