"""Products, arithmetic and norms of ONNX as operations of PyTorch that have a rule in folding.

A translation need not be complete: what decides is which form folding has to know. One that gives False leaves the
operation opaque. Sizes that only shape a result may be missing, because the result's own are known.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch

from .calls import Call, Slot, aten, unknown_operation
from .rows import why_unread
from .translating import operation, rank_of

_GEMM = (torch.float32, torch.float64)

# -- products ----------------------------------------------------------------------------------------------------


@operation("Conv", "ConvTranspose")
def _convolution(call: Call) -> bool:
    target, args = convolution(call)
    if target is None or call.restored is None:
        return target is not None and call.emit(target, *args, optional={2: 2})
    x, weight, bias, *rest = args
    return channelwise(call, call.step(target, x, weight, None, *rest, value=call.result()), bias)


def channelwise(call: Call, value: torch.fx.Node, bias: torch.fx.Node | None, **bias_slot: Any) -> bool:
    """A value times a factor for each channel, plus a bias: what the scales of quantised weights are to a product."""
    assert call.restored is not None
    channels, shape = call.restored.channels, list(value.meta["val"].shape)
    images = len(shape) > 2 and call.node.op_type in ("Conv", "ConvTranspose")
    if not images:
        value = call.step(aten.reshape.default, value, [-1, channels, 1])
    axes = len(shape) - 2 if images else 1
    factor, slot = call.factor(1)
    factor = call.derived(aten.reshape.default, factor, [channels, *[1] * (axes + 1)])
    target = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}[axes]
    args = (value, factor, bias, [1] * axes, [0] * axes, [1] * axes, channels)
    slots = [slot, call.slot(2, **{"operand": 2, **bias_slot})]
    if images:
        return call.emit(target, *args, slots=slots)
    return call.emit(aten.reshape.default, call.step(target, *args, slots=slots), call.sizes())


def convolution(call: Call) -> tuple[Any, tuple]:
    """PyTorch's operation for a convolution, and its arguments; None where there is none."""
    rank = rank_of(call, 1)
    if rank not in (3, 4, 5) or rank != rank_of(call, 0):
        return None, ()
    axes = rank - 2
    strides, dilations = (list(call.get(name, [1] * axes)) for name in ("strides", "dilations"))
    group, x, weight, bias = call.get("group", 1), *(*call.operands, None)[:3]
    if call.node.op_type == "ConvTranspose":
        target = {1: aten.conv_transpose1d.default, 2: aten.conv_transpose2d.input, 3: aten.conv_transpose3d.input}
        told = call.get("auto_pad", "NOTSET") in ("NOTSET", "") and not call.get("output_shape")
        pads = call.get("pads", [0] * 2 * axes) if told else [0] * 2 * axes
        cut = [min(pads[axis], pads[axis + axes]) for axis in range(axes)]  # what it is at least
        return target[axes], (x, weight, bias, strides, cut, call.get("output_padding", [0] * axes), group, dilations)
    # Only whether there is padding matters: it adds zeros, which have no shift.
    padded = [int(call.is_padded(call.shape(1)[2:]))] * axes
    target = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
    return target[axes], (x, weight, bias, strides, padded, dilations, group)


@operation("Gemm")
def _gemm(call: Call) -> bool:
    """Also of two values, as torch writes its mm: with a bias that counts nothing."""
    if call.is_constant(0) or call.is_constant(1):
        return bool(product(call, call.emit))
    if call.restored is not None:
        return _restored_product(call)
    if call.get("alpha", 1.0) != 1 or (call.operand(2) is not None and call.get("beta", 1.0) != 0):
        return False
    return call.emit(aten.matmul.default, *_factors(call))


def _factors(call: Call) -> list[torch.fx.Node]:
    """Both sides of a product of values, turned as it says."""
    factors = call.operands[:2]
    for place, name in enumerate(("transA", "transB")):
        if call.get(name, 0):
            factors[place] = call.step(aten.permute.default, factors[place], [1, 0])
    return factors


def _restored_product(call: Call) -> bool:
    """A product of two axes with a quantised weight."""
    assert call.restored is not None
    bias = _bias(call, call.restored.channels, left=False)
    if bias is False:
        return False
    if call.get("alpha", 1.0) != 1:
        value = call.step(unknown_operation("Gemm"), call.operands[:2], value=call.result())
    else:
        value = call.step(aten.matmul.default, *_factors(call))
    return channelwise(call, value, bias, required=call.version < 11, factor="beta")


def product(call: Call, put: Callable[..., Any]) -> Any:
    """A product of two axes of which one side is constant; a constant on the left writes the rows of the result.

    Args:
        call: a Gemm, or a MatMul that becomes one where it gets a bias.
        put: :meth:`Call.emit` or :meth:`Call.step`.

    Returns:
        What `put` gives; False where neither side is constant, or the bias is none per channel.
    """
    side = next((side for side in (1, 0) if call.is_constant(side) and rank_of(call, side) == 2), None)
    if side is None:
        return False
    left, turned = side == 0, [bool(call.get(name, 0)) for name in ("transA", "transB")]
    weight, slot = weight_of(call, side, transposed=turned[side] == left)
    bias = _bias(call, weight.meta["val"].shape[0], left=left)
    if bias is False:
        return False
    x = call.operands[1 - side]
    if turned[1 - side] != left:
        x = call.step(aten.permute.default, x, [1, 0])
    store = _as_column if left else None
    slots = [slot, call.slot(2, 2, store=store, required=call.version < 11, factor="beta")]
    if not left:
        return put(aten.linear.default, x, weight, bias, slots=slots)
    return put(aten.permute.default, call.step(aten.linear.default, x, weight, bias, slots=slots), [1, 0])


def _bias(call: Call, rows: int, *, left: bool) -> torch.fx.Node | Literal[False] | None:
    """The bias of a Gemm, multiplied by `beta`; None if it has none, False if it is none per channel."""
    bias = call.operand(2)
    if bias is None:
        return None
    given, fitting = call.shape(2), [[rows, 1]] if left else [[rows], [1, rows]]
    if not call.is_constant(2) or (math.prod(given) != 1 and given not in fitting):
        return False
    if len(given) != 1:
        bias = call.derived(aten.reshape.default, bias, [-1])
    if math.prod(given) != rows:
        bias = call.derived(aten.expand.default, bias, [rows])
    if call.get("beta", 1.0) != 1:
        bias = call.derived(aten.mul.Tensor, bias, call.get("beta"))
    return bias


def _as_column(bias: torch.Tensor) -> torch.Tensor:
    return bias[:, None]


def weight_of(call: Call, operand: int, *, transposed: bool, argument: int = 1) -> tuple[torch.fx.Node, Slot]:
    """A constant factor as the program has it, multiplied by the attribute `alpha` if there is one, and its slot."""
    weight = call.operands[operand]
    if transposed:
        weight = call.derived(aten.transpose.int, weight, -1, -2)
    if call.get("alpha", 1.0) != 1:
        weight = call.derived(aten.mul.Tensor, weight, call.get("alpha"))
    return weight, call.slot(argument, operand, store=_turned if transposed else None, factor="alpha")


def _turned(weight: torch.Tensor) -> torch.Tensor:
    return weight.transpose(-1, -2)


@operation("MatMul")
def _matmul(call: Call) -> bool:
    ranks = [len(call.shape(place)) for place in (0, 1)]
    if min(ranks) < 2:
        return False
    gemm = ranks == [2, 2] and call.result().dtype in _GEMM and not call.file.rank_guessed
    if gemm and call.is_constant(0) != call.is_constant(1):
        return bool(product(call, call.emit))
    if call.restored is None:
        return call.emit(aten.matmul.default, *call.operands)
    if gemm:
        return _restored_product(call)
    return call.scale_channels(call.step(aten.matmul.default, *call.operands), *call.factor(1, 1))


@operation("Einsum")
def _einsum(call: Call) -> bool:
    if len(call.operands) != 2:
        return False
    return call.emit(aten.einsum.default, call.get("equation"), list(call.operands))


@operation("Gather")
def _gather(call: Call) -> bool:
    axis, index = call.get("axis", 0), call.number(1)
    if call.is_constant(0):
        return (
            axis == 0 and rank_of(call, 0) == 2 and index is None and call.emit(aten.embedding.default, *call.operands)
        )
    axis %= len(call.shape(0))
    if index is not None and index.ndim == 0:
        return call.emit(aten.select.int, call.operands[0], axis, int(index))
    if rank_of(call, 1) == 1:
        return call.emit(aten.index_select.default, call.operands[0], axis, call.operands[1])
    if rank_of(call, 1) is None:
        return False
    return call.emit(aten.index.Tensor, call.operands[0], [None] * axis + [call.operands[1]])


# -- arithmetic --------------------------------------------------------------------------------------------------


@operation("Add", "Sub", "Mul", "Div")
def _arithmetic(call: Call) -> bool:
    if not call.only_tensors():
        return False
    if call.get("broadcast") is not None or len(call.operands) != 2:  # of operator sets before 7
        return False
    if not call.is_fixed() and all(size == 1 for size in call.result().shape):
        return False  # nothing is gained with a single number, a step between integers say
    targets = {"Add": aten.add.Tensor, "Sub": aten.sub.Tensor, "Mul": aten.mul.Tensor, "Div": aten.div.Tensor}
    return call.emit(targets[call.node.op_type], *call.operands)


@operation("Sum", "Mean")
def _sum(call: Call) -> bool:
    """Of any number of values; the mean of k of them lies 1/k of the way from the mean of the others to the last."""
    if not call.only_tensors():
        return False
    total, *others = call.operands
    if not others:
        return call.emit(aten.clone.default, total)
    averages = call.node.op_type == "Mean"
    target = aten.lerp.Scalar if averages else aten.add.Tensor
    parts = [(operand, 1 / count) if averages else (operand,) for count, operand in enumerate(others, 2)]
    for part in parts[:-1]:
        total = call.step(target, total, *part)
    return call.emit(target, total, *parts[-1])


@operation("Max", "Min")
def _extreme(call: Call) -> bool:
    """Of two values, of which one may be a constant."""
    if len(call.operands) != 2 or not call.only_tensors():
        return False
    target = aten.maximum.default if call.node.op_type == "Max" else aten.minimum.default
    first, second = call.operands
    return call.emit(target, second, first) if call.is_constant(0) else call.emit(target, first, second)


@operation("Where")
def _where(call: Call) -> bool:
    return len(call.operands) == 3 and call.only_tensors() and call.emit(aten.where.self, *call.operands)


@operation("BatchNormalization")
def _batch_norm(call: Call) -> bool:
    if why_unread(call.file, call.node) or len(call.operands) != 5 or rank_of(call, 0) in (None, 0, 1):
        return False
    eps, momentum = call.get("epsilon", 1e-5), call.get("momentum", 0.9)
    return call.emit(aten.batch_norm.default, *call.operands, False, momentum, eps, False)


@operation("LayerNormalization")
def _layer_norm(call: Call) -> bool:
    rank = len(call.shape(0))
    last = call.get("axis", -1) % max(rank, 1) == rank - 1
    if not last or not call.only_first() or rank_of(call, 1) != 1 or call.get("stash_type", 1) != 1:
        return False
    x, weight, bias = (*call.operands, None)[:3]
    if bias is not None and rank_of(call, 2) != 1:
        return False
    args = (x, [call.shape(1)[0]], weight, bias, call.get("epsilon", 1e-5))
    slots = [call.slot(2, 1, required=True), call.slot(3, 2)]
    return call.emit(aten.layer_norm.default, *args, slots=slots)


@operation("RMSNormalization", "SimplifiedLayerNormalization")
def _rms_norm(call: Call) -> bool:
    """ONNX's own, and what ONNX Runtime has under ONNX's domain."""
    rank = len(call.shape(0))
    if call.get("axis", -1) % max(rank, 1) != rank - 1 or rank_of(call, 1) != 1 or not call.only_first():
        return False
    x, weight = call.operands
    slots = [call.slot(2, 1, required=True)]
    return call.emit(aten.rms_norm.default, x, [call.shape(1)[0]], weight, call.get("epsilon", 1e-5), slots=slots)


@operation("InstanceNormalization")
def _instance_norm(call: Call) -> bool:
    if rank_of(call, 0) not in (3, 4, 5):
        return False
    slots = [call.slot(1, 1, required=True), call.slot(2, 2, required=True)]
    args = (*call.operands, None, None, True, 0.0, call.get("epsilon", 1e-5), False)
    return call.emit(aten.instance_norm.default, *args, slots=slots)


@operation("GroupNormalization")
def _group_norm(call: Call) -> bool:
    """With a gain for each channel; in its first form it had one for each group."""
    if call.shape(1) != call.shape(0)[1:2] or call.get("stash_type", 1) != 1:
        return False
    x, weight, bias = call.operands
    slots = [call.slot(2, 1, required=True), call.slot(3, 2, required=True)]
    args = (x, call.get("num_groups"), weight, bias, call.get("epsilon", 1e-5))
    return call.emit(aten.group_norm.default, *args, slots=slots)


@operation("Softmax")
def _softmax(call: Call) -> bool:
    """Of operator sets before 13 over all axes from one on, which has to be the last."""
    rank, old = len(call.shape(0)), call.version < 13
    axis = call.get("axis", 1 if old else -1) % max(rank, 1)
    return (axis == rank - 1 or not old) and call.emit(aten.softmax.int, call.operands[0], axis)


@operation("Relu")
def _relu(call: Call) -> bool:
    return call.emit(aten.relu.default, call.operands[0])


@operation("LeakyRelu")
def _leaky_relu(call: Call) -> bool:
    return call.emit(aten.leaky_relu.default, call.operands[0], call.get("alpha", 0.01))


@operation("PRelu")
def _prelu(call: Call) -> bool:
    """With one slope, or one for each channel."""
    shape, rank = call.shape(1), len(call.shape(0))
    if not call.is_constant(1) or rank == 0:
        return False
    aligned = [1] * (rank - len(shape)) + shape
    if math.prod(shape) != 1 and (rank < 2 or any(size != 1 for axis, size in enumerate(aligned) if axis != 1)):
        return False
    slope = call.derived(aten.reshape.default, call.operands[1], [-1])
    return call.emit(aten.prelu.default, call.operands[0], slope)


@operation("Abs")
def _abs(call: Call) -> bool:
    return call.emit(aten.abs.default, call.operands[0])


@operation("Neg")
def _neg(call: Call) -> bool:
    return call.emit(aten.neg.default, call.operands[0])


@operation("Clip")
def _clip(call: Call) -> bool:
    """With a lower bound of zero and no upper one it is a Relu."""
    if call.version < 11:
        low, high = call.get("min"), call.get("max")
    else:
        low = call.number(1) if call.operand(1) is not None else None
        high = call.operand(2)
    if low is None or float(low) != 0 or high is not None:
        return False
    return call.emit(aten.relu.default, call.operands[0])


@operation("Identity", "Dropout")
def _identity(call: Call) -> bool:
    """Dropout outside of training. As a copy it stays where it is."""
    if not call.only_first():
        return False
    training = call.number(2) if call.operand(2) is not None else False
    if training is None or bool(training):
        return False
    return call.emit(aten.clone.default, call.operands[0])


@operation("Cast")
def _cast(call: Call) -> bool:
    """One that changes nothing is a copy, which stays."""
    before, after = call.tensor(0).dtype, call.result().dtype
    if before == after:
        return call.emit(aten.clone.default, call.operands[0])
    return call.emit(aten.to.dtype, call.operands[0], after)
