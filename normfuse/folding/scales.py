"""The system of scale ratios, solved exactly by a weighted union-find over single channels.

Every channel of every tensor has one unknown scale. Operations relate them pairwise by ``scale[a] = ratio * scale[b]``;
variable 0 is the constant one. Each variable points at a parent with the ratio between them, roots always have the
lower number, so a class that holds variable 0 is *pinned* and every other class keeps one free factor. A variable may
be required to be positive; a root then carries the sign that this asks of its own value.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

import numpy as np

# Ratios that reach one channel on two ways agree when they differ by rounding only: a few thousand float64 products.
AGREEMENT = 1e-12


class Outcome(enum.Enum):
    """What became of a demand; true when it was met."""

    MET = "met"
    CONTRADICTS = "the ratio contradicts what is known"
    SIGN = "a scale that must be positive would be negative"
    RANGE = "the scales of one class would span too much"

    def __bool__(self) -> bool:
        return self is Outcome.MET


class _Attached(NamedTuple):
    """Roots that were given parents, and what the parents carried before."""

    roots: np.ndarray
    parents: np.ndarray
    before: tuple[np.ndarray, np.ndarray, np.ndarray]


class Scales:
    """Unknown scales, addressed by integer arrays of variable numbers of any shape.

    Args:
        max_range: largest allowed ratio between two scales of one class.
    """

    ONE = 0

    def __init__(self, max_range: float = np.inf) -> None:
        self._max_bits = np.log2(max_range)
        self._count = 1
        self._parent = np.arange(1)
        self._ratio = np.ones(1)
        self._sign = np.ones(1, np.int8)  # of a root's value: +1, -1, or 0 where nothing is asked
        self._low = np.zeros(1)  # of a root: the range of its members' scales relative to its own, in bits
        self._high = np.zeros(1)
        self._reason = np.zeros(1, np.int32)
        self._reasons: list[str] = [""]
        self._values: np.ndarray | None = None

    def fresh(self, shape: tuple[int, ...]) -> np.ndarray:
        """New, unrelated variables in an array of the given shape."""
        start = self._count
        self._count += int(np.prod(shape))
        if self._count > len(self._parent):  # variables beyond the count are roots of their own already
            more = max(self._count, 2 * len(self._parent)) - len(self._parent)
            self._parent = np.concatenate([self._parent, np.arange(len(self._parent), len(self._parent) + more)])
            self._ratio = np.concatenate([self._ratio, np.ones(more)])
            self._sign = np.concatenate([self._sign, np.zeros(more, np.int8)])
            self._low = np.concatenate([self._low, np.zeros(more)])
            self._high = np.concatenate([self._high, np.zeros(more)])
            self._reason = np.concatenate([self._reason, np.zeros(more, np.int32)])
        return np.arange(start, self._count).reshape(shape)

    def pinned(self, shape: tuple[int, ...]) -> np.ndarray:
        """An array that refers to the constant one everywhere."""
        return np.zeros(shape, np.int64)

    def pin(self, index: np.ndarray, reason: str) -> None:
        """Fix scales to one; `reason` is what a user is told when a norm fails on it."""
        self._reasons.append(reason)
        self._require(index, np.zeros_like(index), len(self._reasons) - 1)

    def equate(self, a: np.ndarray, b: np.ndarray) -> None:
        """Require equal scales; the arrays broadcast against each other."""
        a, b = np.broadcast_arrays(a, b)
        self._require(a, b)

    def require_positive(self, index: np.ndarray) -> None:
        """Require positive scales, before any demand."""
        roots, _ = self._roots(index.ravel())
        self._sign[roots] = 1

    def demand(self, out: np.ndarray, inp: np.ndarray, ratio: np.ndarray) -> Outcome:
        """Ask for ``scale[out] = ratio * scale[inp]``.

        Met for all channels or, when one contradicts what is known or would stretch its class beyond the largest
        allowed range, for none.
        """
        out, inp, ratio = np.broadcast_arrays(out, inp, ratio)
        attached: list[_Attached] = []
        outcome = self._union(out.ravel(), inp.ravel(), ratio.ravel(), attached)
        for step in reversed(attached) if not outcome else ():
            self._parent[step.roots] = step.roots
            self._ratio[step.roots] = 1.0
            self._sign[step.parents], self._low[step.parents], self._high[step.parents] = step.before
        return outcome

    def is_pinned(self, index: np.ndarray) -> bool:
        """Whether every variable in `index` is tied to the constant one."""
        return not self._roots(index.ravel())[0].any()

    def why_pinned(self, index: np.ndarray) -> str:
        """The reason that fixed the first pinned variable of `index`; empty when none is pinned."""
        roots, _ = self._roots(index.ravel())
        for variable in index.ravel()[roots == self.ONE]:
            while self._parent[variable] != self.ONE:
                variable = self._parent[variable]
            return self._reasons[self._reason[variable]]
        return ""

    def alone(self, index: np.ndarray) -> bool:
        """Whether no variable of `index` is related to any other variable."""
        roots, _ = self._roots(np.arange(self._count))
        sizes = np.bincount(roots, minlength=len(roots))
        flat = index.ravel()
        return bool((roots[flat] == flat).all() and (sizes[flat] == 1).all() and (flat != self.ONE).all())

    def accepts(self, index: np.ndarray, values: np.ndarray) -> bool:
        """Whether :meth:`assign` may give these values: to variables alone, with the signs that are asked of them."""
        return self.alone(index) and bool((self._sign[index] * values >= 0).all())

    def solve(self, stored: np.ndarray, centre_beyond: float = 3.0) -> None:
        """Give every variable its value.

        A free class whose stored scales leave [2^-centre_beyond, 2^centre_beyond] is multiplied by the power of two
        that centres its range. `stored` names the variables that end up in weights.
        """
        roots, values = self._roots(np.arange(self._count))
        bits = np.log2(np.abs(values[stored]))
        low, high = np.full(len(roots), np.inf), np.full(len(roots), -np.inf)
        np.minimum.at(low, roots[stored], bits)
        np.maximum.at(high, roots[stored], bits)
        wide = np.maximum(-low, high) > centre_beyond
        wide[self.ONE] = False
        factor = np.ones(len(roots))
        factor[wide] = np.exp2(-np.round((low[wide] + high[wide]) / 2))
        factor[self._sign[: self._count] < 0] *= -1.0
        self._values = values * factor[roots]

    def assign(self, index: np.ndarray, values: np.ndarray) -> None:
        """Set the value of variables that accept it, after :meth:`solve`."""
        assert self._values is not None
        self._values[index] = values

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        assert self._values is not None, "solve() has not run"
        return self._values[index]

    def _require(self, a: np.ndarray, b: np.ndarray, reason: int | None = None) -> None:
        # Ratios other than one are only ever demanded, after all equalities: so equalities cannot contradict.
        if not self._union(a.ravel(), b.ravel(), np.ones(a.size), [], reason):
            raise AssertionError("equal scales contradict: an equality was required after a ratio")

    def _roots(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        root, ratio = index.copy(), np.ones(len(index))
        while True:
            parent = self._parent[root]
            if np.array_equal(parent, root):
                return root, ratio
            ratio *= self._ratio[root]
            root = parent

    def _union(
        self,
        a: np.ndarray,
        b: np.ndarray,
        ratio: np.ndarray,
        attached: list[_Attached],
        reason: int | None = None,
    ) -> Outcome:
        while True:
            root_a, ratio_a = self._roots(a)
            root_b, ratio_b = self._roots(b)
            factor = ratio * ratio_b / ratio_a  # value[root_a] = factor * value[root_b]
            met = root_a == root_b
            if np.any(np.abs(factor[met] - 1.0) > AGREEMENT):
                return Outcome.CONTRADICTS
            if met.all():
                return Outcome.MET
            a, b, ratio = a[~met], b[~met], ratio[~met]
            root_a, root_b, factor = root_a[~met], root_b[~met], factor[~met]
            high, low = np.maximum(root_a, root_b), np.minimum(root_a, root_b)
            factor = np.where(root_a > root_b, factor, 1.0 / factor)
            # One parent per root and round; what is left over meets again in the next round.
            high, first = np.unique(high, return_index=True)
            low, factor = low[first], factor[first]
            attached.append(_Attached(high, low, (self._sign[low], self._low[low], self._high[low])))
            self._parent[high] = low
            self._ratio[high] = factor
            if not self._join_signs(high, low, factor):
                return Outcome.SIGN
            if not self._join_ranges(high, low, factor):
                return Outcome.RANGE
            for root in high[low == self.ONE] if reason is None else ():
                partner = first[np.searchsorted(high, root)]
                known = a[partner] if root_b[partner] == root else b[partner]
                self._reason[root] = self._reason_code(known)
            if reason is not None:
                self._reason[high] = reason

    def _join_signs(self, high: np.ndarray, low: np.ndarray, factor: np.ndarray) -> bool:
        """Pass the signs asked of attached roots on to their parents; False where two contradict."""
        asked = self._sign[high] * np.sign(factor).astype(np.int8)
        for sign in (1, -1):
            parents = low[asked == sign]
            if (self._sign[parents] == -sign).any():
                return False
            self._sign[parents] = sign
        return True

    def _join_ranges(self, high: np.ndarray, low: np.ndarray, factor: np.ndarray) -> bool:
        """Let parents span what attached roots span; False where a class becomes too wide."""
        bits = np.log2(np.abs(factor))
        np.minimum.at(self._low, low, self._low[high] + bits)
        np.maximum.at(self._high, low, self._high[high] + bits)
        return bool((self._high[low] - self._low[low] <= self._max_bits).all())

    def _reason_code(self, variable: int) -> int:
        while self._parent[variable] != self.ONE:
            variable = self._parent[variable]
        return int(self._reason[variable])
