"""Products with a constant weight, however they are written: as matrices, in batches, or as an einsum."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from ..arrays import take_first, to_rank, varying, without_leading_ones
from ..gauge import Facts, Gauge
from ..relations import Relations
from ..weight_edits import WeightEdits
from .base import Match, is_float, rule_for
from .contraction import Contraction, contraction_of, factors_of, lay
from .weights import Weighted

aten = torch.ops.aten


class Product(Weighted):
    """A product with the weight on the right; see :mod:`.contraction` for how its axes are named."""

    has_bias = False
    weight_at = 1

    def operands(self) -> tuple[Node, Node, Node | None]:
        factors = factors_of(self.node)
        return factors[1 - self.weight_at], factors[self.weight_at], None

    def fits(self, facts: Facts) -> bool:
        found, options = contraction_of(self.node), facts.options
        if found is None or self.node in options.mixing - options.fixed_equations or not super().fits(facts):
            return False
        x, weight, result = self._axes(found)
        # What is summed over belongs to both: a sum over positions or over a weight alone is no map along axes.
        return all(name in result or (name in x and name in weight) for name in {*x, *weight} - {""})

    def relate(self, relations: Relations) -> np.ndarray:
        operand, _, bias = self.operands()
        others = self._others(relations.scale(operand))
        if others and bias is None and self.held is None and self.node not in relations.gauge.options.fixed_equations:
            relations.mixing.append(self.node)
        return super().relate(relations)

    def input_axes(self) -> tuple[int, ...]:
        x, weight, _ = self._axes(contraction_of(self.node))
        return tuple(axis for axis, name in enumerate(x) if name and name in weight)

    def output_axes(self) -> tuple[int, ...]:
        _, weight, result = self._axes(contraction_of(self.node))
        return tuple(axis for axis, name in enumerate(result) if name and name in weight)

    def columns(self, numbers: np.ndarray) -> Tensor:
        x, weight, _ = self._axes(contraction_of(self.node))
        return torch.from_numpy(lay(numbers, x, weight))

    def rows(self, numbers: np.ndarray) -> Tensor:
        _, weight, result = self._axes(contraction_of(self.node))
        return torch.from_numpy(lay(numbers, result, weight))

    def contracted(self) -> tuple[int, ...]:
        _, weight, result = self._axes(contraction_of(self.node))
        return tuple(axis for axis, name in enumerate(weight) if name and name not in result)

    def written(self, total: Tensor) -> np.ndarray:
        _, weight, result = self._axes(contraction_of(self.node))
        return lay(total.numpy(), weight, result)

    def can_centre(self, groups: np.ndarray) -> bool:
        """Where each entry along an axis has a map of its own, it reads other inputs: no mean goes across them."""
        x, _, result = self._axes(contraction_of(self.node))
        for axis in (a for a, name in enumerate(result) if groups.shape[a] != 1 and name in x):
            slices = [np.unique(part[part >= 0]) for part in np.split(groups, groups.shape[axis], axis)]
            if sum(map(len, slices)) != len(np.unique(groups[groups >= 0])):
                return False
        return True

    def _axes(self, found: Contraction | None) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        """The names of the axes of the input, of the weight and of the result."""
        assert found is not None
        factors = (found.left, found.right)
        return factors[1 - self.weight_at], factors[self.weight_at], found.result


@rule_for(aten.linear.default)
class Linear(Product):
    """``y = x Wᵀ + bias`` with W[out, in] over the last axis."""

    has_bias = True

    def writes_rows(self) -> bool:
        return True

    def operands(self) -> tuple[Node, Node, Node | None]:
        return Weighted.operands(self)

    def fits(self, facts: Facts) -> bool:
        return self.argument("weight").meta["val"].dim() == 2 and super().fits(facts)


@rule_for(
    *(aten.matmul.default, aten.mm.default, aten.bmm.default, aten.mv.default, aten.inner.default),
    *(aten.einsum.default, aten.tensordot.default, aten.outer.default, aten.dot.default, aten.linalg_vecdot.default),
)
class RightProduct(Product):
    """``y = x W``; a bias that folding creates follows as an Add."""


@rule_for(
    *(aten.matmul.default, aten.mm.default, aten.bmm.default, aten.mv.default, aten.inner.default),
    *(aten.einsum.default, aten.tensordot.default, aten.outer.default, aten.dot.default, aten.linalg_vecdot.default),
)
class LeftProduct(Product):
    """``y = W x``; a bias that folding creates follows as an Add."""

    weight_at = 0


@rule_for(aten.linear.default)
class LinearToOne(Product):
    """``y = x w`` with a vector w; a bias that folding creates follows as an Add."""

    def fits(self, facts: Facts) -> bool:
        return self.argument("bias") is None and super().fits(facts)


class BiasedProduct(Product):
    """``y = beta bias + alpha x W`` with a bias of any shape."""

    has_bias = True
    bias_name = "self"

    def operands(self) -> tuple[Node, Node, Node | None]:
        return *super().operands()[:2], self.argument(self.bias_name)

    def fits(self, facts: Facts) -> bool:
        return self.argument("beta") != 0 and super().fits(facts)

    def bias_fits(self, shape: torch.Size) -> bool:
        return True

    def factor_of_product(self) -> float:
        return self.argument("alpha")

    def factor_of_bias(self) -> float:
        return self.argument("beta")

    def bias_of(self, value: np.ndarray) -> np.ndarray:
        return to_rank(value, self.value.dim())

    def bias_layout(self, value: np.ndarray) -> np.ndarray:
        return without_leading_ones(value)


@rule_for(aten.addmm.default, aten.baddbmm.default, aten.addbmm.default, aten.addmv.default)
class BiasedRightProduct(BiasedProduct):
    """``y = beta bias + alpha x W``."""


@rule_for(aten.addmm.default, aten.baddbmm.default, aten.addbmm.default, aten.addmv.default)
class BiasedLeftProduct(BiasedProduct):
    """``y = beta bias + alpha W x``."""

    weight_at = 0


@rule_for(aten.bilinear.default)
class Bilinear(Match):
    """``y_o = sum W[o, i, j] x_i z_j + bias_o`` of two values, whose shifts stop.

    W' = diag(1 / s_y) W diag(s_x) diag(s_z),     bias' = (bias - t_y) / s_y
    """

    owns_constants = True

    def fits(self, facts: Facts) -> bool:
        weight, bias = self.args[2], self.argument("bias")
        known = facts.usable_weight(weight) and (bias is None or facts.program.is_constant(bias))
        return known and all(is_float(x) and not facts.program.is_constant(x) for x in self.args[:2])

    def chooses_shift(self, gauge: Gauge) -> bool:
        return True

    def price(self, gauge: Gauge) -> int:
        return 0 if self.argument("bias") is not None else 2

    def relate(self, relations: Relations) -> np.ndarray:
        for scale in map(relations.scale, self.args[:2]):
            relations.require_equal(scale, varying(scale[..., 0]))
            relations.stored.append(scale)
        return relations.free(self.node, (self.value.dim() - 1,))

    def settle(self, gauge: Gauge) -> np.ndarray:
        return gauge.chosen_shift(self.node)

    def rewrite(self, edits: WeightEdits) -> None:
        gauge, (first, second, weight), bias = edits.gauge, self.args[:3], self.argument("bias")
        sizes = weight.meta["val"].shape
        s_y, s_x, s_z = (
            edits.vector(take_first(s, varying(s[..., 0])), -1, int(size))
            for s, size in zip((gauge.scales[gauge.scale(n)] for n in (self.node, first, second)), sizes, strict=True)
        )
        t_y = edits.vector(gauge.shifts.of[self.node], -1, int(sizes[0]))
        if any((s != 1).any() for s in (s_y, s_x, s_z)):
            edits.scale_weight(self.node, weight, 1.0 / s_y[:, None, None], s_x[:, None], s_z)
        elif not t_y.any():
            return
        old = 0.0 if bias is None else gauge.program.constant(bias)
        name = f"{gauge.path(self.node)}.bias"
        edits.set_bias(self.node, "bias", bias, (old - t_y) / s_y, name=name, like=weight)
