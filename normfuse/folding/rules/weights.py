"""Operations with a weight: they accept any scale and produce any scale, so they demand nothing."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from ..arrays import CannotCarry, along_axis, collapse_equal, subtract_means, varying
from ..program import piece
from .base import Rule, Use, argument, is_float, rule_for

if TYPE_CHECKING:
    from ..engine import Folding

aten = torch.ops.aten
# All axes but the last stay where they are: "...i,io->...o", "bsi,oi->bso".
_PROJECTION = re.compile(r"((?:\.\.\.)?[a-zA-Z]*)([a-zA-Z]),([a-zA-Z]{2})->\1([a-zA-Z])")


class Weighted(Rule):
    """``y = W x + bias`` over one axis, the others being batch.

    With ``x = s_x * f_x + t_x`` and ``y = s_y * f_y + t_y``:

        W'    = diag(1 / s_y) W diag(s_x)
        bias' = (bias + W t_x - t_y) / s_y

    A missing bias is created where it is needed; one that has become zero is dropped.
    """

    owns_constants = True
    #: Names of the arguments in the operation's schema.
    names = ("input", "weight", "bias")
    #: Whether the operation adds a bias itself; otherwise one that folding creates follows as an Add.
    has_bias = True

    def matches(self, node: Node, fold: Folding) -> bool:
        operand, weight, bias = self.operands(node)
        if not is_float(operand) or fold.program.is_constant(operand) or not fold.usable_weight(weight):
            return False
        if bias is None:
            return weight.meta["val"].dim() >= 2
        outputs = node.meta["val"].shape[self.output_axis(node)]
        per_output = tuple(bias.meta["val"].shape) == (outputs,)  # others broadcast
        return weight.meta["val"].dim() >= 2 and fold.program.is_constant(bias) and per_output

    def operands(self, node: Node) -> tuple[Node, Node, Node | None]:
        return tuple(argument(node, name) for name in self.names)

    def chooses_shift(self, node: Node, fold: Folding) -> bool:
        return True

    def input_axis(self, node: Node) -> int:
        return -1

    def output_axis(self, node: Node) -> int:
        return -1

    def relate(self, node: Node, fold: Folding) -> None:
        operand, _, _ = self.operands(node)
        inner = fold.scale(operand)
        axis = self.input_axis(node) % inner.ndim
        fold.require_equal(inner, tuple(a for a in varying(inner) if a != axis))
        value = node.meta["val"]
        shape = [1] * value.dim()
        shape[self.output_axis(node)] = int(value.shape[self.output_axis(node)])
        fold.scale_of[node] = fold.scales.fresh(tuple(shape))
        fold.stored += [inner, fold.scale_of[node]]

    def use(self, node: Node, operand: Node, shift: np.ndarray | None, fold: Folding) -> Use:
        if shift is None:
            return Use.ABSORB
        axis = self.input_axis(node) % shift.ndim
        try:
            collapse_equal(shift, tuple(a for a in varying(shift) if a != axis))
        except CannotCarry:
            return Use.STOP
        return Use.ABSORB

    def settle(self, node: Node, fold: Folding) -> np.ndarray:
        return fold.chosen_shift(node)

    def constant_part(self, node: Node, fold: Folding) -> np.ndarray:
        """``bias + W t_x``, what the result holds whatever the input is, as an array over the result's channels."""
        operand, weight, bias = self.operands(node)
        value = node.meta["val"]
        shape = [1] * value.dim()
        shape[self.output_axis(node)] = size = int(value.shape[self.output_axis(node)])
        constant = torch.zeros(size, dtype=torch.float64) if bias is None else fold.program.constant(bias)
        t_x = fold.incoming(node, operand)
        if t_x.any():
            t_x = fold.vector(t_x, self.input_axis(node), int(operand.meta["val"].shape[self.input_axis(node)]))
            constant = constant + self.through(node, weight, t_x, fold)
        return constant.numpy().reshape(shape)

    def rewrite(self, node: Node, fold: Folding) -> None:
        operand, weight, bias = self.operands(node)
        size = int(operand.meta["val"].shape[self.input_axis(node)])
        s_x, t_x = (
            fold.vector(numbers, self.input_axis(node), size)
            for numbers in (fold.scales[fold.scale(operand)], fold.incoming(node, operand))
        )
        s_y, t_y = (
            fold.vector(numbers, self.output_axis(node), int(node.meta["val"].shape[self.output_axis(node)]))
            for numbers in (fold.scales[fold.scale(node)], fold.shift_of[node])
        )
        rescaled = bool((s_x != 1).any() or (s_y != 1).any())
        centre = fold.centred.get(node)
        if fold.program.computed(weight) and not rescaled and centre is None:
            fold.scale_weight(node, weight)  # a reparametrised weight is stored as what it has become
        if not rescaled and not t_x.any() and not t_y.any() and centre is None:
            return
        constant = fold.program.constant(bias) if bias is not None else torch.zeros_like(s_y)
        if t_x.any():
            constant = constant + self.through(node, weight, t_x, fold)
        constant = (constant - t_y) / s_y
        if centre is not None:
            centre = centre.ravel()
            constant = subtract_means(constant, centre)
            centre = along_axis(centre, self.weight_axis(node), weight.meta["val"].dim())
        if rescaled or centre is not None:
            shape = weight.meta["val"].shape
            factors = (self.rows(node, shape, 1.0 / s_y), self.columns(node, shape, s_x)) if rescaled else ()
            fold.scale_weight(node, weight, *factors, centre=centre)
        self.set_bias(node, weight, bias, constant, fold)

    def set_bias(self, node: Node, weight: Node, bias: Node | None, value: Tensor, fold: Folding) -> None:
        fold.set_bias(node, self.names[2], bias, value, name=_bias_name(fold.program.name(weight)), like=weight)

    def rows(self, node: Node, shape: torch.Size, numbers: Tensor) -> Tensor:
        """Numbers per output channel, laid against the weight."""
        return numbers[:, None]

    def columns(self, node: Node, shape: torch.Size, numbers: Tensor) -> Tensor:
        """Numbers per input channel, laid against the weight."""
        return numbers[None, :]

    def outputs_first(self, node: Node) -> bool:
        """Whether the weight's first axis holds the output channels, or else its last."""
        return True

    def weight_axis(self, node: Node) -> int:
        """The weight's axis that holds the output channels."""
        return 0 if self.outputs_first(node) else 1

    def can_centre(self, node: Node) -> bool:
        """Whether the weight can produce its result less means over output channels."""
        return True

    def through(self, node: Node, weight: Node, shift: Tensor, fold: Folding) -> Tensor:
        """What a constant input contributes to the output: ``W shift``."""
        shift = self.columns(node, weight.meta["val"].shape, shift)
        parts = [(block * piece(shift, rows)) for rows, block in fold.program.blocks(weight)]
        if self.outputs_first(node):
            return torch.cat([part.flatten(1).sum(1) for part in parts])
        return sum(part.sum(0) for part in parts)


@rule_for(aten.linear.default)
class Linear(Weighted):
    """``y = x Wᵀ + bias`` with W[out, in] over the last axis."""


class Product(Weighted):
    """``y = x W`` with a weight written as [in, out]."""

    def rows(self, node: Node, shape: torch.Size, numbers: Tensor) -> Tensor:
        return numbers[None, :]

    def columns(self, node: Node, shape: torch.Size, numbers: Tensor) -> Tensor:
        return numbers[:, None]

    def outputs_first(self, node: Node) -> bool:
        return False


@rule_for(aten.addmm.default)
class Addmm(Product):
    """``y = bias + x W`` with a bias over the last axis."""

    names = ("mat1", "mat2", "self")

    def matches(self, node: Node, fold: Folding) -> bool:
        return argument(node, "beta") == 1 and argument(node, "alpha") == 1 and super().matches(node, fold)


@rule_for(aten.matmul.default, aten.mm.default)
class Matmul(Product):
    """``y = x W`` with W[in, out]; a bias that folding creates follows as an Add."""

    has_bias = False

    def operands(self, node: Node) -> tuple[Node, Node, None]:
        return node.args[0], node.args[1], None

    def matches(self, node: Node, fold: Folding) -> bool:
        two_axes = is_float(node.args[1]) and node.args[1].meta["val"].dim() == 2
        return two_axes and node.args[0].meta["val"].dim() >= 2 and super().matches(node, fold)

    def set_bias(self, node: Node, weight: Node, bias: Node | None, value: Tensor, fold: Folding) -> None:
        if value.any():
            fold.append_add(node, value.numpy(), name=_bias_name(fold.program.name(weight)), like=weight)


@rule_for(aten.matmul.default)
class LeftMatmul(Weighted):
    """``y = W x`` with W[out, in] over the last axis but one; a bias that folding creates follows as an Add."""

    has_bias = False

    def operands(self, node: Node) -> tuple[Node, Node, None]:
        return node.args[1], node.args[0], None

    def matches(self, node: Node, fold: Folding) -> bool:
        two_axes = is_float(node.args[0]) and node.args[0].meta["val"].dim() == 2
        return two_axes and node.args[1].meta["val"].dim() >= 2 and super().matches(node, fold)

    def input_axis(self, node: Node) -> int:
        return -2

    def output_axis(self, node: Node) -> int:
        return -2

    def set_bias(self, node: Node, weight: Node, bias: Node | None, value: Tensor, fold: Folding) -> None:
        if value.any():
            column = value.numpy()[:, None]
            fold.append_add(node, column, name=_bias_name(fold.program.name(weight)), like=weight)


@rule_for(aten.einsum.default)
class Einsum(Matmul):
    """``...i,io->...o`` and ``...i,oi->...o`` written as a contraction of the last axis with a weight."""

    def operands(self, node: Node) -> tuple[Node, Node, None]:
        return *node.args[1], None

    def matches(self, node: Node, fold: Folding) -> bool:
        return self._layout(node) is not None and Weighted.matches(self, node, fold)

    def _layout(self, node: Node) -> str | None:
        """``io`` or ``oi``, how the weight is laid out; None where the contraction is another one."""
        found = _PROJECTION.fullmatch(node.args[0].replace(" ", ""))
        if found is None:
            return None
        others, inner, weight, outer = found.groups()
        letters = others.removeprefix("...") + inner + outer
        if len(set(letters)) != len(letters) or weight not in (inner + outer, outer + inner):
            return None
        return "io" if weight[0] == inner else "oi"

    def rows(self, node: Node, shape: torch.Size, numbers: Tensor) -> Tensor:
        return numbers[:, None] if self.outputs_first(node) else numbers[None, :]

    def columns(self, node: Node, shape: torch.Size, numbers: Tensor) -> Tensor:
        return numbers[None, :] if self.outputs_first(node) else numbers[:, None]

    def outputs_first(self, node: Node) -> bool:
        return self._layout(node) == "oi"


@rule_for(
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
)
class Convolution(Weighted):
    """W[out, in / groups, *kernel] over axis 1.

    ``W t_x`` sums over the kernel, which holds only where no zero padding enters: with padding, a shift stops.
    """

    def matches(self, node: Node, fold: Folding) -> bool:
        batched = argument(node, "input").meta["val"].dim() == argument(node, "weight").meta["val"].dim()
        return batched and super().matches(node, fold)

    def input_axis(self, node: Node) -> int:
        return 1

    def output_axis(self, node: Node) -> int:
        return 1

    def use(self, node: Node, operand: Node, shift: np.ndarray | None, fold: Folding) -> Use:
        padding = argument(node, "padding")
        padding = [padding] if isinstance(padding, str | int) else padding
        if any(amount not in (0, "valid") for amount in padding):
            return Use.STOP
        return super().use(node, operand, shift, fold)

    def rows(self, node: Node, shape: torch.Size, numbers: Tensor) -> Tensor:
        return _over_kernel(numbers, shape)

    def columns(self, node: Node, shape: torch.Size, numbers: Tensor) -> Tensor:
        return _per_group(numbers, shape, argument(node, "groups"))

    def can_centre(self, node: Node) -> bool:
        return argument(node, "groups") == 1  # other groups of the convolution read other inputs


@rule_for(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
class TransposedConvolution(Convolution):
    """W[in, out / groups, *kernel]: scales pass, a shift never does (the borders see fewer kernel taps)."""

    def use(self, node: Node, operand: Node, shift: np.ndarray | None, fold: Folding) -> Use:
        return Use.STOP

    def rows(self, node: Node, shape: torch.Size, numbers: Tensor) -> Tensor:
        return _per_group(numbers, shape, argument(node, "groups"))

    def columns(self, node: Node, shape: torch.Size, numbers: Tensor) -> Tensor:
        return _over_kernel(numbers, shape)

    def weight_axis(self, node: Node) -> int:
        return 1


@rule_for(aten.embedding.default)
class Embedding(Rule):
    """``y = E[index]``: ``E' = (E - t_y) / s_y``."""

    owns_constants = True

    def matches(self, node: Node, fold: Folding) -> bool:
        return fold.usable_weight(node.args[0]) and not fold.program.is_constant(node.args[1])

    def chooses_shift(self, node: Node, fold: Folding) -> bool:
        return True

    def relate(self, node: Node, fold: Folding) -> None:
        fold.free_axis(node, node.meta["val"].dim() - 1)

    def settle(self, node: Node, fold: Folding) -> np.ndarray:
        return fold.chosen_shift(node)

    def rewrite(self, node: Node, fold: Folding) -> None:
        weight = node.args[0]
        size = int(node.meta["val"].shape[-1])
        s_y = fold.vector(fold.scales[fold.scale(node)], -1, size)
        t_y = fold.vector(fold.shift_of[node], -1, size)
        centre = fold.centred.get(node)
        if (s_y != 1).any() or t_y.any() or centre is not None:
            centre = None if centre is None else centre.reshape(1, -1)
            fold.scale_weight(node, weight, 1.0 / s_y[None, :], minus=t_y[None, :], centre=centre)


def _over_kernel(numbers: Tensor, shape: torch.Size) -> Tensor:
    """Numbers along the weight's first axis."""
    return numbers.reshape(-1, *(1,) * (len(shape) - 1))


def _per_group(numbers: Tensor, shape: torch.Size, groups: int) -> Tensor:
    """Numbers along the weight's second axis, which holds one group's channels: [first axis, second axis, 1, ...]."""
    grouped = numbers.reshape(groups, -1).repeat_interleave(shape[0] // groups, dim=0)
    return grouped.reshape(*grouped.shape, *(1,) * (len(shape) - 2))


def _bias_name(weight_name: str) -> str:
    return weight_name.removesuffix("weight") + "bias" if weight_name.endswith("weight") else weight_name + ".bias"
