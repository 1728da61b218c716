"""Operations whose result's scale is no ratio to an operand's: products of two computed values, and powers."""

from __future__ import annotations

import numpy as np
from torch.fx import Node

from ..arrays import Collapse, take_first
from ..gauge import Gauge
from ..relations import Relations
from ..scales import AGREEMENT
from .base import Match


class Equation(Match):
    """``s_y = s_1 * s_2^power``, met when the ratios are: see :mod:`normfuse.folding.solve`.

    Of scales that are fixed the others follow; where all are free, ``s_2`` is chosen. Of two factors with a result that
    is fixed, the one that varies as the result does follows.
    """

    @property
    def power(self) -> float:
        """The power of the second scale."""
        return 1.0

    def is_determined(self, gauge: Gauge) -> bool:
        first, second, result = (~np.isnan(gauge.scales.known(side)).any() for side in self.sides(gauge))
        return bool(first + second + result > 1 or second or (first and self.power == 1))

    def meet(self, gauge: Gauge) -> bool:
        scales = gauge.scales
        first, second, result = self.sides(gauge)
        unknown = [bool(np.isnan(scales.known(side)).any()) for side in (first, second)]
        if self.power == 1 and unknown[1] and not (unknown[0] and _has_one_each(first, scales.known(result))):
            first, second = second, first
        ratio = scales.known(result) / scales.known(first)
        follows = np.isnan(scales.known(second)) & ~np.isnan(ratio)
        if self.power % 2 != 1 and (ratio[follows] < 0).any():
            return False
        root = np.sign(ratio[follows]) * np.abs(ratio[follows]) ** (1.0 / self.power)
        if not scales.demand(second[follows], np.zeros_like(second[follows]), root):
            return False
        scales.choose(second)
        return bool(scales.demand(result, first, scales.known(second) ** self.power))


def _has_one_each(variables: np.ndarray, numbers: np.ndarray) -> bool:
    """Whether numbers laid against scale variables are the same, or unknown, wherever a variable is."""
    order = np.argsort(variables, axis=None, kind="stable")
    ids, found = variables.ravel()[order], numbers.ravel()[order]
    again = ids[1:] == ids[:-1]
    return np.allclose(found[1:][again], found[:-1][again], rtol=AGREEMENT, atol=0.0, equal_nan=True)


class ProductOfTwo(Equation):
    """``(s_1 * x_1) (s_2 * x_2) = s_1 s_2 * (x_1 x_2)``, with the inverse of s_2 in a quotient.

    What contradicts the equation fixes the second factor, and the scale of the first one passes.
    """

    def factors(self) -> tuple[Node, Node]:
        """The two values."""
        raise NotImplementedError

    def laid(self, at: int, numbers: np.ndarray, collapse: Collapse) -> np.ndarray:
        """Numbers about one of them, arranged as the result's."""
        raise NotImplementedError

    def may_multiply(self, relations: Relations) -> bool:
        """Whether the equation may be asked for."""
        first, second = self.factors()
        return first is not second and self.node not in relations.gauge.options.fixed_equations

    def multiplied(self, relations: Relations) -> np.ndarray:
        """Scale variables of a result that has the product of both scales."""
        sides = [self.laid(at, relations.scale(x), relations.require_equal) for at, x in enumerate(self.factors())]
        relations.equations.append(self.node)
        return relations.scales.fresh(np.broadcast_shapes(*(side.shape for side in sides)))

    def sides(self, gauge: Gauge) -> tuple[np.ndarray, ...]:
        sides = [self.laid(at, gauge.scale(x), take_first) for at, x in enumerate(self.factors())]
        return tuple(np.broadcast_arrays(*sides, gauge.scale(self.node)))
