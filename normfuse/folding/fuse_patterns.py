"""Norms that a model spells out in arithmetic become the operation they are: ``x * rsqrt(mean(x²) + eps)``."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.fx import Node

from .nodes import argument, is_float
from .operations import CASTS
from .program import Program

aten = torch.ops.aten


def fuse_patterns(program: Program) -> None:
    """Replace every written-out RMSNorm and LayerNorm over the last axis by one operation, gain and shift included.

    Found is what an RMSNorm computes, whatever module computes it: a value over the root of its own mean square and a
    constant. Where that value is another one less its mean, the norm is a LayerNorm. Casts that change nothing are
    looked through; where the dtype does change, the operation stands between the casts.
    """
    for node in list(program.graph.nodes):
        if node.op == "call_function" and (found := _core(node, program)) is not None:
            _replace(node, *found, program)
    program.graph.eliminate_dead_code()


def _replace(node: Node, x: Node, eps: float, program: Program) -> None:
    shape = [x.meta["val"].shape[-1]]
    centred = _less_its_mean(x)
    last, gain = _constant_behind(node, aten.mul.Tensor, program)
    shift, args = None, cast(tuple[Any, ...], ())
    if centred is not None:
        last, shift = _constant_behind(last, aten.add.Tensor, program)
        target, args = aten.layer_norm.default, (centred, shape, gain, shift, eps)
    else:
        target, args = aten.rms_norm.default, (x, shape, gain, eps)
    while node is not last:  # assertions about what goes would keep it
        (reader,) = _readers(node)
        for user in list(node.users):
            if user is not reader:
                program.graph.erase_node(user)
        node = reader
    program.replace(last, program.insert(last, target, args, last))


def _core(node: Node, program: Program) -> tuple[Node, float] | None:
    """The value x and eps of ``x * rsqrt(mean(x²) + eps)`` and its like."""
    if node.target is aten.mul.Tensor:
        pairs = [node.args[:2], node.args[1::-1]]
        found = next(((x, v) for x, root in pairs if (v := _under_inverse_root(root, program)) is not None), None)
    elif node.target is aten.div.Tensor:
        root = _under_root(node.args[1])
        found = None if root is None else (node.args[0], root)
    else:
        return None
    if found is None or not is_float(found[0]) or not _is(found[1], aten.add.Tensor):
        return None
    x, (mean, eps) = _same_values(found[0]), found[1].args[:2]
    number = _number(eps, program)
    square = _mean_over_last(mean)
    if number is None or square is None or found[1].kwargs:
        return None
    squared = _squared(square)
    if squared is None or not _equal(squared, x):
        return None
    kinds = {value.meta["val"].dtype for value in (square, x, node)}
    return (x, number) if len(kinds) == 1 and isinstance(x.meta["val"].shape[-1], int) else None


def _under_inverse_root(node: Any, program: Program) -> Any:
    """What v is in ``1 / sqrt(v)``, however it is written."""
    if _is(node, aten.pow.Tensor_Scalar):
        return node.args[0] if node.args[1] == -0.5 else None
    if _is(node, aten.rsqrt.default):
        return node.args[0]
    if _is(node, aten.div.Tensor):
        return _under_root(node.args[1]) if _number(node.args[0], program) == 1 else None
    if _is(node, aten.mul.Tensor) and _number(node.args[1], program) == 1:  # PyTorch's 1 / x is reciprocal(x) * 1
        node = node.args[0]
    return _under_root(node.args[0]) if _is(node, aten.reciprocal.default) else None


def _under_root(node: Any) -> Any:
    """What v is in ``sqrt(v)``."""
    power = _is(node, aten.pow.Tensor_Scalar) and node.args[1] == 0.5
    return node.args[0] if power or _is(node, aten.sqrt.default) else None


def _squared(node: Any) -> Node | None:
    if _is(node, aten.pow.Tensor_Scalar) and node.args[1] == 2:
        return node.args[0]
    if _is(node, aten.square.default) or (_is(node, aten.mul.Tensor) and node.args[0] is node.args[1]):
        return node.args[0]
    return None


def _mean_over_last(node: Any) -> Node | None:
    """What is averaged over its last axis, which is kept."""
    rank = node.meta["val"].dim() if _is(node, aten.mean.dim) and argument(node, "keepdim") else 0
    return node.args[0] if rank and [d % rank for d in node.args[1]] == [rank - 1] else None


def _less_its_mean(x: Node) -> Node | None:
    """u where x is ``u - mean(u)``."""
    if not _is(x, aten.sub.Tensor) or x.kwargs or not isinstance(x.args[1], Node):
        return None
    averaged = _mean_over_last(x.args[1])
    u = _same_values(x.args[0])
    return u if averaged is not None and _equal(averaged, u) else None


def _constant_behind(node: Node, target: object, program: Program) -> tuple[Node, Node | None]:
    """The product with, or sum with, a constant per channel that alone reads `node`, and that constant."""
    last = node
    while True:
        readers = _readers(last)
        if len(readers) != 1 or readers[0].op == "output":
            return node, None
        reader = readers[0]
        if _same_values(reader) is _same_values(last):
            last = reader
            continue
        break
    if not _is(reader, target) or reader.kwargs:
        return node, None
    constant = next((x for x in reader.args[:2] if program.is_constant(x)), None)
    if constant is None or reader.meta["val"].dtype != node.meta["val"].dtype:
        return node, None
    value = constant.meta["val"]
    fits = value.dim() == 1 and value.shape[0] == node.meta["val"].shape[-1] and value.dtype == node.meta["val"].dtype
    return (reader, constant) if fits else (node, None)


def _equal(a: Any, b: Any) -> bool:
    """Whether two arguments are the same value: differences are often written, and computed, twice."""
    if not (isinstance(a, Node) and isinstance(b, Node)):
        return type(a) is type(b) and a == b
    a, b = _same_values(a), _same_values(b)
    twice = a.target is b.target is aten.sub.Tensor and a.kwargs == b.kwargs
    return a is b or (twice and all(map(_equal, a.args, b.args)))


def _readers(node: Node) -> list[Node]:
    """The users of a value, without assertions about its dtype."""
    return [user for user in node.users if user.meta.get("val") is not None or user.op == "output"]


def _same_values(node: Node) -> Node:
    """The value itself, without casts to the dtype that it has."""
    while _is(node, *CASTS) and node.args[0].meta["val"].dtype == node.meta["val"].dtype:
        node = node.args[0]
    return node


def _number(value: Any, program: Program) -> float | None:
    if isinstance(value, int | float):
        return float(value)
    if program.is_constant(value) and is_float(value) and value.meta["val"].numel() == 1:
        return float(program.constant(value))
    return None


def _is(node: Any, *targets: object) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets
