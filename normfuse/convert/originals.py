"""Checkpoints that the authors' own programs wrote, loaded into this package's modules."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from ..nn import (
    BatchChannelNorm,
    DomainSplitNorm,
    EstimatedBatchNorm,
    LearnableRegionNorm,
    ProgressiveNorm,
    RegionNorm,
    RepBatchNorm,
    TimeDependentLayerNorm,
)
from ..nn.sigma_reparam import SigmaReparam

State = dict[str, Tensor]


class _Names(NamedTuple):
    """How the names below one module change: patterns of theirs, and what ours are."""

    kind: type[nn.Module]
    renamed: tuple[tuple[str, str], ...]


_RAMP = (("param0", "start"), ("param1", "end"), ("nodecay_weight", "slope"), ("nodecay_bias", "offset"))
_NAMES = (
    _Names(ProgressiveNorm, ((r"norm1\.", "original."), (r"norm2\.", "static."))),
    _Names(RepBatchNorm, ((r"bn\.", ""),)),
    _Names(BatchChannelNorm, ((r"weight$", "group_weight"), (r"bias$", "group_bias"), (r"bn\.", "batch_norm."))),
    _Names(
        LearnableRegionNorm,
        ((r"sa\.conv1\.", "attention."), (r"sa\.gamma_conv\.", "gain."), (r"sa\.beta_conv\.", "shift.")),
    ),
    _Names(
        TimeDependentLayerNorm,
        tuple(
            (rf"(?:{theirs})\.{part}$", f"{ours}.{name}")
            for theirs, ours in (("weight|scale", "gain"), ("bias|offset", "shift"))
            for part, name in _RAMP
        ),
    ),
    _Names(DomainSplitNorm, ((r"bns\.", "norms."),)),
)


def load_original(model: nn.Module, state_dict: Mapping[str, Any], strict: bool = True) -> Any:
    """Load a ``state_dict`` of the program in which a norm was published into a model of this package's modules.

    Known are the names and shapes of RepBN and PRepBN's LinearNorm, BCN and EstBN, region normalisation (basic and
    learnable), DiMR's time-dependent norms, the vision program of σReparam, and domain-specific BatchNorm. PowerNorm,
    Unified Norm, MABN and BatchNorms load by ``load_state_dict`` as they are.

    Args:
        model: built of this package's norms where the original has its own, with the same names above them.
        state_dict: tensors by name; it is not changed. Names that are this package's already are left alone.
        strict: whether every name must fit, as for :meth:`torch.nn.Module.load_state_dict`.

    Returns:
        What ``load_state_dict`` returns: the missing and unexpected names.

    Raises:
        ValueError: the length of a PRepBN schedule is not that of the :class:`normfuse.nn.ProgressiveNorm`.
        RuntimeError: names or shapes do not fit.

    Example:
        >>> from normfuse.convert import load_original
        >>> from normfuse.nn import RepBatchNorm
        >>> model = nn.Sequential(nn.Linear(8, 8), RepBatchNorm(8))
        >>> load_original(model, torch.load("slab.pt", weights_only=True))  # doctest: +SKIP
    """
    state = dict(state_dict)
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = path + "." if path else ""
        for kind, renamed in _NAMES:
            if isinstance(module, kind):
                state = _rename(state, prefix, renamed, set(module.state_dict()))
        for kind, convert in _VALUES:
            if isinstance(module, kind):
                convert(module, prefix, state)
        if parametrize.is_parametrized(module):
            _singular_vectors(module, prefix, state)
    return model.load_state_dict(state, strict=strict)


def _rename(state: State, prefix: str, renamed: tuple[tuple[str, str], ...], ours: set[str]) -> State:
    """``state`` with the names below ``prefix`` changed by the first pattern that fits their rest."""
    result = {}
    for name, value in state.items():
        rest = name[len(prefix) :] if name.startswith(prefix) else None
        if rest is not None and rest not in ours:
            for pattern, replacement in renamed:
                if re.match(pattern, rest):
                    name = prefix + re.sub(pattern, replacement, rest, count=1)
                    break
        result[name] = value
    return result


def _shortcut(norm: RepBatchNorm, prefix: str, state: State) -> None:
    if prefix + "alpha" in state:
        state[prefix + "alpha"] = state[prefix + "alpha"].reshape(norm.alpha.shape)


def _groups(norm: BatchChannelNorm, prefix: str, state: State) -> None:
    for name in ("group_weight", "group_bias"):
        if prefix + name in state:
            state[prefix + name] = state[prefix + name].reshape(-1)


def _moving_speed(norm: EstimatedBatchNorm, prefix: str, state: State) -> None:
    speed = state.pop(prefix + "estbn_moving_speed", None)
    if speed is not None:
        norm.momentum = float(speed)


def _regions(norm: RegionNorm, prefix: str, state: State) -> None:
    for ours, theirs in (("weight", "gamma"), ("bias", "beta")):
        pair = [f"{prefix}{region}_{theirs}" for region in ("background", "foreground")]
        if all(name in state for name in pair):
            state[prefix + ours] = torch.stack([state.pop(name) for name in pair])


def _schedule(norm: ProgressiveNorm, prefix: str, state: State) -> None:
    """Their counters run down: ``warm`` steps of LayerNorm alone are left, then ``iter`` of ``total_step`` steps."""
    if prefix + "iter" not in state:
        return
    warm, left, total = (int(state.pop(prefix + name)) for name in ("warm", "iter", "total_step"))
    if total != norm.end - norm.begin or warm > norm.begin:
        raise ValueError(
            f"{prefix.rstrip('.')}: the original's schedule has {total} steps and {warm} of warm-up left, this one "
            f"falls from step {norm.begin} to {norm.end}; build it with begin of at least {warm}, end=begin + {total}"
        )
    state[prefix + "step"] = torch.tensor(norm.begin - warm + total - left)


def _singular_vectors(module: nn.Module, prefix: str, state: State) -> None:
    """The vision program keeps the right vector, which it calls ``u``; the left one follows from it."""
    for name, chain in module.parametrizations.items():
        below = f"{prefix}parametrizations.{name}."
        reparams = [(i, part) for i, part in enumerate(chain) if isinstance(part, SigmaReparam)]
        vector = next(
            (k for k in state if re.fullmatch(rf"{re.escape(prefix)}spectral_normed_\w+\.(net\.)?u", k)), None
        )
        if not reparams or vector is None:
            continue
        (index, reparam), weight, v = reparams[0], state.pop(prefix + name), state.pop(vector)
        state[below + "original"] = weight
        u = F.normalize(reparam._matrix(weight).to(v.dtype) @ v, dim=0)
        state |= {f"{below}{index}.v": v, f"{below}{index}.u": u}
        state[f"{below}{index}.gain"] = state.pop(prefix + "sigma").reshape(())
        for extra in [k for k in state if k.startswith((prefix + "spectral_normed_", prefix + "effective_spectral"))]:
            del state[extra]


_VALUES: tuple[tuple[type[nn.Module], Callable[[Any, str, State], None]], ...] = (
    (RepBatchNorm, _shortcut),
    (BatchChannelNorm, _groups),
    (EstimatedBatchNorm, _moving_speed),
    (RegionNorm, _regions),
    (ProgressiveNorm, _schedule),
)
