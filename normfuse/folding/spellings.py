"""Operations that have several names, stand for several others, or read more than they need, written in one way."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node, map_arg

from .arrays import same_size
from .nodes import CALLED, argument
from .operations import filled_with

aten = torch.ops.aten
_NAMES = {
    aten.add.Scalar: aten.add.Tensor,
    aten.sub.Scalar: aten.sub.Tensor,
    aten.mul.Scalar: aten.mul.Tensor,
    aten.div.Scalar: aten.div.Tensor,
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


def make_norm_whole(node: Node) -> None:
    """Write the first of a norm's three results, as decompositions have them, as that norm, if it alone is read."""
    if node.target is not operator.getitem or node.args[1] != 0:
        return
    apart = node.args[0]
    if apart.target in _WHOLE and not any(user.users for user in apart.users if user is not node):
        node.target, node.args = _WHOLE[apart.target](*(argument(apart, each.name) for each in _parameters(apart)))
        node.meta = dict(apart.meta) | {"val": node.meta["val"]}


def _take_apart(node: Node) -> None:
    """Write a variance or deviation that comes with its mean as one of the two."""
    if node.target is not operator.getitem or node.args[0].target not in _WITH_MEAN:
        return
    both = node.args[0]
    if node.args[1] == 0:
        node.target, node.args, node.kwargs = _WITH_MEAN[both.target], both.args, both.kwargs
    else:
        axes, keepdim = argument(both, "dim"), argument(both, "keepdim", False)
        node.target = aten.mean.default if axes is None else aten.mean.dim
        node.args = (both.args[0],) if axes is None else (both.args[0], axes, keepdim)


_WITH_MEAN = {
    getattr(getattr(aten, f"{name}_mean"), overload): getattr(getattr(aten, name), overload)
    for name in ("var", "std")
    for overload in ("default", "dim", "correction")
}


def _parameters(node: Node) -> list[Any]:
    return node.target._schema.arguments


def _batch_norm(x: Any, weight: Any, bias: Any, mean: Any, var: Any, momentum: float, eps: float) -> Any:
    return aten.batch_norm.default, (x, weight, bias, mean, var, False, momentum, eps, False)


def _layer_norm(x: Any, shape: Any, weight: Any, bias: Any, eps: float) -> Any:
    return aten.layer_norm.default, (x, shape, weight, bias, eps, False)


def _group_norm(x: Any, weight: Any, bias: Any, n: Any, c: Any, rest: Any, groups: int, eps: float) -> Any:
    return aten.group_norm.default, (x, groups, weight, bias, eps, False)


_WHOLE: dict[object, Callable[..., Any]] = {
    aten._native_batch_norm_legit_no_training.default: _batch_norm,
    aten.native_layer_norm.default: _layer_norm,
    aten.native_group_norm.default: _group_norm,
}


def _one_of_several(node: Node) -> None:
    make_norm_whole(node)
    _take_apart(node)


def _convolution(node: Node) -> None:
    """The convolution of all kinds, as decompositions write it, is one of a number of axes."""
    x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = (
        argument(node, each.name) for each in _parameters(node)
    )
    axes = weight.meta["val"].dim() - 2
    if not 1 <= axes <= 3 or x.meta["val"].dim() != axes + 2:
        return
    if transposed:
        node.target = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)[
            axes - 1
        ]
        node.args = (x, weight, bias, stride, padding, output_padding, groups, dilation)
    else:
        node.target = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)[axes - 1]
        node.args = (x, weight, bias, stride, padding, dilation, groups)
    node.kwargs = {}


def _cast_like(node: Node) -> None:
    """``x.type_as(y)``, ``x.to(y)`` and ``x.to(y.device, y.dtype)`` do not read y."""
    value, result = node.args[0].meta["val"], node.meta["val"]
    if value.device == result.device:
        node.target, node.args, node.kwargs = aten.to.dtype, (node.args[0], result.dtype), {}


def _shaped_like(target: Any) -> Callable[[Node], None]:
    """``x.expand_as(y)`` and its like read the sizes of y."""

    def respell(node: Node) -> None:
        value, other = node.args
        node.target, node.args = target, (value, _sizes(node, other))

    return respell


def _sizes(node: Node, other: Node) -> list[Any]:
    """The sizes of a tensor, those that are not known as operations in front of a node."""
    shape = other.meta["val"].shape
    return [
        size if isinstance(size, int) else _before(node, aten.sym_size.int, other, a) for a, size in enumerate(shape)
    ]


def _square(node: Node) -> None:
    """A product of a value by itself, which the model computes twice."""
    first, second = node.args
    computed = all(isinstance(x, Node) and isinstance(x.target, torch._ops.OpOverload) for x in (first, second))
    if not computed or torch.Tag.nondeterministic_seeded in first.target.tags:
        return
    if (first.target, first.args, first.kwargs) == (second.target, second.args, second.kwargs):
        node.args = (first, first)


def _without_empty(node: Node) -> None:
    """What adds nothing to a concatenation is left out: tensors without entries, also those with one axis only."""
    dtype, axis = node.meta["val"].dtype, argument(node, "dim", 0)
    parts = [part for part in node.args[0] if not _has_no_entries(part.meta["val"], axis)]
    if parts and all(part.meta["val"].dtype == dtype for part in parts):
        node.args = (parts, *node.args[1:])


def _has_no_entries(value: torch.Tensor, axis: int) -> bool:
    size = value.shape[0 if value.dim() == 1 else axis]
    return isinstance(size, int) and size == 0


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
    zeros = other == 0 if not isinstance(other, Node) else filled_with(other) == 0
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


def _split_along(axis: int, target: object) -> Callable[[Node], None]:
    """A split that is named after its axis; the first one of a tensor with one axis."""

    def respell(node: Node) -> None:
        operand, parts = node.args
        node.target, node.args = target, (operand, parts, min(axis, operand.meta["val"].dim() - 1))

    return respell


def _multiply_by(factor: float) -> Callable[[Node], None]:
    def respell(node: Node) -> None:
        node.target, node.args = aten.mul.Tensor, (node.args[0], factor)

    return respell


def _fill(node: Node) -> None:
    """A tensor that is filled counts for its shape only."""
    if not isinstance(node.args[1], Node):
        node.target = aten.full_like.default


def _zero(node: Node) -> None:
    node.target = aten.zeros_like.default


def _copy(node: Node) -> None:
    """What is copied into a tensor, in the shape and dtype of that."""
    target, value = node.args[:2]
    into = target.meta["val"]
    if value.meta["val"].dtype != into.dtype:
        value = _before(node, aten.to.dtype, value, into.dtype)
    if not _same_form(node, value):
        value = _before(node, aten.expand.default, value, _sizes(node, target))
    node.target, node.args, node.kwargs = aten.clone.default, (value,), {}


def _times_power_of_two(node: Node) -> None:
    value, exponent = node.args
    node.target, node.args = aten.mul.Tensor, (value, _before(node, aten.pow.Scalar, 2.0, exponent))


def _rotate(node: Node) -> None:
    """A quarter turn reverses one axis and exchanges both."""
    turns, (first, second) = argument(node, "k") % 4, argument(node, "dims")
    if turns % 2:
        reversed_ = _before(node, aten.flip.default, node.args[0], [second if turns == 1 else first])
        node.target, node.args = aten.transpose.int, (reversed_, first, second)
    else:
        node.target, node.args = aten.flip.default, (node.args[0], [first, second] if turns else [])
    node.kwargs = {}


def _inner(node: Node) -> None:
    """An inner product with a number multiplies by it."""
    if any(operand.meta["val"].dim() == 0 for operand in node.args):
        node.target = aten.mul.Tensor


def _multiply_in_turns(node: Node) -> None:
    """A chain of matrices, from the left."""
    product, *others, last = node.args[0]
    for matrix in others:
        product = _before(node, aten.matmul.default, product, matrix)
    node.target, node.args = aten.matmul.default, (product, last)


def _einsum(node: Node) -> None:
    _contract_in_pairs(node)
    _multiply_each(node)


def _multiply_each(node: Node) -> None:
    """An einsum that sums nothing multiplies single numbers; one from a file stays, where its arguments have places."""
    if CALLED in node.meta:
        return
    equation, operands = node.args[0].replace(" ", ""), list(node.args[1])
    before, arrow, result = equation.partition("->")
    terms = before.split(",")
    if len(terms) != 2 or not arrow or not (before + result).replace(",", "").isalpha():
        return
    if terms[0] != result:
        terms, operands = terms[::-1], operands[::-1]
    if terms[0] != result or len(set(result)) != len(result) or "".join(x for x in result if x in terms[1]) != terms[1]:
        return
    shape = iter(operands[1].meta["val"].shape)
    sizes = [next(shape) if letter in terms[1] else 1 for letter in result]
    if not all(isinstance(size, int) for size in sizes):
        return
    other = operands[1] if terms[1] == result else _before(node, aten.reshape.default, operands[1], sizes)
    node.target, node.args = aten.mul.Tensor, (operands[0], other)


def _contract_in_pairs(node: Node) -> None:
    """An einsum of three operands or more as einsums of two: the first one with the next one that shares a letter."""
    equation, operands = node.args[0].replace(" ", ""), list(node.args[1])
    before, arrow, result = equation.partition("->")
    terms = before.split(",")
    if len(terms) < 3 or not arrow or "." in equation or any(len(set(term)) != len(term) for term in terms):
        return
    while len(terms) > 2:
        at = next((i for i, term in enumerate(terms) if i and set(term) & set(terms[0])), 1)
        first, second, a, b = terms.pop(0), terms.pop(at - 1), operands.pop(0), operands.pop(at - 1)
        needed = set(result).union(*terms)
        both = "".join(letter for letter in dict.fromkeys(first + second) if letter in needed)
        terms.insert(0, both)
        operands.insert(0, _before(node, aten.einsum.default, f"{first},{second}->{both}", [a, b]))
        _multiply_each(operands[0])
    node.args = (f"{terms[0]},{terms[1]}->{result}", operands)


def _before(node: Node, target: Any, *args: Any) -> Node:
    """A new operation in front of another one."""
    with node.graph.inserting_before(node):
        new = node.graph.call_function(target, args)
    new.meta = dict(node.meta)
    values = map_arg(args, lambda operand: operand.meta["val"])
    with node.meta["val"].fake_mode:
        new.meta["val"] = target(*values)
    return new


_FORMS: dict[object, Callable[[Node], None]] = {
    operator.getitem: _one_of_several,
    aten.convolution.default: _convolution,
    **dict.fromkeys((aten.type_as.default, aten.to.other, aten.to.device), _cast_like),
    aten.expand_as.default: _shaped_like(aten.expand.default),
    aten.view_as.default: _shaped_like(aten.view.default),
    aten.reshape_as.default: _shaped_like(aten.reshape.default),
    aten.mul.Tensor: _square,
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
    aten.hsplit.int: _split_along(1, aten.tensor_split.sections),
    aten.hsplit.array: _split_along(1, aten.tensor_split.indices),
    aten.vsplit.int: _split_along(0, aten.tensor_split.sections),
    aten.vsplit.array: _split_along(0, aten.tensor_split.indices),
    aten.dsplit.int: _split_along(2, aten.tensor_split.sections),
    aten.dsplit.array: _split_along(2, aten.tensor_split.indices),
    aten.fill.Scalar: _fill,
    aten.zero.default: _zero,
    aten.copy.default: _copy,
    aten.deg2rad.default: _multiply_by(math.pi / 180.0),
    aten.rad2deg.default: _multiply_by(180.0 / math.pi),
    aten.ldexp.Tensor: _times_power_of_two,
    aten.rot90.default: _rotate,
    aten.inner.default: _inner,
    aten.linalg_multi_dot.default: _multiply_in_turns,
    aten.einsum.default: _einsum,
}
