"""What flows through a graph: the type and the sizes of every value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, ValueInfoProto, helper

from normfuse.onnx.graph import GraphError
from normfuse.onnx.protos import for_runtime

from .onnx_file import OnnxFile, torch_dtype
from .trial import Trial, plain_session, run_session

_SMALL = 1 << 22  # entries of a constant that is computed for what can be seen then
_LARGEST_VALUE = 1 << 28  # entries, where the file fixes the sizes
_KINDS = {
    "float": 1, "uint8": 2, "int8": 3, "uint16": 4, "int16": 5, "int32": 6, "int64": 7, "string": 8, "bool": 9,
    "float16": 10, "double": 11, "uint32": 12, "uint64": 13, "bfloat16": 16,
}  # fmt: skip


@dataclass(frozen=True)
class Observed:
    """A value inside the graph: its type, and its sizes in each trial; None where it is no tensor."""

    kind: int
    shapes: tuple[tuple[int, ...], ...]


def value_types(file: OnnxFile) -> dict[str, int]:
    """The types of the tensors that the main graph computes, as ONNX Runtime infers them.

    Raises:
        GraphError: ONNX Runtime cannot load the file, or one of them is too large to be computed here.
    """
    names = [name for node in file.nodes for name in node.output if name]
    model = onnx.ModelProto()
    model.CopyFrom(file.proto)
    outputs = {value.name for value in model.graph.output}
    model.graph.output.extend(ValueInfoProto(name=name) for name in names if name not in outputs)
    found = {}
    for value in plain_session(*for_runtime(model, file.path)).outputs:
        kind = _KINDS.get(value.type.removeprefix("tensor(").removesuffix(")"))
        if kind is not None and value.type.startswith("tensor("):
            found[value.name] = kind
            size = math.prod(d if isinstance(d, int) else 1 for d in value.shape or ())
            if size > _LARGEST_VALUE:
                raise GraphError(f"{value.name!r} has {size} entries, more than can be computed here")
    return {name: found[name] for name in names if name in found}


def observe(file: OnnxFile, types: Mapping[str, int], trials: Sequence[Trial]) -> dict[str, Observed]:
    """Types and sizes of everything that the main graph computes.

    Every value is asked for its shape in a copy of the graph that is run with the trials' inputs.
    """
    if ("", "Shape") in file.functions or not types:
        return {}
    model = onnx.ModelProto()
    model.CopyFrom(file.proto)
    taken = {name for node in file.nodes for name in (*node.input, *node.output)}
    del model.graph.output[:]
    for number, name in enumerate(types):
        shape = f"shape_{number}"
        while shape in taken:
            shape += "_"
        model.graph.node.append(helper.make_node("Shape", [name], [shape]))
        model.graph.output.append(helper.make_tensor_value_info(shape, TensorProto.INT64, None))
    session = plain_session(*for_runtime(model, file.path))
    seen = [run_session(session, trial) for trial in trials]
    return {
        name: Observed(kind, tuple(tuple(run[number].tolist()) for run in seen))
        for number, (name, kind) in enumerate(types.items())
    }


def evaluate_constants(file: OnnxFile, observed: Mapping[str, Observed], trial: Trial) -> None:
    """Let a file know the small constants that it computes, such as a bias that is expanded to a weight's size."""
    small = [
        name
        for name in file.computed()
        if name in observed and torch_dtype(observed[name].kind) and math.prod(observed[name].shapes[0]) <= _SMALL
    ]
    if not small:
        return
    model = onnx.ModelProto()
    model.CopyFrom(file.proto)
    del model.graph.output[:]
    model.graph.output.extend(ValueInfoProto(name=name) for name in small)
    session = plain_session(*for_runtime(model, file.path))
    values = zip(small, run_session(session, trial), strict=True)
    file.learn({name: value for name, value in values if isinstance(value, np.ndarray)})


def observe_inputs(file: OnnxFile, trials: Sequence[Trial]) -> dict[str, Observed]:
    """Types and sizes of the inputs."""
    return {
        value.name: Observed(
            value.type.tensor_type.elem_type, tuple(tuple(np.shape(trial.feeds[value.name])) for trial in trials)
        )
        for value in file.inputs
        if value.type.HasField("tensor_type")
    }
