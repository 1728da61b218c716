"""Weights that are stored as integers and restored with scales: these take a factor of what a product gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from onnx import NodeProto

from normfuse.onnx.protos import attribute, uses_of

from .onnx_file import OnnxFile, torch_dtype

_MICROSOFT = "com.microsoft"
#: ONNX Runtime's own products with quantised weights: the operands that are their scales and their bias.
WITH_SCALES = {"MatMulNBits": (2, 5), "DynamicQuantizeMatMul": (2, 4), "MatMulIntegerToFloat": (3, 6)}
_PER_AXIS_SINCE = 13  # the operator set from which a DequantizeLinear may have several scales
_FLOATS = (torch.float32, torch.float16)
#: Products, and the axis of their weight that writes channels; None where each channel is written by several.
_WRITES: dict[str, Callable[[NodeProto], int | None]] = {
    "Conv": lambda node: 0,
    "ConvTranspose": lambda node: 1 if attribute(node, "group", 1) == 1 else None,
    "Gemm": lambda node: 0 if attribute(node, "transB", 0) else 1,
    "MatMul": lambda node: 1,
}


@dataclass(frozen=True)
class Restored:
    """The scales of a product's weight.

    Attributes:
        position: of the operation that reads them.
        operand: which of its operands they are.
        name: of the scales.
        dtype: of the scales, and of the product.
        channels: how many the product writes.
        store: makes scales from a factor for each channel.
        axis: of the weight, along which each channel has one scale from then on.
    """

    position: int
    operand: int
    name: str
    dtype: torch.dtype
    channels: int
    store: Callable[[torch.Tensor], torch.Tensor]
    axis: int | None = None


def restored_weights(file: OnnxFile, pinned: Collection[int]) -> dict[int, Restored]:
    """The scales that can take a factor for each channel that a product writes, by the position of the product.

    They are one number, one for each of these channels, or several for each. A weight that several operations read is
    none, nor is one with a scale for each channel that the product reads: it takes factors of none that it writes.
    Where values are quantised too, a DequantizeLinear keeps its scales: ONNX Runtime quantises the biases of such
    products with them, and a small factor would leave no room for the bias.
    """
    makers = {name: place for place, node in enumerate(file.nodes) for name in node.output if name}
    uses = uses_of(file.proto.graph)
    quantised = _quantised_constants(file)
    values = any(node.op_type == "QuantizeLinear" and node.input[0] not in file.constants for node in file.nodes)
    found: dict[int, Restored] = {}
    for position, node in zip(file.positions, file.nodes, strict=True):
        if position in pinned:
            continue
        if node.op_type in WITH_SCALES and file.domain(node) == _MICROSOFT:
            restored = _of_itself(file, position, node, WITH_SCALES[node.op_type][0])
        elif not values and node.op_type in _WRITES and file.is_own(node) and len(node.input) > 1:
            axis, name = _WRITES[node.op_type](node), node.input[1]
            while axis is not None and uses[name] == 1 and name in makers:
                maker = file.nodes[makers[name]]
                if maker.op_type != "Transpose" or not file.is_own(maker):
                    break
                perm = attribute(maker, "perm", [1, 0])
                axis, name = perm[axis] if axis < len(perm) else None, maker.input[0]
            place = makers.get(name)
            if axis is None or place is None or uses[name] != 1 or file.positions[place] in pinned:
                continue
            restored = _of_axis(file, file.positions[place], file.nodes[place], axis, quantised)
        else:
            continue
        if restored is not None:
            found[position] = restored
    return found


def _quantised_constants(file: OnnxFile) -> dict[str, list[int]]:
    """Constants, and what quantises them as in training, with their sizes."""
    found = {name: list(tensor.dims) for name, tensor in file.constants.items()}
    for node in file.nodes:
        if node.op_type == "QuantizeLinear" and node.input[0] in file.constants:
            found[node.output[0]] = found[node.input[0]]
    return found


def restored_values(file: OnnxFile) -> set[str]:
    """Weights that are restored from integers, transposed or not."""
    found, quantised = set[str](), _quantised_constants(file)
    for node in file.nodes:
        kind, source = node.op_type, next(iter(node.input), "")
        if (kind == "DequantizeLinear" and source in quantised) or (kind == "Transpose" and source in found):
            found.update(node.output)
    return found


def _of_axis(
    file: OnnxFile, position: int, node: NodeProto, axis: int, quantised: Mapping[str, list[int]]
) -> Restored | None:
    """Of a DequantizeLinear whose weight writes channels along an axis."""
    if node.op_type != "DequantizeLinear" or file.domain(node) not in ("", _MICROSOFT):
        return None
    source, *names = (name for name in node.input if name)
    if source not in quantised or not file.constants.keys() >= {*names} or attribute(node, "output_dtype", 0):
        return None
    held = [file.constants[name] for name in names]
    weight, scales = quantised[source], list(held[0].dims)
    along, blocks = attribute(node, "axis", 1) % len(weight), attribute(node, "block_size", 0)
    single = not blocks and math.prod(scales) == 1
    if single and (file.version < _PER_AXIS_SINCE or (len(held) > 1 and torch_dtype(held[1].data_type) is None)):
        return None
    laid = scales if blocks else [1 if single or place != along else size for place, size in enumerate(weight)]
    if not single and laid[axis] != weight[axis]:
        return None
    per_axis = None if blocks else axis
    return _restored(file, position, 1, laid, axis, weight[axis], keeps_dims=bool(blocks), per_axis=per_axis)


def _of_itself(file: OnnxFile, position: int, node: NodeProto, operand: int) -> Restored | None:
    """Of a product that has the scales itself: one, one for each channel, or in MatMulNBits one for each block."""
    weight, scales = (file.constants.get(node.input[place]) for place in (1, operand))
    if weight is None or scales is None:
        return None
    blocks = node.op_type == "MatMulNBits"
    channels, count = attribute(node, "N", 0) if blocks else weight.dims[-1], math.prod(scales.dims)
    if channels < 1 or (count % channels if blocks else len(weight.dims) != 2 or count not in (1, channels)):
        return None
    return _restored(file, position, operand, [channels, -1] if blocks else [-1], 0, channels, keeps_dims=blocks)


def _restored(
    file: OnnxFile,
    position: int,
    operand: int,
    laid: list[int],
    axis: int,
    channels: int,
    *,
    keeps_dims: bool,
    per_axis: int | None = None,
) -> Restored | None:
    """With scales that are laid against the weight so; see :class:`Restored` for `per_axis`."""
    name = file.proto.graph.node[position].input[operand]
    dtype, dims = torch_dtype(file.constants[name].data_type), list(file.constants[name].dims)
    if dtype not in _FLOATS:
        return None

    def store(factor: torch.Tensor) -> torch.Tensor:
        scales = torch.from_numpy(file.array(name).astype(np.float32)).reshape(laid)
        across = [-1 if place == axis else 1 for place in range(len(laid))]
        return (scales * factor.reshape(across)).to(dtype).reshape(dims if keeps_dims else -1)

    return Restored(position, operand, name, dtype, channels, store, per_axis)
