"""Products with a constant weight, however they are written: as matrices, in batches, or as an einsum."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from ..arrays import to_rank, without_leading_ones
from ..gauge import Gauge
from .base import argument, rule_for
from .contraction import Contraction, contraction_of, factors_of, lay
from .weights import Weighted

aten = torch.ops.aten


class Product(Weighted):
    """A product with the weight on the right; see :mod:`.contraction` for how its axes are named."""

    has_bias = False
    weight_at = 1

    def operands(self, node: Node) -> tuple[Node, Node, Node | None]:
        factors = factors_of(node)
        return factors[1 - self.weight_at], factors[self.weight_at], None

    def matches(self, node: Node, gauge: Gauge) -> bool:
        found = contraction_of(node)
        if found is None or not super().matches(node, gauge):
            return False
        x, weight, result = self._axes(found)
        # What is summed over belongs to both: a sum over positions or over a weight alone is no map along axes.
        return all(name in result or (name in x and name in weight) for name in {*x, *weight} - {""})

    def input_axes(self, node: Node) -> tuple[int, ...]:
        x, weight, _ = self._axes(contraction_of(node))
        return tuple(axis for axis, name in enumerate(x) if name and name in weight)

    def output_axes(self, node: Node) -> tuple[int, ...]:
        _, weight, result = self._axes(contraction_of(node))
        return tuple(axis for axis, name in enumerate(result) if name and name in weight)

    def columns(self, node: Node, numbers: np.ndarray) -> Tensor:
        x, weight, _ = self._axes(contraction_of(node))
        return torch.from_numpy(lay(numbers, x, weight))

    def rows(self, node: Node, numbers: np.ndarray) -> Tensor:
        _, weight, result = self._axes(contraction_of(node))
        return torch.from_numpy(lay(numbers, result, weight))

    def contracted(self, node: Node) -> tuple[int, ...]:
        _, weight, result = self._axes(contraction_of(node))
        return tuple(axis for axis, name in enumerate(weight) if name and name not in result)

    def written(self, node: Node, total: Tensor) -> np.ndarray:
        _, weight, result = self._axes(contraction_of(node))
        return lay(total.numpy(), weight, result)

    def can_centre(self, node: Node, groups: np.ndarray) -> bool:
        """Where each entry along an axis has a map of its own, it reads other inputs: no mean goes across them."""
        x, _, result = self._axes(contraction_of(node))
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

    def writes_rows(self, node: Node) -> bool:
        return True

    def operands(self, node: Node) -> tuple[Node, Node, Node | None]:
        return Weighted.operands(self, node)

    def matches(self, node: Node, gauge: Gauge) -> bool:
        return argument(node, "weight").meta["val"].dim() == 2 and super().matches(node, gauge)


@rule_for(
    *(aten.matmul.default, aten.mm.default, aten.bmm.default, aten.mv.default, aten.inner.default),
    *(aten.einsum.default, aten.tensordot.default, aten.outer.default),
)
class RightProduct(Product):
    """``y = x W``; a bias that folding creates follows as an Add."""


@rule_for(
    *(aten.matmul.default, aten.mm.default, aten.bmm.default, aten.mv.default, aten.inner.default),
    *(aten.einsum.default, aten.tensordot.default, aten.outer.default),
)
class LeftProduct(Product):
    """``y = W x``; a bias that folding creates follows as an Add."""

    weight_at = 0


@rule_for(aten.linear.default)
class LinearToOne(Product):
    """``y = x w`` with a vector w; a bias that folding creates follows as an Add."""

    def matches(self, node: Node, gauge: Gauge) -> bool:
        return argument(node, "bias") is None and super().matches(node, gauge)


class BiasedProduct(Product):
    """``y = beta bias + alpha x W`` with a bias of any shape."""

    has_bias = True
    bias_name = "self"

    def operands(self, node: Node) -> tuple[Node, Node, Node | None]:
        return *super().operands(node)[:2], argument(node, self.bias_name)

    def matches(self, node: Node, gauge: Gauge) -> bool:
        return argument(node, "beta") != 0 and super().matches(node, gauge)

    def bias_fits(self, node: Node, shape: torch.Size) -> bool:
        return True

    def factor_of_product(self, node: Node) -> float:
        return argument(node, "alpha")

    def factor_of_bias(self, node: Node) -> float:
        return argument(node, "beta")

    def bias_of(self, node: Node, value: np.ndarray) -> np.ndarray:
        return to_rank(value, node.meta["val"].dim())

    def bias_layout(self, node: Node, value: np.ndarray) -> np.ndarray:
        return without_leading_ones(value)


@rule_for(aten.addmm.default, aten.baddbmm.default, aten.addbmm.default, aten.addmv.default)
class BiasedRightProduct(BiasedProduct):
    """``y = beta bias + alpha x W``."""


@rule_for(aten.addmm.default, aten.baddbmm.default, aten.addbmm.default, aten.addmv.default)
class BiasedLeftProduct(BiasedProduct):
    """``y = beta bias + alpha W x``."""

    weight_at = 0
