"""Replace the norms of a trained model, step by step, by norms that fold away."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from ..errors import some_of
from ..nn import ProgressiveNorm
from ..nn._running_norm import check_choice, check_count
from ..nn.progressive_norm import SHAPES
from ..ops._layout import is_exporting
from .composite import joined, split, take_hooks
from .fitting import fit_static_norms
from .swap import Swap, SwapReport, Where, find_norms, put, successor

STATIC = ("rep_batch", "batch", "unified", "power")
ORDERS = ("together", "layers")


@dataclass(frozen=True)
class Schedule:
    """When the share λ of the original norms falls from 1 to 0.

    Args:
        steps: optimiser steps of the whole training, at least 1.
        start: fraction of ``steps`` at which λ begins to fall, at least 0.
        end: fraction from which on λ is 0 and the model trains with its static norms alone, more than ``start`` and
            at most 1.
        order: "together": all norms at the same time; "layers": one after another in the order of the model, each in an
            equal part of the time.
        shape: "linear", or "cosine": flat at both ends.

    Raises:
        TypeError, ValueError: a value is not allowed.

    Example:
        >>> from normfuse.convert import Schedule
        >>> Schedule(steps=1000, end=0.8, order="layers").windows(2)
        [(0, 400), (400, 800)]
    """

    steps: int
    start: float = 0.0
    end: float = 0.8
    order: str = "together"
    shape: str = "linear"

    def __post_init__(self) -> None:
        check_count("steps", self.steps, 1)
        check_choice("order", self.order, ORDERS)
        check_choice("shape", self.shape, SHAPES)
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(
                f"start={self.start}, end={self.end} are not allowed; give fractions with 0 <= start < end <= 1"
            )

    def windows(self, count: int) -> list[tuple[int, int]]:
        """The steps between which the λ of each of ``count`` norms falls.

        Args:
            count: number of norms, in the order of the model.

        Returns:
            For each norm the step at which its λ begins to fall, and that from which on it is 0.
        """
        parts = count if self.order == "layers" else 1
        edges = [round(self.steps * (self.start + (self.end - self.start) * i / parts)) for i in range(parts + 1)]
        windows = [(begin, max(end, begin + 1)) for begin, end in pairwise(edges)]
        return windows if parts == count else windows * count


def _takes(model: nn.Module, name: str) -> bool:
    """Whether ``model`` can be called with an argument of that name; wrappers take any and hand them on."""
    parameters = inspect.signature(model.forward).parameters.values()
    return any(p.name == name or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def given_as(model: nn.Module, name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """What ``model`` is called with for the argument ``name``; None where it is not given."""
    if name in options:
        return options[name]
    return inspect.signature(model.forward).bind_partial(*arguments, **options).arguments.get(name)


class Conversion:
    """A conversion under way, see :func:`progressive`.

    Args:
        valid_mask: the argument of ``forward`` that says which positions are valid, see :func:`progressive`.

    Attributes:
        model: the model whose norms are being replaced.
        norms: the :class:`normfuse.nn.ProgressiveNorm` modules by their name in the model; one that is used at several
            places is listed once.
        report: what is replaced by what, and what was left alone.

    Example:
        >>> from normfuse.convert import Schedule, progressive
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
        >>> conversion = progressive(model, schedule=Schedule(steps=10, end=0.5))
        >>> conversion.step(10)
        >>> _ = conversion.finish()
        >>> type(model[1]).__name__
        'RepBatchNorm'
    """

    def __init__(
        self, model: nn.Module, norms: dict[str, ProgressiveNorm], report: SwapReport, valid_mask: str | None
    ) -> None:
        self.model = model
        self.norms = norms
        self.report = report
        self._valid_mask = valid_mask
        self._hook = None
        self._looked_for_idle = False
        if valid_mask is not None and _takes(model, valid_mask):
            self._hook = model.register_forward_pre_hook(self._hand_over_mask, with_kwargs=True)

    def _hand_over_mask(self, model: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        if is_exporting():  # an exported program may assign no attribute, and needs no mask
            return
        mask = None if self._valid_mask is None else given_as(model, self._valid_mask, arguments, options)
        # It stays until the next forward: a checkpointed block runs again in the backward pass and needs it there.
        pad_mask = None if mask is None else mask == 0
        for norm in self.norms.values():
            norm.pad_mask = pad_mask

    @property
    def share(self) -> float:
        """The mean share λ of the original norms: 1 at the beginning, 0 when only static norms are left."""
        return sum(norm.share for norm in self.norms.values()) / len(self.norms)

    def step(self, steps: int = 1) -> None:
        """Count optimiser steps; call it after each ``optimizer.step()``. Waits for the device the first time only.

        Args:
            steps: how many, at least 0.

        Raises:
            RuntimeError: the share of a norm begins to fall from moving averages, and it has not run in training mode.
        """
        if not self._looked_for_idle:
            self._looked_for_idle = True
            self._warn_of_idle()
        for name, norm in self.norms.items():
            try:
                norm.advance(steps)
            except RuntimeError as error:
                raise RuntimeError(f"{name}: {error}") from error

    def _warn_of_idle(self) -> None:
        idle = [name for name, norm in self.norms.items() if norm.resting and norm.momentum and norm.measured == 0]
        if idle:
            warnings.warn(
                f"{len(idle)} of {len(self.norms)} norms have not run in training mode in the first step: "
                f"{some_of(idle)}. Norms that have not when their λ begins to fall end the training with an error; "
                "leave out what does not train with `where`",
                RuntimeWarning,
                stacklevel=3,
            )

    def calibrate(
        self,
        loader: Iterable[Any],
        *,
        max_batches: int | None = None,
        device: torch.device | str | None = None,
        fit: bool = True,
    ) -> dict[str, float]:
        """Set the statistics of the static norms from data, and fit them to the originals.

        One pass over the data with the norms as they are (at λ = 1: the original model), in evaluation mode. With
        ``fit``, gain and shift become those of the per-channel affine map that is closest to the original norm's output
        in least squares, a far better start than the original's own gain, which belongs to another divisor. A second
        pass, with the static norms alone, then takes the statistics of the inputs that these leave to one another. The
        shortcut of a RepBatchNorm starts at 0.

        Args:
            loader: batches, each a tensor or a mapping of keyword arguments, or a tuple or list that begins with
                either.
            max_batches: stop after that many; None: all.
            device: where to move batches; None: leave them.
            fit: whether to set gain and shift.

        Returns:
            For each norm the share of the original's variance that the fitted affine map explains, 1 at best.

        Raises:
            ValueError: no batch, no valid row for any norm, or a statistic that is not finite.
        """
        return fit_static_norms(self.model, self.norms, loader, max_batches=max_batches, device=device, fit=fit)

    def finish(self) -> SwapReport:
        """Put the static norms in their places; the model is then ready for :func:`normfuse.save` and export.

        Returns:
            A :class:`SwapReport`.

        Raises:
            ValueError: λ is not 0 everywhere. Nothing has changed then.
        """
        for name, norm in self.norms.items():
            if norm.share > 0:
                raise ValueError(
                    f"{name} is still {norm.share:.1%} {type(norm.original).__name__} (step {norm.step.item()} of "
                    f"{norm.end}); train on, and call step() after each step of the optimiser"
                )
        for name, module in list(self.model.named_modules(remove_duplicate=False)):
            if isinstance(module, ProgressiveNorm):
                take_hooks(module.static, module)
                put(self.model, name, module.static)
        if self._hook is not None:
            self._hook.remove()
        return self.report


def progressive(
    model: nn.Module,
    to: str = "rep_batch",
    schedule: Schedule | int = 10_000,
    *,
    where: Where | None = None,
    frozen: bool = True,
    moving_average: float | None = None,
    keep_last: bool = False,
    valid_mask: str | None = "attention_mask",
    **options: Any,
) -> Conversion:
    """Replace the norms of a trained model by λ · original + (1 − λ) · static norm, where λ falls to 0.

    The model is the same function as before until training goes on. ``state_dict`` carries both norms, the statistics
    and λ's step: to resume, build the model, call this with the same arguments, and load. Create the optimiser
    afterwards.

    ```python
    conversion = progressive(model, to="rep_batch", schedule=Schedule(steps=10_000))
    conversion.calibrate(loader, max_batches=50)
    for batch in loader:
        ...                       # loss.backward(); optimizer.step()
        conversion.step()
    conversion.finish()
    ```

    Args:
        model: changed in place. Found are the norms that :func:`swap_norms` finds.
        to: "rep_batch", "batch", "unified" or "power" (without group scaling unless ``group_num`` asks for it).
        schedule: when λ falls; a number stands for ``Schedule(steps=number)``.
        where: which norms, as for :func:`swap_norms`; None: all.
        frozen: keep the statistics as calibrated, only gain and shift learn. Then training and evaluation are the same
            function, and a conversion never ends below what :meth:`Conversion.calibrate` gave because of statistics
            alone. False: statistics run, as in training from scratch; they follow the activations as they change, and
            forget the calibration.
        moving_average: fit the static norms from moving averages, of this momentum, of what the original norms see and
            give before λ falls, in the place of :meth:`Conversion.calibrate`; see :func:`normfuse.convert.taper`.
        keep_last: leave the last norm in the order of the model alone. In front of a head it keeps the scale of the
            logits.
        valid_mask: the argument of the model's ``forward`` that is not 0 where a position is valid; where its shape is
            that of a norm's input without the channels, padding is left out of the statistics. None: every row counts.
        options: of the static norms, such as ``momentum=0.05``.

    Returns:
        A :class:`Conversion`.

    Raises:
        ValueError: ``to`` is unknown, nothing was found, or a norm cannot be replaced. The model is then as before.
        TypeError: an option has a wrong type.

    Example:
        >>> from normfuse.convert import Schedule, progressive
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
        >>> conversion = progressive(model, to="rep_batch", schedule=Schedule(steps=10))
        >>> conversion.calibrate([torch.randn(32, 4) for _ in range(3)])  # doctest: +SKIP
        >>> list(conversion.norms)
        ['1']
    """
    check_choice("to", to, STATIC)
    if isinstance(schedule, int):
        schedule = Schedule(schedule)
    options = {"affine": True, **({"group_num": None} if to == "power" else {}), **options}
    places, kept = find_norms(model, where)
    if keep_last:
        last = places[-1][1]
        kept += [name for name, norm in places if norm is last]
        places = [(name, norm) for name, norm in places if norm is not last]
        if not places:
            raise ValueError(f"keep_last=True leaves nothing to replace: {kept[-1]} is the only norm that was selected")
    fallback = next(model.parameters(), None)
    replaced: dict[nn.Module, tuple[ProgressiveNorm, nn.Module]] = {}
    originals = list(dict.fromkeys(old for _, old in places))
    for (begin, end), old in zip(schedule.windows(len(originals)), originals, strict=True):
        name = next(name for name, module in places if module is old)
        alone, behind = split(name, old)
        static = successor(name, alone, to, options, next(old.parameters(recurse=False), fallback))
        new = ProgressiveNorm(
            alone, static, begin=begin, end=end, frozen=frozen, shape=schedule.shape, momentum=moving_average
        )
        replaced[old] = new, joined(new, behind)
    for old, (_, module) in replaced.items():
        take_hooks(module, old)
    report, norms = SwapReport(kept=kept), dict[str, ProgressiveNorm]()
    for name, old in places:
        new, module = replaced[old]
        put(model, name, module)
        report.swaps.append(Swap(name, type(old).__name__, type(new.static).__name__, new.static.num_features))
        if new not in norms.values():
            norms[name if module is new else f"{name}.norm"] = new
    return Conversion(model, norms, report, valid_mask)
