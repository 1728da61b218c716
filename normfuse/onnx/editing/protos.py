"""Small changes to ONNX's messages."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from onnx import GraphProto, ModelProto, NodeProto, StringStringEntryProto, TensorProto, numpy_helper

from .onnx_file import graphs_of, reads, tensors_of


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
