"""Checkpoints from exported programs: files of format 2, and ``.pt2`` archives from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from normfuse.checkpoint import archive as files
from normfuse.checkpoint import inputs as specs_module
from normfuse.checkpoint import kinds, program_file, structure
from normfuse.checkpoint.arguments import bind
from normfuse.checkpoint.capture import ExportableModel, capture
from normfuse.checkpoint.errors import CheckpointError
from normfuse.checkpoint.inputs import Axis, Derived, Dimension, InputSpec
from normfuse.checkpoint.pt2.reader import Archive, FlatProgram, read_program, read_samples
from normfuse.checkpoint.pure import copy_what_changes
from normfuse.checkpoint.tracing import linear, separate_outputs

_MOST_PARTS = 10_000


def load_program(path: Path, specs: Sequence[InputSpec] | None, trust: bool) -> ExportableModel:
    """The checkpoint in a PT2 archive.

    Args:
        path: the file.
        specs: instead of those in the file: the same inputs in the same order, under other names of dimensions or with
            narrower bounds. None: those in the file.
        trust: read an archive that is not data with torch's own reader, which can run any code.

    Raises:
        CheckpointError: the archive is not data, is damaged, or does not fit ``specs``.
    """
    try:
        with kinds.opened(path) as file:
            archive = Archive(file, str(path))
            checkpoint = program_file.read(archive) if program_file.is_ours(archive) else _from_elsewhere(archive)
    except CheckpointError:
        if not trust:
            raise
        checkpoint = _trusted(path)
    return checkpoint if specs is None else _respecified(checkpoint, specs)


def _from_elsewhere(archive: Archive) -> ExportableModel:
    flat = read_program(archive)
    specs = _specs(flat.program, flat.input_names, archive.source)
    examples = _examples(flat, read_samples(archive), specs)
    program_file.check_stored_numbers(flat.program, archive.source)
    tensors = [*flat.program.state_dict.values(), *flat.program.constants.values(), *examples]
    if any(tensor.is_floating_point() and tensor.dtype != torch.float32 for tensor in tensors):
        return _retraced(flat.program, specs, examples, archive.source)
    separate_outputs(flat.program)
    copy_what_changes(flat.program)
    program_file.set_examples(flat.program, examples)
    names = structure.output_names(flat.result_paths, [spec.name for spec in specs])
    return ExportableModel(flat.program, specs, tuple(names), examples, (), archive.source)


def from_program(program: ExportedProgram, source: str = "the program") -> ExportableModel:
    """The model in a program that is in memory, traced again: flat, and in float32.

    Args:
        program: from ``torch.export``, of a model in evaluation mode. It is not changed.
        source: what messages call it.

    Returns:
        The model. Dynamic dimensions are called as the program calls their symbols, and example inputs are the
        program's, or made up where it has none.

    Raises:
        CheckpointError: the program takes other things than tensors, or cannot be traced again.

    Example:
        >>> from normfuse.checkpoint import from_program
        >>> program = torch.export.export(nn.Linear(4, 2).eval(), (torch.ones(3, 4),))
        >>> print(*from_program(program).inputs)
        input:float32[3,4]
    """
    names = program.graph_signature.user_inputs
    if not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{source}: the program takes other things than tensors")
    specs = _specs(program, names, source)
    saved = program.example_inputs
    if saved is not None:
        module = program.module()
        call = bind(module, saved[0], saved[1])
        if _fit(specs, call.tensors):
            named = [replace(spec, name=name) for spec, name in zip(specs, call.names, strict=True)]
            return capture(module, call, named, source)
    return _retraced(program, specs, made_up(specs), source)


def _trusted(path: Path) -> ExportableModel:
    return from_program(files.guarded(path, torch.export.load), str(path))


def _retraced(
    program: ExportedProgram, specs: Sequence[InputSpec], examples: Sequence[torch.Tensor], source: str
) -> ExportableModel:
    module = program.module()
    call = bind(module, {spec.name: example for spec, example in zip(specs, examples, strict=True)})
    return capture(module, call, specs, source)


def _specs(program: ExportedProgram, names: Sequence[str], source: str) -> tuple[InputSpec, ...]:
    """What a program takes. Dimensions are called as torch.export calls its symbols: s77."""
    values = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    specs = []
    for name in names:
        value = values[name]
        if not isinstance(value, torch.Tensor) or value.dtype not in specs_module.DTYPES.values():
            raise CheckpointError(f"{source}: input {name!r} of the program is not a tensor of a supported dtype")
        dims = tuple(_axis(program, size, f"{source}: input {name!r}") for size in value.shape)
        specs.append(InputSpec(name, value.dtype, dims))
    return tuple(specs)


def _axis(program: ExportedProgram, size: Any, what: str) -> Axis:
    if isinstance(size, int):
        return size
    sum_of = linear(size.node.expr)
    if sum_of is None:
        raise CheckpointError(
            f"{what} has a size of {size}, which is not a sum of other sizes: export it with fixed ones"
        )
    terms = tuple((_dimension(program, symbol), factor) for symbol, factor in sum_of[0])
    return terms[0][0] if terms[0][1:] == (1,) and sum_of[1] == 0 and len(terms) == 1 else Derived(terms, sum_of[1])


def _dimension(program: ExportedProgram, symbol: Any) -> Dimension:
    bounds = program.range_constraints.get(symbol)
    low = int(bounds.lower) if bounds is not None and bounds.lower.is_Integer else 1
    high = int(bounds.upper) if bounds is not None and bounds.upper.is_Integer and bounds.upper < 2**31 else None
    return Dimension(str(symbol), max(low, 1), high)


def _examples(flat: FlatProgram, saved: Any, specs: Sequence[InputSpec]) -> tuple[torch.Tensor, ...]:
    """The example inputs of an archive, or such that are made up where it has none that fit."""
    leaves = list(_leaves(saved)) if saved is not None else []
    if len(leaves) == len(flat.arguments):
        tensors = tuple(leaf for leaf, is_tensor in zip(leaves, flat.arguments, strict=True) if is_tensor)
        if _fit(specs, tensors):
            return tensors
    return made_up(specs)


def _leaves(saved: Any) -> Iterator[Any]:
    """The parts of nested containers. A pickle can hold one container in many places: it ends after 10 000 parts."""
    todo, left = [saved], _MOST_PARTS
    while todo and left:
        left -= 1
        value = todo.pop()
        if isinstance(value, dict):
            todo += reversed(value.values())
        elif isinstance(value, (list, tuple)):
            todo += reversed(value)
        else:
            yield value


def _fit(specs: Sequence[InputSpec], tensors: Sequence[Any]) -> bool:
    whole = len(tensors) == len(specs) and all(
        type(x) is torch.Tensor
        and x.layout is torch.strided
        and x.device.type == "cpu"
        and x.nbytes <= x.untyped_storage().nbytes()
        for x in tensors
    )
    try:
        return whole and bool(specs_module.consistent_sizes(specs, tensors) or True)
    except CheckpointError:
        return False


def made_up(specs: Sequence[InputSpec]) -> tuple[torch.Tensor, ...]:
    """Inputs that fit, the same every time."""
    generator = torch.Generator().manual_seed(0)
    sizes = specs_module.first_sizes(specs)
    return tuple(specs_module.make_up(spec, sizes, generator) for spec in specs)


def _respecified(checkpoint: ExportableModel, specs: Sequence[InputSpec]) -> ExportableModel:
    """The checkpoint with the inputs as somebody described them, whose examples are made up if its own do not fit."""
    if [spec.name for spec in specs] != list(checkpoint.input_names):
        names = ", ".join(checkpoint.input_names)
        raise CheckpointError(f"{checkpoint.source} takes {names} in this order; --input names others")
    for spec, known in zip(specs, checkpoint.inputs, strict=True):
        fixed = [dim if isinstance(dim, int) else None for dim in known.dims]
        fits = spec.dtype == known.dtype and len(spec.dims) == len(fixed)
        if not fits or any(size not in (None, dim) for size, dim in zip(fixed, spec.dims, strict=True)):
            raise CheckpointError(f"{checkpoint.source} takes {known}, not {spec}")
    if _fit(specs, checkpoint.example_inputs):
        return replace(checkpoint, inputs=tuple(specs))
    return replace(checkpoint, inputs=tuple(specs), example_inputs=made_up(specs), expected_outputs=())
