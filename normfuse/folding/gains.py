"""What the exact treatment of dynamic norms asks for: their gain and shift go into the weights behind them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch.fx import Node

from .rules import Use
from .rules.dynamic import DynamicNorm
from .rules.weights import Weighted

if TYPE_CHECKING:
    from .engine import Folding

_NOT_FINITE = "it is not finite"


def demand_gains(fold: Folding) -> None:
    """Ask for ``scale = gain`` behind every dynamic norm, after all other demands: a gain that stays costs nothing."""
    for node in fold.dynamic:
        gain = _rule(node, fold).gain(node, fold)
        if not np.isfinite(gain).all():
            fold.kept_gain[node] = _NOT_FINITE
        elif gain.all():
            scale = fold.scale(node)
            if not (outcome := fold.scales.demand(scale, np.zeros_like(scale), gain)):
                fixed = fold.scales.why_pinned(scale)
                mixed = f"its result is fixed by {fixed}" if fixed else "its channels are mixed"
                fold.kept_gain[node] = fold.why_not(outcome) or mixed


def assign_zero_gain(node: Node, fold: Folding, tolerant: set[Node]) -> None:
    """A gain with zeros has no ratio: it goes where only weights read the result, whose columns become zero."""
    goes = node in tolerant and not who_stops(node, fold)
    gain = _rule(node, fold).gain(node, fold)
    if not goes or not fold.scales.rescale(fold.scale(node), gain, fold.scales_behind(node)):
        fold.kept_gain[node] = "it is zero in places, and not only weights read the result"


def has_zero_gain(node: Node, fold: Folding) -> bool:
    """Whether a dynamic norm's gain, which may go, is zero in places."""
    return node not in fold.kept_gain and not _rule(node, fold).gain(node, fold).all()


def choose_shifts(fold: Folding) -> None:
    """Let the shift of every dynamic norm travel if all weights that it reaches can take it without a new operation."""
    for node in fold.dynamic:
        shift = _rule(node, fold).shift(node, fold)
        if not shift.any() or node in fold.kept_shift:
            continue
        stopped_by = who_stops(node, fold) if np.isfinite(shift).all() else _NOT_FINITE
        if stopped_by:
            fold.kept_shift[node] = stopped_by
        else:
            fold.chosen[node] = shift


def keep_shift(node: Node, fold: Folding) -> None:
    """Leave a shift in its norm that would have to be written out as an Add further on."""
    fold.kept_shift[node] = "it would have to be written out further on"


def who_stops(node: Node, fold: Folding) -> str:
    """Why a shift of `node` cannot go, or only into an Add of its own: the first reader in its way; else empty."""
    pending, seen = [node], {node}
    while pending:
        current = pending.pop(0)
        for user in current.users:
            if fold.returns(user, current):
                return "the model's output cannot take a shift"
            if user in seen or user not in fold.rule_of or not fold.reads_values(user):
                continue
            rule = fold.rule_of[user]
            use = rule.use(user, current, fold.any_shift(current), fold)
            if use in (Use.STOP, Use.JOIN):
                return f"{fold.describe(user)} cannot take a shift"
            if isinstance(rule, Weighted) and not rule.has_bias:
                return f"{fold.describe(user)} has no bias to take it"
            if use is Use.PASS:
                seen.add(user)
                pending.append(user)
    return ""


def _rule(node: Node, fold: Folding) -> DynamicNorm:
    rule = fold.rule_of[node]
    assert isinstance(rule, DynamicNorm)
    return rule
