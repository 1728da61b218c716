"""Powers of a value: the only operations whose result's scale is no multiple of the operand's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.fx import Node

from .base import Rule, is_float, rule_for

if TYPE_CHECKING:
    from ..engine import Folding

aten = torch.ops.aten
_EXPONENTS = {
    aten.square.default: 2.0,
    aten.sqrt.default: 0.5,
    aten.rsqrt.default: -0.5,
    aten.reciprocal.default: -1.0,
    aten.mul.Tensor: 2.0,
}


@rule_for(aten.pow.Tensor_Scalar, *_EXPONENTS)
class Power(Rule):
    """``(s * x)^p = s^p * x^p``; for a p that is no integer the scale is positive. A shift stops.

    The equation is no ratio. It is met when the ratios are: see :func:`settle_powers`.
    """

    def matches(self, node: Node, fold: Folding) -> bool:
        if node in fold.fixed_powers or not is_float(node) or not is_float(node.args[0]):
            return False
        if node.target is aten.mul.Tensor:
            return node.args[0] is node.args[1]
        return node.args[0].meta["val"].dtype == node.meta["val"].dtype and self.exponent(node) != 0

    def exponent(self, node: Node) -> float:
        """The power to which the operand is raised."""
        return node.args[1] if node.target is aten.pow.Tensor_Scalar else _EXPONENTS[node.target]

    def relate(self, node: Node, fold: Folding) -> None:
        scale = fold.scale(node.args[0])
        fold.scale_of[node] = fold.scales.fresh(scale.shape)
        if self.exponent(node) % 1:
            fold.scales.require_positive(scale)
            fold.scales.require_positive(fold.scale_of[node])
        fold.powers.append(node)


def settle_powers(fold: Folding) -> Node | None:
    """Meet the equations of all powers, one after another; returns the first that contradicts what is known.

    Where the scale of one side is fixed, the other follows. Where both are free, the operand's is chosen.
    """
    for node in fold.powers:
        rule = fold.rule_of[node]
        assert isinstance(rule, Power)
        exponent, x, y = rule.exponent(node), fold.scale(node.args[0]), fold.scale(node)
        behind = fold.scales.known(y)
        follows = np.isnan(fold.scales.known(x)) & ~np.isnan(behind)
        if exponent % 2 != 1 and (behind[follows] < 0).any():
            return node
        root = np.sign(behind[follows]) * np.abs(behind[follows]) ** (1.0 / exponent)
        if not fold.scales.demand(x[follows], np.zeros_like(x[follows]), root):
            return node
        fold.scales.choose(x)
        if not fold.scales.demand(y, np.zeros_like(y), fold.scales.known(x) ** exponent):
            return node
    return None
