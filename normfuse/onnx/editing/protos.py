"""Small changes to ONNX's messages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from .onnx_file import graphs_of, reads


def remove_attribute(node: NodeProto, name: str) -> None:
    """Take an attribute off a node, if it has it."""
    replace_entries(node.attribute, [attribute for attribute in node.attribute if attribute.name != name])


def uses_of(graph: GraphProto) -> Counter[str]:
    """How often each value is read, by nodes and as an output of the graph."""
    uses = Counter(name for node in graph.node for name in reads(node) if name)
    uses.update(value.name for value in graph.output)
    return uses


def all_names(model: ModelProto) -> set[str]:
    """Every name in a model's graphs."""

    def inside(graph: GraphProto) -> Iterator[str]:
        yield from (value.name for value in (*graph.input, *graph.output, *graph.value_info))
        yield from (tensor.name for tensor in graph.initializer)
        yield from (tensor.values.name for tensor in graph.sparse_initializer)
        for node in graph.node:
            yield from (node.name, *node.input, *node.output)
            for inner in graphs_of(node):
                yield from inside(inner)

    return set(inside(model.graph))


def rename(graph: GraphProto, names: dict[str, str], *, outputs: bool = False) -> None:
    """Let everything in a graph, and in the graphs of its operations, read and write under other names."""
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name in names:
                node.input[place] = names[name]
        for place, name in enumerate(node.output if outputs else ()):
            if name in names:
                node.output[place] = names[name]
        for inner in graphs_of(node):
            rename(inner, names)
            for value in inner.output:
                value.name = names.get(value.name, value.name)


def sort_by_place(entries: Any, places: dict[str, int]) -> None:
    """In the order of the file; what is new comes last."""
    replace_entries(entries, sorted(entries, key=lambda entry: places.get(entry.name, len(places))))


def replace_entries(entries: Any, by: Sequence[Any]) -> None:
    """Let a repeated field hold these messages, some of which it holds already."""
    copies = []
    for entry in by:
        copied = type(entry)()
        copied.CopyFrom(entry)
        copies.append(copied)
    del entries[:]
    entries.extend(copies)


def to_proto(tensor: torch.Tensor, name: str) -> TensorProto:
    """A tensor as ONNX stores it."""
    tensor = tensor.contiguous()
    if tensor.dtype == torch.bfloat16:
        raw = tensor.view(torch.int16).numpy().tobytes()
        return TensorProto(name=name, data_type=TensorProto.BFLOAT16, dims=tensor.shape, raw_data=raw)
    return numpy_helper.from_array(tensor.numpy(), name)
