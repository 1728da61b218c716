"""Which axes of an operand are those of an operation's result."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import NodeProto

from normfuse.onnx.protos import attribute

from .onnx_file import OnnxFile

#: In place of an axis: the size is one. None stands for any other size that is not known.
ONE = -1
Axes = list[int | None]

#: Operations whose result has its operands' axes, one for one, but for broadcasting.
ELEMENTWISE = frozenset(
    "Abs Add Cast Clip Ceil Div Dropout Elu Erf Exp Floor Gelu HardSigmoid HardSwish Identity LeakyRelu Log LogSoftmax "
    "Max Mean Min Mish Mul Neg Not Pow PRelu Reciprocal Relu Round Selu Sigmoid Sign Softmax Softplus Sqrt Sub Sum "
    "Tanh Where QuantizeLinear DequantizeLinear DynamicQuantizeLinear".split()
)
#: Operations whose result has the axes of the first operand.
_LIKE_THE_FIRST = frozenset(
    "BatchNormalization GroupNormalization InstanceNormalization LayerNormalization LpNormalization LRN "
    "MeanVarianceNormalization RMSNormalization SimplifiedLayerNormalization SkipLayerNormalization".split()
)
_RULES: dict[str, Callable[[NodeProto, Axes, OnnxFile], Axes | None]] = {}


def moved(node: NodeProto, place: int, axes: Axes, file: OnnxFile) -> Axes | None:
    """The axes of an operation's first result; None where they are not known.

    Args:
        node: the operation.
        place: which of its operands has these axes.
        axes: of the operand.
        file: whose operation it is.
    """
    kind = node.op_type
    if kind in ELEMENTWISE:
        wider = max([len(axes), *(len(file.constants[o].dims) for o in node.input if o in file.constants)])
        return [None] * (wider - len(axes)) + axes
    if kind == "Concat":
        along = attribute(node, "axis", 0)
        return [None if position == along % len(axes) else axis for position, axis in enumerate(axes)]
    if place or not axes:
        return None
    if kind in _LIKE_THE_FIRST:
        return axes
    return _RULES[kind](node, axes, file) if kind in _RULES else None


def _rule(*kinds: str) -> Callable:
    def register(function: Callable) -> Callable:
        _RULES.update(dict.fromkeys(kinds, function))
        return function

    return register


def numbers(node: NodeProto, name: str, place: int, file: OnnxFile) -> list | None:
    """Numbers from an attribute of older operator sets, or from a constant operand."""
    given = attribute(node, name)
    if given is None and place < len(node.input) and node.input[place] in file.constants:
        given = np.ravel(file.array(node.input[place])).tolist()
    return None if given is None else list(given)


@_rule("Transpose")
def _transpose(node: NodeProto, axes: Axes, file: OnnxFile) -> Axes | None:
    perm = attribute(node, "perm", list(range(len(axes)))[::-1])
    return [axes[p] for p in perm] if sorted(perm) == list(range(len(axes))) else None


@_rule("Unsqueeze")
def _unsqueeze(node: NodeProto, axes: Axes, file: OnnxFile) -> Axes | None:
    where = numbers(node, "axes", 1, file)
    if where is None:
        return None
    rank, rest = len(axes) + len(where), iter(axes)
    new = {axis % rank for axis in where}
    return [ONE if position in new else next(rest, None) for position in range(rank)]


@_rule("Squeeze", *(f"Reduce{kind}" for kind in ("Max", "Mean", "Min", "Sum", "L2")))
def _without(node: NodeProto, axes: Axes, file: OnnxFile) -> Axes | None:
    where = numbers(node, "axes", 1, file)
    if where is None and (node.op_type == "Squeeze" or len(node.input) > 1):
        return None
    gone = set(range(len(axes))) if where is None else {axis % len(axes) for axis in where}
    if node.op_type != "Squeeze" and attribute(node, "keepdims", 1):
        return [ONE if position in gone else axis for position, axis in enumerate(axes)]
    return [axis for position, axis in enumerate(axes) if position not in gone]


@_rule("MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "Resize", "Upsample")
def _pool(node: NodeProto, axes: Axes, file: OnnxFile) -> Axes:
    return axes[:2] + [ONE if node.op_type.startswith("Global") else None] * (len(axes) - 2)


@_rule("Pad")
def _pad(node: NodeProto, axes: Axes, file: OnnxFile) -> Axes | None:
    pads = numbers(node, "pads", 1, file)
    if pads is None or len(pads) != 2 * len(axes):
        return None
    return [None if pads[p] or pads[p + len(axes)] else axis for p, axis in enumerate(axes)]


@_rule("Slice")
def _slice(node: NodeProto, axes: Axes, file: OnnxFile) -> Axes | None:
    where, starts = numbers(node, "axes", 3, file), numbers(node, "starts", 1, file)
    if where is None:
        where = None if starts is None else list(range(len(starts)))
    cut = None if where is None else {axis % len(axes) for axis in where}
    return None if cut is None else [None if position in cut else axis for position, axis in enumerate(axes)]


@_rule("Split")
def _split(node: NodeProto, axes: Axes, file: OnnxFile) -> Axes:
    return [None if position == attribute(node, "axis", 0) % len(axes) else a for position, a in enumerate(axes)]


@_rule("Gather")
def _gather(node: NodeProto, axes: Axes, file: OnnxFile) -> Axes | None:
    if node.input[1] not in file.constants:
        return None
    along = attribute(node, "axis", 0) % len(axes)
    return axes[:along] + [None] * len(file.constants[node.input[1]].dims) + axes[along + 1 :]


@_rule("Flatten")
def _flatten(node: NodeProto, axes: Axes, file: OnnxFile) -> Axes:
    at = attribute(node, "axis", 1)
    return [_together(axes[:at]), _together(axes[at:])]


@_rule("Reshape")
def _reshape(node: NodeProto, axes: Axes, file: OnnxFile) -> Axes | None:
    sizes = numbers(node, "shape", 1, file)
    if sizes is None:
        return None
    found = [axes[place] if not size and place < len(axes) else ONE if size == 1 else None
             for place, size in enumerate(sizes)]  # fmt: skip
    left = [axis for axis in axes if axis is None or (axis != ONE and axis not in found)]
    unknown = [place for place, axis in enumerate(found) if axis is None]
    if len(left) == len(unknown):  # such as what a pooling leaves
        for place, axis in zip(unknown, left, strict=True):
            found[place] = axis
    return found


@_rule("MatMul", "MatMulInteger")
def _matmul(node: NodeProto, axes: Axes, file: OnnxFile) -> Axes:
    return [*axes[:-1], None]


def _together(axes: Axes) -> int | None:
    """What axes that are merged are: one of them, if the others have size one."""
    left = [axis for axis in axes if axis != ONE]
    return ONE if not left else left[0] if len(left) == 1 else None
