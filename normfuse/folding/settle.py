"""The second step of folding: one topological pass carries the shifts to the weights that absorb them.

Where a shift reaches an operation that cannot take it, a weight operation on the way is asked to produce the opposite
one: its bias pays. Only where none can, the shift is written out as an Add.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.fx import Node

from .arrays import CannotCarry, collapse_equal
from .follow import Followed
from .gains import choose_shifts, keep_shift
from .gauge import Gauge
from .nodes import coarseness
from .results import Shifts, closed
from .rules import Use
from .rules.base import is_float
from .tolerance import to_bend, tolerant_values, tolerates, wants_adds
from .weight_edits import WRITTEN_OUT, noted

# A shift may ride along a stream while it is at most this many times as large as the constants it is made of: two
# binary digits. Beyond, norms have amplified it; if the model's own values did not grow alike, it is subtracted later.
GROWTH = 4.0
# Values at which a search for a source looks.
_FAR = 256
# How often shifts of norms are sent out; afterwards all of them stay where they are.
_ATTEMPTS = 8
# What may be left of a shift that was cancelled, relative to it. Scales on the way magnify float64's rounding.
ROUNDING = 1e-9


@dataclass(frozen=True)
class _Route:
    """A way from a source, whose shift can be chosen, to the value where a shift must vanish."""

    source: Node
    steps: tuple[tuple[Node, Node], ...]  # (operand, reader) from the source on

    @property
    def end(self) -> Node:
        """The value where the shift must vanish."""
        return self.steps[-1][1] if self.steps else self.source


class CannotWriteOut(Exception):
    """A shift is to be written out behind a scale of zero, where no Add to the stored value gives one."""


def settle(gauge: Gauge) -> Gauge:
    """Give every value its shift, and find the readers that need an Add. Raises :class:`CannotWriteOut`."""
    kept_shift: dict[Node, str] = {}
    for attempt in itertools.count(1):
        gauge = gauge.knowing(shifts=Shifts(kept_shift=kept_shift))
        shifts = gauge.shifts
        if not gauge.options.keep_dynamic_norms:
            choose_shifts(gauge)
        travelling = set(shifts.chosen)
        _carry_shifts(gauge)
        # Inside its norm a shift costs nothing: it does not travel to where it would have to be written out.
        back = travelling & sources_of_shift(shifts.materialised_shifts, gauge).keys()
        if not back:
            written_out = all(gauge.scales[gauge.scale(node)].all() for node in shifts.materialised_shifts)
            if gauge.options.fold_zeros and not written_out:
                raise CannotWriteOut
            return gauge.knowing(shifts=closed(shifts))
        for node in back if attempt < _ATTEMPTS else travelling:
            keep_shift(node, gauge)
    raise AssertionError("an endless loop has ended")


def _carry_shifts(gauge: Gauge) -> None:
    """One pass over the program, in its order."""
    order = {node: position for position, node in enumerate(gauge.program.graph.nodes)}
    tolerant, flexible = tolerant_values(gauge), tolerant_values(gauge, bending=True)
    constants: dict[Node, _Constants] = {}
    for constant in gauge.matches.free_constants:
        gauge.shifts.of[constant] = gauge.no_shift(constant)
    for node in order:
        if node not in gauge.matches.of or node not in gauge.matches.scale_of:
            continue
        _join_shifts(node, order, tolerant, gauge)
        if node in flexible and _lets_go(node, gauge):
            stays = node in gauge.matches.affine
            readers, values = to_bend(node, tolerant, gauge)
            if not (readers and stays and wants_adds(node, gauge)):
                gauge.shifts.chosen[node] = gauge.matches.of[node].constant_part(gauge)
                if stays or gauge.shifts.chosen[node].any():  # a map that stays may be given a summand by others
                    gauge.shifts.bent.update(readers)
                    tolerant |= values
        gauge.shifts.of[node] = gauge.matches.of[node].settle(gauge)
        if isinstance(gauge.shifts.of[node], list) or not gauge.shifts.of[node].any():
            continue
        # A shift that will be stopped somewhere is best cancelled where it arises, before readers multiply.
        arises = node in gauge.matches.affine and node not in gauge.solution.kept and node not in tolerant
        if arises and _cancel(node, order, tolerant, gauge):
            continue
        constants[node] = _constants(node, constants, gauge)
        grown = node in gauge.matches.affine and _size(gauge.shifts.of[node]) > GROWTH * constants[node].size
        if grown and _rides(node, gauge) and _cancel(node, order, tolerant, gauge):
            gauge.shifts.settled_early.append(node)
            continue
        if _stopping(node, gauge) and not _cancel(node, order, tolerant, gauge):
            for user in _stopping(node, gauge):
                if tolerates(user, node, flexible, gauge, bending=True):
                    gauge.shifts.bent.add(user)
            if _stopping(node, gauge):
                gauge.shifts.materialised_shifts[node] = _stopping(node, gauge)


def _join_shifts(node: Node, order: dict[Node, int], tolerant: set[Node], gauge: Gauge) -> None:
    """Where a result can carry one shift only, and its operands have different ones: they are to have none."""
    joined = [x for x in node.all_input_nodes if x in gauge.matches.scale_of and is_float(x)]
    if not any(_use_of_its_shift(node, operand, gauge) is Use.JOIN for operand in joined):
        return
    carried = [gauge.carried(node, operand) for operand in joined]
    if all(np.equal(carried[0], shift).all() for shift in carried[1:]):
        return
    for operand in joined:
        if gauge.incoming(node, operand).any() and not _cancel(operand, order, tolerant, gauge):
            gauge.shifts.materialised_shifts.setdefault(operand, []).append(node)


def _use_of_its_shift(user: Node, node: Node, gauge: Gauge) -> Use:
    shift = gauge.shifts.of[node] if node in gauge.shifts.of else gauge.no_shift(node)
    return gauge.matches.of[user].use(node, shift, gauge)


def sources_of_shift(values: Iterable[Node], gauge: Gauge) -> dict[Node, Node]:
    """The operations from which the shifts of values may have come, each with one such value.

    They are affine maps, and what chooses a shift.
    """
    pending, seen, found = [(value, value) for value in values], set[Node](), dict[Node, Node]()
    while pending:
        current, value = pending.pop()
        if current in seen or current not in gauge.matches.of:
            continue
        seen.add(current)
        if current in gauge.shifts.chosen or (
            current in gauge.matches.affine and gauge.matches.affine[current].b.any()
        ):
            found[current] = value
        pending += [(o, value) for o in current.all_input_nodes if is_float(o) and np.any(gauge.shifts.of.get(o, 0))]
    return found


def _size(shift: np.ndarray) -> float:
    """Root mean square over channels, also of numbers whose squares leave float64."""
    largest = np.abs(shift).max(initial=0.0)
    return float(largest * np.sqrt(np.mean(np.square(shift / largest)))) if largest else 0.0


@dataclass(frozen=True)
class _Constants:
    """The size of the constants that a shift is made of, added as if they were independent.

    Those that have passed no affine map yet are multiplied by the first one, as in the model itself; by later ones they
    become smaller, but never larger. Adding one to the values it belongs to rounds as much in the model as this allows.
    """

    fresh: float
    old: float

    @property
    def size(self) -> float:
        return math.hypot(self.fresh, self.old)


def _constants(node: Node, constants: dict[Node, _Constants], gauge: Gauge) -> _Constants:
    arriving = [constants[o] for o in node.all_input_nodes if o in constants and gauge.incoming(node, o).any()]
    fresh, old = math.hypot(*(c.fresh for c in arriving)), math.hypot(*(c.old for c in arriving))
    if node in gauge.matches.affine and node not in gauge.solution.kept:
        operand, a, b = gauge.matches.affine[node]
        before = gauge.incoming(node, operand)
        gain = _size(a * before) / _size(before) if before.any() else 0.0
        return _Constants(0.0, math.hypot(gain * fresh, min(gain, 1.0) * old, _size(b)))
    made_here = node in gauge.shifts.chosen or not arriving
    return _Constants(_size(gauge.shifts.of[node]), 0.0) if made_here else _Constants(fresh, old)


def _rides(node: Node, gauge: Gauge) -> bool:
    """Whether a value goes into an addition, possibly rearranged."""
    rules = [(user, gauge.matches.of[user]) for user in node.users if user in gauge.matches.of]
    return any(rule.adds or (rule.moves and _rides(user, gauge)) for user, rule in rules)


def _lets_go(node: Node, gauge: Gauge) -> bool:
    """Whether an operation's constant part, if all readers take it, goes to them.

    It does where it would be an Add of its own, and where biases are to leave residual streams.
    """
    if node in gauge.matches.affine:
        return node in gauge.solution.kept
    rule = gauge.matches.of[node]
    return rule.weighs and (not rule.has_bias or (gauge.options.carry_biases and _adds_to_stream(node, gauge)))


def _adds_to_stream(node: Node, gauge: Gauge) -> bool:
    """Whether a weight operation's result goes into an addition and nowhere else."""
    while len(node.users) == 1:
        (node,) = node.users
        rule = gauge.matches.of.get(node)
        if rule is not None and rule.adds:
            return True
        mapped = node in gauge.matches.affine and node not in gauge.solution.kept
        if rule is None or not (rule.moves or mapped):
            return False
    return False


def _stopping(node: Node, gauge: Gauge) -> list[Node]:
    """The readers that cannot take the shift a value has."""
    return [
        user
        for user in node.users
        if gauge.returns(user, node) or (gauge.reads_values(user) and _use_of_its_shift(user, node, gauge) is Use.STOP)
    ]


def _cancel(node: Node, order: dict[Node, int], tolerant: set[Node], gauge: Gauge) -> bool:
    """Choose a source's shift such that `node` gets none."""
    if noted(node, WRITTEN_OUT):
        return False
    for route in sorted(_routes(node, tolerant, gauge), key=lambda r: _cost(r.source, gauge)):
        change = _needed_at_source(route, gauge)
        if change is None or _reaches_others(route, change, tolerant, gauge) or _is_magnified(route, change, gauge):
            continue
        if _choose(route, change, order, gauge):
            return True
    return False


def _choose(route: _Route, change: np.ndarray, order: dict[Node, int], gauge: Gauge) -> bool:
    """Change the shift of a source, if that takes away the shift at the end of the route."""
    node, source, shifts = route.end, route.source, gauge.shifts
    size, had_one = np.abs(shifts.of[node]).max(), source in shifts.chosen
    before = shifts.of[source] if source in gauge.matches.free_constants else gauge.chosen_shift(source)
    shifts.chosen[source] = before + change
    _resettle(source, order[node], order, gauge)
    # What is left is the rounding of the way there and back, which must not ask for an Add, unless the change reaches
    # the value on a second way as well.
    if np.abs(shifts.of[node]).max() <= ROUNDING * size:
        shifts.of[node] = gauge.no_shift(node)
        return True
    shifts.chosen[source] = before
    _resettle(source, order[node], order, gauge)
    if not had_one:
        del shifts.chosen[source]
    return False


def _is_magnified(route: _Route, change: np.ndarray, gauge: Gauge) -> bool:
    """Whether small gains on the way make the change large where that costs digits.

    It does for others that read a value there, because they subtract it, and where a value has fewer digits than the
    one at the end, because it is rounded with the change in it.
    """
    limit, moved = GROWTH * _size(gauge.shifts.of[route.end]), change
    for operand, reader in route.steps:
        counts = len(operand.users) > 1 or coarseness(operand) > coarseness(route.end)
        if counts and not isinstance(moved, list) and _size(moved) > limit:
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
        for operand in current.all_input_nodes:
            if operand not in gauge.matches.scale_of or rule.use(operand, None, gauge) is not Use.PASS:
                continue
            others = (user for user in operand.users if user is not current and not _reads_part(user, gauge))
            if operand not in gauge.matches.free_constants and not all(
                tolerates(u, operand, tolerant, gauge) for u in others
            ):
                continue
            if operand in gauge.matches.free_constants and len(operand.users) > 1:
                continue
            pending.append((operand, ((operand, current), *steps)))


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
    """What a source pays for another shift; an added parameter is a table that is stored once more."""
    rule = gauge.matches.of.get(source)
    return 2 if rule is None else rule.price()


def _needed_at_source(route: _Route, gauge: Gauge) -> np.ndarray | None:
    """The change of the source's shift that cancels the shift at the end of the route; None where none does."""
    shape = gauge.scale(route.source).shape
    followed = Followed.along(shape)
    try:
        for operand, reader in route.steps:
            followed = followed.behind(gauge.matches.of[reader], operand, gauge)
    except CannotCarry:
        return None
    shift, reached = gauge.shifts.of[route.end], followed.channels.shape
    if np.broadcast_shapes(shift.shape, reached) != reached or not followed.factor.all():
        return None
    change = np.zeros(int(np.prod(shape)))
    cancels = followed._replace(shift=np.broadcast_to(shift, reached)).become_zero(change)
    return change.reshape(shape) if cancels else None


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
