"""What the operations of a graph say about its inputs: sizes that they need, and how large integers may be."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import NodeProto

from normfuse.onnx.protos import all_nodes, attribute

from .axes import ELEMENTWISE, ONE, Axes, moved, numbers
from .onnx_file import OnnxFile

# Convolutions, and products of matrices, by the operand that is their weight.
_CONVOLUTIONS = {"Conv": 1, "ConvInteger": 1, "QLinearConv": 3, "ConvTranspose": 1, "FusedConv": 1}
_PRODUCTS = {
    **dict.fromkeys(("MatMul", "MatMulInteger", "FusedMatMul", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"), 1),
    "QLinearMatMul": 3,
}
_OVER_LAST_AXES = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
_REACH = 64  # operations that are followed from an input


@dataclass
class Hints:
    """What is known of one input.

    Attributes:
        rank: the number of its axes, if the file does not say it, and an operation shows it.
        guessed: whether no operation shows it either, so that it is a guess.
        sizes: sizes that an operation needs, by axis.
        below: integers are smaller than this, being indices.
        equals: integers that it is compared with.
    """

    rank: int | None = None
    guessed: bool = False
    sizes: dict[int, int] = field(default_factory=dict)
    below: int | None = None
    equals: list[int] = field(default_factory=list)


def hints_of(file: OnnxFile, guess: int = 2) -> dict[str, Hints]:
    """Follows every input through operations that keep its axes to those that show what it has to be.

    Args:
        file: the file.
        guess: the number of axes of inputs of which nothing shows it.
    """
    readers: dict[str, list[NodeProto]] = defaultdict(list)
    for node in all_nodes(file.proto.graph.node):
        if not (file.is_own(node) or node.domain == "com.microsoft"):
            continue  # what bears a known name may mean something else
        for name in dict.fromkeys(node.input):
            readers[name].append(node)
    shapes = _shapes(file)
    found = {}
    for value in file.inputs:
        hints = found[value.name] = Hints()
        rank = len(value.type.tensor_type.shape.dim) if value.type.tensor_type.HasField("shape") else None
        if rank is None:
            _follow(value.name, None, readers, hints, shapes, file)
            hints.guessed, rank = hints.rank is None, guess if hints.rank is None else hints.rank
            hints.rank = rank
        _follow(value.name, list(range(rank)), readers, hints, shapes, file)
    return found


def _follow(
    name: str,
    axes: Axes | None,
    readers: Mapping[str, Sequence[NodeProto]],
    hints: Hints,
    shapes: Mapping[str, tuple[int, ...]],
    file: OnnxFile,
) -> None:
    """Look at what reads a value, and at what reads that; without axes only as long as all axes stay."""
    pending, seen = [(name, axes)], {name}
    while pending and len(seen) < _REACH:
        name, axes = pending.pop(0)
        for node in readers.get(name, ()):
            place = list(node.input).index(name)
            _look(node, place, axes, hints, shapes, file)
            results = node.output if node.op_type == "Split" else node.output[:1]
            after = None if axes is None else moved(node, place, axes, file)
            if after is None and not (axes is None and node.op_type in ELEMENTWISE):
                continue
            pending += [(output, after) for output in results if output not in seen]
            seen.update(results)


def _shapes(file: OnnxFile) -> dict[str, tuple[int, ...]]:
    """The sizes of constants, and of weights that are transposed or restored from them."""
    shapes = {name: tuple(tensor.dims) for name, tensor in file.constants.items()}
    for node in file.nodes:
        if not node.output or not node.input or node.input[0] not in shapes or node.output[0] in shapes:
            continue
        before = shapes[node.input[0]]
        if node.op_type == "Transpose":
            perm = attribute(node, "perm", list(range(len(before)))[::-1])
            shapes[node.output[0]] = tuple(before[axis] for axis in perm)
        elif node.op_type in ("Cast", "DequantizeLinear", "Identity"):
            shapes[node.output[0]] = before
    return shapes


def _look(
    node: NodeProto,
    place: int,
    axes: Axes | None,
    hints: Hints,
    shapes: Mapping[str, tuple[int, ...]],
    file: OnnxFile,
) -> None:
    """Note what one reader shows."""
    kind = node.op_type

    def sizes(operand: int) -> tuple[int, ...]:
        return shapes.get(node.input[operand], ()) if operand < len(node.input) else ()

    if kind in _CONVOLUTIONS and place == 0 and (weight := sizes(_CONVOLUTIONS[kind])):
        channels = weight[0] if kind == "ConvTranspose" else weight[1] * attribute(node, "group", 1)
        _need(hints, axes, 1, channels, len(weight))
    elif kind in ("Gemm", "FusedGemm") and place < 2 and len(sizes(1 - place)) == 2:
        turned = [bool(attribute(node, name, 0)) for name in ("transA", "transB")]
        summed = [0 if turned[0] else 1, 1 if turned[1] else 0]
        _need(hints, axes, summed[place], sizes(1 - place)[summed[1 - place]], 2)
    elif kind in _PRODUCTS and place == 0 and len(weight := sizes(_PRODUCTS[kind])) > 1:
        size = weight[-1 if attribute(node, "transB", 0) else -2]
        _need(hints, axes, -2 if attribute(node, "transA", 0) else -1, size, None)
    elif kind in ("MatMul", "MatMulInteger") and place == 1 and sizes(0):
        _need(hints, axes, -2, sizes(0)[-1], None)
    elif kind == "MatMulNBits" and place == 0:
        _need(hints, axes, -1, attribute(node, "K", 0), None)
    elif kind == "Attention" and place == 0 and sizes(1):
        _need(hints, axes, -1, sizes(1)[0], 3)
    elif kind in ("LSTM", "GRU", "RNN") and sizes(1):
        if place == 0:
            _need(hints, axes, 2, sizes(1)[2], 3)
        elif place >= 5 and sizes(2):
            _need(hints, axes, 2, sizes(2)[2], 3)
            _need(hints, axes, 0, sizes(2)[0], 3)
    elif kind in ("BatchNormalization", "InstanceNormalization") and place == 0 and sizes(1):
        _need(hints, axes, 1, sizes(1)[0], None)
    elif kind in _OVER_LAST_AXES and place == 0:
        _need_last(hints, axes, sizes(1))
    elif kind == "Einsum" and len(node.input) == 2:
        _look_at_letters(attribute(node, "equation"), place, axes, hints, sizes(1 - place))
    elif kind in ELEMENTWISE and "Quantize" not in kind and axes is not None:
        for operand in range(len(node.input)):  # batches of one broadcast
            _need_last(hints, [None if axis == 0 else axis for axis in axes], sizes(operand))
    elif kind == "Squeeze" and axes:
        for axis in numbers(node, "axes", 1, file) or ():
            _need(hints, axes, axis, 1, None)
    elif kind == "Split" and axes and (parts := numbers(node, "split", 1, file)):
        _need(hints, axes, attribute(node, "axis", 0), sum(parts), None)
    elif kind == "Concat" and axes:
        along = attribute(node, "axis", 0) % len(axes)
        for operand in range(len(node.input)):
            _need_last(hints, [None if at == along else axis for at, axis in enumerate(axes)], sizes(operand))
    elif kind in ("MaxPool", "AveragePool", "LpPool") and axes is None:
        hints.rank = hints.rank or len(attribute(node, "kernel_shape", ())) + 2
    elif kind == "Transpose" and axes is None:
        hints.rank = hints.rank or len(attribute(node, "perm", ())) or None
    elif kind in ("Gather", "OneHot"):
        data = sizes(0) if kind == "Gather" else None
        axis = attribute(node, "axis", 0)
        if kind == "Gather" and place == 1 and data:
            hints.below = min(hints.below or data[axis], data[axis])
        if kind == "OneHot" and place == 0 and node.input[1] in file.constants:
            depth = int(np.ravel(file.array(node.input[1]))[0])
            hints.below = min(hints.below or depth, depth)
    elif kind == "EmbedLayerNormalization" and place < 2 and (table := sizes(2 + 2 * place)):  # tokens and segments
        hints.below = min(hints.below or table[0], table[0])
    elif kind == "Equal":
        other = node.input[1 - place]
        if other in file.constants and file.array(other).dtype.kind != "O":
            hints.equals += [int(number) for number in np.ravel(file.array(other))[:4]]


def _look_at_letters(equation: Any, place: int, axes: Axes | None, hints: Hints, other: tuple[int, ...]) -> None:
    """What the constant factor of an einsum shows."""
    terms = equation.decode().replace(" ", "").partition("->")[0].split(",") if isinstance(equation, bytes) else []
    if len(terms) != 2 or "." in "".join(terms) or len(other) != len(terms[1 - place]):
        return
    sizes = dict(zip(terms[1 - place], other, strict=True))
    for axis, letter in enumerate(terms[place]):
        if letter in sizes:
            _need(hints, axes, axis, sizes[letter], len(terms[place]))


def _need_last(hints: Hints, axes: Axes | None, sizes: Sequence[int]) -> None:
    """Note what the last axes have to be, but where a constant broadcasts."""
    for place, size in enumerate(reversed(sizes), 1):
        if size != 1:
            _need(hints, axes, -place, size, None)


def _need(hints: Hints, axes: Axes | None, axis: int, size: int, rank: int | None) -> None:
    if axes is None:
        hints.rank = hints.rank or rank
    elif -len(axes) <= axis < len(axes) and (own := axes[axis]) is not None and own != ONE:
        hints.sizes.setdefault(own, size)
