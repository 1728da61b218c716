"""The step of folding that meets the demands for ratios, those that save most first; what contradicts stays."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.fx import Node

from .arrays import example_size
from .gains import assign_zero_gain, demand_gains, first_blockers, has_zero_gain
from .gauge import Gauge
from .nodes import module_of, operation_name
from .operations import NORMALISING
from .report import FoldError
from .results import Solution, closed
from .scales import Outcome
from .tolerance import tolerant_values
from .weight_edits import REFUSED, noted

aten = torch.ops.aten
KEPT_FOR_INTEGERS = "its scales would cost int8 products more accuracy than the norm takes time"
_ZERO = "a scale is zero, and not only weights read the result"
_ZERO_BEFORE_ADD = "a scale is zero, and what is stored behind one would count: in a shift, or in the steps of integers"


class Contradiction(Exception):
    """Equations that cannot be met: their scales are to be fixed before all demands."""

    def __init__(self, equations: set[Node]) -> None:
        super().__init__(equations)
        self.equations = equations


def solve(gauge: Gauge) -> Gauge:
    """Give every scale its value. Raises :class:`Contradiction`."""
    gauge, options = gauge.knowing(solution=Solution()), gauge.options
    for stored in gauge.matches.stored:
        gauge.scales.store(stored)
    with_zeros = _meet_demands(gauge)
    if not options.keep_dynamic_norms:
        demand_gains(gauge)
    if contradicting := _meet_equations(gauge):
        raise Contradiction(contradicting)
    gauge.scales.solve(np.concatenate([np.zeros(1, np.int64), *(s.ravel() for s in gauge.matches.stored)]))
    tolerant = tolerant_values(gauge) if options.fold_zeros else set()
    dynamic = set() if options.keep_dynamic_norms else {n for n in gauge.matches.dynamic if has_zero_gain(n, gauge)}
    blockers = first_blockers(gauge) if dynamic else {}
    for node in gauge.program.graph.nodes:  # in its order: a map builds on the scale in front of it
        if node in dynamic:
            assign_zero_gain(node, gauge, node in tolerant and node not in blockers)
        elif node in with_zeros:
            operand, a, _ = gauge.matches.affine[node]
            values = a * gauge.scales[gauge.scale(operand)]
            behind = gauge.scales_behind(node)
            if node not in tolerant or not gauge.scales.rescale(gauge.scale(node), values, behind):
                gauge.solution.kept[node] = _ZERO if options.fold_zeros else _ZERO_BEFORE_ADD
    for node, (_, _, b) in gauge.matches.affine.items():
        if not np.isfinite(b).all():
            _refuse_not_finite(node)
    return gauge.knowing(solution=closed(gauge.solution))


def _meet_demands(gauge: Gauge) -> set[Node]:
    """Enter the ratios of affine maps; returns those that have none, because they multiply by zero somewhere."""
    with_zeros, solution = set(), gauge.solution
    solution.kept.update((node, why) for node in gauge.matches.affine if (why := gauge.untouched(node)))
    for node in sorted(gauge.matches.demands, key=lambda n: _saved(n, gauge), reverse=True):
        _, a, b = gauge.matches.affine[node]
        if node in solution.kept:
            continue
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            _refuse_not_finite(node)
            solution.kept[node] = "a constant factor is not finite"
        elif node in gauge.options.kept_maps:
            solution.kept[node] = KEPT_FOR_INTEGERS
        elif not a.all():
            with_zeros.add(node)
        elif not (outcome := _demand(node, gauge)):
            solution.kept[node] = gauge.why_not(outcome) or _what_fixes(node, gauge)
            if outcome in (Outcome.RANGE, Outcome.BOUND):
                allowed = gauge.options.max_scale_range if outcome is Outcome.RANGE else math.inf
                solution.refused_range[node] = allowed
    return with_zeros


def _demand(node: Node, gauge: Gauge) -> Outcome:
    # What an earlier fold kept for its range it would not keep again: all scales begin at one once more.
    if noted(node, REFUSED) >= gauge.options.max_scale_range:
        return Outcome.RANGE
    operand, a, _ = gauge.matches.affine[node]
    return gauge.scales.demand(gauge.scale(node), gauge.scale(operand), a)


def _saved(node: Node, gauge: Gauge) -> int:
    """How many results of operations are never computed when a demand is met, for the example's sizes."""
    _, a, b = gauge.matches.affine[node]
    return (int((a != 1).any()) + int(b.any())) * math.prod(map(example_size, node.meta["val"].shape))


def _refuse_not_finite(node: Node) -> None:
    # Elsewhere, an infinite number can be a mask.
    if node.target in NORMALISING or node.target is aten.addcmul.default:
        path, kind = module_of(node)
        raise FoldError(
            f"{kind or operation_name(node)} {path or node.name!r}: its scale or shift is not finite; its weight, "
            "bias and running statistics must be finite and the running variance not negative"
        )


def _what_fixes(node: Node, gauge: Gauge) -> str:
    sides = gauge.scale(gauge.matches.affine[node].operand), gauge.scale(node)
    before, behind = (gauge.scales.why_pinned(side).rstrip(",") for side in sides)
    if before and behind:
        return f"its input is fixed by {before}, its result by {behind}: no weight between them can take the scale"
    return (
        "its result meets its own input again (in an addition) or is mixed over its channels: "
        "no weight between them can take the scale"
    )


def _meet_equations(gauge: Gauge) -> set[Node]:
    """Meet the equations of powers and products; returns those that contradict what is known.

    First come those of which the other side follows. Only where there are none something is chosen, in the first of
    those that share a free scale.
    """
    contradicting, pending = set[Node](), dict.fromkeys(gauge.matches.equations)
    while pending:
        next_ones, free = [n for n in pending if gauge.matches.of[n].is_determined(gauge)], set[int]()
        for node in () if next_ones else pending:
            own = {root for side in gauge.matches.of[node].sides(gauge) for root in gauge.scales.free(side)}
            next_ones += [] if own & free else [node]
            free |= own
        for node in next_ones:
            if not gauge.matches.of[node].meet(gauge):
                contradicting.add(node)
            del pending[node]
    return contradicting
