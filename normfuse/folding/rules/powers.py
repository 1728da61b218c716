"""Powers of a value: the only operations whose result's scale is no multiple of the operand's."""

from __future__ import annotations

import numpy as np
import torch
from torch.fx import Node

from ..gauge import Gauge
from .base import Rule, is_float, rule_for

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

    def matches(self, node: Node, gauge: Gauge) -> bool:
        if node in gauge.options.fixed_powers or not is_float(node) or not is_float(node.args[0]):
            return False
        if node.target is aten.mul.Tensor:
            return node.args[0] is node.args[1]
        return node.args[0].meta["val"].dtype == node.meta["val"].dtype and self.exponent(node) != 0

    def exponent(self, node: Node) -> float:
        """The power to which the operand is raised."""
        return node.args[1] if node.target is aten.pow.Tensor_Scalar else _EXPONENTS[node.target]

    def relate(self, node: Node, gauge: Gauge) -> None:
        scale = gauge.scale(node.args[0])
        gauge.matches.scale_of[node] = gauge.scales.fresh(scale.shape)
        if self.exponent(node) % 1:
            gauge.scales.require_positive(scale)
            gauge.scales.require_positive(gauge.matches.scale_of[node])
        gauge.matches.powers.append(node)


def settle_powers(gauge: Gauge) -> set[Node]:
    """Meet the equations of all powers, one after another; returns those that contradict what is known.

    Where the scale of one side is fixed, the other follows. Where both are free, the operand's is chosen.
    """
    return {node for node in gauge.matches.powers if not _meet(node, gauge)}


def _meet(node: Node, gauge: Gauge) -> bool:
    rule = gauge.matches.rule_of[node]
    assert isinstance(rule, Power)
    exponent, x, y = rule.exponent(node), gauge.scale(node.args[0]), gauge.scale(node)
    behind = gauge.scales.known(y)
    follows = np.isnan(gauge.scales.known(x)) & ~np.isnan(behind)
    if exponent % 2 != 1 and (behind[follows] < 0).any():
        return False
    root = np.sign(behind[follows]) * np.abs(behind[follows]) ** (1.0 / exponent)
    if not gauge.scales.demand(x[follows], np.zeros_like(x[follows]), root):
        return False
    gauge.scales.choose(x)
    return bool(gauge.scales.demand(y, np.zeros_like(y), gauge.scales.known(x) ** exponent))
