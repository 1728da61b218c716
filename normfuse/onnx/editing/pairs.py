"""Operations that are read together with the one in front of them, whose result they alone read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from onnx import NodeProto

from normfuse.onnx.protos import outer_names

if TYPE_CHECKING:
    from .reading import Reader

#: Products of integers, with the axis along which their weight writes.
_INTEGER_PRODUCTS = {"MatMulInteger": -1, "ConvInteger": 1}


class Front(NamedTuple):
    """The operation in front: its position in the file, and for scales of integers the axis of their channels."""

    position: int
    node: NodeProto
    axis: int | None = None


def pairs_of(reader: Reader, pinned: frozenset[int]) -> dict[int, Front | None]:
    """By the position of each such operation the one in front of it, by whose own position None.

    They are an Add of a bias behind a MatMul, and scales that multiply what a product of integers gives.
    """
    file = reader.file
    makers: dict[str, Front] = {}
    readers: dict[str, list[int]] = {}
    kept = {value.name for value in file.proto.graph.output}
    for position, node in zip(file.positions, file.nodes, strict=True):
        for name in (*node.input, *outer_names(node)):
            readers.setdefault(name, []).append(position)
        makers.update(dict.fromkeys(node.output, Front(position, node)))
    found: dict[int, Front | None] = {}
    for position, node in zip(file.positions, file.nodes, strict=True):
        if node.op_type not in ("Add", "Mul") or not file.is_own(node) or position in pinned:
            continue
        for name, other in (node.input, reversed(node.input)):
            front = makers.get(name)
            if front is None or name in kept or readers[name] != [position]:
                continue
            if not file.is_own(front.node) or front.position in pinned or reader.fake(node.output[0]) is None:
                continue
            axis = _scaled_axis(reader, front.node, other, makers) if node.op_type == "Mul" else None
            if axis is not None or (node.op_type == "Add" and _takes_bias(reader, front.node, other)):
                found[position], found[front.position] = front._replace(axis=axis), None
                break
    return found


def _takes_bias(reader: Reader, product: NodeProto, bias: str) -> bool:
    """Whether an operation is a product with a constant, to which a constant is added."""
    constants = reader.file.constants
    if product.op_type != "MatMul" or bias not in constants or product.input[0] in constants:
        return False
    weight = list(constants[product.input[1]].dims) if product.input[1] in constants else []
    return len(weight) == 2 and list(constants[bias].dims) == [weight[1]]


def _scaled_axis(reader: Reader, scales: NodeProto, numbers: str, makers: Mapping[str, Front]) -> int | None:
    """The axis of the channels of a product of integers, if `scales` is that of its input times that of its weight."""
    constants, value = reader.file.constants, reader.fake(numbers)
    cast = makers.get(numbers)
    product = makers.get(cast.node.input[0]) if cast is not None and cast.node.op_type == "Cast" else None
    axis = _INTEGER_PRODUCTS.get(product.node.op_type) if product is not None else None
    if axis is None or value is None or value.dtype != torch.float32 or scales.op_type != "Mul":
        return None
    of_weight = [name for name in scales.input if name in constants]
    of_input = [name for name in scales.input if name in makers and name not in constants]
    if len(of_weight) != 1 or len(of_input) != 1 or makers[of_input[0]].node.op_type != "DynamicQuantizeLinear":
        return None
    channels, dims = value.shape[axis], list(constants[of_weight[0]].dims)
    aligned = [1] * (value.dim() - len(dims)) + dims
    along = [channels if place == axis % value.dim() else 1 for place in range(value.dim())]
    return axis if isinstance(channels, int) and aligned in (along, [1] * value.dim()) else None
