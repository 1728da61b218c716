"""Writing a checkpoint: data only, whole or not at all."""

from __future__ import annotations

import inspect
import json
import os
import secrets
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import normfuse
from normfuse.checkpoint import factory as factories
from normfuse.checkpoint.archive import FORMAT, VERSION, CheckpointError, digest, one_line
from normfuse.checkpoint.arguments import bind, dynamic_axes
from normfuse.checkpoint.capture import asked
from normfuse.checkpoint.inputs import Dimension, InputSpec
from normfuse.checkpoint.wrappers import unwrapped


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    example_inputs: Any,
    dynamic_shapes: Any = None,
    factory: str | type[nn.Module] | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Saves a model as data, so that :func:`normfuse.load` and ``normfuse export`` can build it again.

    Args:
        model: the trained module, on any device, in any mode. Wrappers (torch.compile,
            DistributedDataParallel) are taken off.
        path: the file to write. It appears under this name only when it is complete.
        example_inputs: what ``model.forward`` takes: a tensor, a sequence in the order of its arguments, or a
            mapping by argument name. They are stored, and exporting verifies on them.
        dynamic_shapes: which dimensions may vary, as torch.export takes them (by input name or in order): an
            ``{axis: Dim}`` per input, where a plain string serves as well as ``torch.export.Dim``. None: all
            fixed.
        factory: the class to build the module with: the class itself, or ``"package.module:Class"``. None
            with ``kwargs`` given: the model's own class. None without: no factory is recorded, and loading
            needs ``model``.
        kwargs: keyword arguments for the factory; JSON values only (numbers, strings, booleans, None, lists,
            dicts).

    Raises:
        CheckpointError: an argument cannot be recorded as data, or the file cannot be written.
    """
    model, _, _ = unwrapped(model)
    path = Path(path)
    call = bind(model, example_inputs)
    if any(len(where) > 1 or not isinstance(leaf, torch.Tensor) for where, leaf in call.leaves()):
        raise CheckpointError("example_inputs: only arguments that are tensors can be recorded")
    specs, _ = asked(call, dynamic_axes(call, dynamic_shapes))
    names, examples = call.names, call.tensors
    state = _packed(model.state_dict())
    kwargs = None if kwargs is None else _recordable_kwargs(kwargs)
    metadata = json.dumps(
        {
            "factory": _recordable_factory(model, factory, kwargs),
            "kwargs": kwargs or {},
            "inputs": [_as_json(spec) for spec in specs],
            "extra_dtypes": {
                name: str(buffer.dtype).removeprefix("torch.")
                for name, buffer in model.named_buffers()
                if name not in state and buffer.is_floating_point()
            },
            "written_with": {"torch": torch.__version__, "normfuse": normfuse.__version__},
        },
        allow_nan=False,
    )
    groups = {"state_dict": state, "examples": _packed(dict(zip(names, examples, strict=True)))}
    content = {
        "format": FORMAT,
        "version": VERSION,
        "metadata": metadata,
        "sha256": digest(metadata, groups),
        **groups,
    }
    _write(content, path)


def _packed(tensors: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Plain, contiguous CPU tensors without slack behind them; tensors that share their data still do."""
    packed: dict[str, torch.Tensor] = {}
    seen: dict[Any, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"state_dict entry {name!r} is a {type(tensor).__name__}; only tensors can be saved")
        tensor = tensor.detach()
        plain = type(tensor) is torch.Tensor and tensor.layout is torch.strided and not tensor.is_quantized
        if not plain or tensor.is_meta:
            kind = "has no data (meta device)" if tensor.is_meta else f"is a {tensor.layout} {type(tensor).__name__}"
            raise CheckpointError(f"tensor {name!r} {kind}; only plain dense tensors can be saved")
        storage = tensor.untyped_storage().data_ptr()
        key = (tensor.device, storage, tensor.storage_offset(), tensor.dtype, tensor.shape, tensor.stride())
        if key not in seen:
            data = tensor.cpu().contiguous()
            seen[key] = data.clone() if data.untyped_storage().nbytes() > data.nbytes else data
        packed[name] = seen[key]
    return packed


def _recordable_factory(
    model: nn.Module, factory: str | type[nn.Module] | None, kwargs: Mapping[str, Any] | None
) -> str | None:
    if factory is None and kwargs is None:
        return None
    if factory is None:
        factory = type(model)
    if inspect.isclass(factory):
        if not issubclass(factory, nn.Module):
            raise CheckpointError(f"factory {factory.__name__} is not an nn.Module subclass; loading would refuse it")
        factory = factories.name_of(factory)
    if not isinstance(factory, str):
        raise CheckpointError(f"factory is a {type(factory).__name__}; give a class or 'package.module:Class'")
    module, _ = factories.parse(factory)
    if module == "__main__":
        raise CheckpointError(
            f"factory {factory!r} names the script that runs, which cannot be imported again: move the class "
            "to a module"
        )
    try:
        cls = factories.recorded(factory, "save")
        inspect.signature(cls).bind(**(kwargs or {}))
    except (CheckpointError, TypeError, ValueError) as error:
        # Not an error: the weights of a long training must not be lost over a name, and --model can replace
        # it.
        warnings.warn(
            f"saved, but loading will need the model to be named: factory {factory!r} does not build one "
            "here "
            f"({one_line(error)})",
            stacklevel=3,
        )
    return factory


def _recordable_kwargs(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in kwargs.items():
        try:
            same = json.loads(json.dumps(value, allow_nan=False)) == (
                list(value) if isinstance(value, tuple) else value
            )
        except (TypeError, ValueError):
            same = False
        if not same:
            raise CheckpointError(
                f"kwargs[{name!r}] is {one_line(repr(value), 80)}, which JSON cannot hold; give numbers, "
                "strings, booleans, "
                "None, lists or dicts with string keys"
            )
    return dict(kwargs)


def _as_json(spec: InputSpec) -> dict[str, Any]:
    dims = [
        {"name": dim.name, "minimum": dim.minimum, "maximum": dim.maximum} if isinstance(dim, Dimension) else dim
        for dim in spec.dims
    ]
    return {"name": spec.name, "dtype": str(spec.dtype).removeprefix("torch."), "dims": dims}


def _write(content: dict[str, Any], path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        raise CheckpointError(f"cannot write {path}: {getattr(error, 'strerror', None) or one_line(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)
