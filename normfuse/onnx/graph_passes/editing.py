"""What the passes share: reading constants and sizes, adding nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np
import onnx_ir as ir

Dim = int | str
_MAX_CONSTANT = 64  # entries; larger constants are weights, which nobody needs to read here


def dims(value: ir.Value | None) -> tuple[Dim, ...] | None:
    """A value's sizes, dynamic ones by name; None if its rank or any size is unknown.

    Dimensions of one name are equal wherever they stand, so that equal tuples mean equal shapes.
    """
    if value is None or value.shape is None:
        return None
    known = [size if isinstance(size, int) else size.value for size in value.shape]
    named = tuple(size for size in known if size is not None)
    return named if len(named) == len(known) else None


def sizes(value: ir.Value) -> tuple[Dim, ...]:
    """What :func:`dims` gives of a value whose sizes are known."""
    if (known := dims(value)) is None:
        raise ValueError(f"the sizes of {value.name!r} are not known")
    return known


def dtype_of(value: ir.Value) -> ir.DataType:
    """The type of a value whose type is known."""
    if value.dtype is None:
        raise ValueError(f"the type of {value.name!r} is not known")
    return value.dtype


def operand(node: ir.Node, place: int) -> ir.Value:
    """An operand that a node has."""
    value = node.inputs[place] if place < len(node.inputs) else None
    if value is None:
        raise ValueError(f"{node.op_type} {node.name!r} has no operand {place}")
    return value


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The entries of a small constant: a shape, an axis, an index; None for everything else."""
    tensor = None if value is None or value.is_graph_input() else ir.convenience.get_const_tensor(value)
    return None if tensor is None or tensor.size > _MAX_CONSTANT else tensor.numpy()


def producer(value: ir.Value | None, *kinds: str) -> ir.Node | None:
    """The node of the standard operator set that makes a value, if it is one of these kinds."""
    node = None if value is None else value.producer()
    return node if node is not None and node.domain in ("", "ai.onnx") and node.op_type in kinds else None


def only_user(value: ir.Value, *kinds: str) -> ir.Node | None:
    """The node that reads a value, if it is the only one, one of these kinds, and the value is no output."""
    users = list(value.uses())
    if len(users) != 1 or value.is_graph_output():
        return None
    return users[0].node if users[0].node.domain in ("", "ai.onnx") and users[0].node.op_type in kinds else None


def is_permutation(node: ir.Node | None, *perm: int) -> TypeGuard[ir.Node]:
    """Whether a node is the Transpose with this permutation."""
    return node is not None and node.op_type == "Transpose" and tuple(node.attributes["perm"].as_ints()) == perm


class Editor:
    """Adds nodes and constants to a model's graph.

    Args:
        model: is changed in place.
        label: the pass, part of the names of what it adds.
    """

    def __init__(self, model: ir.Model, label: str) -> None:
        self.graph = model.graph
        self._label = label
        self._names = {value.name for node in self.graph.all_nodes() for value in node.outputs}
        self._names.update(value.name for value in self.graph.inputs)
        self._names.update(self.graph.initializers)

    def name(self, base: str) -> str:
        """A name that the graph does not have yet."""
        candidate, number = f"{base}_{self._label}", 1
        while candidate in self._names:
            number += 1
            candidate = f"{base}_{self._label}_{number}"
        self._names.add(candidate)
        return candidate

    def constant(self, array: np.ndarray, base: str) -> ir.Value:
        """A new initializer."""
        name = self.name(base)
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def node(
        self,
        kind: str,
        inputs: Sequence[ir.Value | None],
        like: ir.Value,
        shapes: Sequence[Sequence[Any] | None],
        attributes: dict[str, Any] | None = None,
        *,
        dtype: ir.DataType | None = None,
    ) -> ir.Node:
        """A node that stands nowhere yet, with an output for each of ``shapes``, named and typed after ``like``."""
        node = ir.node(kind, inputs, attributes or {}, num_outputs=len(shapes), name=self.name(f"{like.name}_node"))
        for output, shape in zip(node.outputs, shapes, strict=True):
            output.name = self.name(str(like.name))
            if (known := dtype or like.dtype) is not None:
                output.dtype = known
            output.shape = None if shape is None else ir.Shape(shape)
        return node

    def put(self, nodes: Sequence[ir.Node], after: ir.Value) -> None:
        """Inserts nodes behind the one that makes a value, first of all if it is an input or a constant."""
        producer = after.producer()
        if producer is None:
            self.graph.insert_before(self.graph[0], nodes)
        else:
            self.graph.insert_after(producer, nodes)

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Lets everything that reads ``old`` read ``new``, which takes over the name of an output of the graph."""
        if old.is_graph_output():
            name, old.name = old.name, self.name(str(old.name))
            new.name = name
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)

    def drop(self, value: ir.Value | None) -> None:
        """Removes what makes a value that nothing reads, and what only that reads, and so on."""
        if value is None or value.uses() or value.is_graph_output():
            return
        node = value.producer()
        if node is None:
            if value.name is not None and value.is_initializer() and not value.is_graph_input():
                del self.graph.initializers[value.name]
            return
        if node.graph is None or any(output.uses() or output.is_graph_output() for output in node.outputs):
            return
        inputs = list(node.inputs)
        self.graph.remove(node, safe=True)
        for operand in inputs:
            self.drop(operand)
