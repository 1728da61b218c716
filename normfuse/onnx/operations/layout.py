"""Operations that move, select and join elements."""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional as F

from normfuse.onnx.operations.registry import Untranslated, axes_of, is_sizes, operation, sizes, tensor


@operation("Range")
def _range(node: ir.Node, start: Any, limit: Any, delta: Any) -> Tensor:
    return torch.arange(*(sizes(value)[0] for value in (start, limit, delta)))


@operation("Shape")
def _shape(node: ir.Node, x: Tensor) -> list[int]:
    shape = x.shape if isinstance(x, Tensor) else [len(x)] if isinstance(x, list) else []
    return list(shape[node.attributes.get_int("start", 0) : node.attributes.get_int("end", None)])


@operation("ConstantOfShape")
def _constant_of_shape(node: ir.Node, shape: Any) -> Any:
    value = node.attributes.get_tensor("value", None)
    fill = 0.0 if value is None else value.numpy().item()
    if isinstance(fill, int) and len(sizes(shape)) == 1 and isinstance(sizes(shape)[0], int):
        return [fill] * sizes(shape)[0]
    return torch.full(sizes(shape), fill)


@operation("Reshape")
def _reshape(node: ir.Node, x: Any, shape: Any) -> Any:
    if is_sizes(x):
        return sizes(x) if sizes(shape) == [-1] else sizes(x)[0]
    target = sizes(shape)
    if not node.attributes.get_int("allowzero", 0):
        target = [x.shape[axis] if isinstance(size, int) and size == 0 else size for axis, size in enumerate(target)]
    return x.reshape(target)


@operation("Flatten")
def _flatten(node: ir.Node, x: Tensor) -> Tensor:
    axis = node.attributes.get_int("axis", 1)
    return x.reshape([math.prod(x.shape[:axis]), -1]) if axis else x.reshape([1, -1])


@operation("Expand")
def _expand(node: ir.Node, x: Any, shape: Any) -> Any:
    if isinstance(x, list) and len(sizes(shape)) == 1 and isinstance(sizes(shape)[0], int):
        return x * (sizes(shape)[0] if len(x) == 1 else 1)
    x = tensor(x)
    target, missing = sizes(shape), len(sizes(shape)) - x.dim()
    own = [1] * missing + list(x.shape)
    return x.expand(
        [o if isinstance(s, int) and s == 1 else s for s, o in zip(target, own[-len(target) :], strict=True)]
    )


@operation("Transpose")
def _transpose(node: ir.Node, x: Tensor) -> Tensor:
    return x.permute(list(node.attributes.get_ints("perm", list(range(x.dim()))[::-1])))


@operation("Squeeze")
def _squeeze(node: ir.Node, x: Any, axes: Any = None) -> Any:
    if is_sizes(x):
        return sizes(x)[0]
    where = axes_of(node, axes)
    return x.squeeze() if where is None else x.squeeze(where)


@operation("Unsqueeze")
def _unsqueeze(node: ir.Node, x: Any, axes: Any = None) -> Any:
    if is_sizes(x) and not isinstance(x, list):
        return [x]
    x, where = tensor(x), axes_of(node, axes)
    for axis in sorted(axis % (x.dim() + len(where)) for axis in where):
        x = x.unsqueeze(axis)
    return x


@operation("Concat")
def _concat(node: ir.Node, *parts: Any) -> Any:
    if all(is_sizes(part) for part in parts):
        return [size for part in parts for size in sizes(part)]
    return torch.cat([tensor(part) for part in parts], node.attributes["axis"].as_int())


@operation("Split")
def _split(node: ir.Node, x: Tensor, given: Any = None) -> Any:
    axis, count = node.attributes.get_int("axis", 0), len(node.outputs)
    lengths = axes_of(node, given) if given is not None else node.attributes.get_ints("split", None)
    if lengths is not None:
        return tuple(torch.split(x, list(lengths), axis))
    return tuple(torch.chunk(x, count, axis))


@operation("Slice")
def _slice(node: ir.Node, x: Any, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> Any:
    starts, ends = sizes(starts), sizes(ends)
    axes = list(range(len(starts))) if axes is None else sizes(axes)
    steps = [1] * len(starts) if steps is None else sizes(steps)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if is_sizes(x):
            x = sizes(x)[start : None if step < 0 and end < -len(sizes(x)) else end : step]
            continue
        axis = axis % x.dim()
        if step < 0:  # what PyTorch lacks: the same elements, counted from the other end
            size = x.shape[axis]
            first, last = (torch.sym_min(i, size - 1) if i >= 0 else torch.sym_max(i + size, -1) for i in (start, end))
            x, start, end, step = x.flip(axis), size - 1 - first, size - 1 - last, -step
        x = x[(slice(None),) * axis + (slice(start, end, step),)]
    return x


@operation("Gather")
def _gather(node: ir.Node, x: Any, indices: Any) -> Any:
    axis = node.attributes.get_int("axis", 0)
    if is_sizes(x):
        return [sizes(x)[i] for i in indices] if isinstance(indices, list) else sizes(x)[indices]
    if not isinstance(indices, list | Tensor):
        return x.select(axis, indices)
    index = tensor(indices)
    if axis == 0 and x.dim() == 2 and node.inputs[0].is_initializer():
        return F.embedding(index, x)
    return x.index_select(axis, index.reshape(-1)).reshape([*x.shape[:axis], *index.shape, *x.shape[axis:][1:]])


@operation("GatherElements")
def _gather_elements(node: ir.Node, x: Tensor, indices: Any) -> Tensor:
    return torch.gather(x, node.attributes.get_int("axis", 0), tensor(indices))


@operation("GatherND")
def _gather_nd(node: ir.Node, x: Tensor, indices: Any) -> Tensor:
    shared, index = node.attributes.get_int("batch_dims", 0), tensor(indices)
    if not shared:
        return x[index.unbind(-1)]
    # Every element of the shared axes picks from its own part.
    parts, picks = x.flatten(0, shared - 1), index.flatten(0, shared - 1)
    own = torch.arange(parts.shape[0]).reshape([-1, *[1] * (picks.dim() - 2)])
    found = parts[(own, *picks.unbind(-1))]
    return found.reshape([*x.shape[:shared], *found.shape[1:]])


@operation("Tile")
def _tile(node: ir.Node, x: Any, repeats: Any) -> Any:
    if is_sizes(x):
        return sizes(x) * sizes(repeats)[0]
    return x.repeat(sizes(repeats))


@operation("Trilu")
def _trilu(node: ir.Node, x: Tensor, k: Any = 0) -> Tensor:
    return (torch.triu if node.attributes.get_int("upper", 1) else torch.tril)(x, sizes(k)[0])


@operation("CumSum")
def _cumsum(node: ir.Node, x: Any, axis: Any) -> Tensor:
    if any(node.attributes.get_int(name, 0) for name in ("exclusive", "reverse")):
        raise Untranslated("a CumSum that is exclusive or goes backwards")
    return torch.cumsum(tensor(x), sizes(axis)[0])


@operation("Size")
def _size(node: ir.Node, x: Any) -> int:
    return math.prod(x.shape) if isinstance(x, Tensor) else len(sizes(x))


@operation("DepthToSpace")
def _depth_to_space(node: ir.Node, x: Tensor) -> Tensor:
    block = node.attributes["blocksize"].as_int()
    if node.attributes.get_string("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, block)
    n, _, h, w = x.shape
    return x.reshape(n, block, block, -1, h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, -1, h * block, w * block)


@operation("SpaceToDepth")
def _space_to_depth(node: ir.Node, x: Tensor) -> Tensor:
    block, (n, c, h, w) = node.attributes["blocksize"].as_int(), x.shape
    parts = x.reshape(n, c, h // block, block, w // block, block)
    return parts.permute(0, 3, 5, 1, 2, 4).reshape(n, c * block * block, h // block, w // block)
