"""A PT2 archive, what ``torch.export.save`` writes, read as data."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import torch
from torch._export.serde import schema
from torch._export.serde.serialize import ExportedProgramDeserializer
from torch.export import ExportedProgram
from torch.utils._pytree import tree_structure, treespec_dumps

from normfuse.checkpoint.errors import CheckpointError
from normfuse.checkpoint.pt2.graph import GraphReader, all_graphs, sizes_of
from normfuse.checkpoint.pt2.schema import build
from normfuse.checkpoint.pt2.shapes import ShapeRunner
from normfuse.checkpoint.pt2.symbols import Symbols
from normfuse.checkpoint.pt2.tensors import TensorReader
from normfuse.checkpoint.records import Records
from normfuse.checkpoint.strict_json import parse_json
from normfuse.errors import one_line
from normfuse.quiet import quiet

WEIGHTS, CONSTANTS, SAMPLES, MODELS = "data/weights/", "data/constants/", "data/sample_inputs/", "models/"
OWN_RECORD, OWN_FOLDER = "extra/normfuse.json", "data/normfuse/"
_COMPILED = ("data/aotinductor/", "executorch/")
_GRAPH_BYTES = 1 << 27
_DIALECTS = {"ATEN", "TRAINING"}
_TRUST = "give --trust (trust=True) if you know who made it"


class Archive:
    """The records of a PT2 archive that holds one program, read once each.

    Raises CheckpointError for an archive that holds compiled code, several programs, or none.
    """

    def __init__(self, file: BinaryIO, source: str) -> None:
        self.source = source
        self.records = Records(file, source)
        self.digests: dict[str, str] = {}
        names = list(self.records.sizes)
        compiled = [name for name in names if name.startswith(_COMPILED)]
        if compiled:
            raise CheckpointError(f"{source} holds a compiled program ({compiled[0]}), which cannot be folded any more")
        if self.read("archive_format", 16) != b"pt2" or self.read("archive_version", 16) != b"0":
            raise CheckpointError(f"{source} is a PT2 archive of a version that is not known; save it again")
        if self.records.sizes.get("byteorder") and self.read("byteorder", 16) != b"little":
            raise CheckpointError(f"{source} was written on a big-endian machine; save it again on another")
        models = [name for name in names if name.startswith(MODELS)]
        if len(models) != 1 or not models[0].endswith(".json"):
            raise CheckpointError(f"{source} holds {len(models)} programs; it must hold one")
        self.model = models[0].removeprefix(MODELS).removesuffix(".json")

    def read(self, name: str, at_most: int) -> bytes:
        """The bytes of a record; CheckpointError as in :meth:`Records.read`."""
        data = self.records.read(name, at_most)
        self.digests[name] = hashlib.sha256(data).hexdigest()
        return data

    def storage(self, name: str) -> torch.Tensor:
        """The bytes of a record as an uint8 tensor of shape [size]."""
        tensor, self.digests[name] = self.records.tensor(name)
        return tensor


@dataclass(frozen=True)
class FlatProgram:
    """A program that takes flat tensors and returns flat tensors, as its archive says.

    Attributes:
        program: of torch.export; its arguments are ``input_names`` in order, its result a tuple.
        input_names: of its placeholders.
        arguments: for each input of the archive, the tensors' and the others' (None, numbers), whether it is among
            ``input_names``: where the example inputs of the archive belong.
        result_paths: where each result is in what the module returned, as far as that can be told: keys and indices.
    """

    program: ExportedProgram
    input_names: tuple[str, ...]
    arguments: tuple[bool, ...]
    result_paths: tuple[tuple[Any, ...], ...]


def read_program(archive: Archive) -> FlatProgram:
    """The program of an archive, built from checked JSON and raw bytes only.

    The structure of its arguments and results is not built: it takes and returns tensors one beside the other.
    Operands that were no tensors are left out; they are constants of the program.

    Raises CheckpointError, in one line, for whatever is not allowed and whatever does not fit.
    """
    with quiet(logging.CRITICAL):  # what torch logs is said in one line anyway
        return _read_program(archive)


def _read_program(archive: Archive) -> FlatProgram:
    source, model = archive.source, archive.model
    what = f"{source}: {MODELS}{model}.json"
    saved = build(schema.ExportedProgram, parse_json(archive.read(f"{MODELS}{model}.json", _GRAPH_BYTES), what), what)
    if saved.schema_version.major != schema.SCHEMA_VERSION[0]:
        raise CheckpointError(
            f"{source} was exported by torch {one_line(saved.torch_version, 30)}, whose programs torch "
            f"{torch.__version__} does not read; export it again"
        )
    for name in (f"{WEIGHTS}{model}.pt", f"{CONSTANTS}{model}.pt"):
        if name in archive.records.sizes:
            raise CheckpointError(
                f"{source} holds pickled weights ({name}): reading them can run code; {_TRUST}", advice=["--trust"]
            )
    tensors = TensorReader(archive.read, archive.storage, archive.records.file_size, source)
    weights = tensors.group(f"{WEIGHTS}{model}_weights_config.json", WEIGHTS, "weight_")
    constants = tensors.group(f"{CONSTANTS}{model}_constants_config.json", CONSTANTS, "tensor_")
    graph = saved.graph_module.graph
    try:
        symbols = Symbols(sizes_of(all_graphs(graph)))
        reader = GraphReader(symbols, ShapeRunner(archive.records.file_size))
        names, input_specs, arguments = _inputs(saved, reader, weights, constants)
        reader.walk(graph, names)
        output_specs, kept = _outputs(saved, reader, names)
        ranges = _ranges(saved, symbols)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    user_inputs = [spec.user_input.arg.as_tensor.name for spec in input_specs if str(spec.type) == "user_input"]
    flat = schema.GraphModule(
        reader.graph, schema.GraphSignature(input_specs, output_specs), [_root(user_inputs, len(output_specs))]
    )
    checked = schema.ExportedProgram(
        graph_module=flat,
        opset_version={},
        range_constraints=ranges,
        schema_version=schema.SchemaVersion(*schema.SCHEMA_VERSION),
        verifiers=[dialect for dialect in saved.verifiers if dialect in _DIALECTS] or ["TRAINING"],
    )
    program = _built(checked, weights, constants, source)
    paths = _result_paths(saved.graph_module.module_call_graph, len(graph.outputs))
    return FlatProgram(program, tuple(user_inputs), arguments, tuple(paths[index] for index in kept))


def _inputs(
    saved: schema.ExportedProgram,
    reader: GraphReader,
    weights: Mapping[str, torch.Tensor],
    constants: Mapping[str, torch.Tensor],
) -> tuple[dict[str, str], list[schema.InputSpec], tuple[bool, ...]]:
    """Declares the placeholders. Returns their new names, their specs, and which user inputs are tensors."""
    graph, specs = saved.graph_module.graph, saved.graph_module.signature.input_specs
    if len(specs) != len(graph.inputs):
        raise CheckpointError(f"{len(graph.inputs)} inputs have {len(specs)} specifications")
    names: dict[str, str] = {}
    kept: list[schema.InputSpec] = []
    arguments: list[bool] = []
    for spec, argument in zip(specs, graph.inputs, strict=True):
        kind, value = str(spec.type), spec.value
        if kind == "constant_input":
            arguments.append(False)
            continue
        if kind not in ("user_input", "parameter", "buffer", "tensor_constant") or str(argument.type) != "as_tensor":
            raise CheckpointError(f"an input is {one_line(repr(spec), 80)}; only tensors can be")
        name = argument.as_tensor.name
        said = value.arg.as_tensor.name if kind == "user_input" and str(value.arg.type) == "as_tensor" else None
        if (said if kind == "user_input" else value.arg.name) != name or name in names:
            raise CheckpointError(f"input {one_line(name, 60)!r} is specified under another name, or twice")
        stored = None if kind == "user_input" else _stored(kind, value, weights, constants)
        names[name] = reader.placeholder(name, graph, stored)
        made = schema.TensorArgument(names[name])
        if kind == "user_input":
            arguments.append(True)
            value = replace(value, arg=schema.Argument.create(as_tensor=made))
        else:
            value = replace(value, arg=made)
        kept.append(schema.InputSpec.create(**{kind: value}))
    return names, kept, tuple(arguments)


def _stored(
    kind: str, spec: Any, weights: Mapping[str, torch.Tensor], constants: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    lasting = kind == "parameter" or (kind == "buffer" and spec.persistent)
    name = {"parameter": "parameter_name", "buffer": "buffer_name"}.get(kind, "tensor_constant_name")
    target = getattr(spec, name)
    found = (weights if lasting else constants).get(target)
    plain = all(part and not part.startswith("__") and part.isprintable() for part in target.split("."))
    if found is None or not plain or isinstance(found, torch.nn.Parameter) != (kind == "parameter"):
        raise CheckpointError(f"the program reads {kind} {one_line(target, 80)!r}, which the file has not")
    return found


def _outputs(
    saved: schema.ExportedProgram, reader: GraphReader, names: Mapping[str, str]
) -> tuple[list[schema.OutputSpec], list[int]]:
    """Adds the outputs that are tensors. Returns their specs, and which of all outputs they are."""
    graph, specs = saved.graph_module.graph, saved.graph_module.signature.output_specs
    if len(specs) != len(graph.outputs):
        raise CheckpointError(f"{len(graph.outputs)} outputs have {len(specs)} specifications")
    kept, places = [], []
    for index, (spec, output) in enumerate(zip(specs, graph.outputs, strict=True)):
        if str(spec.type) != "user_output":
            raise CheckpointError(
                f"the program writes {one_line(repr(spec.value), 80)} while it runs, as norms do in training: "
                "call model.eval() before torch.export.export"
            )
        kind = str(output.type)
        if kind in ("as_none", "as_int", "as_float", "as_bool", "as_string"):
            continue
        if kind != "as_tensor" or str(spec.user_output.arg.type) != kind or spec.user_output.arg != output:
            raise CheckpointError(f"an output is {one_line(repr(output), 80)}; only tensors can be")
        name, _ = reader.lookup(names, output.as_tensor.name, True)
        made = schema.Argument.create(as_tensor=schema.TensorArgument(name))
        reader.graph.outputs.append(made)
        kept.append(schema.OutputSpec.create(user_output=schema.UserOutputSpec(made)))
        places.append(index)
    if not kept:
        raise CheckpointError("the program returns no tensor")
    return kept, places


def _result_paths(calls: list[schema.ModuleCallEntry], count: int) -> list[tuple[Any, ...]]:
    """Keys and indices that lead to each result, from the text that says how the module's results were structured.

    The classes in it are names and stay so. Indices alone if the text is not of the form that torch writes.
    """
    paths: list[tuple[Any, ...]] = []

    def walk(spec: Any, path: tuple[Any, ...]) -> None:
        if spec["type"] is None:
            paths.append(path)
            return
        keys: Any = parse_json(spec["context"].encode(), "keys") if isinstance(spec["context"], str) else None
        parts = spec["children_spec"]
        named = isinstance(keys, list) and len(keys) == len(parts) and all(isinstance(key, (str, int)) for key in keys)
        for key, part in zip(keys if named else range(len(parts)), parts, strict=True):
            walk(part, (*path, key))

    try:
        (root,) = (call.signature for call in calls if call.fqn == "" and call.signature is not None)
        walk(parse_json(root.out_spec.encode(), "structure")[1], ())
    except (CheckpointError, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        paths = []
    return paths if len(paths) == count else [(index,) if count > 1 else () for index in range(count)]


def _ranges(saved: schema.ExportedProgram, symbols: Symbols) -> dict[str, schema.RangeConstraint]:
    """The ranges of the sizes that occur, each with the example's size in it."""
    ranges = {}
    for name, bounds in saved.range_constraints.items():
        low, high = bounds.min_val, bounds.max_val
        size = symbols.sizes.get(name)
        if size is None:
            continue
        if not (low is None or 0 <= low <= size) or not (high is None or size <= high):
            raise CheckpointError(f"size {name} of the example is {size}, outside of {low} to {high}")
        if symbols.occurs(name):
            ranges[name] = bounds
    return ranges


def _root(inputs: list[str], outputs: int) -> schema.ModuleCallEntry:
    """The calling convention: tensors one beside the other, a tuple of tensors back."""
    in_spec = treespec_dumps(tree_structure(((0,) * len(inputs), {})))
    out_spec = treespec_dumps(tree_structure((0,) * outputs))
    return schema.ModuleCallEntry("", schema.ModuleCallSignature([], [], in_spec, out_spec, inputs))


def _built(
    checked: schema.ExportedProgram,
    weights: dict[str, torch.Tensor],
    constants: dict[str, torch.Tensor],
    source: str,
) -> ExportedProgram:
    """torch's own builder, on nothing but what has been checked: tensors, not pickles; expressions, not text."""
    try:
        program = ExportedProgramDeserializer().deserialize(checked, weights, constants, None)
        names = [node.name for node in program.graph.nodes]
        if len(set(names)) != len(names):
            raise ValueError("two operations have one name")
    except Exception as error:  # torch raises its own SerializeError, SpecViolationError, AssertionError and more
        reason = one_line(str(error).strip().rpartition("\n")[2] or error, 200)
        raise CheckpointError(f"{source}: its graph cannot be built ({reason})") from error
    return program


def read_samples(archive: Archive) -> Any:
    """The example inputs of an archive as ``torch.save`` wrote them, (positional, by name), or None if it has none.

    Raises CheckpointError if they are anything but tensors, numbers and text in lists, tuples and dictionaries.
    """
    name = f"{SAMPLES}{archive.model}.pt"
    if not archive.records.sizes.get(name):
        return None
    data = archive.read(name, archive.records.sizes[name])
    source = f"{archive.source}: {name}"
    if not data.startswith(b"PK\x03\x04"):
        raise CheckpointError(f"{source} is not a zip archive as torch.save writes it")
    Records(io.BytesIO(data), source)  # nothing compressed, nothing twice, nothing overlapping
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises at least five types for files that are not whole, or not data
        raise CheckpointError(
            f"{source} holds other things than tensors ({one_line(error, 80)}): reading them can run code; {_TRUST}",
            advice=["--trust"],
        ) from error
