"""How a module is called: example inputs and dynamic dimensions, in any form people write them, as flat tensors."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from normfuse.checkpoint import structure
from normfuse.checkpoint.archive import CheckpointError, one_line
from normfuse.checkpoint.inputs import DTYPES, Derived, Dimension, parse_dimension
from normfuse.checkpoint.structure import Path

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_Hint = type(Dim.AUTO)
# Which axes of a tensor may vary, and what they are called; Dim.AUTO: tracing shall find out.
Axes = dict[int, Any]  # Dimension, Derived, or a hint


@dataclass(frozen=True)
class Call:
    """One call of a module.

    Attributes:
        args, kwargs: what ``forward`` takes, in any structure.
        given: the same arguments by name, in the order of `args` and `kwargs`.
        names: one name per tensor in them.
        positional: the name of the parameter that takes any number of positional arguments, if it took some.
        guess: what was assumed of the example inputs, for when it turns out wrong.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    given: dict[str, Any]
    names: tuple[str, ...]
    positional: str | None = None
    guess: str = ""

    def leaves(self) -> list[tuple[Path, Any]]:
        return structure.leaves(self.given)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(leaf for _, leaf in self.leaves() if isinstance(leaf, torch.Tensor))

    @property
    def constants(self) -> dict[str, Any]:
        """What is no tensor, by name: its value becomes part of the program."""
        return {"_".join(map(str, path)): leaf for path, leaf in self.leaves() if not isinstance(leaf, torch.Tensor)}

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments with these tensors in place of the given ones."""
        return structure.replaced((self.args, self.kwargs), tensors)


def parameters_of(module: nn.Module) -> dict[str, inspect.Parameter]:
    """The parameters of ``module.forward`` by name."""
    return dict(signature_of(module).parameters)


def signature_of(module: nn.Module) -> inspect.Signature:
    """The signature of ``module.forward``, or the one that the module gives itself."""
    if "__signature__" in vars(module):
        return inspect.signature(module)
    # accelerate's mixed precision, which hides the arguments, keeps the forward it was put around.
    return inspect.signature(vars(module).get("_original_forward", module.forward))


def bind(module: nn.Module, example_inputs: Any, more: Mapping[str, Any] | None = None) -> Call:
    """How example inputs are handed to ``module.forward``.

    Args:
        module: what is called.
        example_inputs: a tuple or list of arguments in order, a mapping by argument name, or a single argument. An
            argument has any structure; what is no tensor in it keeps its value.
        more: further arguments by name.

    Raises:
        CheckpointError: ``forward`` does not take them, or there is no tensor among them.
    """
    parameters, name = parameters_of(module), type(module).__name__
    rest = next((p.name for p in parameters.values() if p.kind is inspect.Parameter.VAR_POSITIONAL), None)
    guess = ""
    if isinstance(example_inputs, Mapping) and len(parameters) == 1 and not example_inputs.keys() & parameters.keys():
        ((only, kind),) = ((p.name, p.kind) for p in parameters.values())
        if kind in _POSITIONAL:
            guess = f"example_inputs has no entry {only!r} and was taken for it as a whole"
            example_inputs = (example_inputs,)
    if isinstance(example_inputs, Mapping):
        args, kwargs = _by_name(dict(example_inputs), parameters, rest, name)
    else:
        args, kwargs = tuple(example_inputs) if isinstance(example_inputs, (list, tuple)) else (example_inputs,), {}
    kwargs |= more or {}
    if not args and not kwargs:
        raise CheckpointError("example_inputs is empty; give the tensors that forward takes")
    ordered = [p.name for p in parameters.values() if p.kind in _POSITIONAL]
    if len(args) > len(ordered) and rest is None:
        raise CheckpointError(f"{len(args)} example inputs, but {name}.forward names {len(ordered)} arguments")
    try:
        signature_of(module).bind(*args, **kwargs)
    except TypeError as error:
        raise CheckpointError(f"example_inputs does not fit {name}.forward: {one_line(error)}") from error
    given = dict(zip(ordered, args, strict=False))
    if len(args) > len(ordered):
        given[str(rest)] = args[len(ordered) :]
    given |= kwargs
    tensors = [(path, leaf) for path, leaf in structure.leaves(given) if isinstance(leaf, torch.Tensor)]
    if not tensors:
        raise CheckpointError("example_inputs holds no tensor; give the tensors that forward takes")
    names = structure.input_names([path for path, _ in tensors])
    for label, (_, tensor) in zip(names, tensors, strict=True):
        _check(label, tensor)
    return Call(args, kwargs, given, tuple(names), rest if len(args) > len(ordered) else None, guess)


def _by_name(
    given: dict[str, Any], parameters: Mapping[str, inspect.Parameter], rest: str | None, name: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments for a mapping. What can be positional is: hooks see positional arguments."""
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    unknown = [key for key in given if key not in parameters]
    if unknown and not takes_any:
        raise CheckpointError(
            f"example_inputs names {unknown[0]!r}, but {name}.forward takes {', '.join(parameters)}; an argument "
            "that is a dictionary itself is given in a tuple: ({…},)"
        )
    args: list[Any] = []
    for key, parameter in parameters.items():
        if key not in given or parameter.kind not in (*_POSITIONAL, inspect.Parameter.VAR_POSITIONAL):
            break
        args += list(given[key]) if key == rest else [given[key]]
        del given[key]
    return tuple(args), given


def _check(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in DTYPES.values():
        raise CheckpointError(f"example input {name!r} is {tensor.dtype}; allowed are {', '.join(DTYPES)}")
    if tensor.is_meta or tensor.layout is not torch.strided or tensor.is_nested:
        kind = "on the meta device" if tensor.is_meta else "nested" if tensor.is_nested else f"{tensor.layout}"
        raise CheckpointError(f"example input {name!r} is {kind}; give a dense tensor with values")


def dynamic_axes(call: Call, dynamic_shapes: Any) -> list[Axes]:
    """Which axes of each tensor of a call may vary.

    Args:
        call: from :func:`bind`.
        dynamic_shapes: as torch.export takes them, by argument name or in order, in the structure of the arguments;
            names of single tensors (``batch_ids``) serve as well. A tensor has ``{axis: dim}`` or one entry per axis;
            a `dim` is a :class:`torch.export.Dim`, an expression of one (``past + 1``), ``Dim.AUTO``,
            ``Dim.DYNAMIC``, or a name.

    Raises:
        CheckpointError: an entry does not fit its argument.
    """
    axes: list[Axes] = [{} for _ in call.names]
    index = {path: number for number, (path, _) in enumerate(_tensors(call.given))}
    if dynamic_shapes is None:
        return axes
    if not isinstance(dynamic_shapes, Mapping):
        dynamic_shapes = _in_order(call, tuple(dynamic_shapes))
    by_name = {name: path for name, (path, _) in zip(call.names, _tensors(call.given), strict=True)}
    for key, spec in dynamic_shapes.items():
        if key in call.given:
            found = list(_specs(call.given[key], spec, (key,)))
        elif key in by_name:
            found = [(by_name[key], spec)]
        else:
            known = ", ".join(dict.fromkeys([*call.given, *call.names]))
            raise CheckpointError(f"dynamic_shapes names {key!r}, but the example inputs are {known}")
        for path, entry in found:
            number = index[path]
            axes[number] |= _axes(entry, call.tensors[number], call.names[number])
    return axes


def _tensors(given: Mapping[str, Any]) -> list[tuple[Path, torch.Tensor]]:
    return [(path, leaf) for path, leaf in structure.leaves(given) if isinstance(leaf, torch.Tensor)]


def _in_order(call: Call, entries: tuple[Any, ...]) -> dict[str, Any]:
    """Entries in the order of the arguments, by argument name."""
    if len(entries) == len(call.given):
        by_name = dict(zip(call.given, entries, strict=True))
        # What is said of the only one of any number of arguments may be said of the tensor itself.
        if call.positional and isinstance(call.args[-1], torch.Tensor) and len(call.given[call.positional]) == 1:
            said = by_name[call.positional]
            if isinstance(said, Mapping) and not any(isinstance(entry, Mapping) for entry in said.values()):
                by_name[call.positional] = (said,)
        return by_name
    before = len(call.args) - len(call.given.get(call.positional, ())) if call.positional else len(call.args)
    if call.positional and len(entries) == len(call.args) + len(call.kwargs):
        return _in_order(call, (*entries[:before], entries[before : len(call.args)], *entries[len(call.args) :]))
    raise CheckpointError(
        f"dynamic_shapes has {len(entries)} entries for {len(call.given)} example inputs ({', '.join(call.given)})"
    )


def _specs(value: Any, spec: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    """What is said of every tensor inside an argument, with its path."""
    if spec is None:
        return
    label = structure.identifier(path, "input")
    if isinstance(value, torch.Tensor):
        yield path, spec
        return
    parts = structure.children(value)
    if parts is None:
        raise CheckpointError(f"dynamic_shapes says something of {label!r}, which is {one_line(repr(value), 40)}")
    if not isinstance(spec, Mapping):
        spec = tuple(spec)
        if len(spec) != len(parts):
            raise CheckpointError(f"dynamic_shapes has {len(spec)} entries for {label!r}, which has {len(parts)}")
        spec = dict(zip(parts, spec, strict=True))
    for key, entry in spec.items():
        if key not in parts:
            raise CheckpointError(f"dynamic_shapes names {key!r} in {label!r}, which has {', '.join(map(str, parts))}")
        yield from _specs(parts[key], entry, (*path, key))


def _axes(spec: Any, example: torch.Tensor, name: str) -> Axes:
    if not isinstance(spec, Mapping) and len(spec) != example.dim():
        raise CheckpointError(
            f"dynamic_shapes[{name!r}] has {len(spec)} entries for {example.dim()} axes; give one for each, or "
            "{axis: name}"
        )
    entries = spec if isinstance(spec, Mapping) else dict(enumerate(spec))
    axes: Axes = {}
    for axis, dim in entries.items():
        if not (isinstance(axis, int) and -example.dim() <= axis < example.dim()):
            raise CheckpointError(f"dynamic_shapes[{name!r}] names axis {axis} of a tensor with {example.dim()} axes")
        if isinstance(dim, int) and dim != example.shape[axis]:
            raise CheckpointError(
                f"dynamic_shapes[{name!r}] fixes axis {axis} at {dim}, but the example has {example.shape[axis]}"
            )
        if dim is not None and not isinstance(dim, int) and getattr(dim, "type", None) != Dim.STATIC.type:
            axes[axis % example.dim()] = _axis(dim, name, axis)
    return axes


def _axis(dim: Any, name: str, axis: int) -> Any:
    if isinstance(dim, str):
        return parse_dimension(dim, f"dynamic_shapes[{name!r}][{axis}]")
    if isinstance(dim, (_Hint, Dimension, Derived)):
        return dim
    if not isinstance(dim, Dim):
        raise CheckpointError(
            f"dynamic_shapes[{name!r}][{axis}] is {one_line(repr(dim), 60)}; give the dimension a name, e.g. 'batch' "
            "or torch.export.Dim('batch'): names become the axes of the ONNX file"
        )
    root = getattr(dim, "root", None)
    if root is not None:  # made by arithmetic: a root multiplied by a number, plus a number
        offset = dim.fn(0)
        return Derived(((_dimension(root), dim.fn(1) - offset),), offset)
    return _dimension(dim)


def _dimension(dim: Dim) -> Dimension:
    low = dim.min if isinstance(dim.min, int) else 1
    high = dim.max if isinstance(dim.max, int) and dim.max < 2**31 else None
    return Dimension(dim.__name__, max(low, 1), high)
