"""The operations of ONNX that have a rule in folding, as those of PyTorch; all others are opaque to it.

A translation need not be complete: what decides is which form folding has to know. One that gives False leaves the
operation opaque. Sizes that only shape a result may be missing, because the result's own are known.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .calls import Call, aten

_TABLE: dict[str, Callable[[Call], bool]] = {}
# What is translated completely, so that the value of a result may be computed where all operands are constants.
_EXACT = frozenset(
    "Abs Add Cast Concat Div Dropout Expand Flatten Identity Mul Neg Relu Reshape Squeeze Sub Transpose "
    "Unsqueeze".split()
)


def translate(call: Call) -> bool:
    """Put an operation into the program as one that folding knows; False if there is none."""
    if call.product is not None:
        return call.emit_product()
    translation = _TABLE.get(call.node.op_type)
    if translation is None or not call.node.output or not call.node.output[0]:
        return False
    result = call.result()
    if result is None or not result.is_floating_point() or (call.operands and call.operands[0] is None):
        return False
    if call.is_fixed() and call.node.op_type not in _EXACT:
        return False
    first = call.operands[0].meta["val"] if call.operands else None
    return isinstance(first, torch.Tensor) and translation(call)


def _operation(*kinds: str) -> Callable:
    def register(function: Callable[[Call], bool]) -> Callable[[Call], bool]:
        _TABLE.update(dict.fromkeys(kinds, function))
        return function

    return register


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


@_operation("Conv", "ConvTranspose")
def _convolution(call: Call) -> bool:
    rank = _rank(call, 1)
    if rank not in (3, 4, 5) or rank != _rank(call, 0):
        return False
    axes = rank - 2
    pads, auto = call.get("pads", []), call.get("auto_pad", "NOTSET")
    # Only whether there is padding matters: it adds zeros, which have no shift.
    padded = any(pads) if auto == "NOTSET" else auto != "VALID"
    strides, dilations = call.get("strides", [1] * axes), call.get("dilations", [1] * axes)
    group = call.get("group", 1)
    x, weight, bias = (*call.operands, None)[:3]
    if call.node.op_type == "Conv":
        target = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}[axes]
        args = (x, weight, bias, list(strides), [int(padded)] * axes, list(dilations), group)
    else:
        target = {1: aten.conv_transpose1d.default, 2: aten.conv_transpose2d.input, 3: aten.conv_transpose3d.input}
        args = (x, weight, bias, list(strides), [int(padded)] * axes, [0] * axes, group, list(dilations))
        target = target[axes]
    return call.emit(target, *args, optional={2: 2})


@_operation("Gemm")
def _gemm(call: Call) -> bool:
    plain = call.get("alpha", 1.0) == 1 and not call.get("transA", 0)
    if not plain or not call.is_constant(1) or _rank(call, 1) != 2:
        return False
    x, weight, bias = (*call.operands, None)[:3]
    if bias is not None and (call.get("beta", 1.0) != 1 or not call.is_constant(2)):
        return False
    if bias is not None and call.shape(2) != [call.shape(1)[0 if call.get("transB", 0) else 1]]:
        return False
    swapped = not call.get("transB", 0)
    slots = [call.slot((1,), 1, transposed=swapped), call.slot((2,), 2, required=call.version < 11)]
    return call.emit(aten.linear.default, x, call.transposed(weight) if swapped else weight, bias, slots=slots)


@_operation("MatMul")
def _matmul(call: Call) -> bool:
    ranks = (_rank(call, 0), _rank(call, 1))
    if None in ranks or min(ranks) < 2:
        return False
    return call.emit(aten.matmul.default, *call.operands)


@_operation("Einsum")
def _einsum(call: Call) -> bool:
    if len(call.operands) != 2:
        return False
    return call.emit(aten.einsum.default, call.get("equation"), list(call.operands))


@_operation("Gather")
def _gather(call: Call) -> bool:
    axis, index = call.get("axis", 0), call.number(1)
    if call.is_constant(0):
        return axis == 0 and _rank(call, 0) == 2 and index is None and call.emit(aten.embedding.default, *call.operands)
    axis %= len(call.shape(0))
    if index is not None and index.ndim == 0:
        return call.emit(aten.select.int, call.operands[0], axis, int(index))
    if _rank(call, 1) == 1:
        return call.emit(aten.index_select.default, call.operands[0], axis, call.operands[1])
    return False


# -- arithmetic --------------------------------------------------------------------------------------------------


@_operation("Add", "Sub", "Mul", "Div")
def _arithmetic(call: Call) -> bool:
    if any(operand is None or not isinstance(operand.meta["val"], torch.Tensor) for operand in call.operands):
        return False
    if call.get("broadcast") is not None or len(call.operands) != 2:  # of operator sets before 7
        return False
    if not call.is_fixed() and all(size == 1 for size in call.result().shape):
        return False  # nothing is gained with a single number, a step between integers say
    targets = {"Add": aten.add.Tensor, "Sub": aten.sub.Tensor, "Mul": aten.mul.Tensor, "Div": aten.div.Tensor}
    return call.emit(targets[call.node.op_type], *call.operands)


@_operation("BatchNormalization")
def _batch_norm(call: Call) -> bool:
    training = call.get("training_mode", 0) or call.get("spatial", 1) != 1 or not call.only_first()
    if training or len(call.operands) != 5 or _rank(call, 0) in (None, 0, 1):
        return False
    eps, momentum = call.get("epsilon", 1e-5), call.get("momentum", 0.9)
    return call.emit(aten.batch_norm.default, *call.operands, False, momentum, eps, False)


@_operation("LayerNormalization")
def _layer_norm(call: Call) -> bool:
    rank = _rank(call, 0)
    last = rank is not None and call.get("axis", -1) % max(rank, 1) == rank - 1
    if not last or not call.only_first() or _rank(call, 1) != 1 or call.get("stash_type", 1) != 1:
        return False
    x, weight, bias = (*call.operands, None)[:3]
    if bias is not None and _rank(call, 2) != 1:
        return False
    args = (x, [call.shape(1)[0]], weight, bias, call.get("epsilon", 1e-5))
    slots = [call.slot((2,), 1, required=True), call.slot((3,), 2)]
    return call.emit(aten.layer_norm.default, *args, slots=slots)


@_operation("RMSNormalization")
def _rms_norm(call: Call) -> bool:
    rank = _rank(call, 0)
    if rank is None or call.get("axis", -1) % rank != rank - 1 or _rank(call, 1) != 1:
        return False
    x, weight = call.operands
    slots = [call.slot((2,), 1, required=True)]
    return call.emit(aten.rms_norm.default, x, [call.shape(1)[0]], weight, call.get("epsilon", 1e-5), slots=slots)


@_operation("Relu")
def _relu(call: Call) -> bool:
    return call.emit(aten.relu.default, call.operands[0])


@_operation("LeakyRelu")
def _leaky_relu(call: Call) -> bool:
    return call.emit(aten.leaky_relu.default, call.operands[0], call.get("alpha", 0.01))


@_operation("Abs")
def _abs(call: Call) -> bool:
    return call.emit(aten.abs.default, call.operands[0])


@_operation("Neg")
def _neg(call: Call) -> bool:
    return call.emit(aten.neg.default, call.operands[0])


@_operation("Clip")
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


@_operation("Identity", "Dropout")
def _identity(call: Call) -> bool:
    """Dropout outside of training. As a copy it stays where it is."""
    if not call.only_first():
        return False
    training = call.number(2) if call.operand(2) is not None else False
    if training is None or bool(training):
        return False
    return call.emit(aten.clone.default, call.operands[0])


@_operation("Cast")
def _cast(call: Call) -> bool:
    """One that changes nothing is a copy, which stays."""
    before, after = call.operands[0].meta["val"].dtype, call.result().dtype
    if before == after:
        return call.emit(aten.clone.default, call.operands[0])
    return call.emit(aten.to.dtype, call.operands[0], after)


# -- layout ------------------------------------------------------------------------------------------------------


@_operation("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def _reshape(call: Call) -> bool:
    # The result's sizes say all; those that an operand computes are read, so that it stays.
    shape = [size if isinstance(size, int) else -1 for size in call.result().shape]
    rest = [operand for operand in call.operands[1:] if operand is not None and not _is_placeholder(operand)]
    if rest:
        return call.emit(aten.reshape.default, call.operands[0], rest[0])
    return call.emit(aten.reshape.default, call.operands[0], shape)


def _is_placeholder(operand: torch.fx.Node) -> bool:
    return operand.op == "placeholder"


@_operation("Transpose")
def _transpose(call: Call) -> bool:
    perm = call.get("perm", list(range(len(call.shape(0))))[::-1])
    return call.emit(aten.permute.default, call.operands[0], [int(axis) for axis in perm])


@_operation("Expand")
def _expand(call: Call) -> bool:
    if call.is_constant(1):
        shape = [size if isinstance(size, int) else -1 for size in call.result().shape]
        return call.emit(aten.expand.default, call.operands[0], shape)
    return call.emit(aten.expand.default, *call.operands)


@_operation("Concat")
def _concat(call: Call) -> bool:
    if any(operand is None or not isinstance(operand.meta["val"], torch.Tensor) for operand in call.operands):
        return False
    return call.emit(aten.cat.default, list(call.operands), _axis(call, 0))


@_operation("Split")
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


@_operation("Slice")
def _slice(call: Call) -> bool:
    """Along one axis, by constants."""
    if call.version < 10:
        starts, ends, axes, steps = call.get("starts"), call.get("ends"), call.get("axes"), None
    else:
        given = [call.number(place) if call.operand(place) is not None else None for place in range(1, 5)]
        known = all(call.operand(place) is None or given[place - 1] is not None for place in range(1, 5))
        if not known:
            return False
        starts, ends, axes, steps = (None if g is None else g.ravel().tolist() for g in given)
    axes = list(range(len(starts))) if axes is None else axes
    step = 1 if steps is None else steps[0]
    if len(starts) != 1 or step < 1:
        return False
    return call.emit(aten.slice.Tensor, call.operands[0], int(axes[0]), int(starts[0]), int(ends[0]), int(step))


@_operation("Pad")
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


@_operation("MaxPool")
def _max_pool(call: Call) -> bool:
    axes = len(call.shape(0)) - 2
    targets = {1: aten.max_pool1d.default, 2: aten.max_pool2d.default, 3: aten.max_pool3d.default}
    if axes not in targets or not call.only_first():
        return False
    return call.emit(targets[axes], call.operands[0], list(call.get("kernel_shape")))


@_operation("AveragePool")
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


@_operation("GlobalAveragePool", "GlobalMaxPool")
def _global_pool(call: Call) -> bool:
    target = aten.mean.dim if call.node.op_type == "GlobalAveragePool" else aten.amax.default
    return call.emit(target, call.operands[0], list(range(2, len(call.shape(0)))), True)


@_operation("ReduceMean", "ReduceMax")
def _reduce(call: Call) -> bool:
    rank, axes = len(call.shape(0)), _axes(call)
    if axes is None:
        if call.operand(1) is not None or call.get("noop_with_empty_axes", 0):
            return False
        axes = list(range(rank))
    if not axes:
        return False
    target = aten.mean.dim if call.node.op_type == "ReduceMean" else aten.amax.default
    return call.emit(target, call.operands[0], [axis % rank for axis in axes], bool(call.get("keepdims", 1)))


@_operation("Resize", "Upsample")
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


@_operation("DepthToSpace")
def _depth_to_space(call: Call) -> bool:
    return call.get("mode", "DCR") == "CRD" and call.emit(
        aten.pixel_shuffle.default, call.operands[0], call.get("blocksize")
    )


@_operation("Tile")
def _tile(call: Call) -> bool:
    repeats = call.number(1)
    return repeats is not None and call.emit(aten.repeat.default, call.operands[0], [int(r) for r in repeats.ravel()])
