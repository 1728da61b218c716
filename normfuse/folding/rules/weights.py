"""Operations with a weight: they accept any scale and produce any scale, so they demand nothing."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from ..arrays import CannotCarry, along_axis, collapse_equal, subtract_means, take_first, varying, without_leading_ones
from ..gauge import Facts, Gauge
from ..operations import CONVOLUTIONS
from ..program import piece
from ..relations import Relations
from ..weight_edits import WeightEdits
from .base import Match, MeanRole, Use, is_float, rule_for

aten = torch.ops.aten


class Weighted(Match):
    """``y = W x + bias``, a linear map with a constant weight.

    With ``x = s_x * f_x + t_x`` and ``y = s_y * f_y + t_y``:

        W'    = diag(1 / s_y) W diag(s_x)
        bias' = (bias + W t_x - t_y) / s_y

    Scales and shifts may vary along the axes of the input that the weight reads and along the axes of the result that
    it writes; where an axis of the weight is both (experts, heads), each entry has a map of its own. A missing bias is
    created where it is needed; one that has become zero is dropped. Where a channel is to hold a number, its
    row of W becomes zero and its bias that number before anything else.
    """

    owns_constants = True
    mean = MeanRole.WRITES
    weighs = True
    writes_constants = True
    #: Name of the bias in the operation's schema.
    bias_name = "bias"

    def fits(self, facts: Facts) -> bool:
        operand, weight, bias = self.operands()
        if not is_float(operand) or facts.program.is_constant(operand):
            return False
        if not facts.usable_weight(weight) or not is_float(weight):
            return False
        return bias is None or (facts.program.is_constant(bias) and self.bias_fits(bias.meta["val"].shape))

    def bias_fits(self, shape: torch.Size) -> bool:
        """Whether a bias of this shape is added to the output channels; others broadcast."""
        (axis,) = self.output_axes()
        return tuple(shape) == (self.value.shape[axis],)

    def operands(self) -> tuple[Node, Node, Node | None]:
        return tuple(self.argument(name) for name in ("input", "weight", self.bias_name))

    def chooses_shift(self, gauge: Gauge) -> bool:
        return True

    def price(self, gauge: Gauge) -> int:
        return 0 if self.operands()[2] is not None else 2

    def columns(self, numbers: np.ndarray) -> Tensor:
        """Numbers about the input, which vary along the axes that the weight reads, laid against the weight."""
        raise NotImplementedError

    def rows(self, numbers: np.ndarray) -> Tensor:
        """Numbers about the result, which vary along the axes that the weight writes, laid against the weight."""
        raise NotImplementedError

    def contracted(self) -> tuple[int, ...]:
        """The axes of the weight that the product sums over."""
        raise NotImplementedError

    def written(self, total: Tensor) -> np.ndarray:
        """Sums over the weight's contracted axes, which are kept with size one, as an array over the result."""
        raise NotImplementedError

    def factor_of_product(self) -> float:
        """What the product is multiplied by."""
        return 1.0

    def factor_of_bias(self) -> float:
        """What the bias is multiplied by."""
        return 1.0

    def can_centre(self, groups: np.ndarray) -> bool:
        """Whether the weight can produce its result less means over groups of its entries."""
        return True

    def relate(self, relations: Relations) -> np.ndarray:
        operand, _, _ = self.operands()
        inner = relations.scale(operand)
        relations.require_equal(inner, self._others(inner))
        relations.stored.append(inner)
        return relations.free(self.node, self.output_axes())

    def use(self, operand: Node, shift: np.ndarray | None, gauge: Gauge) -> Use:
        if shift is None:
            return Use.ABSORB
        try:
            collapse_equal(shift, self._others(shift))
        except CannotCarry:
            return Use.STOP
        return Use.ABSORB

    def settle(self, gauge: Gauge) -> np.ndarray:
        return gauge.chosen_shift(self.node)

    def constant_part(self, gauge: Gauge) -> np.ndarray:
        """``bias + W t_x``, what the result holds whatever the input is; nothing where it differs between positions."""
        constant = self._constant(gauge)
        positions = tuple(axis for axis in varying(constant) if axis not in self.output_axes())
        return (
            gauge.no_shift(self.node)
            if positions
            else np.broadcast_to(constant, gauge.matches.scale_of[self.node].shape)
        )

    def rewrite(self, edits: WeightEdits) -> None:
        gauge = edits.gauge
        operand, weight, bias = self.operands()
        s_x, s_y = gauge.scales[gauge.scale(operand)], gauge.scales[gauge.scale(self.node)]
        t_x, t_y = gauge.incoming(self.node, operand), gauge.shifts.of[self.node]
        rescaled = bool((s_x != 1).any() or (s_y != 1).any()) or self.held is not None
        centre = gauge.centring.centred.get(self.node)
        if gauge.program.computed(weight) and not rescaled and centre is None:
            edits.scale_weight(self.node, weight)  # a reparametrised weight is stored as what it has become
        if not rescaled and not t_x.any() and not t_y.any() and centre is None:
            return
        constant = (self._constant(gauge) - t_y) / s_y
        if centre is not None:
            constant = subtract_means(torch.from_numpy(constant), centre).numpy()
        if rescaled or centre is not None:
            s_x = take_first(s_x, self._others(s_x))
            rows = 1.0 / s_y if self.held is None else np.where(np.isnan(self.held), 1.0 / s_y, 0.0)
            factors = (self.rows(rows), self.columns(s_x)) if rescaled else ()
            centre = None if centre is None else self.rows(centre).numpy()
            edits.scale_weight(self.node, weight, *factors, centre=centre)
        self.set_bias(weight, bias, constant / self.factor_of_bias(), edits)

    def set_bias(self, weight: Node, bias: Node | None, value: np.ndarray, edits: WeightEdits) -> None:
        """Let the operation add `value`, an array over the result's channels."""
        name = _bias_name(edits.program.name(weight))
        if self.has_bias:
            stored = torch.from_numpy(np.array(self.bias_layout(value)))
            edits.set_bias(self.node, self.bias_name, bias, stored, name=name, like=weight)
        elif value.any():
            edits.append_add(self.node, without_leading_ones(value), name=name, like=weight)

    def bias_of(self, value: np.ndarray) -> np.ndarray:
        """The operation's bias as an array over the result."""
        (axis,) = self.output_axes()
        return along_axis(value, axis, self.value.dim())

    def bias_layout(self, value: np.ndarray) -> np.ndarray:
        """An array over the result's channels, as the operation's bias holds it."""
        (axis,) = self.output_axes()
        return np.broadcast_to(value.ravel(), (int(self.value.shape[axis]),))

    def through(self, weight: Node, shift: np.ndarray, gauge: Gauge) -> np.ndarray:
        """What a constant input contributes to the result: ``W shift``, as an array over the result's channels."""
        laid, contracted = self.columns(collapse_equal(shift, self._others(shift))), self.contracted()
        parts = [block * piece(laid, rows) for rows, block in gauge.program.blocks(weight)]
        parts = [part.sum(contracted, keepdim=True) for part in parts] if contracted else parts
        return self.written(sum(parts) if 0 in contracted else torch.cat(parts)) * self.factor_of_product()

    def _constant(self, gauge: Gauge) -> np.ndarray:
        operand, weight, bias = self.operands()
        constant = gauge.no_shift(self.node)
        if bias is not None:
            constant = self.bias_of(gauge.program.constant(bias).numpy()) * self.factor_of_bias()
        t_x = gauge.incoming(self.node, operand)
        constant = constant + self.through(weight, t_x, gauge) if t_x.any() else constant
        return constant if self.held is None else np.where(np.isnan(self.held), constant, self.held)

    def _others(self, numbers: np.ndarray) -> tuple[int, ...]:
        """The axes along which numbers about the input vary, though the weight does not read them."""
        read = self.input_axes()
        return tuple(axis for axis in varying(numbers) if axis not in read)


@rule_for(*CONVOLUTIONS)
class Convolution(Weighted):
    """W[out, in / groups, *kernel] over axis 1, or over the first one where there is no batch.

    ``W t_x`` sums over the kernel, which holds only where no zero padding enters: with padding, a shift stops.
    """

    def input_axes(self) -> tuple[int, ...]:
        return (1 - self._missing(),)

    def output_axes(self) -> tuple[int, ...]:
        return (1 - self._missing(),)

    def use(self, operand: Node, shift: np.ndarray | None, gauge: Gauge) -> Use:
        return super().use(operand, shift, gauge) if self._reads_whole_windows() else Use.STOP

    def _reads_whole_windows(self) -> bool:
        """Whether every entry of the result is a sum over the whole kernel."""
        return all(amount in (0, "valid") for amount in self._amounts("padding"))

    def _amounts(self, name: str) -> list[int | str]:
        """An argument with a number for each axis of the kernel."""
        amounts = self.argument(name)
        axes = self.argument("weight").meta["val"].dim() - 2
        return list(amounts) * (axes // len(amounts)) if isinstance(amounts, list | tuple) else [amounts] * axes

    def rows(self, numbers: np.ndarray) -> Tensor:
        return self._over_kernel(self._batched(numbers))

    def columns(self, numbers: np.ndarray) -> Tensor:
        return self._per_group(self._batched(numbers))

    def contracted(self) -> tuple[int, ...]:
        return tuple(range(1, self.argument("weight").meta["val"].dim()))

    def written(self, total: Tensor) -> np.ndarray:
        written = total.transpose(0, 1).numpy()
        return written[0] if self._missing() else written

    def can_centre(self, groups: np.ndarray) -> bool:
        return self.argument("groups") == 1  # other groups of the convolution read other inputs

    def writes_rows(self) -> bool:
        return self.argument("groups") == 1

    def _missing(self) -> int:
        """How many leading axes the input lacks: one where there is no batch."""
        return self.argument("weight").meta["val"].dim() - self.value.dim()

    def _batched(self, numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(np.array(numbers[None] if self._missing() else numbers))

    def _over_kernel(self, numbers: Tensor) -> Tensor:
        """Numbers along the weight's first axis."""
        return numbers.transpose(0, 1)

    def _per_group(self, numbers: Tensor) -> Tensor:
        """Numbers along the weight's second axis, which holds the channels of one group."""
        groups, first = self.argument("groups"), self.argument("weight").meta["val"].shape[0]
        if groups == 1 or numbers.numel() == 1:
            return numbers
        grouped = numbers.reshape(groups, -1).repeat_interleave(first // groups, dim=0)
        return grouped.reshape(*grouped.shape, *(1,) * (numbers.dim() - 2))


@rule_for(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
class TransposedConvolution(Convolution):
    """W[in, out / groups, *kernel]. Its borders see fewer taps of the kernel, and padding cuts them off.

    ``W t_x`` sums over the kernel where all of them are cut off, without strides: with a kernel of one, always.
    """

    def _reads_whole_windows(self) -> bool:
        kernel = self.argument("weight").meta["val"].shape[2:]
        border = [(size - 1) * step for size, step in zip(kernel, self._amounts("dilation"), strict=True)]
        plain = set(self._amounts("stride")) == {1} and set(self._amounts("output_padding")) == {0}
        return plain and all(cut >= size for cut, size in zip(self._amounts("padding"), border, strict=True))

    def writes_rows(self) -> bool:
        return False

    def rows(self, numbers: np.ndarray) -> Tensor:
        return self._per_group(self._batched(numbers))

    def columns(self, numbers: np.ndarray) -> Tensor:
        return self._over_kernel(self._batched(numbers))

    def contracted(self) -> tuple[int, ...]:
        return super().contracted()[1:]

    def written(self, total: Tensor) -> np.ndarray:
        grouped = total.reshape(self.argument("groups"), -1, *total.shape[1:]).sum(1)
        return super().written(grouped.reshape(-1, 1, *total.shape[2:]))


@rule_for(aten.embedding.default)
class Embedding(Match):
    """``y = E[index]``: ``E' = (E - t_y) / s_y``."""

    owns_constants = True
    mean = MeanRole.WRITES

    def output_axes(self) -> tuple[int, ...]:
        return (self.value.dim() - 1,)

    def can_centre(self, groups: np.ndarray) -> bool:
        return True

    def price(self, gauge: Gauge) -> int:
        return 3 if gauge.program.shared(self.args[0]) else 1

    def fits(self, facts: Facts) -> bool:
        return facts.usable_weight(self.args[0]) and not facts.program.is_constant(self.args[1])

    def chooses_shift(self, gauge: Gauge) -> bool:
        return True

    def relate(self, relations: Relations) -> np.ndarray:
        return relations.free(self.node, (self.value.dim() - 1,))

    def settle(self, gauge: Gauge) -> np.ndarray:
        return gauge.chosen_shift(self.node)

    def rewrite(self, edits: WeightEdits) -> None:
        gauge = edits.gauge
        weight = self.args[0]
        size = int(self.value.shape[-1])
        s_y = edits.vector(gauge.scales[gauge.scale(self.node)], -1, size)
        t_y = edits.vector(gauge.shifts.of[self.node], -1, size)
        centre = gauge.centring.centred.get(self.node)
        if (s_y != 1).any() or t_y.any() or centre is not None:
            centre = None if centre is None else centre.reshape(1, -1)
            edits.scale_weight(self.node, weight, 1.0 / s_y[None, :], minus=t_y[None, :], centre=centre)


def _bias_name(weight_name: str) -> str:
    # A parameter that is called otherwise is no module, so that nothing can be stored below it.
    return weight_name.removesuffix("weight") + "bias" if weight_name.endswith("weight") else weight_name + "_bias"
