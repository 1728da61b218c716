"""ONNX's messages: what is in them, and small changes to them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    NodeProto,
    StringStringEntryProto,
    TensorProto,
    helper,
    numpy_helper,
)

from normfuse.onnx.graph import GraphError

_DEEPEST = 64  # graphs within graphs

# -- what is in them ---------------------------------------------------------------------------------------------


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    """An attribute of an operation."""
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def graphs_of(node: NodeProto) -> list[GraphProto]:
    """The graphs that an operation holds: the branches of If, the bodies of Loop and Scan."""
    return [
        graph
        for attribute in node.attribute
        for graph in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs)
    ]


def all_nodes(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """Operations, and those of the graphs that they hold."""
    for node in nodes:
        yield node
        for graph in graphs_of(node):
            yield from all_nodes(graph.node)


def tensors_of(model: ModelProto) -> Iterator[TensorProto]:
    """All tensors in a model, those in graphs of operations and in functions among them."""
    yield from _in_graph(model.graph)
    for function in model.functions:
        for node in function.node:
            yield from _in_node(node)


def _in_graph(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        yield from _in_node(node)


def _in_node(node: NodeProto) -> Iterator[TensorProto]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.TENSOR:
            yield attribute.t
        yield from attribute.tensors
        for sparse in [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []:
            yield from (sparse.values, sparse.indices)
    for graph in graphs_of(node):
        yield from _in_graph(graph)


def outer_names(node: NodeProto) -> list[str]:
    """What the graphs of an operation read from around them."""
    return list(dict.fromkeys(name for graph in graphs_of(node) for name in _free_names(graph, 0)))


def _free_names(graph: GraphProto, depth: int) -> Iterator[str]:
    if depth > _DEEPEST:
        raise GraphError(f"graphs are nested more than {_DEEPEST} deep")
    own = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    own |= {tensor.values.name for tensor in graph.sparse_initializer}
    for node in graph.node:
        inner = (name for within in graphs_of(node) for name in _free_names(within, depth + 1))
        yield from (name for name in (*node.input, *inner) if name and name not in own)
        own.update(node.output)
    yield from (value.name for value in graph.output if value.name not in own)


def reads(node: NodeProto) -> list[str]:
    """Everything an operation reads, in order; absent operands are empty."""
    return [*node.input, *outer_names(node)]


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


# -- changes -----------------------------------------------------------------------------------------------------


def remove_attribute(node: NodeProto, name: str) -> None:
    """Take an attribute off a node, if it has it."""
    replace_entries(node.attribute, [attribute for attribute in node.attribute if attribute.name != name])


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


def for_runtime(model: ModelProto, path: Path) -> tuple[bytes, str]:
    """A model in bytes, and the folder in which ONNX Runtime finds its weights.

    Of a file it follows links, such as those to `blobs` in the cache of the Hugging Face hub; of a model in memory it
    does not leave the folder. So where weights lie elsewhere, they are named by where they are.

    Args:
        model: the model of a file, or a changed one.
        path: the file beside which its weights lie.
    """
    folder = os.path.realpath(path.parent)
    external = [t for t in tensors_of(model) if t.data_location == TensorProto.EXTERNAL]
    real = {os.path.realpath(path.parent / _location(tensor).value) for tensor in external}
    if all(Path(file).is_relative_to(folder) for file in real):
        return model.SerializeToString(), folder
    folder, moved = os.path.commonpath([os.path.dirname(file) for file in real]), ModelProto()
    moved.CopyFrom(model)
    for tensor in tensors_of(moved):
        if tensor.data_location == TensorProto.EXTERNAL:
            place = _location(tensor)
            place.value = os.path.relpath(os.path.realpath(path.parent / place.value), folder)
    return moved.SerializeToString(), folder


def _location(tensor: TensorProto) -> StringStringEntryProto:
    return next(entry for entry in tensor.external_data if entry.key == "location")


def to_proto(tensor: torch.Tensor, name: str) -> TensorProto:
    """A tensor as ONNX stores it."""
    tensor = tensor.contiguous()
    if tensor.dtype == torch.bfloat16:
        raw = tensor.view(torch.int16).numpy().tobytes()
        return TensorProto(name=name, data_type=TensorProto.BFLOAT16, dims=tensor.shape, raw_data=raw)
    return numpy_helper.from_array(tensor.numpy(), name)
