"""Weights in the files of training scripts: where they lie, and how their names become the module's.

Scripts save a module's tensors under ``model`` or ``state_dict``, beside an optimiser and a moving average, and with
``module.`` or ``_orig_mod.`` in front of their names. Nothing is taken by its name alone: a group of tensors is
taken if, with a prefix left out, it holds what the module needs.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from normfuse.checkpoint.archive import CheckpointError, some_of
from normfuse.checkpoint.pickled import PREFERRED

_AVERAGE = re.compile(r"(^|[._])(ema|avg|average|averaged|swa|teacher|shadow|target|momentum)([._]|$)", re.IGNORECASE)
_OPTIMIZER = re.compile(r"(^|[._])(optim\w*|sched\w*|lr_sched\w*|scaler|momentum_buffer|exp_avg\w*|grads?)([._]|$)")
# Components that wrappers put into names: anywhere, because they wrap parts of models too.
_WRAPPERS = frozenset(
    ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "_module")
)
_PREFIXES = _WRAPPERS | {"model", "net", "network", "generator"}
# What frameworks write, or once wrote, and no result depends on: counters, and constants that the module makes itself.
_INCIDENTAL = frozenset(
    "num_batches_tracked n_averaged position_ids token_type_ids inv_freq original_inv_freq relative_position_index "
    "attn_mask masked_bias total_ops total_params _extra_state".split()
)
_CAUSAL_MASK = re.compile(r"(^|\.)(attn|attention)\.bias$")  # a buffer of booleans in older GPT-2 and GPT-NeoX files
_DEPTH = 3  # of groups within groups


@dataclass(frozen=True)
class _Needs:
    """What a module wants to be given: names and shapes, which of them it can do without, which are one tensor."""

    shapes: dict[str, torch.Size]
    optional: frozenset[str]
    ties: dict[str, frozenset[str]]

    @classmethod
    def of(cls, module: nn.Module) -> _Needs:
        own = {n: t for n, t in module.state_dict(keep_vars=True).items() if isinstance(t, torch.Tensor)}
        places: dict[Any, set[str]] = {}
        for name, tensor in own.items():
            places.setdefault(_place(name, tensor), set()).add(name)
        ties = {name: frozenset(places[_place(name, tensor)] - {name}) for name, tensor in own.items()}
        parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        optional = {n for n in own if n.rpartition(".")[2] in _INCIDENTAL and n not in parameters}
        return cls({name: tensor.shape for name, tensor in own.items()}, frozenset(optional), ties)

    def missing(self, given: Container[str]) -> list[str]:
        """Names without which the module is incomplete."""
        return [
            name
            for name in self.shapes
            if name not in given and name not in self.optional and not any(tie in given for tie in self.ties[name])
        ]


@dataclass(frozen=True)
class _Fit:
    """A group of tensors under the module's names.

    Attributes:
        group: where the tensors lie in the file (``a.b``); empty for the file itself.
        prefix: what was left out in front of names, ``model.``.
        held: the group's tensors, where wrappers are left out of their names.
        names: those of the tensors that the module takes, by the module's names.
        missing: names that the module needs.
        misshapen: how many tensors have another shape than the module's.
    """

    group: str
    prefix: str
    held: Mapping[str, torch.Tensor]
    names: Mapping[str, str]
    missing: list[str]
    misshapen: int

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """What the module takes, by its names."""
        return {own: self.held[name] for own, name in self.names.items()}

    @property
    def left(self) -> dict[str, torch.Tensor]:
        """The group's other tensors."""
        taken = set(self.names.values())
        return {name: tensor for name, tensor in self.held.items() if name not in taken}

    @property
    def name(self) -> str:
        """As ``--weights`` takes it."""
        return ".".join(filter(None, (self.group, self.prefix.rstrip("."))))

    @property
    def rank(self) -> tuple[bool, bool, int, bool]:
        """The smaller, the likelier: trained weights before averages, usual names before others."""
        last = self.group.rpartition(".")[2]
        place = PREFERRED.index(last) if last in PREFERRED else len(PREFERRED) if last else -1
        unusual = bool(set(self.prefix.split(".")) - _PREFIXES - {""})
        return bool(self.misshapen), bool(_AVERAGE.search(self.name)), place, unusual


def take(
    content: Any, module: nn.Module, source: str, wanted: str | None = None
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The tensors of a file that belong in a module, under the module's names.

    Args:
        content: what was read: a mapping of tensors, or of mappings that hold some.
        module: takes the tensors.
        source: the file, for messages.
        wanted: the group to take, as an earlier note named it (``state_dict_ema``).

    Returns:
        The tensors, those that the module does not know among them, and notes on what was taken and what else there
        was.

    Raises:
        CheckpointError: there are no tensors, several groups fit the module equally well and none is `wanted`, there
            is no group of the name that is, or one tensor of the module has two values in the file.
    """
    groups = dict(_groups(content))
    if not groups:
        raise CheckpointError(_without_tensors(content, source))
    needs = _Needs.of(module)
    fits = [fit for group, tensors in groups.items() for fit in _fits(group, tensors, needs)]
    if wanted is None:
        fits = [fit for fit in fits if not _OPTIMIZER.search(fit.name)] or fits
    else:
        named = [fit for fit in fits if fit.name == wanted or fit.group == wanted]
        named = named or [fit for fit in fits if f".{fit.name}".endswith(f".{wanted}")]
        if not named:
            raise CheckpointError(f"{source} holds no weights {wanted!r}; it has {_listed(fits)}")
        fits = named
    chosen, others = _choose(fits, type(module).__name__, source)
    tensors = chosen.tensors
    for name, ties in needs.ties.items():
        for tie in ties & tensors.keys() if name in tensors else ():
            if not torch.equal(tensors[name], tensors[tie]):
                raise CheckpointError(
                    f"{source}: {name} and {tie} are one tensor in {type(module).__name__} and two different ones in "
                    "the file; build the module without tying them"
                )
    unknown, outside = _sorted_out(chosen)
    notes = _notes(chosen, others, outside, source)
    return {**tensors, **unknown}, notes


def missing_from(given: Container[str], module: nn.Module) -> list[str]:
    """The tensors that a module lacks to be complete: all but what it makes itself, and other names of a tensor."""
    return _Needs.of(module).missing(given)


def module_in(content: Any) -> nn.Module | None:
    """The module that a trusted file holds as an object: itself, or under one of the usual names."""
    if isinstance(content, Mapping):
        found = {key: value for key, value in content.items() if isinstance(value, nn.Module)}
        usual = [key for key in PREFERRED if key in found]
        return found[usual[0]] if usual else next(iter(found.values()), None)
    return content if isinstance(content, nn.Module) else None


def _place(name: str, tensor: torch.Tensor) -> Any:
    return (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else name


def _groups(
    content: Any, path: tuple[str, ...] = (), seen: set[int] | None = None
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Every mapping that holds tensors by name, with its first place in the file (``a.b``): one may have many."""
    seen = set() if seen is None else seen
    if not isinstance(content, Mapping) or len(path) > _DEPTH or id(content) in seen:
        return
    seen.add(id(content))
    tensors = {k: t for k, v in content.items() if isinstance(k, str) and (t := _tensor(v)) is not None}
    if tensors:
        yield ".".join(path), tensors
    for key, value in content.items():
        if isinstance(key, str) and "." not in key:
            yield from _groups(value, (*path, key), seen)


def _tensor(value: Any) -> torch.Tensor | None:
    """A tensor, also of an array of NumPy; None for whatever else a file holds."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf" and value.dtype.itemsize <= 8:
        return torch.from_numpy(np.ascontiguousarray(value.astype(value.dtype.newbyteorder("="))).reshape(value.shape))
    return value if isinstance(value, torch.Tensor) else None


def _fits(group: str, tensors: Mapping[str, torch.Tensor], needs: _Needs) -> list[_Fit]:
    """The ways in which a group's names become the module's: those that are whole, else the one that lacks least."""
    fits: list[_Fit] = []
    for rename in (str, _without_wrappers):
        held = {rename(name): tensor for name, tensor in tensors.items()}
        if len(held) < len(tensors) or (fits and held.keys() == tensors.keys()):
            continue
        for prefix, added in _prefixes(held, needs):
            named = {own: prefix + own.removeprefix(added) for own in needs.shapes if own.startswith(added)}
            names = {own: name for own, name in named.items() if name in held}
            misshapen = sum(needs.shapes[own] != held[name].shape for own, name in names.items())
            fits.append(_Fit(group, prefix, held, names, needs.missing(names), misshapen))
        if any(not fit.missing for fit in fits):
            break
    return [fit for fit in fits if not fit.missing] or sorted(fits, key=lambda fit: len(fit.missing))[:1]


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _prefixes(keys: Iterable[str], needs: _Needs) -> list[tuple[str, str]]:
    """Pairs to try: what the file's names have in front, and what the module's have."""
    pairs = [("", "")]
    # A few of the longest names find every prefix; one alone might be missing from the file.
    for own in sorted(needs.shapes, key=len, reverse=True)[:5]:
        pairs += [(key[: -len(own)], "") for key in keys if key.endswith(f".{own}")]
    first = next(iter(needs.shapes), "").partition(".")[0]
    if first and all(name.startswith(f"{first}.") for name in needs.shapes):
        pairs.append(("", f"{first}."))  # the file holds the part of the module that everything is in
    return list(dict.fromkeys(pairs))


def _choose(fits: Sequence[_Fit], module: str, source: str) -> tuple[_Fit, list[_Fit]]:
    """The likeliest group, and the others that would do."""
    whole = sorted((fit for fit in fits if not fit.missing), key=lambda fit: fit.rank)
    if not whole:
        return min(fits, key=lambda fit: (len(fit.missing), fit.rank)), []  # loading says what is missing
    if whole[0].misshapen:
        return whole[0], []  # loading says which shapes
    equal = [fit for fit in whole if fit.rank == whole[0].rank]
    if len(equal) > 1:
        raise CheckpointError(
            f"{source} holds {len(equal)} groups of weights that fit {module}: {_listed(equal)}; choose one with "
            "--weights NAME (weights=…)",
            advice=[f"--weights {equal[0].name}"],
        )
    return whole[0], [fit for fit in whole[1:] if not fit.misshapen]


def _sorted_out(fit: _Fit) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Sorts a group's other tensors, without incidental ones and second copies.

    Returns those that the module should know, under the names it would know them by; and names of those that belong to
    other parts of what was saved.
    """
    unknown, outside = {}, []
    taken = fit.tensors.values()
    for name, tensor in fit.left.items():
        own = name.removeprefix(fit.prefix)
        mask = _CAUSAL_MASK.search(name) and (tensor.dim() == 4 or tensor.dtype in (torch.bool, torch.uint8))
        if name.rpartition(".")[2] in _INCIDENTAL or mask or _is_copy(tensor, taken):
            continue
        if fit.prefix and not name.startswith(fit.prefix) and not fit.missing:
            outside.append(name)
        else:
            unknown[own] = tensor
    return unknown, outside


def _is_copy(tensor: torch.Tensor, taken: Iterable[torch.Tensor]) -> bool:
    """Whether a tensor is stored twice, as a head that is tied to an embedding is."""
    return tensor.dim() > 1 and any(tensor.shape == other.shape and torch.equal(tensor, other) for other in taken)


def _notes(chosen: _Fit, others: Sequence[_Fit], outside: list[str], source: str) -> list[str]:
    notes = []
    if chosen.group or chosen.prefix:
        where = f"{chosen.group!r} of {source}" if chosen.group else source
        without = f", without {chosen.prefix!r} in front of their names" if chosen.prefix else ""
        rest = f"; left out: {some_of(outside)}" if outside else ""
        notes.append(f"weights taken from {where}{without}{rest}")
    if others:
        instead = ", ".join(f"--weights {fit.name}" for fit in others)
        notes.append(f"{source} also holds {_listed(others)}; {instead} takes that instead")
    return notes


def _listed(fits: Sequence[_Fit]) -> str:
    return some_of(list(dict.fromkeys(repr(fit.name) if fit.name else "the file itself" for fit in fits)), 6)


def _without_tensors(content: Any, source: str) -> str:
    if isinstance(content, Mapping):
        keys = some_of([str(key) for key in content], 6)
        return (
            f"{source} is not a state_dict: it holds {keys or 'nothing'}; save the module's state_dict by itself, or "
            "use normfuse.save"
        )
    return f"{source} holds a {type(content).__name__}, not a state_dict"
