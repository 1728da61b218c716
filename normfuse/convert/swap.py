"""Exchange the norms of a model, keeping what they have learned."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import some_of
from ..nn import (
    Derf,
    DyT,
    EstimatedBatchNorm,
    MaskedBatchNorm,
    MovingAverageBatchNorm,
    PowerNorm,
    RegularizedBatchNorm,
    RepBatchNorm,
    UnifiedNorm,
)
from ..nn._running_norm import ChannelNorm
from ..nn._torch_encoder import call_norms
from ..nn.foreign_norms import ForeignNorm, eps_of, is_foreign_norm, is_measurable, measure, shape_of_channels
from .composite import joined, split, take_hooks

Where = str | re.Pattern[str] | type | tuple[type, ...] | Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class Swap:
    """One exchanged norm.

    Attributes:
        name: in the model.
        before: the class of the norm that was replaced.
        after: the class of the new norm.
        num_features: its number of channels.
    """

    name: str
    before: str
    after: str
    num_features: int


@dataclass(frozen=True)
class SwapReport:
    """The norms that :func:`swap_norms` replaced; ``print`` it.

    Attributes:
        swaps: one entry per exchanged norm.
        kept: names of the norms that ``where`` left alone.
    """

    swaps: list[Swap] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{s.name}: {s.before} -> {s.after} ({s.num_features} channels)" for s in self.swaps]
        return "\n".join([*lines, *(f"{name}: kept" for name in self.kept)])


def _is_norm(module: nn.Module) -> bool:
    if isinstance(module, RepBatchNorm):
        return False  # no other norm has a place for its shortcut
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm, _BatchNorm, ChannelNorm, DyT, Derf)):
        return True
    return is_foreign_norm(module)


def channels_of(name: str, norm: nn.Module) -> int:
    """How many channels a norm normalises over; ValueError unless they are one dimension of a known size."""
    if isinstance(norm, (_BatchNorm, ChannelNorm, DyT, Derf)):
        return norm.num_features
    shape = shape_of_channels(norm)
    if len(shape) == 1:
        return shape[0]
    if shape and (found := measure(norm) if is_measurable(norm) else None) is not None:
        return found.channels
    if shape:
        raise ValueError(
            f"{name}, a {type(norm).__name__}, normalises over the shape {shape}; only norms over one dimension of "
            "channels can be swapped: leave it out with `where`"
        )
    raise ValueError(
        f"{name}, a {type(norm).__name__}, does not say how many channels it normalises over: set its normalized_shape "
        "to their number before, or leave it out with `where`"
    )


@dataclass(frozen=True)
class _Learned:
    """What a successor takes over: where the channels are; gain and shift, and whether each learns."""

    channel_dim: int
    gain: Tensor | None
    shift: Tensor | None
    learns: tuple[bool, bool] = (True, True)


def _learned(name: str, norm: nn.Module) -> _Learned:
    if is_measurable(norm):
        found = measure(norm)
        if found is None:
            raise ValueError(
                f"{name}, a {type(norm).__name__} of {type(norm).__module__}, does not compute a LayerNorm or RMSNorm "
                "over one dimension of channels on random input: leave it out with `where`"
            )
        return _of_measured(found)
    gain, shift = (getattr(norm, label, None) for label in ("weight", "bias"))
    if isinstance(norm, ChannelNorm):
        channel_dim = norm.channel_dim
    else:
        channel_dim = 1 if isinstance(norm, _BatchNorm) or type(norm).__name__.lower().endswith("2d") else -1
    return _Learned(channel_dim, gain, shift, (_learns(gain), _learns(shift)))


def _learns(parameter: Tensor | None) -> bool:
    return parameter is None or parameter.requires_grad


def _of_measured(found: ForeignNorm) -> _Learned:
    learns = _learns(found.gain_parameter), _learns(found.shift_parameter)
    gain = found.gain if found.gain_parameter is not None or found.gain.ne(1).any() else None
    shift = found.shift if found.shift_parameter is not None or found.shift.ne(0).any() else None
    return _Learned(found.channel_dim, gain, shift, learns)


def _make_dynamic(make: type[nn.Module]) -> Callable[..., nn.Module]:
    def build(channels: int, *, channel_dim: int, affine: bool, **options: Any) -> nn.Module:
        if channel_dim != -1:
            raise ValueError(f"{make.__name__} works on channels last only; leave this norm out with `where`")
        return make(channels, elementwise_affine=affine, **options)

    return build


def _make_activation(make: type[nn.Module]) -> Callable[..., nn.Module]:
    def build(channels: int, *, channel_dim: int, affine: bool, eps: float = 0.0, **options: Any) -> nn.Module:
        if channel_dim != -1:
            raise ValueError(f"{make.__name__} works on channels last only; leave this norm out with `where`")
        return make(channels, **options)

    return build


_TARGETS: dict[str, Callable[..., nn.Module]] = {
    "unified": UnifiedNorm,
    "power": PowerNorm,
    "batch": MaskedBatchNorm,
    "rep_batch": RepBatchNorm,
    "regularized_batch": RegularizedBatchNorm,
    "estimated_batch": EstimatedBatchNorm,
    "moving_average": MovingAverageBatchNorm,
    "layer": _make_dynamic(nn.LayerNorm),
    "rms": _make_dynamic(nn.RMSNorm),
    "dyt": _make_activation(DyT),
    "derf": _make_activation(Derf),
}


def _selector(where: Where | None) -> Callable[[str, nn.Module], bool]:
    if where is None:
        return lambda name, module: True
    if isinstance(where, (str, re.Pattern)):
        pattern = re.compile(where)
        return lambda name, module: pattern.search(name) is not None
    if isinstance(where, (type, tuple)):
        return lambda name, module: isinstance(module, where)
    return where


@torch.no_grad()
def successor(name: str, old: nn.Module, to: str, options: dict[str, Any], fallback: Tensor | None) -> nn.Module:
    """The norm of kind ``to`` that takes the place of ``old``, with all of it that has a place.

    ``name`` is for messages; ``fallback`` gives device and dtype where ``old`` has no weight.
    """
    channels, learned = channels_of(name, old), _learned(name, old)
    anchor = next(old.parameters(recurse=False), fallback)
    wanted: dict[str, Any] = {"channel_dim": learned.channel_dim, "affine": learned.gain is not None}
    if anchor is not None:
        wanted |= {"device": anchor.device, "dtype": anchor.dtype}
    if (eps := eps_of(old)) is not None:
        wanted["eps"] = eps
    try:
        new = _TARGETS[to](channels, **(wanted | options))
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error
    for label, value, learns in zip(("weight", "bias"), (learned.gain, learned.shift), learned.learns, strict=True):
        target = getattr(new, label, None)
        if value is not None and target is None and value.ne(0 if label == "bias" else 1).any():
            raise ValueError(f"{name}: {type(new).__name__} has no {label} to take over; leave it out with `where`")
        if value is not None and target is not None:
            target.copy_(value.reshape(-1))
            target.requires_grad_(learns)
    if isinstance(old, (_BatchNorm, MaskedBatchNorm)) and old.running_var is not None:
        statistic = {"unified": "running_var", "moving_average": "running_var", "power": "running_phi"}.get(to)
        if statistic and not getattr(new, "group_num", 0):
            new.get_buffer(statistic).copy_(old.running_var + old.running_mean**2)  # the mean of x²
        elif isinstance(new, MaskedBatchNorm):
            new.running_mean.copy_(old.running_mean)
            new.running_var.copy_(old.running_var)
    return new.train(old.training)


def find_norms(model: nn.Module, where: Where | None) -> tuple[list[tuple[str, nn.Module]], list[str]]:
    """Names and modules of the norms that ``where`` selects, every name of a shared one, and the names of the others.

    Raises:
        ValueError: there are none, or ``model`` is itself a norm.
    """
    if _is_norm(model):
        raise ValueError("model is itself a norm; give the module that contains it, or build the new norm directly")
    selected = _selector(where)
    norms = [(name, m) for name, m in model.named_modules(remove_duplicate=False) if name and _is_norm(m)]
    places = [(name, m) for name, m in norms if selected(name, m)]
    kept = [name for name, m in norms if not selected(name, m)]
    if not places:
        leaves = (type(m).__name__ for m in model.modules() if not any(m.children()))
        others = sorted({name for name in leaves if "norm" in name.lower()})
        unknown = f" (those of class {some_of(others)} it does not)" if others else ""
        found = f"the norms are {', '.join(kept)}" if kept else f"the model has no norms that it knows{unknown}"
        raise ValueError(f"where={where!r} selects nothing; {found}")
    return places, kept


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Set the submodule called ``name``, a norm."""
    *path, label = name.split(".")
    parent = model
    call_norms(parent)
    for part in path:
        parent = parent.get_submodule(part)
        call_norms(parent)
    setattr(parent, label, module)


def swap_norms(model: nn.Module, to: str = "unified", *, where: Where | None = None, **options: Any) -> SwapReport:
    """Replace norms of ``model`` in place; weight, bias, eps, device, dtype and mode are kept.

    Found are LayerNorm, RMSNorm, BatchNorm, this package's norms over one dimension of channels (not RepBatchNorm,
    whose shortcut has no place elsewhere), and modules without children whose class name ends in "LayerNorm" or
    "RMSNorm", as in transformers and timm. What such a class of another library does, its axis, gain and shift, is
    measured on random values (Gemma's norms add one to their weight). Where it holds an activation, as timm's
    ``BatchNormAct2d`` does, the new norm and the activation become an ``nn.Sequential``; where every head has a gain of
    its own, [heads, 1, C], the new norm (one for all heads) and those gains do. A norm without parameters says its
    number of channels by its ``normalized_shape`` or another attribute that is a number.

    Hooks on a norm run on its successor. A norm that the model uses at several places stays one norm.
    The new norms' statistics start fresh (from one
    BatchNorm to another: where they were; else from a BatchNorm: at its mean of x²): train, or run
    :func:`normfuse.nn.calibrate`. The norm that replaces an RMSNorm has a bias of zero. Create the optimiser
    afterwards.

    Args:
        model: a module that contains norms.
        to: "unified", "power", "batch" (:class:`normfuse.nn.MaskedBatchNorm`), "rep_batch", "regularized_batch",
            "estimated_batch", "moving_average" (which wants
            :func:`normfuse.nn.center_weight` on the weights before it), "layer", "rms", "dyt" or "derf".
        where: which norms; a regular expression searched in their names, a class or tuple of classes, or a
            function of name and module. None: all.
        options: of the new norms, such as ``warmup_iters=100``; ``channel_dim`` overrides that of the old norm.

    Returns:
        A :class:`SwapReport`; ``print`` it.

    Raises:
        ValueError: ``to`` is unknown, nothing was found, or a norm cannot be swapped. The model is then as before.
        TypeError: an option has a wrong type.

    Example:
        >>> from normfuse.convert import swap_norms
        >>> print(swap_norms(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)), to="unified"))
        1: LayerNorm -> UnifiedNorm (8 channels)
    """
    if to not in _TARGETS:
        raise ValueError(f"to={to!r} is unknown; give one of {', '.join(map(repr, _TARGETS))}")
    places, kept = find_norms(model, where)
    fallback = next(model.parameters(), None)
    report, successors = SwapReport(kept=kept), {}
    for name, old in places:
        if old not in successors:
            alone, behind = split(name, old)
            new = successor(name, alone, to, options, next(old.parameters(recurse=False), fallback))
            successors[old] = joined(new, behind)
        report.swaps.append(Swap(name, type(old).__name__, type(new).__name__, channels_of(name, old)))
    for old, new in successors.items():
        take_hooks(new, old)
    for name, old in places:
        put(model, name, successors[old])
    return report
