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
        gain = gauge.matches.rule_of[node].gain(node, gauge)
        if not np.isfinite(gain).all():
            gauge.solution.kept_gain[node] = _NOT_FINITE
        elif gain.all():
            scale = gauge.scale(node)
            if not (outcome := gauge.scales.demand(scale, np.zeros_like(scale), gain)):
                fixed = gauge.scales.why_pinned(scale)
                mixed = f"its result is fixed by {fixed}" if fixed else "its channels are mixed"
                gauge.solution.kept_gain[node] = gauge.why_not(outcome) or mixed


def assign_zero_gain(node: Node, gauge: Gauge, tolerant: set[Node]) -> None:
    """A gain with zeros has no ratio: it goes where only weights read the result, whose columns become zero."""
    goes = node in tolerant and not first_blocker(node, gauge)
    gain = gauge.matches.rule_of[node].gain(node, gauge)
    if not goes or not gauge.scales.rescale(gauge.scale(node), gain, gauge.scales_behind(node)):
        gauge.solution.kept_gain[node] = "it is zero in places, and not only weights read the result"


def has_zero_gain(node: Node, gauge: Gauge) -> bool:
    """Whether a dynamic norm's gain, which may go, is zero in places."""
    return node not in gauge.solution.kept_gain and not gauge.matches.rule_of[node].gain(node, gauge).all()


def choose_shifts(gauge: Gauge) -> None:
    """Let the shift of every dynamic norm travel if all weights that it reaches can take it without a new operation."""
    for node in gauge.matches.dynamic:
        shift = gauge.matches.rule_of[node].shift(node, gauge)
        if not shift.any() or node in gauge.shifts.kept_shift:
            continue
        stopped_by = first_blocker(node, gauge) if np.isfinite(shift).all() else _NOT_FINITE
        if stopped_by:
            gauge.shifts.kept_shift[node] = stopped_by
        else:
            gauge.shifts.chosen[node] = shift


def keep_shift(node: Node, gauge: Gauge) -> None:
    """Leave a shift in its norm that would have to be written out as an Add further on."""
    gauge.shifts.kept_shift[node] = "it would have to be written out further on"


def first_blocker(node: Node, gauge: Gauge) -> str:
    """Why a shift of `node` cannot go, or only into an Add of its own: the first reader in its way; else empty."""
    pending, seen = [node], {node}
    while pending:
        current = pending.pop(0)
        for user in current.users:
            if gauge.returns(user, current):
                return "the model's output cannot take a shift"
            if user in seen or user not in gauge.matches.rule_of or not gauge.reads_values(user):
                continue
            rule = gauge.matches.rule_of[user]
            use = rule.use(user, current, gauge.any_shift(current), gauge)
            if use in (Use.STOP, Use.JOIN):
                return f"{gauge.describe(user)} cannot take a shift"
            if not rule.has_bias:
                return f"{gauge.describe(user)} has no bias to take it"
            if use is Use.PASS:
                seen.add(user)
                pending.append(user)
    return ""
