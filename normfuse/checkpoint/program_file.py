"""Format 2: a checkpoint as a PT2 archive, the program and one record of ours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import torch
from torch.export import ExportedProgram

import normfuse
from normfuse.checkpoint import inputs as specs_module
from normfuse.checkpoint.capture import ExportableModel
from normfuse.checkpoint.errors import CheckpointError
from normfuse.checkpoint.inputs import DTYPES, Axis, Derived, Dimension, InputSpec
from normfuse.checkpoint.numbers import check_tensors
from normfuse.checkpoint.pt2 import tensors
from normfuse.checkpoint.pt2.reader import OWN_FOLDER, OWN_RECORD, Archive, read_program
from normfuse.checkpoint.pt2.writer import write_archive
from normfuse.checkpoint.strict_json import parse_json
from normfuse.errors import one_line

FORMAT, VERSION = "normfuse checkpoint", 2
_RECORD_BYTES = 1 << 26
_UNNAMED_BY_DIGESTS = (OWN_RECORD, ".data/", "byteorder")
_ALL_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in tensors.DTYPES.values()}


def write(checkpoint: ExportableModel, file: BinaryIO) -> None:
    """Writes a checkpoint; CheckpointError if something in its program is not data."""
    groups = {"inputs": checkpoint.example_inputs, "outputs": checkpoint.expected_outputs}
    record = {
        "format": FORMAT,
        "version": VERSION,
        "inputs": [_spec_as_json(spec) for spec in checkpoint.inputs],
        "outputs": list(checkpoint.outputs),
        "examples": {name: [_tensor_as_json(tensor) for tensor in group] for name, group in groups.items()},
        "notes": list(checkpoint.notes),
        "written_with": {"torch": torch.__version__, "normfuse": normfuse.__version__},
    }
    further = {f"{name}_{index}": tensor for name, group in groups.items() for index, tensor in enumerate(group)}
    write_archive(file, checkpoint.program, record, further)


def is_ours(archive: Archive) -> bool:
    """Whether an archive holds a record of ours."""
    return OWN_RECORD in archive.records.sizes


def read(archive: Archive) -> ExportableModel:
    """The checkpoint in an archive that :func:`write` wrote; CheckpointError if anything in it is not as it must be."""
    what = f"{archive.source}: {OWN_RECORD}"
    record = parse_json(archive.read(OWN_RECORD, _RECORD_BYTES), what)
    if not isinstance(record, dict) or record.get("format") != FORMAT or record.get("version") != VERSION:
        found = record.get("version") if isinstance(record, dict) else None
        raise CheckpointError(
            f"{archive.source} has format version {one_line(repr(found), 20)}; this normfuse reads versions 1 and "
            f"{VERSION}: upgrade it"
        )
    flat = read_program(archive)
    try:
        specs = tuple(_spec_from_json(entry) for entry in _list(record, "inputs"))
        outputs = tuple(_text(name) for name in _list(record, "outputs"))
        notes = tuple(_text(note) for note in _list(record, "notes"))
        examples = _list_of_examples(archive, record, "inputs", len(specs))
        expected = _list_of_examples(archive, record, "outputs", len(outputs))
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{what} is not of the form that normfuse.save writes ({one_line(error, 80)})") from error
    _check_digests(archive, record)
    check_program(flat.program, specs, archive.source)
    if len(outputs) != len(flat.program.graph_signature.user_outputs):
        raise CheckpointError(f"{archive.source}: its program returns another number of tensors than it has names for")
    try:
        specs_module.consistent_sizes(specs, examples)
    except CheckpointError as error:
        raise CheckpointError(f"{archive.source}: {error}") from error
    _check_results(flat.program, examples, expected, archive.source)
    set_examples(flat.program, examples)
    check_stored_numbers(flat.program, archive.source)
    return ExportableModel(flat.program, specs, outputs, examples, expected, archive.source, notes)


def check_program(program: ExportedProgram, specs: Sequence[InputSpec], source: str) -> None:
    """Raises CheckpointError unless a program takes what the specifications say.

    That is as many tensors, of these dtypes, and fixed sizes where they are fixed.
    """
    names = program.graph_signature.user_inputs
    values = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    if len(names) != len(specs):
        raise CheckpointError(f"{source}: its program takes {len(names)} tensors; {len(specs)} are described")
    for name, spec in zip(names, specs, strict=True):
        value = values[name]
        fixed = [dim if isinstance(dim, int) else None for dim in spec.dims]
        if value.dtype != spec.dtype or fixed != [size if isinstance(size, int) else None for size in value.shape]:
            raise CheckpointError(f"{source}: its program takes {value.dtype} {list(value.shape)} for {spec}")


def set_examples(program: ExportedProgram, examples: tuple[torch.Tensor, ...]) -> None:
    """Gives a flat program its example inputs, which have been checked."""
    program._example_inputs = (examples, {})  # the property itself evaluates text, to make a named tuple


def check_stored_numbers(program: ExportedProgram, source: str) -> None:
    """Refuses numbers that no training leaves behind, see :func:`normfuse.checkpoint.numbers.check_tensors`."""
    constants = {name: value for name, value in program.constants.items() if isinstance(value, torch.Tensor)}
    check_tensors({**program.state_dict, **constants}, source)


def _check_results(
    program: ExportedProgram, examples: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], source: str
) -> None:
    """Raises CheckpointError unless the recorded outputs have the shapes that the program gives on the examples."""
    values = {node.name: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}
    sizes = {
        size.node.expr: actual
        for name, example in zip(program.graph_signature.user_inputs, examples, strict=True)
        for size, actual in zip(values[name].shape, example.shape, strict=True)
        if not isinstance(size, int) and size.node.expr.is_Symbol
    }
    for name, tensor in zip(program.graph_signature.user_outputs, expected, strict=True):
        shape = [size if isinstance(size, int) else size.node.expr.subs(sizes) for size in values[name].shape]
        if shape != list(tensor.shape) or values[name].is_floating_point() != tensor.is_floating_point():
            raise CheckpointError(
                f"{source}: an output of shape {list(tensor.shape)} is recorded where {shape} belongs"
            )


def _check_digests(archive: Archive, record: Mapping[str, Any]) -> None:
    """Every record is named by its digest, and has it."""
    digests = record.get("records")
    names = {name for name in archive.records.sizes if not name.startswith(_UNNAMED_BY_DIGESTS)}
    if not isinstance(digests, dict) or set(digests) != names:
        raise CheckpointError(
            f"{archive.source} is damaged: its records are not those that it lists; copy or save it again"
        )
    for name in names - set(archive.digests):
        archive.storage(name)
    for name in names:
        if digests[name] != archive.digests[name]:
            raise CheckpointError(
                f"{archive.source} is damaged: record {name!r} does not match its digest; copy or save it again"
            )


def _list_of_examples(archive: Archive, record: Mapping[str, Any], group: str, count: int) -> tuple[torch.Tensor, ...]:
    entries = _list(record["examples"], group)
    if len(entries) != count:
        raise ValueError(f"{len(entries)} {group} for {count} names")
    made = []
    for index, entry in enumerate(entries):
        what = f"{archive.source}: example {group}_{index}"
        dtype, shape = _ALL_DTYPES[entry["dtype"]], [_natural(size) for size in _list(entry, "shape")]
        storage = archive.storage(f"{OWN_FOLDER}{group}_{index}")
        if storage.numel() != math.prod(shape) * dtype.itemsize:
            raise CheckpointError(f"{what} of shape {shape} has {storage.numel()} bytes")
        tensors.check_booleans(storage, dtype, what)
        made.append(storage.view(dtype).reshape(shape))
    return tuple(made)


def _tensor_as_json(tensor: torch.Tensor) -> dict[str, Any]:
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}


def _spec_as_json(spec: InputSpec) -> dict[str, Any]:
    dims = [_axis_as_json(dim) for dim in spec.dims]
    return {"name": spec.name, "dtype": str(spec.dtype).removeprefix("torch."), "dims": dims}


def _axis_as_json(dim: Axis) -> Any:
    if isinstance(dim, Dimension):
        return {"name": dim.name, "minimum": dim.minimum, "maximum": dim.maximum}
    if isinstance(dim, Derived):
        return {"sum": [[_axis_as_json(term), factor] for term, factor in dim.terms], "offset": dim.offset}
    return dim


def _spec_from_json(entry: Mapping[str, Any]) -> InputSpec:
    return InputSpec(_text(entry["name"]), DTYPES[entry["dtype"]], tuple(map(_axis_from_json, _list(entry, "dims"))))


def _axis_from_json(entry: Any) -> Axis:
    if not isinstance(entry, dict):
        return _natural(entry)
    if "sum" in entry:
        terms = tuple((_dimension(term), _whole(factor)) for term, factor in _list(entry, "sum"))
        return Derived(terms, _whole(entry["offset"]))
    return _dimension(entry)


def _dimension(entry: Mapping[str, Any]) -> Dimension:
    high = entry["maximum"]
    return Dimension(_text(entry["name"]), _natural(entry["minimum"]), None if high is None else _natural(high))


def _list(entry: Mapping[str, Any], key: str) -> list[Any]:
    if not isinstance(entry[key], list):
        raise TypeError(f"{key} is not a list")
    return entry[key]


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.isprintable() or len(value) > 1000:
        raise TypeError("a name is not text")
    return value


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise TypeError("a number is not an integer")
    return value


def _natural(value: Any) -> int:
    if _whole(value) < 0:
        raise ValueError("a number is negative")
    return value
