"""float16 files that ONNX Runtime refuses, or on which it crashes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from normfuse.onnx.protos import all_nodes, attribute

_TYPES = ("Cast", "Identity")


def float32_only(model: ModelProto, known: Mapping[str, Collection[int]]) -> set[str]:
    """Operations of a model that have no float16, around integers above all: the converter takes them for the others.

    Args:
        model: the model.
        known: operands that the converter leaves alone, by operation.
    """
    versions = {o.domain.removeprefix("ai.onnx"): o.version for o in model.opset_import}
    found = set()
    for kind, domain in {(node.op_type, node.domain) for node in all_nodes(model.graph.node)}:
        if domain not in ("", "ai.onnx"):
            narrow = "quantize" in kind.lower() or "Integer" in kind or (kind[:1] == "Q" and kind[1:2].isupper())
        else:
            narrow = onnx.defs.has(kind) and _is_narrow(kind, versions.get("", 1), known.get(kind, ()))
        found |= {kind} if narrow else set()
    return found


def _is_narrow(kind: str, version: int, known: Collection[int]) -> bool:
    """Whether an operand, or the first result, may be float32 and not float16."""
    schema = onnx.defs.get_schema(kind, version)
    parts = [part for place, part in enumerate(schema.inputs) if place not in known] + list(schema.outputs[:1])
    return any("tensor(float)" in part.types and "tensor(float16)" not in part.types for part in parts)


def lift_weights(model: ModelProto) -> int:
    """Give weights leading axes of size one where ONNX Runtime 1.32 would crash; how many products that changes.

    ONNX Runtime takes a transposition into the MatMul behind it. One that moves the first axis its fused product can
    only take if both operands have as many axes; it does not look, and crashes where conversions from and to float16
    stand around. Numbers stay as they are, wherever they are stored.
    """
    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output}
    listed = {value.name for value in graph.input}
    weights = {tensor.name: tensor for tensor in graph.initializer if tensor.name not in listed}
    reads = Counter(name for node in all_nodes(graph.node) for name in node.input)
    reads.update(value.name for value in graph.output)
    lifted: dict[tuple[str, int], str] = {}
    count = 0
    for node in graph.node:
        if node.op_type != "MatMul" or node.domain:
            continue
        for place, name in enumerate(node.input):
            rank = _moved_rank(makers.get(node.input[1 - place]), makers)
            weight = weights.get(name)
            if weight is None or not 2 <= len(weight.dims) < rank:
                continue
            if (name, rank) not in lifted:
                lifted[name, rank] = _lift(graph, weight, rank, alone=reads[name] == 1)
            node.input[place] = lifted[name, rank]
            count += 1
    return count


def _moved_rank(node: NodeProto | None, makers: dict[str, NodeProto]) -> int:
    """How many axes a value has whose first one a Transpose in front has moved; 0 if none has."""
    while node is not None and node.op_type in ("Transpose", *_TYPES):
        perm = attribute(node, "perm", [])
        if node.op_type == "Transpose" and len(perm) > 2 and perm[0] != 0:
            return len(perm)
        node = makers.get(node.input[0])
    return 0


def _lift(graph: GraphProto, weight: TensorProto, rank: int, *, alone: bool) -> str:
    """The name of a weight with so many axes: itself if nothing else reads it, otherwise a second one."""
    dims = [1] * (rank - len(weight.dims)) + list(weight.dims)
    if not alone:
        taken = {tensor.name for tensor in graph.initializer} | {n for node in graph.node for n in node.output}
        copy = graph.initializer.add()
        copy.CopyFrom(weight)
        while copy.name in taken:
            copy.name += f"_{rank}d"
        weight = copy
    del weight.dims[:]
    weight.dims.extend(dims)
    kept = [value for value in graph.value_info if value.name != weight.name]
    if len(kept) < len(graph.value_info):
        del graph.value_info[:]
        graph.value_info.extend(kept)
    return weight.name
