"""The operations of ONNX that have a rule in folding, as those of PyTorch.

A translation need not be complete: what decides is which form folding has to know. One that gives False leaves the
operation opaque. Sizes that only shape a result may be missing, because the result's own are known.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from .calls import Call, Slot, aten
from .translating import operation


def _rank(call: Call, operand: int) -> int | None:
    shape = call.shape(operand)
    return None if shape is None else len(shape)


def _axis(call: Call, default: int) -> int:
    return call.get("axis", default) % len(call.shape(0))


def _axes(call: Call, place: int = 1) -> list[int] | None:
    """Axes from the attribute of older operator sets, or from an operand that is constant."""
    axes = call.get("axes")
    if axes is None and call.operand(place) is not None:
        number = call.number(place)
        axes = None if number is None else number.ravel().tolist()
    return None if axes is None else [int(axis) for axis in axes]


# -- products ----------------------------------------------------------------------------------------------------


@operation("Conv", "ConvTranspose")
def _convolution(call: Call) -> bool:
    target, args = convolution(call)
    return target is not None and call.emit(target, *args, optional={2: 2})


def convolution(call: Call) -> tuple[Any, tuple]:
    """PyTorch's operation for a convolution, and its arguments; None where there is none."""
    rank = _rank(call, 1)
    if rank not in (3, 4, 5) or rank != _rank(call, 0):
        return None, ()
    axes = rank - 2
    pads, auto = call.get("pads", []), call.get("auto_pad", "NOTSET")
    # Only whether there is padding matters: it adds zeros, which have no shift.
    padded = [int(any(pads) if auto == "NOTSET" else auto != "VALID")] * axes
    strides, dilations = (list(call.get(name, [1] * axes)) for name in ("strides", "dilations"))
    group, x, weight, bias = call.get("group", 1), *(*call.operands, None)[:3]
    if call.node.op_type == "ConvTranspose":
        target = {1: aten.conv_transpose1d.default, 2: aten.conv_transpose2d.input, 3: aten.conv_transpose3d.input}
        return target[axes], (x, weight, bias, strides, padded, [0] * axes, group, dilations)
    target = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
    return target[axes], (x, weight, bias, strides, padded, dilations, group)


@operation("Gemm")
def _gemm(call: Call) -> bool:
    if not call.is_constant(1) or _rank(call, 1) != 2:
        return False
    x = call.operands[0]
    if call.get("transA", 0):
        x = call.step(aten.permute.default, x, [1, 0])
    weight, slot = weight_of(call, 1, transposed=not call.get("transB", 0))
    bias, slots = call.operand(2), [slot]
    if bias is not None:
        fits = call.is_constant(2) and call.shape(2) in (
            [weight.meta["val"].shape[0]],
            [1, weight.meta["val"].shape[0]],
        )
        if not fits:
            return False
        if _rank(call, 2) == 2:
            bias = call.derived(aten.reshape.default, bias, [-1])
        if call.get("beta", 1.0) != 1:
            bias = call.derived(aten.mul.Tensor, bias, call.get("beta"))
    slots.append(call.slot(2, 2, required=call.version < 11, factor="beta"))
    return call.emit(aten.linear.default, x, weight, bias, slots=slots)


def weight_of(call: Call, operand: int, *, transposed: bool) -> tuple[torch.fx.Node, Slot]:
    """A constant factor as a linear layer has it, multiplied by the attribute `alpha` if there is one."""
    weight = call.operands[operand]
    if transposed:
        weight = call.derived(aten.t.default, weight)
    if call.get("alpha", 1.0) != 1:
        weight = call.derived(aten.mul.Tensor, weight, call.get("alpha"))
    return weight, call.slot(1, operand, store=torch.Tensor.t if transposed else None, factor="alpha")


@operation("MatMul")
def _matmul(call: Call) -> bool:
    ranks = (_rank(call, 0), _rank(call, 1))
    if None in ranks or min(ranks) < 2:
        return False
    return call.emit(aten.matmul.default, *call.operands)


@operation("Einsum")
def _einsum(call: Call) -> bool:
    if len(call.operands) != 2:
        return False
    return call.emit(aten.einsum.default, call.get("equation"), list(call.operands))


@operation("Gather")
def _gather(call: Call) -> bool:
    axis, index = call.get("axis", 0), call.number(1)
    if call.is_constant(0):
        return axis == 0 and _rank(call, 0) == 2 and index is None and call.emit(aten.embedding.default, *call.operands)
    axis %= len(call.shape(0))
    if index is not None and index.ndim == 0:
        return call.emit(aten.select.int, call.operands[0], axis, int(index))
    if _rank(call, 1) == 1:
        return call.emit(aten.index_select.default, call.operands[0], axis, call.operands[1])
    if _rank(call, 1) is None:
        return False
    return call.emit(aten.index.Tensor, call.operands[0], [None] * axis + [call.operands[1]])


# -- arithmetic --------------------------------------------------------------------------------------------------


@operation("Add", "Sub", "Mul", "Div")
def _arithmetic(call: Call) -> bool:
    if any(operand is None or not isinstance(operand.meta["val"], torch.Tensor) for operand in call.operands):
        return False
    if call.get("broadcast") is not None or len(call.operands) != 2:  # of operator sets before 7
        return False
    if not call.is_fixed() and all(size == 1 for size in call.result().shape):
        return False  # nothing is gained with a single number, a step between integers say
    targets = {"Add": aten.add.Tensor, "Sub": aten.sub.Tensor, "Mul": aten.mul.Tensor, "Div": aten.div.Tensor}
    return call.emit(targets[call.node.op_type], *call.operands)


@operation("Sum")
def _sum(call: Call) -> bool:
    """Of any number of values."""
    if any(operand is None or not isinstance(operand.meta["val"], torch.Tensor) for operand in call.operands):
        return False
    *before, last = call.operands
    if not before:
        return call.emit(aten.clone.default, last)
    total = before[0]
    for operand in before[1:]:
        total = call.step(aten.add.Tensor, total, operand)
    return call.emit(aten.add.Tensor, total, last)


@operation("Max", "Min")
def _extreme(call: Call) -> bool:
    """Of two values, of which one may be a constant."""
    if len(call.operands) != 2 or any(_rank(call, place) is None for place in (0, 1)):
        return False
    target = aten.maximum.default if call.node.op_type == "Max" else aten.minimum.default
    first, second = call.operands
    return call.emit(target, second, first) if call.is_constant(0) else call.emit(target, first, second)


@operation("Where")
def _where(call: Call) -> bool:
    if any(_rank(call, place) is None for place in range(3)):
        return False
    return call.emit(aten.where.self, *call.operands)


@operation("BatchNormalization")
def _batch_norm(call: Call) -> bool:
    training = call.get("training_mode", 0) or call.get("spatial", 1) != 1 or not call.only_first()
    if training or len(call.operands) != 5 or _rank(call, 0) in (None, 0, 1):
        return False
    eps, momentum = call.get("epsilon", 1e-5), call.get("momentum", 0.9)
    return call.emit(aten.batch_norm.default, *call.operands, False, momentum, eps, False)


@operation("LayerNormalization")
def _layer_norm(call: Call) -> bool:
    rank = _rank(call, 0)
    last = rank is not None and call.get("axis", -1) % max(rank, 1) == rank - 1
    if not last or not call.only_first() or _rank(call, 1) != 1 or call.get("stash_type", 1) != 1:
        return False
    x, weight, bias = (*call.operands, None)[:3]
    if bias is not None and _rank(call, 2) != 1:
        return False
    args = (x, [call.shape(1)[0]], weight, bias, call.get("epsilon", 1e-5))
    slots = [call.slot(2, 1, required=True), call.slot(3, 2)]
    return call.emit(aten.layer_norm.default, *args, slots=slots)


@operation("RMSNormalization")
def _rms_norm(call: Call) -> bool:
    rank = _rank(call, 0)
    if rank is None or call.get("axis", -1) % rank != rank - 1 or _rank(call, 1) != 1:
        return False
    x, weight = call.operands
    slots = [call.slot(2, 1, required=True)]
    return call.emit(aten.rms_norm.default, x, [call.shape(1)[0]], weight, call.get("epsilon", 1e-5), slots=slots)


@operation("InstanceNormalization")
def _instance_norm(call: Call) -> bool:
    if _rank(call, 0) not in (3, 4, 5):
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


@operation("Relu")
def _relu(call: Call) -> bool:
    return call.emit(aten.relu.default, call.operands[0])


@operation("LeakyRelu")
def _leaky_relu(call: Call) -> bool:
    return call.emit(aten.leaky_relu.default, call.operands[0], call.get("alpha", 0.01))


@operation("PRelu")
def _prelu(call: Call) -> bool:
    """With one slope, or one for each channel."""
    shape, rank = call.shape(1), _rank(call, 0)
    if not call.is_constant(1) or rank in (None, 0):
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
    before, after = call.operands[0].meta["val"].dtype, call.result().dtype
    if before == after:
        return call.emit(aten.clone.default, call.operands[0])
    return call.emit(aten.to.dtype, call.operands[0], after)


# -- layout ------------------------------------------------------------------------------------------------------


@operation("Shape", "Size")
def _shape(call: Call) -> bool:
    """What reads no numbers; the result's own type and sizes are not those of the operand."""
    return _rank(call, 0) is not None and call.emit(aten.empty_like.default, call.operands[0])


@operation("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def _reshape(call: Call) -> bool:
    # The result's sizes say all; those that an operand computes are read, so that it stays.
    rest = [operand for operand in call.operands[1:] if operand is not None and not _is_placeholder(operand)]
    if rest:
        return call.emit(aten.reshape.default, call.operands[0], rest[0])
    return call.emit(aten.reshape.default, call.operands[0], _known(call))


def _known(call: Call) -> list[int]:
    """The result's sizes, -1 for those that differ from run to run."""
    return [size if isinstance(size, int) else -1 for size in call.result().shape]


def _is_placeholder(operand: torch.fx.Node) -> bool:
    return operand.op == "placeholder"


@operation("Transpose")
def _transpose(call: Call) -> bool:
    perm = call.get("perm", list(range(len(call.shape(0))))[::-1])
    return call.emit(aten.permute.default, call.operands[0], [int(axis) for axis in perm])


@operation("Expand")
def _expand(call: Call) -> bool:
    if call.is_constant(1):
        return call.emit(aten.expand.default, call.operands[0], _known(call))
    return call.emit(aten.expand.default, *call.operands)


@operation("Concat")
def _concat(call: Call) -> bool:
    if any(operand is None or not isinstance(operand.meta["val"], torch.Tensor) for operand in call.operands):
        return False
    return call.emit(aten.cat.default, list(call.operands), _axis(call, 0))


@operation("Split")
def _split(call: Call) -> bool:
    if not all(call.node.output) or len(call.node.output) < 2:
        return False
    axis = _axis(call, 0)
    results = [call.result(number) for number in range(len(call.node.output))]
    if any(result is None for result in results):
        return False
    sizes = [result.shape[axis] for result in results]
    if not all(isinstance(size, int) for size in sizes):
        return False
    extra = [o for o in call.operands[1:] if o is not None and not _is_placeholder(o)]
    if extra:
        return False
    return call.emit(aten.split_with_sizes.default, call.operands[0], sizes, axis, outputs=len(sizes))


@operation("Slice")
def _slice(call: Call) -> bool:
    """By constants, from front to back."""
    if call.version < 10:
        starts, ends, axes, steps = call.get("starts"), call.get("ends"), call.get("axes"), None
    else:
        given = [call.number(place) if call.operand(place) is not None else None for place in range(1, 5)]
        known = all(call.operand(place) is None or given[place - 1] is not None for place in range(1, 5))
        if not known:
            return False
        starts, ends, axes, steps = (None if g is None else g.ravel().tolist() for g in given)
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    ranges = [tuple(map(int, entry)) for entry in zip(axes, starts, ends, steps, strict=True)]
    if not ranges or any(step < 1 for *_, step in ranges):
        return False
    x = call.operands[0]
    for entry in ranges[:-1]:
        x = call.step(aten.slice.Tensor, x, *entry)
    return call.emit(aten.slice.Tensor, x, *ranges[-1])


@operation("Pad")
def _pad(call: Call) -> bool:
    """With zeros or copies, by constants."""
    rank, mode = len(call.shape(0)), call.get("mode", "constant")
    if call.version < 11:
        pads, value, axes = call.get("pads"), call.get("value", 0.0), None
    else:
        pads = call.number(1)
        value = call.number(2) if call.operand(2) is not None else 0.0
        axes = call.number(3) if call.operand(3) is not None else None
        if pads is None or value is None or (call.operand(3) is not None and axes is None):
            return False
        pads = pads.ravel().tolist()
    if mode not in ("constant", "reflect", "edge") or (mode == "constant" and float(value) != 0):
        return False
    where = list(range(rank)) if axes is None else [int(axis) % rank for axis in axes.ravel()]
    before, after = [0] * rank, [0] * rank
    for place, axis in enumerate(where):
        before[axis], after[axis] = int(pads[place]), int(pads[place + len(where)])
    amounts = [amount for axis in reversed(range(rank)) for amount in (before[axis], after[axis])]
    if mode == "constant":
        return call.emit(aten.constant_pad_nd.default, call.operands[0], amounts)
    return call.emit(aten.pad.default, call.operands[0], amounts, "replicate" if mode == "edge" else mode)


# -- pooling -----------------------------------------------------------------------------------------------------


@operation("MaxPool")
def _max_pool(call: Call) -> bool:
    axes = len(call.shape(0)) - 2
    targets = {1: aten.max_pool1d.default, 2: aten.max_pool2d.default, 3: aten.max_pool3d.default}
    if axes not in targets or not call.only_first():
        return False
    return call.emit(targets[axes], call.operands[0], list(call.get("kernel_shape")))


@operation("AveragePool")
def _average_pool(call: Call) -> bool:
    axes = len(call.shape(0)) - 2
    targets = {1: aten.avg_pool1d.default, 2: aten.avg_pool2d.default, 3: aten.avg_pool3d.default}
    if axes not in targets:
        return False
    auto = call.get("auto_pad", "NOTSET")
    padded = any(call.get("pads", [])) if auto == "NOTSET" else auto != "VALID"
    padded = padded or bool(call.get("ceil_mode", 0))  # windows may reach beyond the end
    counted = bool(call.get("count_include_pad", 0))
    kernel = list(call.get("kernel_shape"))
    args = (kernel, list(call.get("strides", [1] * axes)), [int(padded)] * axes, False, counted)
    return call.emit(targets[axes], call.operands[0], *args)


@operation("GlobalAveragePool", "GlobalMaxPool")
def _global_pool(call: Call) -> bool:
    target = aten.mean.dim if call.node.op_type == "GlobalAveragePool" else aten.amax.default
    return call.emit(target, call.operands[0], list(range(2, len(call.shape(0)))), True)


_REDUCTIONS = {
    "ReduceMean": aten.mean.dim, "ReduceSum": aten.sum.dim_IntList, "ReduceMax": aten.amax.default,
    "ReduceMin": aten.amin.default,
}  # fmt: skip


@operation(*_REDUCTIONS)
def _reduce(call: Call) -> bool:
    rank, axes = len(call.shape(0)), _axes(call)
    if axes is None:
        if call.operand(1) is not None or call.get("noop_with_empty_axes", 0):
            return False
        axes = list(range(rank))
    if not axes:
        return False
    target = _REDUCTIONS[call.node.op_type]
    return call.emit(target, call.operands[0], [axis % rank for axis in axes], bool(call.get("keepdims", 1)))


@operation("Resize", "Upsample")
def _resize(call: Call) -> bool:
    """Between neighbouring positions of one channel, the weights adding up to one."""
    before, after = call.shape(0), list(call.result().shape)
    if call.get("coordinate_transformation_mode") == "tf_crop_and_resize" or len(before) not in (3, 4):
        return False
    if any(a is not b and a != b for a, b in zip(before[:2], after[:2], strict=True)):
        return False
    mode = call.get("mode", "nearest")
    targets = {
        ("nearest", 3): aten.upsample_nearest1d.vec, ("nearest", 4): aten.upsample_nearest2d.vec,
        ("linear", 3): aten.upsample_linear1d.vec, ("linear", 4): aten.upsample_bilinear2d.vec,
        ("cubic", 4): aten.upsample_bicubic2d.vec,
    }  # fmt: skip
    if (mode, len(before)) not in targets:
        return False
    rest = [operand for operand in call.operands[1:] if operand is not None and not _is_placeholder(operand)]
    if any(isinstance(value := operand.meta["val"], torch.Tensor) and value.is_floating_point() for operand in rest):
        return False  # factors that are computed are values as any
    return call.emit(targets[mode, len(before)], call.operands[0], *rest)


@operation("DepthToSpace")
def _depth_to_space(call: Call) -> bool:
    if _rank(call, 0) != 4:
        return False
    (batch, channels, height, width), block = call.shape(0), call.get("blocksize")
    if call.get("mode", "DCR") == "CRD":
        return call.emit(aten.pixel_shuffle.default, call.operands[0], block)
    parts = [batch, block, block, channels // block**2, height, width]
    x = call.step(aten.reshape.default, call.operands[0], parts)
    x = call.step(aten.permute.default, x, [0, 3, 4, 1, 5, 2])
    return call.emit(aten.reshape.default, x, _known(call))


@operation("SpaceToDepth")
def _space_to_depth(call: Call) -> bool:
    if _rank(call, 0) != 4:
        return False
    (batch, channels, *_), block = call.shape(0), call.get("blocksize")
    height, width = call.result().shape[2:]
    x = call.step(aten.reshape.default, call.operands[0], [batch, channels, height, block, width, block])
    x = call.step(aten.permute.default, x, [0, 3, 5, 1, 2, 4])
    return call.emit(aten.reshape.default, x, _known(call))


@operation("Tile")
def _tile(call: Call) -> bool:
    repeats = call.number(1)
    return repeats is not None and call.emit(aten.repeat.default, call.operands[0], [int(r) for r in repeats.ravel()])
