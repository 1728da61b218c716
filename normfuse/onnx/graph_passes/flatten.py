"""A residual stream that stays a matrix."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from .editing import Dim, Editor, constant, dims, only_user, operand, producer, sizes

_ELEMENTWISE = frozenset(
    "Abs Add Celu Clip Div Elu Erf Exp Gelu HardSigmoid HardSwish LeakyRelu Max Min Mish Mul Neg Relu Selu Sigmoid "
    "Softplus Softsign Sqrt Sub Swish Tanh".split()
)
_BY_ROW = frozenset(("LayerNormalization", "RMSNormalization", "Softmax", "LogSoftmax"))  # over the last axis
_FLOATING = (ir.DataType.FLOAT, ir.DataType.DOUBLE)


def gemm2d(model: ir.Model) -> int:
    """Keep streams [B, S, C] as matrices [B·S, C] and their products as Gemm; says how many products.

    *Algebra.* A product with a weight, a function of single entries and a norm over channels treat every row alike, so
    they commute with ``Reshape(x, [-1, C])``. All such operations that are connected form a region; reshapes stand only
    where values enter and leave it (attention, lookups, outputs). ``MatMul`` and the ``Add`` of its bias become one
    ``Gemm``, which ONNX knows for matrices only.

    *Needs* known equal leading dimensions throughout a region (by size or name) and known channels. A region
    is left as it is unless it saves at least as many additions as half the reshapes it costs: an addition passes over
    the whole tensor, a reshape moves nothing.

    The shape to which values return is a constant if at most one leading dimension is dynamic; otherwise it is read
    once, from the first value that enters a region.
    """
    flattening = _Flattening(Editor(model, "gemm2d"))
    return sum(flattening.rewrite(nodes) for nodes in list(_regions(model.graph)))


def _regions(graph: ir.Graph) -> Iterator[list[ir.Node]]:
    """Connected sets of nodes that work row by row, each in the graph's order."""
    parent: dict[ir.Node, ir.Node] = {node: node for node in graph if _rows(node)}

    def root(node: ir.Node) -> ir.Node:
        while parent[node] is not node:
            parent[node] = node = parent[parent[node]]
        return node

    readers: dict[ir.Value, ir.Node] = {}
    for node in parent:
        for value in _rows(node):
            source = value.producer()
            neighbour = source if source in parent else readers.setdefault(value, node)
            parent[root(node)] = root(neighbour)
    regions: dict[ir.Node, list[ir.Node]] = {}
    for node in parent:
        regions.setdefault(root(node), []).append(node)
    yield from regions.values()


def _rows(node: ir.Node) -> list[ir.Value]:
    """The operands that become matrices if this node does; none if it cannot."""
    shape = dims(node.outputs[0]) if len(node.outputs) == 1 else None
    x = node.inputs[0] if node.inputs else None
    if node.domain or x is None or shape is None or len(shape) < 3 or not isinstance(shape[-1], int):
        return []
    first = dims(x)
    if node.op_type == "MatMul":
        weight = dims(node.inputs[1])
        if first is None or weight is None or len(weight) != 2 or first[:-1] != shape[:-1]:
            return []
        known = isinstance(first[-1], int) and isinstance(weight[1], int)
        return [x] if known and node.outputs[0].dtype in _FLOATING else []
    if node.op_type in _BY_ROW:
        over_last = node.attributes.get_int("axis", -1) in (-1, len(shape) - 1)
        vectors = all(len(dims(value) or (0, 0)) <= 1 for value in node.inputs[1:] if value is not None)
        return [x] if first == shape and over_last and vectors else []
    if node.op_type not in _ELEMENTWISE:
        return []
    rows = [value for value in node.inputs if value is not None and dims(value) == shape]
    others = [value for value in node.inputs if value is not None and dims(value) != shape]
    return rows if all(_broadcasts(value) for value in others) else []


def _broadcasts(value: ir.Value) -> bool:
    """Whether a value is the same for all rows and says so without more axes than a matrix has."""
    shape = dims(value)
    return shape is not None and len(shape) <= 1


class _Flattening:
    """What regions share: constants, shapes, matrix forms of values.

    Regions are rewritten in the order of their first nodes. An operand of that node is older than everything that
    leaves this region or a later one, so a shape that is read from it can serve them all.
    """

    def __init__(self, editor: Editor) -> None:
        self.editor = editor
        self.flat: dict[ir.Value, ir.Value] = {}
        self._constants: dict[tuple[int, ...], ir.Value] = {}
        self._leading: dict[tuple[Dim, ...], ir.Value] = {}
        self._shapes: dict[tuple[Dim, ...], ir.Value] = {}

    def rewrite(self, nodes: list[ir.Node]) -> int:
        inside = set(nodes)
        made = dict.fromkeys(node.outputs[0] for node in nodes)
        entries = list(dict.fromkeys(value for node in nodes for value in _rows(node) if value not in made))
        exits = [v for v in made if v.is_graph_output() or any(use.node not in inside for use in v.uses())]
        products = [node for node in nodes if node.op_type == "MatMul"]
        saved = sum(only_user(node.outputs[0], "Add") in inside for node in products)
        if not saved or 2 * saved < len(entries) + len(exits):
            return 0
        leading = sizes(entries[0])[:-1]
        if sum(not isinstance(size, int) for size in leading) > 1 and leading not in self._leading:
            self._leading[leading] = self._read_leading(entries[0])
        for value in entries:
            if value not in self.flat:
                self.flat[value] = self._flatten(value)
        done: set[ir.Node] = set()
        for node in nodes:
            if node not in done:
                done.update(self._flatten_node(node, inside))
        for value in exits:
            if value in self.flat:
                self._leave(value, inside)
        for node in reversed(nodes):
            self.editor.drop(node.outputs[0])
        for value in entries:
            self.editor.drop(value)
        return len(products)

    def _flatten(self, value: ir.Value) -> ir.Value:
        maker = producer(value, "Reshape")
        source = value if maker is None else operand(maker, 0)  # one reshape instead of two
        shape: Any = sizes(value)
        reshape = self.editor.node("Reshape", [source, self._constant(-1, shape[-1])], value, [_matrix(shape)])
        self.editor.put([reshape], after=value)
        return reshape.outputs[0]

    def _flatten_node(self, node: ir.Node, inside: set[ir.Node]) -> list[ir.Node]:
        """Puts the matrix form of a node behind it; returns the nodes that this stands for."""
        result, covered = node.outputs[0], [node]
        inputs = [None if value is None else self.flat.get(value, value) for value in node.inputs]
        kind = node.op_type
        if kind == "MatMul":
            add = only_user(result, "Add")
            bias = next((v for v in add.inputs if v is not result), None) if add in inside else None
            if add is not None and dims(bias) == sizes(result)[-1:]:
                kind, result, covered = "Gemm", add.outputs[0], [node, add]
                inputs.append(bias)
        new = self.editor.node(kind, inputs, result, [_matrix(sizes(result))])
        for name, value in node.attributes.items():
            new.attributes[name] = ir.AttrInt64("axis", -1) if name == "axis" else value
        self.editor.graph.insert_after(covered[-1], new)
        self.flat[result] = new.outputs[0]
        return covered

    def _leave(self, value: ir.Value, inside: set[ir.Node]) -> None:
        """Gives those outside what they read: the tensor, or the matrix where they reshape it anyway."""
        outside = [use.node for use in value.uses() if use.node not in inside]
        reshapes = [node for node in outside if node.op_type == "Reshape" and _takes_any_rank(node)]
        for node in reshapes:
            node.replace_input_with(0, self.flat[value])
        if len(reshapes) == len(outside) and not value.is_graph_output():
            return
        shape = sizes(value)
        restored = self.editor.node("Reshape", [self.flat[value], self._shape(shape)], value, [shape])
        self.editor.put([restored], after=self.flat[value])
        self.editor.replace(value, restored.outputs[0])

    def _shape(self, shape: tuple[Any, ...]) -> ir.Value:
        """What a matrix is reshaped to: one tensor for all values of a shape."""
        *leading, channels = shape
        if shape not in self._shapes:
            if tuple(leading) in self._leading:
                sizes = [self._leading[tuple(leading)], self._constant(channels)]
                whole = self.editor.node("Concat", sizes, sizes[0], [(len(shape),)], {"axis": 0})
                self.editor.put([whole], after=sizes[0])
                self._shapes[shape] = whole.outputs[0]
            else:
                self._shapes[shape] = self._constant(*(size if isinstance(size, int) else -1 for size in shape))
        return self._shapes[shape]

    def _read_leading(self, value: ir.Value) -> ir.Value:
        count = len(sizes(value)) - 1
        where = {"start": 0, "end": count}
        shape = self.editor.node("Shape", [value], value, [(count,)], where, dtype=ir.DataType.INT64)
        self.editor.put([shape], after=value)
        return shape.outputs[0]

    def _constant(self, *sizes: int) -> ir.Value:
        if sizes not in self._constants:
            name = "x".join("any" if size < 0 else str(size) for size in sizes)
            self._constants[sizes] = self.editor.constant(np.array(sizes, np.int64), f"shape_{name}")
        return self._constants[sizes]


def _matrix(shape: tuple[Any, ...]) -> tuple[Dim, int]:
    """[B·S, C], the first size by name if it is dynamic."""
    *leading, channels = shape
    fixed = math.prod(size for size in leading if isinstance(size, int))
    named = [size if size.isidentifier() else f"({size})" for size in leading if not isinstance(size, int)]
    rows = fixed if not named else "*".join([*([str(fixed)] if fixed > 1 else []), *named])
    return rows, channels


def _takes_any_rank(reshape: ir.Node) -> bool:
    """Whether a Reshape gives the same for a matrix of the same entries: it copies no size of its operand."""
    shape = constant(reshape.inputs[1])
    return bool(reshape.attributes.get_int("allowzero", 0)) or (shape is not None and bool((shape != 0).all()))
