"""An ONNX file as it lies on the disk: its graph, checked, and its constants, read when they are asked for."""

from __future__ import annotations

import heapq
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from google.protobuf.message import DecodeError
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.inliner import inline_local_functions

from normfuse.checkpoint.kinds import what_instead_of_onnx
from normfuse.errors import one_line
from normfuse.onnx.graph import GraphError
from normfuse.onnx.protos import all_nodes, graphs_of, reads, tensors_of

from .stored import held, make_dense

STANDARD = ("", "ai.onnx")
# A file is parsed in memory as one message, which ends at 2 GiB; larger models keep their weights beside it.
_LARGEST = 2**31 - 1
_MOST_OPERATIONS = 1_000_000  # with functions written out, as ONNX Runtime does
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
_PACKED: dict[int, float] = {TensorProto.UINT4: 0.5, TensorProto.INT4: 0.5, TensorProto.FLOAT4E2M1: 0.5}


class OnnxFile:
    """A model and where its weights lie. Nothing is run, and nothing outside of its folder is read.

    Args:
        path: the file.
        fold_defaults: see :func:`fold_file`.

    Attributes:
        proto: the whole model, no initialiser sparse; weights beside the file are not in it.
        written_out: names of functions whose operations stand in the graph in their place, see :func:`_write_out`.
        nodes: the operations of the main graph in an order in which each comes after what it reads.
        positions: of those operations in the file.
        inputs: what a caller has to give.
        listed: initialisers that are listed among the inputs from IR 4 on: values that a caller may set.
        settable: those of them that are not to be taken as constants.
        opsets: the version of each domain.
        functions: domain and name of every operation that the file defines itself.
        rank_guessed: whether it takes inputs of which nothing shows how many axes they have, so that other numbers than
            those it is run with are possible.

    Raises:
        GraphError: it is not an ONNX file, or one that contradicts itself; one line.
    """

    def __init__(self, path: str | os.PathLike[str], fold_defaults: bool | None = False) -> None:
        self.path = Path(path)
        self.proto = _parse(self.path)
        self.opsets = {_plain(o.domain): o.version for o in self.proto.opset_import}
        self._check()
        self.proto, self.written_out = _write_out(self.proto)
        self.rank_guessed = False
        self.functions = {(_plain(f.domain), f.name) for f in self.proto.functions}
        graph = self.proto.graph
        make_dense(graph)
        self._initializers = {tensor.name: tensor for tensor in graph.initializer}
        fixed = {*self._initializers, *(tensor.values.name for tensor in graph.sparse_initializer)}
        self.inputs = [value for value in graph.input if value.name not in fixed]
        overridable = self.proto.ir_version >= 4
        self.listed = [value.name for value in graph.input if value.name in fixed and overridable]
        if fold_defaults is None:  # who lists everything, as exporters long did, offers nothing
            weights = [tensor.name for tensor in graph.initializer if tensor.data_type in _FLOATS]
            fold_defaults = {*weights} <= {*self.listed}
        self.settable = [] if fold_defaults else self.listed
        order = _ordered(graph, {value.name for value in graph.input} | fixed, self.path)
        self.nodes = [graph.node[position] for position in order]
        self.positions = order

    @property
    def version(self) -> int:
        """The version of ONNX's own operators."""
        return self.opsets.get("", 0)

    @cached_property
    def constants(self) -> dict[str, TensorProto]:
        """Initialisers that no caller may set, what Constant operations hold, and both under the names of Identity."""
        found = {name: tensor for name, tensor in self._initializers.items() if name not in self.settable}
        for node in self.nodes:
            if not self.is_own(node) or not node.output or node.op_type not in ("Constant", "Identity"):
                continue
            tensor = held(node) if node.op_type == "Constant" else found.get(node.input[0])
            if tensor is not None:
                found[node.output[0]] = tensor
        return found

    @cached_property
    def dead(self) -> set[int]:
        """Positions of operations whose results lead to no output, as in files that were cut off."""
        needed, found = {value.name for value in self.proto.graph.output}, set()
        for position, node in zip(reversed(self.positions), reversed(self.nodes), strict=True):
            if needed.isdisjoint(node.output):
                found.add(position)
            else:
                needed.update(reads(node))
        return found

    def computed(self) -> list[str]:
        """Values that operations compute from constants alone, in an order in which each comes after its operands.

        What restores quantised weights is none: they are to stay as they are.
        """
        known, found = set(self.constants), []
        for node in self.nodes:
            kind, operands = node.op_type, [name for name in node.input if name]
            if kind == "CastLike":
                operands = operands[:1]  # of the other one only the type is read
            fixed = bool(operands) and all(name in known for name in operands) and not graphs_of(node)
            if (
                not (fixed and self.is_own(node))
                or "quantize" in kind.lower()
                or "Random" in kind
                or kind == "Bernoulli"
            ):
                continue
            results = [name for name in node.output if name and name not in known]
            known.update(results)
            found += results
        return found

    def learn(self, values: Mapping[str, np.ndarray]) -> None:
        """Take values that were computed for constants."""
        self.constants.update((name, numpy_helper.from_array(value, name)) for name, value in values.items())

    def array(self, name: str) -> np.ndarray:
        """The value of a constant; weights beside the file are mapped, not copied."""
        tensor = self.constants[name]
        if tensor.data_location != TensorProto.EXTERNAL:
            return numpy_helper.to_array(tensor)
        file, offset, length = self.place(tensor)
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        if not length:
            return np.zeros(tuple(tensor.dims), dtype)
        if tensor.data_type in _PACKED:
            raise GraphError(f"{self.path}: the packed weight {name!r} lies beside the file")
        return np.memmap(file, dtype, "r", offset, tuple(tensor.dims))

    def place(self, tensor: TensorProto) -> tuple[Path, int, int]:
        """The file in which a tensor's data lie, where they begin, and their length in bytes."""
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        inside, said = Path(os.path.normpath(location)), one_line(repr(location), 80)
        if not location or inside.is_absolute() or ".." in inside.parts or "\0" in location:
            raise GraphError(f"{self.path}: the weight {tensor.name!r} is stored in {said}, which is not in its folder")
        file = self.path.parent / inside
        roots = {Path(os.path.realpath(folder)) for folder in (self.path.parent, self.path.resolve().parent)}
        if not any(Path(os.path.realpath(file)).is_relative_to(root) for root in roots):
            raise GraphError(
                f"{self.path}: the weight {tensor.name!r} is stored in {said}, which is outside of its folder"
            )
        if not os.path.isfile(file):  # nor a name too long to be one
            raise GraphError(f"the weights of {self.path} cannot be read: there is no file {one_line(str(file), 120)}")
        needed = _bytes(tensor, self.path)
        try:
            offset = int(entries.get("offset") or 0)
            length = int(entries.get("length") or needed)
        except ValueError:
            raise GraphError(f"{self.path}: the offset of the weight {tensor.name!r} is not a number") from None
        if offset < 0 or length != needed or offset + length > file.stat().st_size:
            raise GraphError(
                f"the weights of {self.path} cannot be read: {file.name} does not hold the {needed} bytes of "
                f"{tensor.name!r} at {offset}"
            )
        return file, offset, length

    def beside(self) -> list[Path]:
        """The files beside it in which weights lie."""
        external = (t for t in tensors_of(self.proto) if t.data_location == TensorProto.EXTERNAL)
        return list(dict.fromkeys(self.place(tensor)[0] for tensor in external))

    def is_own(self, node: NodeProto) -> bool:
        """Whether an operation is ONNX's, and not a function of the file that bears its name."""
        return self.domain(node) == ""

    def domain(self, node: NodeProto) -> str | None:
        """The domain of an operation, empty for ONNX's own; None for a function of the file."""
        domain = _plain(node.domain)
        return None if (domain, node.op_type) in self.functions else domain

    def _check(self) -> None:
        graph = self.proto.graph
        names = [tensor.name for tensor in graph.initializer] + [t.values.name for t in graph.sparse_initializer]
        repeated = next((name for name, count in Counter(names).items() if count > 1), None)
        if repeated is not None:
            raise GraphError(f"{self.path}: two initialisers are called {repeated!r}")
        listed = [value.name for value in graph.input]
        if len(set(listed)) < len(listed) or "" in listed or any(not value.name for value in graph.output):
            raise GraphError(f"{self.path}: inputs, or outputs, without a name of their own: {', '.join(listed)}")
        if not graph.output:
            raise GraphError(f"{self.path}: the graph has no output")
        _check_functions(self.proto, self.path)
        for tensor in tensors_of(self.proto):
            if tensor.data_location == TensorProto.EXTERNAL:
                self.place(tensor)
            else:
                _check_length(tensor, self.path)


def _parse(path: Path) -> ModelProto:
    try:
        if path.stat().st_size > _LARGEST:
            raise GraphError(f"{path} is larger than 2 GiB: no ONNX file is")
        data = path.read_bytes()
    except OSError as error:
        raise GraphError(f"cannot read {path}: {error.strerror or error}") from error
    model = ModelProto()
    try:
        model.ParseFromString(data)
    except (DecodeError, ValueError, RecursionError) as error:
        what = what_instead_of_onnx(path) or f"not an ONNX file: {one_line(error)}"
        raise GraphError(f"{path} is {what}") from error
    if not model.graph.node or not model.opset_import or model.ir_version < 1:
        what = what_instead_of_onnx(path)
        what = what or "not an ONNX file with a graph: no operations, operator set or version in it"
        raise GraphError(f"{path} is {what}")
    return model


def _plain(domain: str) -> str:
    """The name of a domain: ONNX's own has two."""
    return "" if domain in STANDARD else domain


def _write_out(model: ModelProto) -> tuple[ModelProto, list[str]]:
    """Functions replaced by their operations where a BatchNormalization is inside one, and their names.

    So they are when ONNX Runtime loads the file. A function of another operator set than the file's stays.
    """
    if not any(node.op_type == "BatchNormalization" for f in model.functions for node in all_nodes(f.node)):
        return model, []
    try:
        plain = inline_local_functions(model)
    except Exception:  # ONNX Runtime says what is wrong with them
        return model, []
    left = {(f.domain, f.name) for f in plain.functions}
    gone = [f.name for f in model.functions if (f.domain, f.name) not in left]
    return (plain, gone) if gone else (model, [])


def _ordered(graph: GraphProto, given: set[str], path: Path) -> list[int]:
    """Positions of the operations in an order in which each comes after what it reads."""
    makers: dict[str, int] = {}
    for position, node in enumerate(graph.node):
        if not node.op_type:
            raise GraphError(f"{path}: operation {position} has no type")
        for name in filter(None, node.output):
            if name in makers or name in given:
                raise GraphError(f"{path}: {name!r} is written more than once")
            makers[name] = position
    for value in graph.output:
        if value.name not in makers and value.name not in given:
            raise GraphError(f"{path}: nothing writes the output {value.name!r}")
    waiting: list[Any] = []
    readers: list[list[Any]] = [[] for _ in graph.node]
    for position, node in enumerate(graph.node):
        names = {name for name in reads(node) if name} - given
        unknown = sorted(names - makers.keys())
        if unknown:
            raise GraphError(f"{path}: {label(node)} reads {unknown[0]!r}, which nothing writes")
        sources = {makers[name] for name in names}
        waiting.append(len(sources))
        for source in sources:
            readers[source].append(position)
    # In the order of the file, as far as that is one: the smallest position that waits for nothing comes next.
    ready = [position for position, count in enumerate(waiting) if not count]
    order = []
    while ready:
        position = heapq.heappop(ready)
        order.append(position)
        for reader in readers[position]:
            waiting[reader] -= 1
            if not waiting[reader]:
                heapq.heappush(ready, reader)
    if len(order) < len(waiting):
        stuck = next(position for position, count in enumerate(waiting) if count)
        raise GraphError(f"{path}: {label(graph.node[stuck])} reads what is made from its own result")
    return order


def label(node: NodeProto) -> str:
    """An operation in words."""
    return f"{node.op_type} {node.name or next(iter(node.output), '')!r}"


def _entries(tensor: TensorProto, path: Path) -> int:
    if any(size < 0 for size in tensor.dims):
        raise GraphError(f"{path}: the tensor {tensor.name!r} has a negative size: {list(tensor.dims)}")
    return math.prod(tensor.dims)


def _bytes(tensor: TensorProto, path: Path) -> int:
    entries = _entries(tensor, path)
    if tensor.data_type in _PACKED:
        return math.ceil(entries * _PACKED[tensor.data_type])
    try:
        return entries * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (KeyError, TypeError) as error:
        raise GraphError(f"{path}: the tensor {tensor.name!r} is of no known type ({tensor.data_type})") from error


def _check_functions(model: ModelProto, path: Path) -> None:
    """GraphError where functions that call functions stand for more operations than a machine can hold."""
    calls = {(f.domain, f.name): _called(f.node) for f in model.functions}
    sizes: dict[tuple[str, str], int] = {}
    pending, begun = list(calls), set()
    while pending:
        key = pending[-1]
        inner = [k for k in calls[key] if k in calls and k not in sizes]
        if key in sizes or not inner:
            sizes[key] = sum(count * sizes.get(k, 1) for k, count in calls[key].items())
            pending.pop()
        elif key in begun:
            return  # they call each other: ONNX Runtime says which
        else:
            begun.add(key)
            pending += inner
    if sum(sizes.get(key, 1) for key in _called(model.graph.node).elements()) > _MOST_OPERATIONS:
        raise GraphError(f"{path}: its functions stand for more than {_MOST_OPERATIONS} operations")


def _called(nodes: Iterable[NodeProto]) -> Counter[tuple[str, str]]:
    """How often each kind of operation is called."""
    return Counter((node.domain, node.op_type) for node in all_nodes(nodes))


def _check_length(tensor: TensorProto, path: Path) -> None:
    """GraphError where a tensor's data are not as many as its sizes say."""
    entries, needed = _entries(tensor, path), None
    if tensor.data_type == TensorProto.STRING:
        found, needed = len(tensor.string_data), entries
    elif tensor.HasField("raw_data"):
        found, needed = len(tensor.raw_data), _bytes(tensor, path)
    else:
        _bytes(tensor, path)
        found = max(len(getattr(tensor, f)) for f in ("float_data", "int32_data", "int64_data", "double_data",
                                                      "uint64_data"))  # fmt: skip
        if tensor.data_type in _PACKED:
            needed = math.ceil(entries * _PACKED[tensor.data_type])
        elif tensor.data_type in (TensorProto.COMPLEX64, TensorProto.COMPLEX128):
            needed = 2 * entries
        else:
            needed = entries
    if found != needed:
        raise GraphError(f"{path}: the tensor {tensor.name!r} {list(tensor.dims)} has {found} entries or bytes of data")


_TORCH: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32, TensorProto.DOUBLE: torch.float64, TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16, TensorProto.INT64: torch.int64, TensorProto.INT32: torch.int32,
    TensorProto.INT16: torch.int16, TensorProto.INT8: torch.int8, TensorProto.UINT8: torch.uint8,
    TensorProto.BOOL: torch.bool,
}  # fmt: skip


def torch_dtype(kind: int) -> torch.dtype | None:
    """PyTorch's type for one of ONNX; None where it has none that folding could take."""
    return _TORCH.get(kind)
