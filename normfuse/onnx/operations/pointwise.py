"""Operations on every element for itself."""

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

from normfuse.onnx.operations.registry import OPERATIONS, is_scalar, is_sizes, operation, sizes, tensor


def _unary(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda node, x: function(tensor(x))


for _kind, _function in {
    "Abs": torch.abs, "Erf": torch.erf, "Exp": torch.exp, "Neg": torch.neg, "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal, "Relu": torch.relu, "Sigmoid": torch.sigmoid, "Sqrt": torch.sqrt,
    "Tanh": torch.tanh, "HardSwish": F.hardswish, "Softplus": F.softplus, "Log": torch.log, "IsNaN": torch.isnan,
    "Sin": torch.sin, "Cos": torch.cos, "Floor": torch.floor, "Ceil": torch.ceil, "Round": torch.round,
    "Sign": torch.sign, "Softsign": F.softsign, "Mish": F.mish,
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
    "Xor": operator.xor, "LessOrEqual": operator.le, "GreaterOrEqual": operator.ge,
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


@operation("Sum", "Mean")
def _sum(node: ir.Node, *values: Any) -> Any:
    total = functools.reduce(lambda a, b: _binary(operator.add)(node, a, b), values)
    return total if node.op_type == "Sum" else total / len(values)


@operation("Mod")
def _mod(node: ir.Node, a: Any, b: Any) -> Any:
    if node.attributes.get_int("fmod", 0):
        return torch.fmod(tensor(a), tensor(b))
    return _binary(operator.mod)(node, a, b)


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


@operation("Elu")
def _elu(node: ir.Node, x: Tensor) -> Tensor:
    return F.elu(x, node.attributes.get_float("alpha", 1.0))


@operation("Selu")
def _selu(node: ir.Node, x: Tensor) -> Tensor:
    alpha = node.attributes.get_float("alpha", 1.67326319217681884765625)
    gamma = node.attributes.get_float("gamma", 1.05070102214813232421875)
    return gamma * F.elu(x, alpha)


@operation("PRelu")
def _prelu(node: ir.Node, x: Tensor, slope: Any) -> Tensor:
    return torch.where(x >= 0, x, tensor(slope) * x)


@operation("Clip")
def _clip(node: ir.Node, x: Tensor, low: Any = None, high: Any = None) -> Tensor:
    return torch.clamp(x, low, high)


@operation("Where")
def _where(node: ir.Node, condition: Tensor, a: Any, b: Any) -> Tensor:
    if is_sizes(condition):  # shapes to expand to, as older exporters compute them
        return [x if c else y for c, x, y in zip(sizes(condition), sizes(a), sizes(b), strict=True)]
    return torch.where(condition, a if is_scalar(a) else tensor(a), b if is_scalar(b) else tensor(b))


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
