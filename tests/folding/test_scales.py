"""The union-find against a direct solution, and its refusals."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normfuse.folding.scales import Outcome, Scales


def test_fresh_variables_are_free_and_stay_one() -> None:
    scales = Scales()
    a = scales.fresh((1, 3))
    assert not scales.is_pinned(a) and scales.alone(a)
    scales.solve(a.ravel())
    assert (scales[a] == 1).all()


def test_ratios_multiply_along_a_chain() -> None:
    scales = Scales()
    a, b, c = (scales.fresh((2,)) for _ in range(3))
    assert scales.demand(b, a, np.array([2.0, -3.0]))
    assert scales.demand(c, b, np.array([0.5, 1.0]))
    scales.pin(a, "input")
    scales.solve(a)
    np.testing.assert_array_equal(scales[c], [1.0, -3.0])
    assert scales.is_pinned(c) and scales.why_pinned(c) == "input"


def test_contradiction_changes_nothing() -> None:
    scales = Scales()
    a, b = scales.fresh((3,)), scales.fresh((3,))
    scales.pin(a[:1], "the first")
    scales.pin(b[:1], "the other")
    assert not scales.demand(b, a, np.array([2.0, 2.0, 2.0]))
    assert scales.alone(b[1:]) and scales.alone(a[1:])
    assert scales.demand(b, a, np.array([1.0, 2.0, 2.0]))
    assert scales.why_pinned(a) == "the first" and scales.why_pinned(b) == "the other"


def test_ratios_that_agree_up_to_rounding_are_met() -> None:
    scales = Scales()
    a, b = scales.fresh((1,)), scales.fresh((1,))
    assert scales.demand(b, a, np.array([1 / 3]))
    assert scales.demand(a, b, np.array([3.0]))
    assert not scales.demand(a, b, np.array([3.0 + 1e-9]))


def test_repeated_variables_in_one_demand() -> None:
    scales = Scales()
    a, b = scales.fresh((1,)), scales.fresh((4,))
    scales.equate(np.broadcast_to(a, (4,)), b)
    scales.solve(a)
    assert len(set(scales[b])) == 1 and not scales.alone(b)
    assert not scales.demand(b, np.broadcast_to(a, (4,)), np.array([1.0, 1.0, 2.0, 1.0]))


def test_a_reason_is_found_through_later_unions() -> None:
    scales = Scales()
    a, b, c = (scales.fresh((1,)) for _ in range(3))
    scales.pin(b, "softmax")
    scales.equate(c, b)
    assert scales.demand(a, c, np.array([4.0]))
    assert scales.why_pinned(a) == "softmax"


def test_wide_classes_are_centred_by_powers_of_two() -> None:
    scales = Scales()
    a, b = scales.fresh((2,)), scales.fresh((2,))
    assert scales.demand(b, a, np.array([2.0**20, 2.0]))
    scales.solve(np.concatenate([a, b]))
    assert scales[a][0] == 2.0**-10 and scales[b][0] == 2.0**10
    assert scales[a][1] == 1.0 and scales[b][1] == 2.0


def test_signs_travel_with_the_ratios() -> None:
    scales = Scales()
    a, b, c = (scales.fresh((1,)) for _ in range(3))
    scales.require_positive(b)
    assert scales.demand(b, a, np.array([-2.0]))
    assert scales.demand(c, a, np.array([1.0]))
    scales.solve(np.concatenate([a, b]))
    assert scales[b] > 0 and scales[a] == -scales[b] / 2


def test_contradicting_signs_are_refused_and_undone() -> None:
    scales = Scales()
    a, b, c = (scales.fresh((1,)) for _ in range(3))
    scales.require_positive(a)
    scales.require_positive(b)
    assert scales.demand(b, a, np.array([-1.0])) is Outcome.SIGN
    assert scales.demand(b, a, np.array([2.0]))
    scales.pin(c, "input")
    assert not scales.demand(c, b, np.array([-1.0]))
    assert scales.demand(c, b, np.array([1.0]))


def test_a_class_stays_within_the_allowed_range() -> None:
    scales = Scales(max_range=100.0)
    a, b, c = (scales.fresh((2,)) for _ in range(3))
    assert scales.demand(b, a, np.array([20.0, 0.1]))
    assert scales.demand(c, b, np.array([20.0, 1.0])) is Outcome.RANGE
    assert scales.alone(c)
    assert scales.demand(c, b, np.array([0.05, 0.2]))
    assert scales.demand(c, a, np.array([1.0, 0.02]))


def test_an_equality_after_a_contradicting_ratio_is_a_mistake_of_the_caller() -> None:
    scales = Scales()
    a, b = scales.fresh((1,)), scales.fresh((1,))
    assert scales.demand(b, a, np.array([2.0]))
    with pytest.raises(AssertionError, match="contradict"):
        scales.equate(a, b)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)).filter(lambda edge: edge[0] != edge[1]), max_size=9))
@settings(max_examples=60, deadline=None)
def test_taking_demands_as_they_come_leaves_as_few_as_possible(edges: list[tuple[int, int]]) -> None:
    """Against the largest subset of demands that can be met together, found by trying all of them."""
    ratios = np.exp(np.random.default_rng(0).normal(size=len(edges)))

    def met(order: tuple[int, ...]) -> int:
        scales = Scales()
        variables = np.concatenate([[Scales.ONE], scales.fresh((5,))])
        edge = {i: (variables[[edges[i][0]]], variables[[edges[i][1]]], ratios[[i]]) for i in order}
        return sum(bool(scales.demand(*edge[i])) for i in order)

    everything = tuple(range(len(edges)))
    subsets = (s for size in everything for s in itertools.combinations(everything, size + 1))
    best = max((len(subset) for subset in subsets if met(subset) == len(subset)), default=0)
    assert met(everything) == met(everything[::-1]) == best


@given(
    st.lists(
        st.tuples(st.integers(0, 11), st.integers(0, 11), st.floats(-4, 4).filter(lambda x: abs(x) > 0.1)), max_size=25
    )
)
@settings(max_examples=300, deadline=None)
def test_agrees_with_potentials_found_by_search(demands: list[tuple[int, int, float]]) -> None:
    """A demand is met exactly when it agrees with every path of demands met before."""
    scales = Scales()
    variables = np.concatenate([[Scales.ONE], scales.fresh((11,))])
    met: list[tuple[int, int, float]] = []

    def ratio(a: int, b: int) -> float | None:
        seen, pending = {a: 1.0}, [a]
        while pending:
            here = pending.pop()
            for x, y, r in met:
                for one, other, factor in ((x, y, r), (y, x, 1 / r)):
                    if one == here and other not in seen:
                        seen[other] = seen[here] * factor
                        pending.append(other)
        return seen.get(b)

    for a, b, r in demands:
        known = 1.0 if a == b else ratio(a, b)
        agrees = known is None or abs(known / r - 1) <= 1e-9
        assert bool(scales.demand(variables[a : a + 1], variables[b : b + 1], np.array([r]))) is bool(agrees)
        if agrees and a != b:
            met.append((a, b, r))
    scales.solve(variables)
    for a, b, r in met:
        np.testing.assert_allclose(scales[variables[a]], r * scales[variables[b]], rtol=1e-9)
    assert scales[np.array([Scales.ONE])] == 1.0


Edge = tuple[int, int, float]  # scale[a] = ratio * scale[b]
VARIABLES, RANGE, NARROW = 6, 2.0**6, 3.0


@dataclass
class Direct:
    """The same system, solved by following edges from every variable: no union-find, no state but what was met."""

    positive: frozenset[int]
    bounded: frozenset[int]
    met: list[Edge] = field(default_factory=list)

    def demand(self, edges: list[Edge]) -> Outcome:
        outcome = self._check([*self.met, *edges])
        self.met += edges if outcome else []
        return outcome

    def _check(self, edges: list[Edge]) -> Outcome:
        classes, refused = [], []
        known: set[int] = set()
        for start in range(VARIABLES):
            if start not in known:
                values, agree = self._values(start, edges)
                if not agree:
                    return Outcome.CONTRADICTS
                known |= set(values)
                classes.append(values)
        for values in classes:
            positive = {np.sign(values[v]) for v in self.positive | {Scales.ONE} if v in values}
            bits = np.log2(np.abs(list(values.values())))
            bounded = np.log2(np.abs([values[v] for v in self.bounded if v in values]))
            if len(positive) > 1:
                refused.append(Outcome.SIGN)
            if bits.max() - bits.min() > np.log2(RANGE):
                refused.append(Outcome.RANGE)
            if bounded.size and not self._fits(bounded - (np.log2(values[0]) if 0 in values else 0.0), 0 in values):
                refused.append(Outcome.BOUND)
        return min(refused, key=list(Outcome).index, default=Outcome.MET)

    def _fits(self, bits: np.ndarray, pinned: bool) -> bool:
        """Whether the scales are within bounds; a free class is multiplied by a whole power, which takes one bit."""
        return bool(np.abs(bits).max() <= NARROW if pinned else bits.max() - bits.min() + 1 <= 2 * NARROW)

    def _values(self, start: int, edges: Iterable[Edge]) -> tuple[dict[int, float], bool]:
        values, pending = {start: 1.0}, [start]
        both = [(a, b, r) for a, b, r in edges] + [(b, a, 1.0 / r) for a, b, r in edges]
        while pending:
            here = pending.pop()
            for a, b, ratio in both:
                if b == here and a not in values:
                    values[a] = ratio * values[here]
                    pending.append(a)
        return values, all(a not in values or np.isclose(values[a], r * values[b], rtol=1e-9) for a, b, r in both)


# Ratios are powers of two, whose products are exact, so that equal ways and full ranges occur.
EDGES = st.tuples(
    *(st.integers(0, VARIABLES - 1),) * 2, st.sampled_from([1.0, -1.0, 2.0, -2.0, 0.5, 8.0, -0.125, 32.0])
)


@given(
    st.lists(st.lists(EDGES, min_size=1, max_size=5), max_size=6),
    st.frozensets(st.integers(1, VARIABLES - 1), max_size=3),
    st.frozensets(st.integers(1, VARIABLES - 1), max_size=2),
)
@settings(max_examples=800, deadline=None)
def test_agrees_with_a_direct_solution_on_signs_and_ranges(
    demands: list[list[Edge]], positive: frozenset[int], bounded: frozenset[int]
) -> None:
    """Each demand relates several channels at once, in chains and stars; a refused one leaves nothing behind."""
    scales, direct = Scales(RANGE, NARROW), Direct(positive, bounded)
    scales.fresh((VARIABLES - 1,))
    scales.require_positive(np.array(sorted(positive), np.int64))
    scales.bound(np.array(sorted(bounded), np.int64))
    for edges in demands:
        a, b, ratio = (np.array(part) for part in zip(*edges, strict=True))
        wanted = direct.demand(edges)
        assert bool(scales.demand(a, b, ratio)) is bool(wanted), (edges, wanted)
    scales.solve(np.arange(VARIABLES))
    values = scales[np.arange(VARIABLES)]
    for a, b, ratio in direct.met:
        assert values[a] == ratio * values[b]
    assert values[Scales.ONE] == 1.0
    assert all(values[v] > 0 for v in positive)
    assert all(abs(np.log2(abs(values[v]))) <= NARROW for v in bounded)


@pytest.mark.parametrize("order", list(itertools.permutations([(1, 0), (2, 1), (3, 2)])), ids=str)
@pytest.mark.parametrize("steps", [1, 3])
def test_chains_of_unions_in_one_step_keep_sign_range_bounds_and_reason(order: tuple, steps: int) -> None:
    """The last link's class asks for something; the chain that ties it to the first is entered at once or singly."""
    edges = np.array(order)
    for ratio, asked, outcome in (
        (-1.0, "require_positive", Outcome.SIGN),
        (8.0, "nothing", Outcome.RANGE),
        (2.0, "bound", Outcome.BOUND),
    ):
        scales = Scales(2.0**8, 2.0)
        scales.fresh((3,))
        if asked != "nothing":
            getattr(scales, asked)(np.array([3]))
        parts = np.array_split(edges, steps)
        outcomes = [scales.demand(part[:, 0], part[:, 1], np.full(len(part), ratio)) for part in parts]
        assert outcomes == [Outcome.MET] * (steps - 1) + [outcome]
        last = parts[-1]
        assert steps > 1 or all(scales.alone(np.array([v])) for v in (1, 2, 3))
        assert scales.demand(last[:, 0], last[:, 1], np.full(len(last), 1.0 if steps == 1 else ratio**-2))
    scales = Scales()
    scales.fresh((3,))
    scales.pin(np.array([1]), "softmax")
    chain = edges[(edges != 0).all(axis=1)]
    assert scales.demand(chain[:, 0], chain[:, 1], np.full(len(chain), 2.0))
    assert [scales.why_pinned(np.array([v])) for v in (1, 2, 3)] == ["softmax"] * 3


def test_long_chains_take_no_longer_each() -> None:
    """A chain of 20 000 in one step and one link at a time from the far end: ways are shortened as they are used."""
    count = 20_000
    chain = np.arange(1, count)
    at_once, singly = Scales(), Scales()
    at_once.fresh((count - 1,))
    assert at_once.demand(chain, chain - 1, np.full(len(chain), -1.0))
    singly.fresh((3000,))
    for link in range(2999, 0, -1):
        assert singly.demand(np.array([link]), np.array([link - 1]), np.array([-1.0]))
    for scales, size in ((at_once, count), (singly, 3000)):
        scales.solve(np.arange(size))
        assert (scales[np.arange(size)] == (-1.0) ** np.arange(size)).all()


PAIRS = st.tuples(*(st.integers(0, VARIABLES - 1),) * 2)
ASKED = st.one_of(
    st.tuples(st.just("equal"), st.lists(PAIRS, min_size=1, max_size=3)),
    st.tuples(st.sampled_from(["positive", "bound", "pin"]), st.lists(st.integers(1, VARIABLES - 1), min_size=1)),
)


@given(
    st.lists(ASKED, max_size=8), st.randoms(use_true_random=False), st.lists(st.lists(EDGES, min_size=1), max_size=4)
)
@settings(max_examples=100, deadline=None)
def test_what_is_asked_before_all_demands_may_come_in_any_order(
    asked: list[tuple[str, list]], source: random.Random, demands: list[list[Edge]]
) -> None:
    """Rules say what is equal, positive, bounded and fixed in the order of the program, in between each other."""

    def outcomes(order: list[tuple[str, list]]) -> list[Outcome]:
        scales = Scales(RANGE, NARROW)
        scales.fresh((VARIABLES - 1,))
        for what, members in order:
            if what == "equal":
                scales.equate(*(np.array(side) for side in zip(*members, strict=True)))
            else:
                index = np.array(members)
                ask = {"positive": scales.require_positive, "bound": scales.bound}
                ask[what](index) if what in ask else scales.pin(index, "a test")
        return [scales.demand(*(np.array(side) for side in zip(*edges, strict=True))) for edges in demands]

    assert outcomes(source.sample(asked, len(asked))) == outcomes(asked)
