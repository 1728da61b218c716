"""Operations that have several names, or read more than their result needs, written in one way."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import Node

from .arrays import same_size

aten = torch.ops.aten
_NAMES = {
    aten.multiply.Tensor: aten.mul.Tensor,
    aten.divide.Tensor: aten.div.Tensor,
    aten.true_divide.Tensor: aten.div.Tensor,
    aten.subtract.Tensor: aten.sub.Tensor,
    aten.negative.default: aten.neg.default,
    aten.positive.default: aten.alias.default,
    aten.clip.default: aten.clamp.default,
    aten.max.other: aten.maximum.default,
    aten.min.other: aten.minimum.default,
    aten.concat.default: aten.cat.default,
    aten.concatenate.default: aten.cat.default,
    aten.swapaxes.default: aten.transpose.int,
    aten.swapdims.default: aten.transpose.int,
    aten.moveaxis.int: aten.movedim.int,
    aten.moveaxis.intlist: aten.movedim.intlist,
    aten.unsafe_split.Tensor: aten.split.Tensor,
    aten.unsafe_chunk.default: aten.chunk.default,
    aten.unsafe_split_with_sizes.default: aten.split_with_sizes.default,
    aten.detach_.default: aten.detach.default,
}


def write_plainly(node: Node) -> None:
    """Give an operation its usual name; what it computes does not change."""
    node.target = _NAMES.get(node.target, node.target)
    if node.target in _FORMS:
        _FORMS[node.target](node)


def _cast_like(node: Node) -> None:
    """``x.type_as(y)`` does not read y."""
    value, other = (operand.meta["val"] for operand in node.args)
    if value.device == other.device:
        node.target, node.args = aten.to.dtype, (node.args[0], other.dtype)


def _without_empty(node: Node) -> None:
    """An empty tensor with one axis is left out of a concatenation of tensors with several."""
    dtype = node.meta["val"].dtype
    parts = [part for part in node.args[0] if part.meta["val"].shape != (0,)]
    if parts and all(part.meta["val"].dtype == dtype for part in parts):
        node.args = (parts, *node.args[1:])


def _divide(node: Node) -> None:
    if node.kwargs.get("rounding_mode") is None:
        node.target, node.kwargs = aten.div.Tensor, {}


def _tile(node: Node) -> None:
    operand, repeats = node.args
    missing = operand.meta["val"].dim() - len(repeats)
    node.target, node.args = aten.repeat.default, (operand, [1] * missing + list(repeats))


def _where(node: Node) -> None:
    """A value where it is positive, and zero elsewhere, is ReLU; but for what is no number, which that passes on."""
    condition, value, other = node.args
    below = isinstance(condition, Node) and condition.target in (aten.lt.Scalar, aten.le.Scalar)
    if below:
        value, other = other, value
    positive = below or (isinstance(condition, Node) and condition.target in (aten.gt.Scalar, aten.ge.Scalar))
    zeros = other == 0 if not isinstance(other, Node) else other.target is aten.zeros_like.default
    if positive and zeros and condition.args[1] == 0 and condition.args[0] is value and _same_form(node, value):
        node.target, node.args = aten.relu.default, (value,)


def _same_form(node: Node, value: Node) -> bool:
    before, after = value.meta["val"], node.meta["val"]
    if before.dtype != after.dtype or before.dim() != after.dim():
        return False
    return all(same_size(a, b) for a, b in zip(before.shape, after.shape, strict=True))


def _flip(axis: int) -> Callable[[Node], None]:
    def respell(node: Node) -> None:
        node.target, node.args = aten.flip.default, (node.args[0], [axis])

    return respell


def _stack_along(axis: int) -> Callable[[Node], None]:
    """Concatenation along an axis of parts with at least two axes; others are given more before."""

    def respell(node: Node) -> None:
        if all(part.meta["val"].dim() >= 2 for part in node.args[0]):
            node.target, node.args = aten.cat.default, (node.args[0], axis)

    return respell


_FORMS: dict[object, Callable[[Node], None]] = {
    aten.type_as.default: _cast_like,
    aten.where.self: _where,
    aten.where.ScalarSelf: _where,
    aten.where.ScalarOther: _where,
    aten.cat.default: _without_empty,
    aten.div.Tensor_mode: _divide,
    aten.tile.default: _tile,
    aten.fliplr.default: _flip(1),
    aten.flipud.default: _flip(0),
    aten.hstack.default: _stack_along(1),
    aten.vstack.default: _stack_along(0),
}
