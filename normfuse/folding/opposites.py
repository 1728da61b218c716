"""Shifts taken away where they cannot go on: a weight on the way back is asked for the opposite one.

A value that is made of several, such as a concatenation, is changed by changing each of its parts.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.fx import Node

from .arrays import CannotCarry, collapse_equal, varying
from .follow import Followed
from .gauge import Gauge
from .nodes import coarseness
from .rules import Use
from .tolerance import tolerates
from .weight_edits import WRITTEN_OUT, noted

# A shift may ride along a stream while it is at most this many times as large as the constants it is made of: two
# binary digits. Beyond, norms have amplified it; if the model's own values did not grow alike, it is subtracted later.
GROWTH = 4.0
# Values at which a search for a source looks.
_FAR = 256
# What may be left of a shift that was cancelled, relative to it. Scales on the way magnify float64's rounding.
ROUNDING = 1e-9
# The price of the Add that a shift costs where it is written out, as of a bias for a part of it; see Match.price.
_ADD = 2


@dataclass(frozen=True)
class _Route:
    """A way from a source, whose shift can be chosen, to a value whose shift is to change."""

    source: Node
    steps: tuple[tuple[Node, Node], ...]  # (operand, reader) from the source on
    parts: bool = False  # whether the shift is chosen by those of the source's parts

    @property
    def end(self) -> Node:
        """The value whose shift is to change."""
        return self.steps[-1][1] if self.steps else self.source


def root_mean_square(shift: np.ndarray) -> float:
    """Root mean square over channels, also of numbers whose squares leave float64."""
    largest = np.abs(shift).max(initial=0.0)
    return float(largest * np.sqrt(np.mean(np.square(shift / largest)))) if largest else 0.0


def cancel_shift(
    node: Node, order: dict[Node, int], tolerant: set[Node], gauge: Gauge, *, only_biases: bool = False
) -> bool:
    """Choose the shifts of sources such that `node` gets none.

    Args:
        node: the value.
        order: the position of every operation.
        tolerant: values of which all readers take a shift.
        gauge: what is known; its shifts change if True is returned.
        only_biases: whether it is left where that would cost an operation anywhere.
    """
    if noted(node, WRITTEN_OUT):
        return False
    shift, zero = gauge.shifts.of[node], gauge.no_shift(node)
    if _change(node, -shift, order[node], order, tolerant, gauge, only_biases) is None:
        return False
    # What is left is the rounding of the way there and back, which must not ask for an Add.
    gauge.shifts.of[node] = zero
    return True


def give_shift(
    node: Node, operands: list[Node], shift: np.ndarray, order: dict[Node, int], tolerant: set[Node], gauge: Gauge
) -> bool:
    """Choose the shifts of sources such that these operands arrive at `node` with one that another operand has.

    Nothing changes where that would cost an operation, or another reader minds it.
    """
    for operand in operands:
        others = [user for user in operand.users if user is not node]
        if not all(tolerates(user, operand, tolerant, gauge) for user in others):
            return False
    ranks = [operand.meta["val"].dim() for operand in operands]
    missing = [shift - gauge.carried(node, operand) for operand in operands]
    if any(any(size != 1 for size in own.shape[: own.ndim - rank]) for own, rank in zip(missing, ranks, strict=True)):
        return False
    changes = [
        (x, own.reshape(own.shape[own.ndim - rank :])) for x, own, rank in zip(operands, missing, ranks, strict=True)
    ]
    shifts = gauge.shifts
    chosen, values = dict(shifts.chosen), dict(shifts.of)
    price = _change_all(changes, order[node] - 1, order, tolerant, gauge, only_biases=False)
    if price is not None and price < _ADD:
        return True
    _restore(chosen, values, gauge)
    return False


def _restore(chosen: dict[Node, Any], values: dict[Node, Any], gauge: Gauge) -> None:
    """Take all changes of shifts back."""
    shifts = gauge.shifts
    shifts.chosen.clear()
    shifts.chosen.update(chosen)
    shifts.of.clear()
    shifts.of.update(values)


def _change(
    node: Node,
    wanted: np.ndarray,
    last: int,
    order: dict[Node, int],
    tolerant: set[Node],
    gauge: Gauge,
    only_biases: bool,
) -> int | None:
    """Change the shift of a value, and those of all that depends on it up to position `last`.

    Returns:
        The price; None where no source can be changed so, and none is.
    """
    for route in sorted(_routes(node, tolerant, gauge), key=lambda r: _cost(r.source, gauge)):
        if only_biases and not _costs_no_operation(route, gauge):
            continue
        change = _needed_at_source(route, wanted, gauge)
        if change is None or _reaches_others(route, change, tolerant, gauge):
            continue
        if _is_magnified(route, change, wanted, gauge):
            continue
        shifts, before = gauge.shifts, gauge.shifts.of[node]
        chosen, values = dict(shifts.chosen), dict(shifts.of)
        if route.parts:
            parts = gauge.matches.of[route.source].parts(change, gauge)
            price = _change_all(parts, last, order, tolerant, gauge, only_biases)
        else:
            price = _choose(route.source, change, last, order, gauge)
        # A change that reaches the value on a second way as well is not the one that was wanted.
        allowed = ROUNDING * max(np.abs(before).max(), np.abs(wanted).max())
        if price is not None and np.abs(shifts.of[node] - before - wanted).max() <= allowed:
            return price
        _restore(chosen, values, gauge)
    return None


def _choose(source: Node, change: np.ndarray, last: int, order: dict[Node, int], gauge: Gauge) -> int:
    """Change what a source was asked for; the price."""
    shifts = gauge.shifts
    before = shifts.of[source] if source in gauge.matches.free_constants else gauge.chosen_shift(source)
    shifts.chosen[source] = before + change
    _resettle(source, last, order, gauge)
    return _cost(source, gauge)


def _change_all(
    parts: list[tuple[Node, np.ndarray]],
    last: int,
    order: dict[Node, int],
    tolerant: set[Node],
    gauge: Gauge,
    only_biases: bool,
) -> int | None:
    """Change the shifts of several values; the highest price, None where one costs more than an Add behind them."""
    prices = [0]
    for part, change in parts:
        if change.any():
            price = _change(part, change, last, order, tolerant, gauge, only_biases)
            if price is None or price > _ADD:
                return None
            prices.append(price)
    return max(prices)


def _costs_no_operation(route: _Route, gauge: Gauge) -> bool:
    """Whether the source has a bias to give, and nothing else reads what changes on the way."""
    alone = all(sum(map(gauge.reads_values, operand.users)) == 1 for operand, _ in route.steps)
    return alone and (route.parts or (route.source in gauge.matches.of and gauge.matches.of[route.source].has_bias))


def _is_joint(node: Node, gauge: Gauge) -> bool:
    """Whether a value is put together from others, each with channels of its own."""
    rule, scale = gauge.matches.of.get(node), gauge.matches.scale_of[node]
    return rule is not None and not isinstance(scale, list) and bool(rule.parts(np.zeros(scale.shape), gauge))


def _is_magnified(route: _Route, change: np.ndarray, wanted: np.ndarray, gauge: Gauge) -> bool:
    """Whether small gains on the way make the change large where that costs digits.

    It does for others that read a value there, because they subtract it, and where a value has fewer digits than the
    one at the end, because it is rounded with the change in it.
    """
    limit, moved = GROWTH * root_mean_square(wanted), change
    for operand, reader in route.steps:
        counts = len(operand.users) > 1 or coarseness(operand) > coarseness(route.end)
        if counts and not isinstance(moved, list) and root_mean_square(moved) > limit:
            return True
        moved = _moved(operand, reader, moved, gauge)
    return False


def _moved(operand: Node, reader: Node, change: Any, gauge: Gauge) -> Any:
    """A change of an operand's shift, as it changes the result's."""
    rule = gauge.matches.of[reader]
    moved = rule.carry(operand, change, collapse_equal, gauge)
    return moved if isinstance(moved, list) else moved * rule.factor(operand, gauge)


def _routes(node: Node, tolerant: set[Node], gauge: Gauge) -> Iterator[_Route]:
    """Ways back to sources, on which no other reader minds a change, unless it reads a part that may stay as it is.

    The nearest come first. A search that has looked at many values ends: along a deep stream it would go back to its
    beginning from every norm on it.
    """
    pending: deque[tuple[Node, tuple[tuple[Node, Node], ...]]] = deque([(node, ())])
    for _ in range(_FAR):
        if not pending:
            return
        current, steps = pending.popleft()
        rule = gauge.matches.of.get(current)
        if current in gauge.matches.free_constants or (rule is not None and rule.chooses_shift(gauge)):
            yield _Route(current, steps)
            continue
        if rule is None:
            continue
        operands = [x for x in current.all_input_nodes if x in gauge.matches.scale_of]
        ways = [x for x in operands if _is_way(x, current, tolerant, gauge)]
        if _is_joint(current, gauge):
            if len(ways) == len(current.all_input_nodes):
                yield _Route(current, steps, parts=True)
            continue
        pending += [(operand, ((operand, current), *steps)) for operand in ways]


def _is_way(operand: Node, reader: Node, tolerant: set[Node], gauge: Gauge) -> bool:
    """Whether a change of an operand goes on into its reader's result, and no other reader minds it."""
    if gauge.matches.of[reader].use(operand, None, gauge) is not Use.PASS:
        return False
    if operand in gauge.matches.free_constants:
        return len(operand.users) == 1
    others = (user for user in operand.users if user is not reader and not _reads_part(user, gauge))
    return all(tolerates(user, operand, tolerant, gauge) for user in others)


def _reads_part(user: Node, gauge: Gauge) -> bool:
    rule = gauge.matches.of.get(user)
    return rule is not None and rule.reads_part


def _reaches_others(route: _Route, change: np.ndarray, tolerant: set[Node], gauge: Gauge) -> bool:
    """Whether a change of the source's shift reaches a part that another reader on the way takes, and minds."""
    moved = change
    for operand, reader in route.steps:
        for user in operand.users:
            if user is not reader and _reads_part(user, gauge) and _minds(user, operand, moved, tolerant, gauge):
                return True
        moved = _moved(operand, reader, moved, gauge)
    return False


def _minds(reader: Node, operand: Node, moved: Any, tolerant: set[Node], gauge: Gauge) -> bool:
    """Whether a reader of a part gets something of a change that it, or one behind it, cannot take."""
    if tolerates(reader, operand, tolerant, gauge):
        return False
    try:
        part = gauge.matches.of[reader].carry(operand, moved, collapse_equal, gauge)
    except CannotCarry:
        return True
    if isinstance(part, list):
        return any(_minds(user, reader, part, tolerant, gauge) for user in reader.users)
    return bool(part.any())


def _cost(source: Node, gauge: Gauge) -> int:
    """What a source pays for another shift; a parameter is a table, which is stored once more where others read it."""
    rule = gauge.matches.of.get(source)
    return rule.price(gauge) if rule is not None else 3 if gauge.program.shared(source) else 1


def _needed_at_source(route: _Route, wanted: np.ndarray, gauge: Gauge) -> np.ndarray | None:
    """The change of the source's shift that gives the end of the route the change that is wanted; None for none.

    The entries of a parameter change alike that have the same place along an axis, so that it does not matter which of
    them are read; or one by one.
    """
    shape, axes = gauge.scale(route.source).shape, varying(gauge.scale(route.source))
    shapes = []
    if route.source in gauge.matches.free_constants and len(axes) > 1:
        shapes = [tuple(size if axis == own else 1 for axis, size in enumerate(shape)) for own in reversed(axes)]
    changes = (_needed_along(route, own, wanted, gauge) for own in (*shapes, shape))
    return next((change for change in changes if change is not None), None)


def _needed_along(route: _Route, shape: tuple[int, ...], wanted: np.ndarray, gauge: Gauge) -> np.ndarray | None:
    """Such a change as an array of this shape."""
    followed = Followed.along(shape)
    try:
        for operand, reader in route.steps:
            followed = followed.behind(gauge.matches.of[reader], operand, gauge)
    except CannotCarry:
        return None
    reached = followed.channels.shape
    if np.broadcast_shapes(wanted.shape, reached) != reached or not followed.factor.all():
        return None
    change = np.zeros(int(np.prod(shape)))
    possible = followed._replace(shift=np.broadcast_to(-wanted, reached)).become_zero(change)
    return change.reshape(shape) if possible else None


def _resettle(source: Node, last: int, order: dict[Node, int], gauge: Gauge) -> None:
    """Carry a changed shift on to every value up to position `last` that depends on it."""
    if source in gauge.matches.free_constants:
        gauge.shifts.of[source] = gauge.shifts.chosen[source]
    queue, queued = [(order[source], source)], {source}
    while queue:
        _position, node = heapq.heappop(queue)
        if node in gauge.matches.of:
            gauge.shifts.of[node] = gauge.matches.of[node].settle(gauge)
        for user in node.users:
            if user in queued or order[user] > last or user.op == "output" or not gauge.reads_values(user):
                continue
            if gauge.matches.of[user].use(node, None, gauge) is Use.PASS:
                queued.add(user)
                heapq.heappush(queue, (order[user], user))
