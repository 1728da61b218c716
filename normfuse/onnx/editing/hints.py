"""What the operations of a graph say about its inputs: sizes that they need, and how large integers may be."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import GraphProto, NodeProto, helper

from .onnx_file import OnnxFile, graphs_of

# Operations whose result has its first operand's axes, one for one.
_ALIKE = frozenset(
    "Abs Add Cast Clip Ceil Div Dropout Elu Erf Exp Floor Identity LeakyRelu Log LogSoftmax Max Min Mul Neg Not Pow "
    "PRelu Reciprocal Relu Round Sigmoid Sign Softmax Softplus Sqrt Sub Tanh Where QuantizeLinear DequantizeLinear "
    "DynamicQuantizeLinear".split()
)
_FIRST_WEIGHT = {"Conv": 1, "ConvInteger": 1, "QLinearConv": 3, "ConvTranspose": 1}
_REACH = 64  # operations that are followed from an input


@dataclass
class Hints:
    """What is known of one input.

    Attributes:
        rank: the number of its axes, if an operation shows it.
        sizes: sizes that an operation needs, by axis.
        below: integers are smaller than this, being indices.
        equals: integers that it is compared with.
    """

    rank: int | None = None
    sizes: dict[int, int] = field(default_factory=dict)
    below: int | None = None
    equals: list[int] = field(default_factory=list)


def hints_of(file: OnnxFile) -> dict[str, Hints]:
    """Follows every input through operations that keep its axes to those that show what it has to be."""
    readers: dict[str, list[NodeProto]] = defaultdict(list)
    shapes: dict[str, tuple[int, ...]] = {name: tuple(tensor.dims) for name, tensor in file.constants.items()}
    for node in _everywhere(file.proto.graph):
        if not (file.is_own(node) or node.domain == "com.microsoft"):
            continue  # what bears a known name may mean something else
        for name in dict.fromkeys(node.input):
            readers[name].append(node)
    found = {}
    for value in file.inputs:
        hints = found[value.name] = Hints()
        rank = len(value.type.tensor_type.shape.dim) if value.type.tensor_type.HasField("shape") else None
        axes = None if rank is None else list(range(rank))
        pending: list[tuple[str, Any]] = [(value.name, axes)]
        seen = {value.name}
        while pending and len(seen) < _REACH:
            name, axes = pending.pop(0)
            for node in readers[name]:
                _look(node, name, axes, hints, shapes, file)
                moved = _moved(node, name, axes, file)
                for output in node.output[:1] if moved is not False else ():
                    if output not in seen:
                        seen.add(output)
                        pending.append((output, moved))
    return found


def _everywhere(graph: GraphProto) -> Iterator[NodeProto]:
    for node in graph.node:
        yield node
        for inner in graphs_of(node):
            yield from _everywhere(inner)


def _look(
    node: NodeProto, name: str, axes: list | None, hints: Hints, shapes: dict[str, tuple[int, ...]], file: OnnxFile
) -> None:
    """Note what one reader shows."""
    place = list(node.input).index(name)
    others = [shapes.get(other) for other in node.input]
    kind = node.op_type
    if kind in _FIRST_WEIGHT and place == 0 and len(others) > _FIRST_WEIGHT[kind]:
        weight = others[_FIRST_WEIGHT[kind]]
        if weight:
            group = next((a.i for a in node.attribute if a.name == "group"), 1)
            _need(hints, axes, 1, weight[0] if kind == "ConvTranspose" else weight[1] * group, len(weight))
    elif kind == "Gemm" and place == 0 and len(others) > 1 and others[1] and len(others[1]) == 2:
        flags = {a.name: a.i for a in node.attribute}
        _need(hints, axes, 0 if flags.get("transA") else 1, others[1][1 if flags.get("transB") else 0], 2)
    elif kind in ("MatMul", "MatMulInteger") and place == 0 and others[1] and len(others[1]) > 1:
        _need(hints, axes, -1, others[1][-2], 2)  # or more, where the file says nothing
    elif kind in ("LSTM", "GRU", "RNN") and others[1]:
        if place == 0:
            _need(hints, axes, 2, others[1][2], 3)
        elif place >= 5 and others[2]:
            _need(hints, axes, 2, others[2][2], 3)
            _need(hints, axes, 0, others[2][0], 3)
    elif kind in ("BatchNormalization", "InstanceNormalization") and place == 0 and others[1]:
        _need(hints, axes, 1, others[1][0], None)
    elif kind in ("Gather", "OneHot"):
        data = others[0] if kind == "Gather" else None
        axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
        if kind == "Gather" and place == 1 and data:
            hints.below = min(hints.below or data[axis], data[axis])
        if kind == "OneHot" and place == 0 and node.input[1] in file.constants:
            depth = int(np.ravel(file.array(node.input[1]))[0])
            hints.below = min(hints.below or depth, depth)
    elif kind == "EmbedLayerNormalization" and place < 2 and (table := others[2 + 2 * place]):  # tokens and segments
        hints.below = min(hints.below or table[0], table[0])
    elif kind == "Equal":
        other = node.input[1 - place]
        if other in file.constants and file.array(other).dtype.kind != "O":
            hints.equals += [int(number) for number in np.ravel(file.array(other))[:4]]


def _need(hints: Hints, axes: list | None, axis: int, size: int, rank: int | None) -> None:
    if axes is None:
        hints.rank = hints.rank or rank
        if rank is not None:
            hints.sizes.setdefault(axis % rank, size)
        return
    if -len(axes) <= axis < len(axes) and axes[axis] is not None:
        hints.sizes.setdefault(axes[axis], size)


def _moved(node: NodeProto, name: str, axes: list | None, file: OnnxFile) -> list | bool | None:
    """Which axes of the input are those of an operation's result; False where that is unknown."""
    place, kind = list(node.input).index(name), node.op_type
    if kind in _ALIKE:
        if axes is None:
            return None
        constants = [len(file.constants[o].dims) for o in node.input if o in file.constants]
        wider = max([len(axes), *constants])
        return [None] * (wider - len(axes)) + axes
    if axes is None or place:
        return False
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute if a.name in ("perm", "axes")}
    if kind == "Transpose":
        perm = attributes.get("perm", list(range(len(axes)))[::-1])
        return [axes[p] for p in perm] if sorted(perm) == list(range(len(axes))) else False
    if kind in ("Unsqueeze", "Squeeze"):
        where = attributes.get("axes")
        if where is None and len(node.input) > 1 and node.input[1] in file.constants:
            where = np.ravel(file.array(node.input[1])).tolist()
        if where is None:
            return False
        if kind == "Squeeze":
            gone = {a % len(axes) for a in where} if axes else set()
            return [axis for position, axis in enumerate(axes) if position not in gone]
        rank, rest = len(axes) + len(where), iter(axes)
        new = {a % rank for a in where}
        return [None if position in new else next(rest, None) for position in range(rank)]
    return False
