"""Values of any structure: where their tensors are, what these are called, and how to put others in their place."""

from __future__ import annotations

import copy
import dataclasses
import keyword
import re
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import nn

Path = tuple[Any, ...]  # keys, indices and field names from the outermost structure inwards
_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)
_WHOLE = (torch.Tensor, nn.Module, type(None), bool, int, float, complex, str, bytes, type, *_SYMBOLS)
_DEPTH = 3  # of objects in objects that are no containers; what is deeper belongs to something else


def children(value: Any) -> dict[Any, Any] | None:
    """What a structure holds, by key, index or field name; None for a tensor, a number, anything without parts.

    Structures are mappings, lists, tuples, named tuples, dataclasses, and objects that keep tensors in their
    attributes. None of them needs to be registered with ``torch.utils._pytree``.
    """
    if isinstance(value, _WHOLE):
        return None
    if isinstance(value, Mapping):
        return dict(value.items())
    if isinstance(value, (list, tuple, deque)):
        return dict(zip(_fields(value), value, strict=True))
    if callable(value):
        return None
    if dataclasses.is_dataclass(value):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if hasattr(value, f.name)}
    return _attributes(value) or None


def _attributes(value: Any) -> dict[str, Any]:
    slots = [name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ())]
    return {name: getattr(value, name) for name in slots if hasattr(value, name)} | dict(getattr(value, "__dict__", {}))


def _fields(value: Sequence[Any]) -> Iterable[Any]:
    """Names of a named tuple's entries, indices of any other's."""
    names = getattr(type(value), "_fields", None)
    if names is None and hasattr(type(value), "n_fields"):  # what torch.max(x, dim=0) returns
        names = getattr(type(value), "__match_args__", None)
    return names if names is not None and len(names) == len(value) else range(len(value))


def leaves(value: Any) -> list[tuple[Path, Any]]:
    """The parts of a value that have no parts themselves, with their paths, in order."""
    found: list[tuple[Path, Any]] = []
    _walk(value, (), lambda path, leaf: found.append((path, leaf)))
    return found


def replaced(value: Any, tensors: Sequence[torch.Tensor]) -> Any:
    """The value with other tensors in place of its own, in order. No container of the original is changed."""
    remaining = iter(tensors)
    return _walk(value, (), lambda _, leaf: next(remaining) if isinstance(leaf, torch.Tensor) else leaf)


def rebuilt(value: Any, parts: Mapping[Path, Any]) -> Any:
    """The value with other leaves at some paths. No container of the original is changed."""
    return _walk(value, (), lambda path, leaf: parts.get(path, leaf))


def _walk(value: Any, path: Path, visit: Callable[[Path, Any], Any], depth: int = 0) -> Any:
    """Visits every leaf; the value itself if nothing in it was changed, else a copy."""
    parts = children(value)
    if parts is None or not (_container(value) or _holds_tensors(value, depth)):
        return visit(path, value)
    if not _container(value):  # what else an object keeps is its own affair
        parts = {key: part for key, part in parts.items() if _holds_tensors(part, depth + 1)}
        depth += 1
    new = {key: _walk(part, (*path, key), visit, depth) for key, part in parts.items()}
    return value if all(new[key] is part for key, part in parts.items()) else _rebuilt(value, new)


def _container(value: Any) -> bool:
    return isinstance(value, (Mapping, list, tuple, deque)) or (dataclasses.is_dataclass(value) and not callable(value))


def _holds_tensors(value: Any, depth: int) -> bool:
    """Whether there are tensors in an object that is no container, not too deep inside."""
    if isinstance(value, torch.Tensor):
        return True
    parts = children(value)
    if parts is None or depth >= _DEPTH:
        return False
    return any(_holds_tensors(part, depth + 1) for part in parts.values())


def _rebuilt(value: Any, new: dict[Any, Any]) -> Any:
    kind = type(value)
    if kind in (dict, OrderedDict):
        return kind(new)
    if isinstance(value, tuple):
        return kind._make(new.values()) if hasattr(kind, "_make") else kind(new.values())
    if kind in (list, deque):
        return kind(new.values())
    if isinstance(value, Mapping) and not isinstance(value, MutableMapping):
        return new
    other = copy.copy(value)
    for key, part in new.items():
        if isinstance(value, (Mapping, list)):
            other[key] = part
        elif part is not getattr(value, key):
            object.__setattr__(other, key, part)  # reaches frozen dataclasses as well
    return other


def input_names(paths: Sequence[Path]) -> list[str]:
    """Names of a module's inputs. A path begins with an argument's name.

    ``xs[0]`` is ``xs_0`` and ``batch["ids"]`` is ``batch_ids``; where ``batch`` is the only argument, it is ``ids``.
    """
    alone = len({path[0] for path in paths}) == 1
    if alone and all(len(path) > 1 and isinstance(path[1], str) for path in paths):
        paths = [path[1:] for path in paths]
    return distinct([identifier(path, "input") for path in paths])


def output_names(paths: Sequence[Path], taken: Iterable[str]) -> list[str]:
    """Names of a module's outputs: keys and fields; ``output`` for a single tensor, else ``output_0`` and so on.

    Args:
        paths: of the tensors in what the module returns.
        taken: names of inputs; an output of the same name gets ``_out`` behind it.
    """
    if len(paths) == 1 and not any(isinstance(key, str) for key in paths[0]):
        names = ["output"]
    else:
        names = [identifier(path if isinstance(path[0], str) else ("output", *path), "output") for path in paths]
    taken = set(taken)
    return distinct([f"{name}_out" if name in taken else name for name in names])


def identifier(path: Path, default: str) -> str:
    """A path as one word of letters, digits and underscores."""
    name = re.sub(r"\W+", "_", "_".join(map(str, path)), flags=re.ASCII).strip("_") or default
    return f"{default}_{name}" if name[0].isdigit() else name


def distinct(names: Sequence[str]) -> list[str]:
    """The names, with numbers behind those that have been there before."""
    seen: set[str] = set()
    result = []
    for name in names:
        candidate, count = name, 1
        while candidate in seen:
            candidate, count = f"{name}_{count}", count + 1
        seen.add(candidate)
        result.append(candidate)
    return result


def parameter_names(names: Sequence[str]) -> list[str]:
    """Names that may stand in a Python signature."""
    return [f"{name}_" if keyword.iskeyword(name) else name for name in names]
