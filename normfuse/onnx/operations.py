"""What the operations of ONNX mean in PyTorch, for :mod:`normfuse.onnx.importer`.

A function takes the node, then its operands. Sizes and axes (integers of at most one axis that come from ``Shape`` or
are constants) travel as Python integers and lists, so that torch.export keeps dynamic dimensions dynamic; all else
are tensors.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional as F

Sizes = int | list[int]
OPERATIONS: dict[str, Callable[..., Any]] = {}


class Untranslated(ValueError):
    """An operation, or a form of it, that the importer does not know; one line."""


def is_sizes(value: object) -> bool:
    return not isinstance(value, Tensor)


def tensor(value: Any) -> Tensor:
    """An operand where a tensor is needed."""
    if isinstance(value, Tensor):
        return value
    if any(isinstance(size, torch.SymInt) for size in (value if isinstance(value, list) else [value])):
        parts = [torch.full((), size, dtype=torch.int64) for size in sizes(value)]
        return torch.stack(parts) if isinstance(value, list) else parts[0]
    return torch.tensor(value)


def sizes(value: Any) -> list[int]:
    """An operand where a list of sizes or axes is needed."""
    if isinstance(value, Tensor):
        raise Untranslated("a shape or an axis is computed from data")
    return value if isinstance(value, list) else [value]


def operation(*kinds: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        OPERATIONS.update(dict.fromkeys(kinds, function))
        return function

    return register


def _unary(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda node, x: function(tensor(x))


for _kind, _function in {
    "Abs": torch.abs, "Erf": torch.erf, "Exp": torch.exp, "Neg": torch.neg, "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal, "Relu": torch.relu, "Sigmoid": torch.sigmoid, "Sqrt": torch.sqrt,
    "Tanh": torch.tanh, "HardSwish": F.hardswish, "Softplus": F.softplus, "Log": torch.log, "IsNaN": torch.isnan,
}.items():  # fmt: skip
    OPERATIONS[_kind] = _unary(_function)


def _binary(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def apply(node: ir.Node, a: Any, b: Any) -> Any:
        if not (is_sizes(a) and is_sizes(b)):
            return function(*(value if is_scalar(value) else tensor(value) for value in (a, b)))
        left, right = sizes(a), sizes(b)
        count = max(len(left), len(right))
        pairs = zip(left * (count // len(left)), right * (count // len(right)), strict=True)
        found = [function(x, y) for x, y in pairs]
        return found if isinstance(a, list) or isinstance(b, list) else found[0]

    return apply


def is_scalar(value: object) -> bool:
    """Whether PyTorch's arithmetic takes an operand as it is."""
    return isinstance(value, Tensor | int | float)


def _divide(a: Any, b: Any) -> Any:
    whole = all(
        isinstance(v, int | torch.SymInt) or (isinstance(v, Tensor) and not v.is_floating_point()) for v in (a, b)
    )
    if not whole:
        return a / b
    return a // b if not isinstance(a, Tensor) else torch.div(a, b, rounding_mode="trunc")


for _kind, _function in {
    "Add": operator.add, "Sub": operator.sub, "Mul": operator.mul, "Div": _divide, "Equal": operator.eq,
    "Less": operator.lt, "Greater": operator.gt, "And": operator.and_, "Or": operator.or_,
    "LessOrEqual": operator.le, "GreaterOrEqual": operator.ge,
}.items():  # fmt: skip
    OPERATIONS[_kind] = _binary(_function)


@operation("Max", "Min")
def _extreme(node: ir.Node, *values: Any) -> Any:
    if all(is_sizes(value) for value in values):
        choose = torch.sym_max if node.op_type == "Max" else torch.sym_min
    else:
        values = tuple(tensor(value) for value in values)
        choose = torch.maximum if node.op_type == "Max" else torch.minimum
    return functools.reduce(lambda a, b: _binary(choose)(node, a, b), values)


@operation("Range")
def _range(node: ir.Node, start: Any, limit: Any, delta: Any) -> Tensor:
    return torch.arange(*(sizes(value)[0] for value in (start, limit, delta)))


@operation("HardSigmoid")
def _hard_sigmoid(node: ir.Node, x: Tensor) -> Tensor:
    alpha, beta = node.attributes.get_float("alpha", 0.2), node.attributes.get_float("beta", 0.5)
    if beta == 0.5 and math.isclose(alpha, 1 / 6, rel_tol=1e-6):
        return F.hardsigmoid(x)
    return torch.clamp(alpha * x + beta, 0.0, 1.0)


@operation("Pow")
def _pow(node: ir.Node, x: Tensor, exponent: Any) -> Tensor:
    return torch.pow(x, exponent)


@operation("Identity", "Dropout")
def _identity(node: ir.Node, x: Any, *_: Any) -> Any:
    return x


@operation("Gelu")
def _gelu(node: ir.Node, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=node.attributes.get_string("approximate", "none"))


@operation("LeakyRelu")
def _leaky_relu(node: ir.Node, x: Tensor) -> Tensor:
    return F.leaky_relu(x, node.attributes.get_float("alpha", 0.01))


@operation("Clip")
def _clip(node: ir.Node, x: Tensor, low: Any = None, high: Any = None) -> Tensor:
    return torch.clamp(x, low, high)


@operation("Softmax")
def _softmax(node: ir.Node, x: Tensor) -> Tensor:
    return torch.softmax(x, node.attributes.get_int("axis", -1))


@operation("Where")
def _where(node: ir.Node, condition: Tensor, a: Any, b: Any) -> Tensor:
    if is_sizes(condition):  # shapes to expand to, as older exporters compute them
        return [x if c else y for c, x, y in zip(sizes(condition), sizes(a), sizes(b), strict=True)]
    return torch.where(condition, a if is_scalar(a) else tensor(a), b if is_scalar(b) else tensor(b))


@operation("MatMul")
def _matmul(node: ir.Node, a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a, b)


@operation("Gemm")
def _gemm(node: ir.Node, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    attributes = node.attributes
    a = a.t() if attributes.get_int("transA", 0) else a
    alpha, beta = attributes.get_float("alpha", 1.0), attributes.get_float("beta", 1.0)
    if attributes.get_int("transB", 0):
        product = F.linear(a, b)
    else:
        product = torch.matmul(a, b)
    product = product if alpha == 1 else alpha * product
    return product if c is None else product + (c if beta == 1 else beta * c)


@operation("Conv")
def _conv(node: ir.Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    axes = weight.dim() - 2
    function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[axes]
    strides, dilations = _window(node, "strides", axes), _window(node, "dilations", axes)
    return function(x, weight, bias, strides, _padding(node, axes), dilations, node.attributes.get_int("group", 1))


@operation("MaxPool")
def _max_pool(node: ir.Node, x: Tensor) -> Tensor:
    axes = x.dim() - 2
    function = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[axes]
    kernel = list(node.attributes["kernel_shape"].as_ints())
    strides, dilations = _window(node, "strides", axes), _window(node, "dilations", axes)
    return function(x, kernel, strides, _padding(node, axes), dilations, bool(node.attributes.get_int("ceil_mode", 0)))


@operation("AveragePool")
def _average_pool(node: ir.Node, x: Tensor) -> Tensor:
    axes = x.dim() - 2
    function = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[axes]
    kernel = list(node.attributes["kernel_shape"].as_ints())
    counted = bool(node.attributes.get_int("count_include_pad", 0))
    if node.attributes.get_int("ceil_mode", 0) or set(_window(node, "dilations", axes)) != {1}:
        raise Untranslated("average pooling with ceil_mode or dilations")
    return function(x, kernel, _window(node, "strides", axes), _padding(node, axes), False, counted)


@operation("GlobalAveragePool")
def _global_average(node: ir.Node, x: Tensor) -> Tensor:
    return x.mean(list(range(2, x.dim())), keepdim=True)


def _window(node: ir.Node, name: str, axes: int) -> list[int]:
    return list(node.attributes.get_ints(name, [1] * axes))


def _padding(node: ir.Node, axes: int) -> list[int]:
    pads = list(node.attributes.get_ints("pads", [0] * 2 * axes))
    if node.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or pads[:axes] != pads[axes:]:
        raise Untranslated("padding that differs between the two sides of an axis")
    return pads[:axes]


@operation("BatchNormalization")
def _batch_norm(node: ir.Node, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    if node.attributes.get_int("training_mode", 0):
        raise Untranslated("a BatchNormalization in training mode")
    return F.batch_norm(x, mean, variance, scale, bias, False, 0.1, node.attributes.get_float("epsilon", 1e-5))


@operation("LayerNormalization")
def _layer_norm(node: ir.Node, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    axis = node.attributes.get_int("axis", -1)
    shape = list(x.shape[axis:])
    if list(scale.shape) != shape:
        raise Untranslated("a LayerNormalization whose scale broadcasts")
    return F.layer_norm(x, shape, scale, bias, node.attributes.get_float("epsilon", 1e-5))


@operation("Attention")
def _attention(node: ir.Node, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    known = {"is_causal", "scale", "qk_matmul_output_mode", "softcap", "q_num_heads", "kv_num_heads"}
    odd = set(node.attributes) - known
    if (
        odd
        or node.attributes.get_float("softcap", 0.0)
        or len(node.outputs) > 1
        or q.dim() != 4
        or k.shape[1] != q.shape[1]
    ):
        raise Untranslated("this form of Attention")
    scale = node.attributes.get_float("scale", None)
    return F.scaled_dot_product_attention(
        q, k, v, mask, 0.0, bool(node.attributes.get_int("is_causal", 0)), scale=scale
    )


@operation("Shape")
def _shape(node: ir.Node, x: Tensor) -> list[int]:
    shape = x.shape if isinstance(x, Tensor) else [len(x)] if isinstance(x, list) else []
    return list(shape[node.attributes.get_int("start", 0) : node.attributes.get_int("end", None)])


@operation("Cast")
def _cast(node: ir.Node, x: Any) -> Any:
    kind = ir.DataType(node.attributes["to"].as_int())
    if is_sizes(x):
        if kind not in (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL):
            return tensor(x).to(_torch_dtype(kind))
        return x
    return x.to(_torch_dtype(kind))


@operation("CastLike")
def _cast_like(node: ir.Node, x: Any, like: Any) -> Any:
    if isinstance(like, Tensor):
        return tensor(x).to(like.dtype)
    return int(x) if isinstance(x, float) and not isinstance(like, float) else x


def _torch_dtype(kind: ir.DataType) -> torch.dtype:
    return torch.from_numpy(np.zeros(0, kind.numpy())).dtype


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
    where = _axes(node, axes)
    return x.squeeze() if where is None else x.squeeze(where)


@operation("Unsqueeze")
def _unsqueeze(node: ir.Node, x: Any, axes: Any = None) -> Any:
    if is_sizes(x) and not isinstance(x, list):
        return [x]
    x, where = tensor(x), _axes(node, axes)
    for axis in sorted(axis % (x.dim() + len(where)) for axis in where):
        x = x.unsqueeze(axis)
    return x


def _axes(node: ir.Node, operand: Any) -> list[int] | None:
    """Axes from the operand, or from the attribute that older operator sets have."""
    if operand is not None:
        return sizes(operand)
    given = node.attributes.get_ints("axes", None)
    return None if given is None else list(given)


@operation("Concat")
def _concat(node: ir.Node, *parts: Any) -> Any:
    if all(is_sizes(part) for part in parts):
        return [size for part in parts for size in sizes(part)]
    return torch.cat([tensor(part) for part in parts], node.attributes["axis"].as_int())


@operation("Split")
def _split(node: ir.Node, x: Tensor, given: Any = None) -> Any:
    axis, count = node.attributes.get_int("axis", 0), len(node.outputs)
    lengths = _axes(node, given) if given is not None else node.attributes.get_ints("split", None)
    if lengths is not None:
        return torch.split(x, list(lengths), axis)
    return torch.chunk(x, count, axis)


@operation("Slice")
def _slice(node: ir.Node, x: Any, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> Any:
    starts, ends = sizes(starts), sizes(ends)
    axes = list(range(len(starts))) if axes is None else sizes(axes)
    steps = [1] * len(starts) if steps is None else sizes(steps)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step < 1:
            raise Untranslated("a Slice that goes backwards")
        if is_sizes(x):
            x = sizes(x)[start:end:step]
        else:
            axis = axis % x.dim()
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
    if node.attributes.get_int("batch_dims", 0):
        raise Untranslated("a GatherND with batch_dims")
    return x[tensor(indices).unbind(-1)]


@operation("ReduceMean", "ReduceSum", "ReduceMax")
def _reduce(node: ir.Node, x: Tensor, axes: Any = None) -> Tensor:
    where = _axes(node, axes) or list(range(x.dim()))
    function = {"ReduceMean": torch.mean, "ReduceSum": torch.sum, "ReduceMax": torch.amax}[node.op_type]
    return function(x, where, keepdim=bool(node.attributes.get_int("keepdims", 1)))
