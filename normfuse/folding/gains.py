"""What the exact treatment of dynamic norms asks for: their gain and shift go into the weights behind them."""

from __future__ import annotations

import numpy as np
from torch.fx import Node

from .gauge import Gauge
from .rules import Use

_NOT_FINITE = "it is not finite"


def demand_gains(gauge: Gauge) -> None:
    """Ask for ``scale = gain`` behind every dynamic norm, after all other demands: a gain that stays costs nothing."""
    for node in gauge.matches.dynamic:
        gain = gauge.matches.of[node].gain(gauge)
        if why := gauge.untouched(node):
            gauge.solution.kept_gain[node] = why
        elif not np.isfinite(gain).all():
            gauge.solution.kept_gain[node] = _NOT_FINITE
        elif gain.all():
            scale = gauge.scale(node)
            if not (outcome := gauge.scales.demand(scale, np.zeros_like(scale), gain)):
                fixed = gauge.scales.why_pinned(scale)
                mixed = f"its result is fixed by {fixed}" if fixed else "its channels are mixed"
                gauge.solution.kept_gain[node] = gauge.why_not(outcome) or mixed


def assign_zero_gain(node: Node, gauge: Gauge, goes: bool) -> None:
    """A gain with zeros has no ratio: it goes where only weights read the result, whose columns become zero."""
    gain = gauge.matches.of[node].gain(gauge)
    if not goes or not gauge.scales.rescale(gauge.scale(node), gain, gauge.scales_behind(node)):
        gauge.solution.kept_gain[node] = (
            "it is zero in places, and what is stored there would count: not only weights read it, or they are int8"
        )


def has_zero_gain(node: Node, gauge: Gauge) -> bool:
    """Whether a dynamic norm's gain, which may go, is zero in places."""
    return node not in gauge.solution.kept_gain and not gauge.matches.of[node].gain(gauge).all()


def choose_shifts(gauge: Gauge) -> None:
    """Let the shift of every dynamic norm travel if all weights that it reaches can take it without a new operation."""
    shifts = {node: gauge.matches.of[node].shift(gauge) for node in gauge.matches.dynamic}
    shifts = {node: shift for node, shift in shifts.items() if shift.any() and node not in gauge.shifts.kept_shift}
    blockers = first_blockers(gauge) if shifts else {}
    for node, shift in shifts.items():
        stopped_by = blockers.get(node) if np.isfinite(shift).all() else _NOT_FINITE
        stopped_by = gauge.untouched(node) or stopped_by
        if stopped_by:
            gauge.shifts.kept_shift[node] = stopped_by
        else:
            gauge.shifts.chosen[node] = shift


def adds_constant(node: Node, gauge: Gauge) -> bool:
    """Whether the model adds a constant there, so that a shift costs nothing."""
    return node in gauge.matches.affine and bool(gauge.matches.affine[node].b.any())


def keep_shift(node: Node, gauge: Gauge) -> None:
    """Leave a shift in its norm that would have to be written out as an Add further on."""
    gauge.shifts.kept_shift[node] = "it would have to be written out further on"


def first_blockers(gauge: Gauge) -> dict[Node, str]:
    """Of every value, why a shift of it cannot go, or only into an Add of its own; nothing for those whose shift can.

    Named is the reader that takes none, the nearest one first, and only then what those that pass it on run into.
    """
    found: dict[Node, str] = {}
    for node in reversed(gauge.program.graph.nodes):
        if node not in gauge.matches.scale_of:
            continue
        uses = {user: _blocks(user, node, gauge, found) for user in node.users}
        passing = (found.get(user, "") for user, why in uses.items() if why is None)
        why = next((why for why in (*uses.values(), *passing) if why), "")
        if why:
            found[node] = why
    return found


def _blocks(user: Node, node: Node, gauge: Gauge, blocked: dict[Node, str]) -> str | None:
    """Why a reader cannot take any shift of a value; None where it passes it on. `blocked` values take none."""
    if gauge.returns(user, node):
        return "the model's output cannot take a shift"
    if user not in gauge.matches.of or not gauge.reads_values(user):
        return ""
    rule = gauge.matches.of[user]
    use = rule.use(node, gauge.any_shift(node), gauge)
    if use in (Use.STOP, Use.JOIN):
        return f"{gauge.describe(user)} cannot take a shift"
    if not rule.has_bias:  # then it is a shift of the result
        return f"{gauge.describe(user)} has no bias to take it" if user in blocked else ""
    return None if use is Use.PASS and not adds_constant(user, gauge) else ""
