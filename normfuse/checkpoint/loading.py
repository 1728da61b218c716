"""Reading a checkpoint: check the file, build the module, load it strictly, look at its statistics, trace it."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normfuse.checkpoint import archive, bounded, factory, sharded
from normfuse.checkpoint import inputs as specs_module
from normfuse.checkpoint import weights as weights_module
from normfuse.checkpoint.archive import CheckpointError, one_line, some_of
from normfuse.checkpoint.arguments import bind, parameters_of
from normfuse.checkpoint.capture import ExportableModel, capture
from normfuse.checkpoint.inputs import DTYPES, Dimension, InputSpec
from normfuse.checkpoint.programs import load_program, made_up
from normfuse.checkpoint.wrappers import unwrapped

_PROGRAM = object()  # stands for what is read elsewhere
_NAME_INPUTS = 'name them: --input "tokens:int64[batch,seq]" (inputs=[…])'


def load(
    path: str | os.PathLike[str],
    *,
    model: str | Callable[..., nn.Module] | nn.Module | None = None,
    model_args: Mapping[str, Any] | None = None,
    inputs: Sequence[str | InputSpec] | None = None,
    weights: str | None = None,
    trust: bool = False,
) -> ExportableModel:
    """Load a checkpoint of :func:`normfuse.save`, or the weights that a training script saved.

    No code from the file is run.

    Args:
        path: the file: of :func:`normfuse.save`, of ``torch.export.save`` (``.pt2``), of ``torch.save``,
            ``.safetensors``, an index of several (``….index.json``), or a folder that holds one of the last two.
            Weights are found under the keys that training scripts use, also with the prefixes of wrappers.
        model: builds the module: ``"package.module:factory"`` (searched in the working directory as well) or
            ``"file.py:factory"``, a callable, or a module to load into. None: the program that the file holds. A file
            that holds its program is exported as it was saved; a module that is given gets its weights.
        model_args: keyword arguments for it; they override those in the file.
        inputs: what the model takes, e.g. ``["tokens:int64[batch,seq]<1000"]`` (see
            :func:`normfuse.checkpoint.parse_input`). None: what the file records.
        weights: which weights to take, where a file holds more than one group that fits (``"state_dict_ema"``). None:
            the trained ones, not their average. ``ExportableModel.notes`` name what was taken.
        trust: also read what can run code: pickled modules, ``.pt2`` archives with pickles in them, and the class that
            a file of format 1 names. Only for files whose author you trust.

    Returns:
        The program with its inputs and outputs.

    Raises:
        CheckpointError: in one line, for a file that is missing, damaged, not data, does not fit the module, or holds
            invalid numbers (not finite, a negative variance). Nothing is changed on disk.

    Example:
        >>> import normfuse
        >>> normfuse.save(nn.Linear(4, 2), "linear.pt", example_inputs=torch.randn(3, 4))
        >>> normfuse.checkpoint.load("linear.pt").input_names
        ('input',)
    """
    path = Path(path)
    specs = None if inputs is None else [specs_module.parse_input(i) if isinstance(i, str) else i for i in inputs]
    try:
        return _load(path, model, model_args, specs, weights, trust)
    except CheckpointError:
        raise
    except (Exception, SystemExit) as error:  # whatever a file, or the user's own model, makes somebody raise
        raise CheckpointError(f"{path} cannot be loaded ({type(error).__name__}: {one_line(error, 240)})") from error


def _load(
    path: Path,
    model: str | Callable[..., nn.Module] | nn.Module | None,
    model_args: Mapping[str, Any] | None,
    specs: list[InputSpec] | None,
    weights: str | None,
    trust: bool,
) -> ExportableModel:
    if path.is_dir():
        path = sharded.weight_file(path)
    content = _read(path, trust)
    if content is _PROGRAM:
        loaded = load_program(path, specs, trust)
        said = [*loaded.notes]
        if isinstance(model, nn.Module):
            _fill(model, loaded.program.state_dict, {}, path, in_own_dtype=True)
            said.append(
                f"{type(model).__name__} has the weights of the file; what is exported is the file's own program"
            )
            model = None
        options = {"model": model, "model_args": model_args, "weights": weights}
        if unused := [name for name, value in options.items() if value]:
            said.append(f"not used, since the file holds its program: {some_of(unused)}")
        return replace(loaded, notes=tuple(said))
    metadata: dict[str, Any] = {}
    examples: dict[str, torch.Tensor] = {}
    notes: list[str] = []
    held = weights_module.module_in(content) if trust else None
    if held is not None and model is not None:
        content, held = held.state_dict(), None
    # Weights in float16 with inputs in float32 were trained in mixed precision: they are computed in float32.
    single = any(spec.dtype == torch.float32 for spec in specs or ())
    if held is not None:
        module = held.float() if single and _is_half(held) else held
    elif isinstance(content, Mapping) and "format" in content:
        metadata, state, examples = _checked(content, path)
        module = _build(path, metadata, model, model_args, trust, state)
        _fill(module, state, metadata, path)
    else:
        module = _build(path, metadata, model, model_args, trust)
        state, notes = weights_module.take(content, module, str(path), weights)
        if not _only_tensors(state):
            raise CheckpointError(f"{path} holds sparse, quantised or expanded tensors; save plain dense ones")
        _fill(module, state, metadata, path, in_own_dtype=single)
    module, plain, said = unwrapped(module)
    if specs is not None:
        examples = (
            examples if _fit(examples, specs) else dict(zip((s.name for s in specs), made_up(specs), strict=True))
        )
    elif metadata:
        specs = _recorded_specs(metadata, path)
    else:
        parameters = parameters_of(module).values()
        names = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        raise CheckpointError(
            f"{path} does not say which inputs the model takes; {_NAME_INPUTS}; {type(module).__name__}.forward takes "
            f"{some_of([p.name for p in parameters], 8)}",
            advice=[f'--input "{name}:{_likely(module)}"' for name in names],
        )
    return captured(module, specs, examples, str(path), [*notes, *said], plain)


def _likely(module: nn.Module) -> str:
    """Dtype and sizes of an input that the first weight of a module may take."""
    for part in module.modules():
        if isinstance(part, nn.Embedding):
            return f"int64[batch,seq]<{part.num_embeddings}"
        if isinstance(part, nn.Linear):
            return f"float32[batch,{part.in_features}]"
        if isinstance(part, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return f"float32[batch,{','.join(map(str, (part.in_channels, *[32] * len(part.kernel_size))))}]"
    return "float32[batch,8]"


def _is_half(module: nn.Module) -> bool:
    dtypes = {p.dtype for p in module.parameters() if p.is_floating_point()}
    return dtypes in ({torch.float16}, {torch.bfloat16})


def _read(path: Path, trust: bool) -> Any:
    if path.name.endswith(sharded.INDEX):
        return sharded.read_index(path, trust)
    kind = archive.file_kind(path)
    return _PROGRAM if kind == "pt2" else archive.read(path, kind, trust)


def captured(
    module: nn.Module,
    specs: Sequence[InputSpec],
    examples: Mapping[str, torch.Tensor],
    source: str,
    notes: Sequence[str] = (),
    plain: nn.Module | None = None,
) -> ExportableModel:
    """Traces a module whose ``forward`` takes one tensor per spec, by name; see :func:`capture` for ``plain``."""
    allowed = parameters_of(module)
    for spec in specs:
        if spec.name not in allowed:
            raise CheckpointError(f"input {spec.name!r}: {type(module).__name__}.forward takes {', '.join(allowed)}")
    by_name = {spec.name: spec for spec in specs}
    tensors = {name: examples[name] for name in by_name}
    specs_module.consistent_sizes(specs, list(tensors.values()))
    call = bind(module, tensors)
    return capture(module, call, [by_name[name] for name in call.names], source, plain=plain, notes=notes)


def _checked(
    content: Mapping[str, Any], path: Path
) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The parts of a normfuse checkpoint, after its digest and its form were checked."""
    if content["format"] != archive.FORMAT:
        raise CheckpointError(
            f"{path} says its format is {one_line(repr(content['format']), 40)}, not {archive.FORMAT!r}"
        )
    if content.get("version") != archive.VERSION:
        raise CheckpointError(
            f"{path} has format version {one_line(repr(content.get('version')), 20)}; this normfuse reads "
            "version "
            f"{archive.VERSION}: upgrade it"
        )
    groups: dict[str, Any] = {name: content.get(name) for name in ("state_dict", "examples")}
    metadata: Any = content.get("metadata")
    whole = isinstance(metadata, str) and all(_only_tensors(group) for group in groups.values())
    if not whole:
        raise CheckpointError(f"{path} is not a complete normfuse checkpoint; save it again")
    if archive.digest(metadata, groups) != content.get("sha256"):
        raise CheckpointError(f"{path} is damaged: its content does not match its checksum; copy or save it again")
    return _parsed(metadata, path), groups["state_dict"], groups["examples"]


def _parsed(text: str, path: Path) -> dict[str, Any]:
    forms: dict[str, Any] = {"factory": (str, type(None)), "kwargs": dict, "inputs": list, "extra_dtypes": dict}
    try:
        metadata = json.loads(text)
        if all(isinstance(metadata[key], form) for key, form in forms.items()):
            return metadata
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its metadata cannot be read ({one_line(error, 80)})") from error
    raise CheckpointError(f"{path}: its metadata is not of the form that normfuse.save writes")


def _only_tensors(group: Any) -> bool:
    """Whether a group maps names to dense tensors whose every number is in the file.

    Strides of zero would make a few bytes look like a huge tensor.
    """
    return isinstance(group, Mapping) and all(
        isinstance(name, str)
        and isinstance(tensor, torch.Tensor)
        and tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and tensor.nbytes <= tensor.untyped_storage().nbytes()
        for name, tensor in group.items()
    )


def _build(
    path: Path,
    metadata: Mapping[str, Any],
    model: Any,
    model_args: Mapping[str, Any] | None,
    trust: bool,
    state: Mapping[str, torch.Tensor] | None = None,
) -> nn.Module:
    """The module to load into.

    Args:
        path: the file.
        metadata: of a file of format 1, which names a class and records its arguments; else empty.
        model: what the user gives: a module, a class or the name of a function.
        model_args: arguments for it.
        trust: whether the class that the file names may be built, and with any argument that it records.
        state: the weights in a file of format 1.
    """
    named = factory.given(model) if isinstance(model, str) else model
    if isinstance(named, nn.Module):
        if model_args:
            raise CheckpointError(
                f"model is a {type(named).__name__} already; --model-arg (model_args) is for a class or function that "
                "builds one"
            )
        return named
    label: Any = metadata.get("factory")
    if model is None and label is None:
        raise CheckpointError(
            f"{path} does not say how to build its model: give --model package.module:factory (model=…)",
            advice=["--model package.module:factory"],
        )
    if model is None and not trust:
        raise CheckpointError(
            f"{path} is of format 1 and names the class {one_line(label, 80)!r}: building it can run code, so it was "
            "not built; give --model package.module:factory (model=…), or --trust (trust=True) if you know who made it",
            advice=["--trust"],
        )
    if model is None:
        build: Any = factory.recorded(label, str(path))
    elif isinstance(model, str):
        build, label = named, model
    else:
        build, label = model, getattr(model, "__qualname__", str(model))
    given, recorded = model_args or {}, metadata.get("kwargs") or {}
    if trust or not recorded or state is None:
        return factory.build(build, {**recorded, **given}, label)
    bounded.check_texts(recorded, given, str(path))
    with bounded.no_larger_than(state, str(path)):
        empty = bounded.on_meta(build, {**recorded, **given})
    if empty is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nothing is copied into it
            _fill(empty, state, metadata, path)
    with bounded.no_larger_than(state, str(path)):
        return factory.build(build, {**recorded, **given}, label)


def _fill(
    module: nn.Module,
    state: Mapping[str, torch.Tensor],
    metadata: Mapping[str, Any],
    path: Path,
    in_own_dtype: bool = False,
) -> None:
    """Strict loading in the dtypes of the file, so that the module computes as the trained one did."""
    extra = metadata.get("extra_dtypes") or {}
    for name, own in () if in_own_dtype else (*module.named_parameters(), *module.named_buffers()):
        dtype: Any = state[name].dtype if name in state else DTYPES.get(extra.get(name, ""), own.dtype)
        if own.is_floating_point() and dtype.is_floating_point and own.dtype != dtype:
            own.data = own.data.to(dtype)
    name = type(module).__name__
    try:
        missing, unexpected = module.load_state_dict(dict(state), strict=False)
    except Exception as error:  # RuntimeError for shapes; a module's own hooks may raise anything
        detail = one_line(error).partition(f"for {name}: ")[2] or one_line(error)
        raise CheckpointError(f"{path} does not fit {name}: {detail}") from error
    if not metadata:
        needed = set(weights_module.missing_from(state, module))
        missing = [name for name in missing if name in needed]
    problems = [
        f"{len(names)} tensor{'s' * (len(names) > 1)} {what} ({some_of(names)})"
        for what, names in (("missing from the file", missing), ("unknown to the module", unexpected))
        if names
    ]
    if problems:
        raise CheckpointError(f"{path} does not fit {name}: {' and '.join(problems)}")


def _recorded_specs(metadata: Mapping[str, Any], path: Path) -> list[InputSpec]:
    try:
        return [
            InputSpec(
                entry["name"],
                DTYPES[entry["dtype"]],
                tuple(Dimension(**dim) if isinstance(dim, Mapping) else int(dim) for dim in entry["dims"]),
            )
            for entry in metadata["inputs"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its record of the inputs cannot be read ({one_line(error, 80)})") from error


def _fit(examples: Mapping[str, torch.Tensor], specs: Sequence[InputSpec]) -> bool:
    """Whether the saved examples also serve the specs that were given instead of the recorded ones."""
    try:
        specs_module.consistent_sizes(specs, [examples[spec.name] for spec in specs])
    except (KeyError, CheckpointError):
        return False
    return True
