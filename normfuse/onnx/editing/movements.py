"""Operations of ONNX that move, choose or gather values along axes, as those of PyTorch; see :mod:`.operations`."""

from __future__ import annotations

import torch

from .calls import Call, aten
from .translating import axes_of, axis_of, operation, rank_of

# -- layout ------------------------------------------------------------------------------------------------------


@operation("Shape", "Size")
def _shape(call: Call) -> bool:
    """What reads no numbers; the result's own type and sizes are not those of the operand."""
    return call.is_tensor(0) and call.emit(aten.empty_like.default, call.operands[0])


@operation("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def _reshape(call: Call) -> bool:
    # The result's sizes say all; those that an operand computes are read, so that it stays.
    rest = [operand for operand in call.operands[1:] if operand is not None and not _is_placeholder(operand)]
    if rest:
        return call.emit(aten.reshape.default, call.operands[0], rest[0])
    return call.emit(aten.reshape.default, call.operands[0], call.sizes())


def _is_placeholder(operand: torch.fx.Node) -> bool:
    return operand.op == "placeholder"


@operation("Transpose")
def _transpose(call: Call) -> bool:
    perm = call.get("perm", list(range(len(call.shape(0))))[::-1])
    return call.emit(aten.permute.default, call.operands[0], [int(axis) for axis in perm])


@operation("Expand")
def _expand(call: Call) -> bool:
    if call.is_constant(1):
        return call.emit(aten.expand.default, call.operands[0], call.sizes())
    return call.emit(aten.expand.default, *call.operands)


@operation("Concat")
def _concat(call: Call) -> bool:
    return call.only_tensors() and call.emit(aten.cat.default, list(call.operands), axis_of(call, 0))


@operation("Split")
def _split(call: Call) -> bool:
    if not all(call.node.output):
        return False
    if len(call.node.output) == 1:  # as tools unpack an axis of size one
        return call.emit(aten.clone.default, call.operands[0])
    axis = axis_of(call, 0)
    sizes = [call.result(number).shape[axis] for number in range(len(call.node.output))]
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
    sizes = call.shape(0)
    if not ranges or any(step < 0 and not isinstance(sizes[axis], int) for axis, *_, step in ranges):
        return False
    if not all(step for *_, step in ranges):
        return False
    x, turned = call.operands[0], [axis for axis, *_, step in ranges if step < 0]
    if turned:
        x = call.step(aten.flip.default, x, turned)
    ranges = [entry if entry[3] > 0 else _from_the_end(entry, sizes[entry[0]]) for entry in ranges]
    for entry in ranges[:-1]:
        x = call.step(aten.slice.Tensor, x, *entry)
    return call.emit(aten.slice.Tensor, x, *ranges[-1])


def _from_the_end(entry: tuple[int, ...], size: int) -> tuple[int, ...]:
    """A range that runs backwards, on the reversed axis."""
    axis, start, end, step = entry
    start = min(max(start if start >= 0 else start + size, 0), size - 1)
    end = max(end if end >= 0 else end + size, -1)
    return axis, size - 1 - start, size - 1 - end, -step


_COPIES = {"edge": "replicate", "reflect": "reflect", "wrap": "circular"}


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
    if mode not in _COPIES and (mode != "constant" or float(value) != 0):
        return False
    where = list(range(rank)) if axes is None else [int(axis) % rank for axis in axes.ravel()]
    before, after = [0] * rank, [0] * rank
    for place, axis in enumerate(where):
        before[axis], after[axis] = int(pads[place]), int(pads[place + len(where)])
    amounts = [amount for axis in reversed(range(rank)) for amount in (before[axis], after[axis])]
    if mode == "constant":
        return call.emit(aten.constant_pad_nd.default, call.operands[0], amounts)
    return call.emit(aten.pad.default, call.operands[0], amounts, _COPIES[mode])


# -- pooling -----------------------------------------------------------------------------------------------------


@operation("MaxPool")
def _max_pool(call: Call) -> bool:
    axes = len(call.shape(0)) - 2
    targets = {
        1: (aten.max_pool1d.default, aten.max_pool1d_with_indices.default),
        2: (aten.max_pool2d.default, aten.max_pool2d_with_indices.default),
        3: (aten.max_pool3d.default, aten.max_pool3d_with_indices.default),
    }
    if axes not in targets:
        return False
    plain, ranked = targets[axes]
    kernel = list(call.get("kernel_shape"))
    if call.only_first():
        return call.emit(plain, call.operands[0], kernel)
    return call.emit(ranked, call.operands[0], kernel, outputs=2)


@operation("AveragePool")
def _average_pool(call: Call) -> bool:
    axes = len(call.shape(0)) - 2
    targets = {1: aten.avg_pool1d.default, 2: aten.avg_pool2d.default, 3: aten.avg_pool3d.default}
    if axes not in targets:
        return False
    kernel = list(call.get("kernel_shape"))
    padded = call.is_padded(kernel) or bool(call.get("ceil_mode", 0))  # windows may reach beyond the end
    counted = bool(call.get("count_include_pad", 0))
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
    rank, axes = len(call.shape(0)), axes_of(call)
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
    if call.get("coordinate_transformation_mode") == "tf_crop_and_resize" or len(before) not in (3, 4, 5):
        return False
    if any(a is not b and a != b for a, b in zip(before[:2], after[:2], strict=True)):
        return False
    mode = call.get("mode", "nearest")
    targets = {
        ("nearest", 3): aten.upsample_nearest1d.vec, ("nearest", 4): aten.upsample_nearest2d.vec,
        ("linear", 3): aten.upsample_linear1d.vec, ("linear", 4): aten.upsample_bilinear2d.vec,
        ("nearest", 5): aten.upsample_nearest3d.vec, ("linear", 5): aten.upsample_trilinear3d.vec,
        ("cubic", 4): aten.upsample_bicubic2d.vec,
    }  # fmt: skip
    if (mode, len(before)) not in targets:
        return False
    rest = [operand for operand in call.operands[1:] if operand is not None and not _is_placeholder(operand)]
    if any(isinstance(value := operand.meta["val"], torch.Tensor) and value.is_floating_point() for operand in rest):
        return False  # factors that are computed are values as any
    return call.emit(targets[mode, len(before)], call.operands[0], *rest)


@operation("GridSample")
def _grid_sample(call: Call) -> bool:
    """Only whether zeros are around matters; elsewhere the weights add up to one."""
    zeros = call.get("padding_mode", "zeros") == "zeros"
    return call.is_tensor(1) and call.emit(aten.grid_sampler.default, *call.operands, 0, int(not zeros), False)


@operation("DepthToSpace")
def _depth_to_space(call: Call) -> bool:
    if rank_of(call, 0) != 4:
        return False
    (batch, channels, height, width), block = call.shape(0), call.get("blocksize")
    if call.get("mode", "DCR") == "CRD":
        return call.emit(aten.pixel_shuffle.default, call.operands[0], block)
    parts = [batch, block, block, channels // block**2, height, width]
    x = call.step(aten.reshape.default, call.operands[0], parts)
    x = call.step(aten.permute.default, x, [0, 3, 4, 1, 5, 2])
    return call.emit(aten.reshape.default, x, call.sizes())


@operation("SpaceToDepth")
def _space_to_depth(call: Call) -> bool:
    if rank_of(call, 0) != 4:
        return False
    (batch, channels, *_), block = call.shape(0), call.get("blocksize")
    height, width = call.result().shape[2:]
    x = call.step(aten.reshape.default, call.operands[0], [batch, channels, height, block, width, block])
    x = call.step(aten.permute.default, x, [0, 3, 5, 1, 2, 4])
    return call.emit(aten.reshape.default, x, call.sizes())


@operation("Tile")
def _tile(call: Call) -> bool:
    repeats, given, sizes = call.number(1), call.shape(0), call.result().shape
    if repeats is not None:
        return call.emit(aten.repeat.default, call.operands[0], [int(r) for r in repeats.ravel()])
    expanded = all(isinstance(a, int) and a in (1, b) for a, b in zip(given, sizes, strict=True))
    return expanded and call.emit(aten.expand.default, *call.operands)
