"""Powers of a value: the only operations whose result's scale is no multiple of the operand's."""

from __future__ import annotations

import numpy as np
import torch

from ..gauge import Facts
from ..operations import EXPONENTS
from ..relations import Relations
from .base import Match, is_float, rule_for

aten = torch.ops.aten
_EXPONENTS = {**EXPONENTS, aten.mul.Tensor: 2.0}  # of a value by itself


@rule_for(aten.pow.Tensor_Scalar, *_EXPONENTS)
class Power(Match):
    """``(s * x)^p = s^p * x^p``; for a p that is no integer the scale is positive. A shift stops.

    The equation is no ratio. It is met when the ratios are: see :mod:`normfuse.folding.solve`.
    """

    def fits(self, facts: Facts) -> bool:
        if self.node in facts.options.fixed_powers or not is_float(self.node) or not is_float(self.args[0]):
            return False
        if self.target is aten.mul.Tensor:
            return self.args[0] is self.args[1]
        return self.args[0].meta["val"].dtype == self.value.dtype and self.exponent != 0

    @property
    def exponent(self) -> float:
        """The power to which the operand is raised."""
        return self.args[1] if self.target is aten.pow.Tensor_Scalar else _EXPONENTS[self.target]

    def relate(self, relations: Relations) -> np.ndarray:
        scale = relations.scale(self.args[0])
        result = relations.scales.fresh(scale.shape)
        if self.exponent % 1:
            relations.scales.require_positive(scale)
            relations.scales.require_positive(result)
        return result
