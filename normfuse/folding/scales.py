"""The system of scale ratios, solved exactly by a weighted union-find over single channels.

Every channel of every tensor has one unknown scale. Operations relate them pairwise by ``scale[a] = ratio * scale[b]``;
variable 0 is the constant one. Each variable points at a parent with the ratio between them, roots always have the
lower number, so a class that holds variable 0 is *pinned* and every other class keeps one free factor. What is asked of
members is kept with their root, relative to its own value: the sign that makes positive members positive, the range of
all scales, and the range of those that are bounded because their values are stored in few exponents.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

import numpy as np

# Ratios that reach one channel on two ways agree when they differ by rounding only: a few thousand float64 products.
AGREEMENT = 1e-12
# How far from one, as a logarithm to base two, the scales of values may be that are stored in few exponents.
NARROW_BITS = 5.0


class Outcome(enum.Enum):
    """What became of a demand; true when it was met."""

    MET = "met"
    CONTRADICTS = "the ratio contradicts what is known"
    SIGN = "a scale that must be positive would be negative"
    RANGE = "the scales of one class would span too much"
    BOUND = "a bounded scale would leave its bounds"

    def __bool__(self) -> bool:
        return self is Outcome.MET


class _Attached(NamedTuple):
    """Roots that were given parents, and what the roots above them carried before."""

    roots: np.ndarray
    above: np.ndarray
    sign: np.ndarray
    ranges: np.ndarray


class Scales:
    """Unknown scales, addressed by integer arrays of variable numbers of any shape.

    Args:
        max_range: largest allowed ratio between two scales of one class.
        narrow_bits: largest allowed absolute logarithm, to base two, of a bounded scale.
    """

    ONE = 0

    def __init__(self, max_range: float = np.inf, narrow_bits: float = NARROW_BITS) -> None:
        self._max_bits = np.log2(max_range)
        self._narrow_bits = narrow_bits
        self._count = 1
        self._parent = np.arange(1)
        self._ratio = np.ones(1)
        self._sign = np.ones(1, np.int8)  # of a root's value: +1, -1, or 0 where nothing is asked
        # Of a root, in bits relative to its own scale: lowest and highest scale of its members, and of bounded ones.
        self._ranges = np.array([[0.0], [0.0], [np.inf], [-np.inf]])
        self._reason = np.zeros(1, np.int32)
        self._reasons: list[str] = [""]
        self._values: np.ndarray | None = None
        self._members: np.ndarray | None = None  # of a root: how many variables its class has

    def fresh(self, shape: tuple[int, ...], *, stored: bool = True) -> np.ndarray:
        """New, unrelated variables in an array of the given shape.

        Those with which nothing is `stored`, because they name a tensor that another one stands for, count in no range.
        """
        start, self._members = self._count, None
        self._count += int(np.prod(shape))
        if self._count > len(self._parent):  # variables beyond the count are roots of their own already
            more = max(self._count, 2 * len(self._parent)) - len(self._parent)
            self._parent = np.concatenate([self._parent, np.arange(len(self._parent), len(self._parent) + more)])
            self._ratio = np.concatenate([self._ratio, np.ones(more)])
            self._sign = np.concatenate([self._sign, np.zeros(more, np.int8)])
            self._ranges = np.concatenate([self._ranges, np.repeat([[0.0], [0.0], [np.inf], [-np.inf]], more, 1)], 1)
            self._reason = np.concatenate([self._reason, np.zeros(more, np.int32)])
        index = np.arange(start, self._count).reshape(shape)
        if not stored:
            self._ranges[:2, start : self._count] = [[np.inf], [-np.inf]]
        return index

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

    def store(self, index: np.ndarray) -> None:
        """Let scales count in the range of their classes, before any demand."""
        roots, _ = self._roots(index.ravel())
        self._ranges[:2, roots] = 0.0

    def bound(self, index: np.ndarray) -> None:
        """Keep scales within ``2 ** ±narrow_bits``, before any demand."""
        roots, _ = self._roots(index.ravel())
        self._ranges[2:, roots] = 0.0

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
            self._sign[step.above], self._ranges[:, step.above] = step.sign, step.ranges
        return outcome

    def known(self, index: np.ndarray) -> np.ndarray:
        """The scales that are tied to the constant one; not a number for the others."""
        roots, ratio = self._roots(index.ravel())
        return np.where(roots == self.ONE, ratio, np.nan).reshape(index.shape)

    def free(self, index: np.ndarray) -> list[int]:
        """The classes of variables that are not tied to the constant one, as the numbers of their roots."""
        roots = np.unique(self._roots(index.ravel())[0])
        return roots[roots != self.ONE].tolist()

    def choose(self, index: np.ndarray) -> None:
        """Give every free class among `index` a value: its first member there becomes plus or minus one."""
        roots, ratio = self._roots(index.ravel())
        roots, first = np.unique(roots, return_index=True)
        values = 1.0 / np.abs(ratio[first])
        values[self._sign[roots] < 0] *= -1.0
        free = roots != self.ONE
        self.demand(roots[free], np.zeros_like(roots[free]), values[free])

    def is_pinned(self, index: np.ndarray) -> bool:
        """Whether every variable in `index` is tied to the constant one."""
        return not self._roots(index.ravel())[0].any()

    def why_pinned(self, index: np.ndarray) -> str:
        """The reason that fixed the first pinned variable of `index`; empty when none is pinned."""
        roots, _ = self._roots(index.ravel())
        pinned = index.ravel()[roots == self.ONE][:1]
        return self._reasons[int(self._reasons_of(pinned)[0])] if pinned.size else ""

    def alone(self, index: np.ndarray) -> bool:
        """Whether no variable of `index` is related to any other variable."""
        if self._members is None:
            self._members = np.bincount(self._all_roots(), minlength=self._count)
        flat = index.ravel()
        return bool(
            (self._parent[flat] == flat).all() and (self._members[flat] == 1).all() and (flat != self.ONE).all()
        )

    def solve(self, stored: np.ndarray, centre_beyond: float = 3.0) -> None:
        """Give every variable its value.

        A free class whose stored scales leave [2^-centre_beyond, 2^centre_beyond] is multiplied by the power of two
        that centres its range. `stored` names the variables that end up in weights.
        """
        roots = self._all_roots()
        values = self._ratio[: self._count].copy()
        bits = np.log2(np.abs(values[stored]))
        low, high = np.full(len(roots), np.inf), np.full(len(roots), -np.inf)
        np.minimum.at(low, roots[stored], bits)
        np.maximum.at(high, roots[stored], bits)
        power = np.zeros(len(roots))
        wide = np.maximum(-low, high) > centre_beyond
        power[wide] = -np.round((low[wide] + high[wide]) / 2)
        lowest, highest = self._ranges[2:, : self._count]
        bounded = lowest <= highest
        power[bounded] = np.clip(
            power[bounded],
            np.ceil(-self._narrow_bits - lowest[bounded]),
            np.floor(self._narrow_bits - highest[bounded]),
        )
        power[self.ONE] = 0.0
        factor = np.exp2(power)
        factor[self._sign[: self._count] < 0] *= -1.0
        self._values = values * factor[roots]

    def rescale(self, index: np.ndarray, values: np.ndarray, members: np.ndarray) -> bool:
        """Set the values of variables, zeros included, and with them their classes, after :meth:`solve`.

        Returns False, and changes nothing, where a class holds others than `members`, or where a sign or a bound that
        is asked of it does not allow the values.
        """
        assert self._values is not None
        if self._members is None:
            self._members = np.bincount(self._all_roots(), minlength=self._count)
        flat, members = index.ravel(), np.unique(members)
        roots, first, inverse = np.unique(self._parent[flat], return_index=True, return_inverse=True)
        current = self._values[flat]
        if (roots == self.ONE).any() or not current.all():
            return False
        factors = np.broadcast_to(values, index.shape).ravel() / current
        factor = factors[first]
        if (np.abs(factors - factor[inverse]) > AGREEMENT * np.abs(factors)).any():
            return False
        members = members[np.isin(self._parent[members], roots)]
        known = np.bincount(np.searchsorted(roots, self._parent[members]), minlength=len(roots))
        if (known != self._members[roots]).any() or ((self._sign[roots] != 0) & (factor < 0)).any():
            return False
        bounded = np.isfinite(self._ranges[2, roots]) & (factor != 0)
        bits = np.log2(np.abs(self._values[roots] * factor)[bounded]) + self._ranges[2:, roots[bounded]]
        if (np.abs(bits) > self._narrow_bits).any():
            return False
        self._values[members] *= factor[np.searchsorted(roots, self._parent[members])]
        return True

    def roots(self, index: np.ndarray) -> np.ndarray:
        """The class of each variable, as the number of its root; zero where the scale is tied to the constant one."""
        return self._all_roots()[index]

    def adjustable(self, roots: np.ndarray) -> np.ndarray:
        """Which classes may take any positive factor: neither pinned nor with members that are bounded."""
        return (roots != self.ONE) & ~np.isfinite(self._ranges[2, roots])

    def multiply(self, roots: np.ndarray, factors: np.ndarray) -> None:
        """Multiply all scales of classes, given by their roots, by positive factors; after :meth:`solve`."""
        assert self._values is not None
        by_root = np.ones(self._count)
        by_root[roots] = factors
        self._values *= by_root[self._all_roots()]

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        assert self._values is not None, "solve() has not run"
        return self._values[index]

    def _require(self, a: np.ndarray, b: np.ndarray, reason: int | None = None) -> None:
        # Ratios other than one are only ever demanded, after all equalities: so equalities cannot contradict.
        if not self._union(a.ravel(), b.ravel(), np.ones(a.size), [], reason):
            raise AssertionError("equal scales contradict: an equality was required after a ratio")

    def _all_roots(self) -> np.ndarray:
        """The root of every variable; afterwards all of them point at it."""
        while True:
            parent = self._parent[: self._count]
            below = np.flatnonzero(parent[parent] != parent)
            if not below.size:
                return parent
            self._shorten(below)

    def _shorten(self, index: np.ndarray) -> None:
        """Let variables point at the parents of their parents."""
        parent = self._parent[index]
        above = self._parent[parent]
        newly_pinned = index[(above == self.ONE) & (parent != self.ONE)]
        self._reason[newly_pinned] = self._reason[self._parent[newly_pinned]]
        self._ratio[index] *= self._ratio[parent]
        self._parent[index] = above

    def _roots(self, index: np.ndarray, *, shorten: bool = True) -> tuple[np.ndarray, np.ndarray]:
        root, ratio = index.copy(), np.ones(len(index))
        while True:
            if shorten:
                self._shorten(root)
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
            # Ways through links of this demand are not shortened, because it may be taken back.
            root_a, ratio_a = self._roots(a, shorten=not attached)
            root_b, ratio_b = self._roots(b, shorten=not attached)
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
            # One parent per root and round, the lowest; what is left over meets again in the next round.
            order = np.lexsort((low, high))
            high, first = np.unique(high[order], return_index=True)
            first = order[first]
            low, factor = low[first], factor[first]
            known = np.where(root_b[first] == high, a[first], b[first])
            outcome = self._attach(high, low, factor, known, attached, reason)
            if not outcome:
                return outcome

    def _attach(
        self,
        high: np.ndarray,
        low: np.ndarray,
        factor: np.ndarray,
        known: np.ndarray,
        attached: list[_Attached],
        reason: int | None,
    ) -> Outcome:
        """Give the roots `high` the roots `low` for parents; some of these may get parents themselves."""
        pinned = low == self.ONE
        self._reason[high[pinned]] = self._reasons_of(known[pinned]) if reason is None else reason
        above, ratio, last = low.copy(), factor.copy(), np.arange(len(high))
        while True:  # each round doubles the way: a chain of roots ends at the one that gets no parent
            position = np.minimum(np.searchsorted(high, above), len(high) - 1)
            chained = high[position] == above
            if not chained.any():
                break
            position = position[chained]
            above[chained], last[chained] = above[position], last[position]
            ratio[chained] *= ratio[position]
        self._reason[high] = self._reason[high[last]]
        tops = np.unique(above)
        attached.append(_Attached(high, tops, self._sign[tops], self._ranges[:, tops]))
        self._parent[high], self._ratio[high] = above, ratio
        self._members = None
        if not self._join_signs(high, above, ratio):
            return Outcome.SIGN
        return self._join_ranges(high, above, tops, ratio)

    def _join_signs(self, high: np.ndarray, above: np.ndarray, ratio: np.ndarray) -> bool:
        """Pass the signs asked of attached roots on to the roots above; False where two contradict."""
        asked = self._sign[high] * np.sign(ratio).astype(np.int8)
        for sign in (1, -1):
            roots = above[asked == sign]
            if (self._sign[roots] == -sign).any():
                return False
            self._sign[roots] = sign
        return True

    def _join_ranges(self, high: np.ndarray, above: np.ndarray, tops: np.ndarray, ratio: np.ndarray) -> Outcome:
        """Let the roots above span what attached roots span; refused where a class becomes too wide."""
        bits = np.log2(np.abs(ratio))
        for bound, ranges in zip((np.minimum, np.maximum) * 2, self._ranges, strict=True):
            bound.at(ranges, above, ranges[high] + bits)
        lowest, highest, lowest_bounded, highest_bounded = self._ranges[:, tops]
        if (highest - lowest > self._max_bits).any():
            return Outcome.RANGE
        # A free class is multiplied by a whole power of two, which takes up to one bit of what is allowed.
        pinned = np.maximum(-lowest_bounded, highest_bounded)
        needed = np.where(tops == self.ONE, pinned, (highest_bounded - lowest_bounded + 1.0) / 2.0)
        return Outcome.MET if (needed <= self._narrow_bits).all() else Outcome.BOUND

    def _reasons_of(self, variables: np.ndarray) -> np.ndarray:
        """The numbers of the reasons that pinned variables have."""
        while (below := self._parent[variables] != self.ONE).any():
            variables = np.where(below, self._parent[variables], variables)
        return self._reason[variables]
