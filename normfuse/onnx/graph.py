"""What is left in an ONNX graph: nodes, norms, per-channel arithmetic, bytes."""

from __future__ import annotations

import math
import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from normfuse.checkpoint.kinds import what_instead_of_onnx
from normfuse.errors import NormfuseError

NORMS = frozenset(
    "BatchNormalization GroupNormalization InstanceNormalization LayerNormalization "
    "MeanVarianceNormalization "
    "RMSNormalization SimplifiedLayerNormalization SkipLayerNormalization "
    "SkipSimplifiedLayerNormalization".split()
)
_ARITHMETIC = frozenset(("Mul", "Add", "Sub", "Div"))
_WEIGHTED = frozenset(("MatMul", "Gemm", "Conv", "ConvTranspose"))
_QUANTISING = frozenset(("QuantizeLinear", "DynamicQuantizeLinear"))  # in front of every product of integers
_CARRIERS = frozenset(("Reshape", "Transpose", "Cast", "Squeeze", "Unsqueeze", "Identity"))


class GraphError(NormfuseError):
    """A file is not an ONNX file that can be read; the message is one line."""


@dataclass(frozen=True)
class GraphSummary:
    """An ONNX graph in numbers.

    Attributes:
        nodes: how many operations of each type.
        norms: names of normalisation nodes, and of the ``Sqrt`` of those that are spelled out.
        affines: names of per-channel ``Mul``, ``Add``, ``Sub``, ``Div`` with a constant; the bias behind a
            product with a weight is part of that product and does not count.
        bytes: size of the file and of the weights beside it.
        opset: version of the standard operator set.
        dtype: ``int8`` if activations are quantised, ``float16`` if any weight is stored so, else ``float32``.
    """

    nodes: dict[str, int]
    norms: list[str]
    affines: list[str]
    bytes: int
    opset: int
    dtype: str

    @property
    def node_count(self) -> int:
        return sum(self.nodes.values())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data.

        Returns:
            A dictionary of everything above.
        """
        return asdict(self) | {"node_count": self.node_count}


def summarize(path: str | os.PathLike[str]) -> GraphSummary:
    """Count the operations, norms and bytes of an ONNX file, without reading its external data.

    Args:
        path: of the ONNX file.

    Returns:
        What the file holds.

    Raises:
        GraphError: it is not an ONNX file, or cannot be read.

    Example:
        >>> import normfuse
        >>> from normfuse.nn import UnifiedNorm
        >>> model = nn.Sequential(nn.Linear(4, 8), UnifiedNorm(8), nn.ReLU(), nn.Linear(8, 2))
        >>> _ = normfuse.onnx.export(model, "model.onnx", example_inputs=torch.randn(3, 4))
        >>> normfuse.onnx.summarize("model.onnx").norms
        []
    """
    path = Path(path)
    try:
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise GraphError(f"cannot read {path}: {error.strerror or error}") from error
    except DecodeError as error:
        raise GraphError(f"{path} is {what_instead_of_onnx(path) or 'not an ONNX file'}") from error
    if not model.graph.node:
        raise GraphError(f"{path} is {what_instead_of_onnx(path) or 'not an ONNX file, or it is empty'}")
    graph = model.graph
    constants = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    constants[node.output[0]] = list(attribute.t.dims)
    producers = {output: node for node in graph.node for output in node.output}
    norms = [node.name for node in graph.node if node.op_type in NORMS or _is_spelled_out_norm(node, producers)]
    affines = [node.name for node in graph.node if _is_affine(node, constants, producers)]
    beside = {entry.value for tensor in graph.initializer for entry in tensor.external_data if entry.key == "location"}
    files = [path, *(path.parent / name for name in beside)]
    return GraphSummary(
        nodes=dict(Counter(node.op_type for node in graph.node).most_common()),
        norms=norms,
        affines=affines,
        bytes=sum(file.stat().st_size for file in files if file.exists()),
        opset=max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0),
        dtype=_dtype(graph),
    )


def _dtype(graph: onnx.GraphProto) -> str:
    if any(node.op_type in _QUANTISING for node in graph.node):
        return "int8"
    return "float16" if any(t.data_type == onnx.TensorProto.FLOAT16 for t in graph.initializer) else "float32"


def _is_affine(node: onnx.NodeProto, constants: dict[str, list[int]], producers: dict[str, onnx.NodeProto]) -> bool:
    if node.op_type not in _ARITHMETIC or len(node.input) != 2:
        return False
    fixed = [name in constants for name in node.input]
    if fixed[0] == fixed[1]:
        return False
    shape = constants[node.input[0 if fixed[0] else 1]]
    if math.prod(shape) < 2 or sum(size > 1 for size in shape) != 1:
        return False
    source = producers.get(node.input[1 if fixed[0] else 0])
    while source is not None and source.op_type in _CARRIERS:
        source = producers.get(source.input[0])
    weighted = source is not None and source.op_type in _WEIGHTED and any(i in constants for i in source.input)
    return not (node.op_type == "Add" and weighted)


def _is_spelled_out_norm(node: onnx.NodeProto, producers: dict[str, onnx.NodeProto]) -> bool:
    """A square root of a mean, with or without an epsilon between."""
    if node.op_type != "Sqrt":
        return False
    source = producers.get(node.input[0])
    if source is not None and source.op_type == "Add":
        sources = [producers.get(name) for name in source.input]
        source = next((s for s in sources if s is not None and s.op_type == "ReduceMean"), None)
    return source is not None and source.op_type == "ReduceMean"
