"""The second step of folding: one topological pass carries the shifts to the weights that absorb them.

Where a shift reaches an operation that cannot take it, a weight operation on the way is asked to produce the opposite
one: its bias pays. Only where none can, the shift is written out as an Add.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.fx import Node

from .arrays import CannotCarry, collapse_equal
from .gains import choose_shifts, keep_shift
from .rules import Use
from .rules.base import is_float
from .rules.carry import Carry, Piece, Select, Slice, Split
from .rules.combine import Sum
from .rules.order import Bend
from .rules.weights import Embedding, Weighted

if TYPE_CHECKING:
    from .engine import Folding


# A shift may ride along a stream while it is at most this many times as large as the constants it is made of: two
# binary digits. Beyond, norms have amplified it; if the model's own values did not grow alike, it is subtracted later.
GROWTH = 4.0
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


def settle_shifts(fold: Folding) -> bool:
    """Give every value its shift in ``fold.shift_of`` and list the readers that need an Add in ``fold.spilled``.

    Returns whether that can be written: behind a scale of zero no Add to the stored value gives a shift.
    """
    while True:
        for settled in (fold.shift_of, fold.chosen, fold.spilled, fold.bent, fold.settled_early):
            settled.clear()
        if not fold.keep_dynamic_norms:
            choose_shifts(fold)
        travelling = set(fold.chosen)
        _carry_shifts(fold)
        # Inside its norm a shift costs nothing: it does not travel to where it would have to be written out.
        back = travelling & {source for node in fold.spilled for source in sources_of_shift(node, fold)}
        if not back:
            return all(fold.scales[fold.scale(node)].all() for node in fold.spilled)
        for node in back:
            keep_shift(node, fold)


def _carry_shifts(fold: Folding) -> None:
    """One pass over the program, in its order."""
    order = {node: position for position, node in enumerate(fold.program.graph.nodes)}
    tolerant = tolerant_values(fold)
    constants: dict[Node, _Constants] = {}
    for leaf in fold.leaves:
        fold.shift_of[leaf] = fold.no_shift(leaf)
    for node in order:
        if node not in fold.rule_of or node not in fold.scale_of:
            continue
        _join_shifts(node, order, tolerant, fold)
        if node in tolerant and _lets_go(node, fold):
            fold.chosen[node] = fold.rule_of[node].constant_part(node, fold)
        fold.shift_of[node] = fold.rule_of[node].settle(node, fold)
        if isinstance(fold.shift_of[node], list) or not fold.shift_of[node].any():
            continue
        # A shift that will be stopped somewhere is best cancelled where it arises, before readers multiply.
        arises = node in fold.affine and node not in fold.kept and node not in tolerant
        if arises and _cancel(node, order, tolerant, fold):
            continue
        constants[node] = _constants(node, constants, fold)
        grown = node in fold.affine and _size(fold.shift_of[node]) > GROWTH * constants[node].size
        if grown and _rides(node, fold) and _cancel(node, order, tolerant, fold):
            fold.settled_early.append(node)
            continue
        if _stopping(node, fold) and not _cancel(node, order, tolerant, fold):
            bends = (user for user in _stopping(node, fold) if isinstance(fold.rule_of.get(user), Bend))
            fold.bent |= {user for user in bends if fold.rule_of[user].bends(user) and user in tolerant}
            if _stopping(node, fold):
                fold.spilled[node] = _stopping(node, fold)


def _join_shifts(node: Node, order: dict[Node, int], tolerant: set[Node], fold: Folding) -> None:
    """Where a result can carry one shift only, and its operands have different ones: they are to have none."""
    joined = [x for x in node.all_input_nodes if x in fold.scale_of and is_float(x)]
    if not any(_use_of_its_shift(node, operand, fold) is Use.JOIN for operand in joined):
        return
    carried = [fold.carried(node, operand) for operand in joined]
    if all(np.array_equal(*np.broadcast_arrays(carried[0], shift)) for shift in carried[1:]):
        return
    for operand in joined:
        if fold.incoming(node, operand).any() and not _cancel(operand, order, tolerant, fold):
            fold.spilled.setdefault(operand, []).append(node)


def _use_of_its_shift(user: Node, node: Node, fold: Folding) -> Use:
    shift = fold.shift_of[node] if node in fold.shift_of else fold.no_shift(node)
    return fold.rule_of[user].use(user, node, shift, fold)


def sources_of_shift(node: Node, fold: Folding) -> Iterator[Node]:
    """The operations from which the shift of a value may have come: affine maps, and what chooses a shift."""
    pending, seen = [node], set()
    while pending:
        current = pending.pop()
        if current in seen or current not in fold.rule_of:
            continue
        seen.add(current)
        if current in fold.chosen or (current in fold.affine and fold.affine[current].b.any()):
            yield current
        pending += [o for o in current.all_input_nodes if is_float(o) and np.any(fold.shift_of.get(o, 0))]


def shift_shapes(fold: Folding) -> dict[Node, Any]:
    """The shapes that the shifts of values can have (lists for several results): some vary where scales do not.

    Found by settling shifts of zero.
    """
    shapes: dict[Node, Any] = {}
    settled = dict(fold.shift_of)
    fold.shift_of.clear()
    for node in fold.program.graph.nodes:
        scale = fold.scale_of.get(node)
        if scale is None:
            continue
        shift = fold.rule_of[node].settle(node, fold) if node in fold.rule_of else fold.no_shift(node)
        if isinstance(scale, list):
            shapes[node] = [np.broadcast_shapes(*(a.shape for a in pair)) for pair in zip(scale, shift, strict=True)]
            fold.shift_of[node] = [np.zeros(shape) for shape in shapes[node]]
        else:
            shapes[node] = np.broadcast_shapes(scale.shape, shift.shape)
            fold.shift_of[node] = np.zeros(shapes[node])
    fold.shift_of.clear()
    fold.shift_of.update(settled)
    return shapes


def tolerant_values(fold: Folding) -> set[Node]:
    """Values whose every reader has weights that take any shift along channels, or carries it on to such readers."""
    tolerant: set[Node] = set()
    for node in reversed(fold.program.graph.nodes):
        if node in fold.scale_of and all(_tolerates(user, node, tolerant, fold) for user in node.users):
            tolerant.add(node)
    return tolerant


def _size(shift: np.ndarray) -> float:
    """Root mean square over channels."""
    return float(np.sqrt(np.mean(np.square(shift))))


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


def _constants(node: Node, constants: dict[Node, _Constants], fold: Folding) -> _Constants:
    arriving = [constants[o] for o in node.all_input_nodes if o in constants and fold.incoming(node, o).any()]
    fresh, old = math.hypot(*(c.fresh for c in arriving)), math.hypot(*(c.old for c in arriving))
    if node in fold.affine and node not in fold.kept:
        operand, a, b = fold.affine[node]
        before = fold.incoming(node, operand)
        gain = _size(a * before) / _size(before) if before.any() else 0.0
        return _Constants(0.0, math.hypot(gain * fresh, min(gain, 1.0) * old, _size(b)))
    made_here = node in fold.chosen or not arriving
    return _Constants(_size(fold.shift_of[node]), 0.0) if made_here else _Constants(fresh, old)


def _rides(node: Node, fold: Folding) -> bool:
    """Whether a value goes into an addition, possibly rearranged."""
    rules = [(user, fold.rule_of.get(user)) for user in node.users]
    return any(isinstance(rule, Sum) or (isinstance(rule, Carry) and _rides(user, fold)) for user, rule in rules)


def _lets_go(node: Node, fold: Folding) -> bool:
    """Whether an operation's constant part, if all readers take it, goes to them: where it would be an Add of its own,
    and where biases are to leave residual streams."""
    if node in fold.affine:
        return node in fold.kept
    rule = fold.rule_of[node]
    return isinstance(rule, Weighted) and (not rule.has_bias or (fold.carry_biases and _adds_to_stream(node, fold)))


def _adds_to_stream(node: Node, fold: Folding) -> bool:
    """Whether a weight operation's result goes into an addition and nowhere else."""
    while len(node.users) == 1:
        (node,) = node.users
        rule = fold.rule_of.get(node)
        if isinstance(rule, Sum):
            return True
        if not isinstance(rule, Carry) and (node not in fold.affine or node in fold.kept):
            return False
    return False


def _tolerates(user: Node, node: Node, tolerant: set[Node], fold: Folding) -> bool:
    if fold.returns(user, node):
        return False
    if user not in fold.rule_of or not fold.reads_values(user):
        return True
    use = fold.rule_of[user].use(user, node, fold.any_shift(node), fold)
    return use is Use.ABSORB or (use is Use.PASS and user in tolerant)


def _stopping(node: Node, fold: Folding) -> list[Node]:
    """The readers that cannot take the shift a value has."""
    return [
        user
        for user in node.users
        if fold.returns(user, node) or (fold.reads_values(user) and _use_of_its_shift(user, node, fold) is Use.STOP)
    ]


def _cancel(node: Node, order: dict[Node, int], tolerant: set[Node], fold: Folding) -> bool:
    """Choose a source's shift such that `node` gets none."""
    magnified = []
    for route in sorted(_routes(node, tolerant, fold), key=lambda r: _cost(r.source, fold)):
        change = _needed_at_source(route, fold)
        if change is not None and not _reaches_others(route, change, tolerant, fold):
            if _is_magnified(route, change, fold):
                magnified.append((route, change))
            elif _choose(route, change, order, fold):
                return True
    return any(_choose(route, change, order, fold) for route, change in magnified)


def _choose(route: _Route, change: np.ndarray, order: dict[Node, int], fold: Folding) -> bool:
    """Change the shift of a source, if that takes away the shift at the end of the route."""
    node, source = route.end, route.source
    size, had_one = np.abs(fold.shift_of[node]).max(), source in fold.chosen
    before = fold.shift_of[source] if source in fold.leaves else fold.chosen_shift(source)
    fold.chosen[source] = before + change
    _resettle(source, order[node], order, fold)
    # What is left is the rounding of the way there and back, which must not ask for an Add, unless the change reaches
    # the value on a second way as well.
    if np.abs(fold.shift_of[node]).max() <= ROUNDING * size:
        fold.shift_of[node] = fold.no_shift(node)
        return True
    fold.chosen[source] = before
    _resettle(source, order[node], order, fold)
    if not had_one:
        del fold.chosen[source]
    return False


def _is_magnified(route: _Route, change: np.ndarray, fold: Folding) -> bool:
    """Whether small gains on the way make the change large for others that read a value there: they subtract it."""
    limit, moved = GROWTH * _size(fold.shift_of[route.end]), change
    for operand, reader in route.steps:
        if len(operand.users) > 1 and not isinstance(moved, list) and _size(moved) > limit:
            return True
        moved = _moved(operand, reader, moved, fold)
    return False


def _moved(operand: Node, reader: Node, change: Any, fold: Folding) -> Any:
    """A change of an operand's shift, as it changes the result's."""
    rule = fold.rule_of[reader]
    moved = rule.carry(reader, operand, change, collapse_equal, fold)
    return moved if isinstance(moved, list) else moved * rule.factor(reader, operand, fold)


def _routes(node: Node, tolerant: set[Node], fold: Folding) -> Iterator[_Route]:
    """Ways back to sources, on which no other reader minds a change, unless it reads a part that may stay as it is."""
    pending: list[tuple[Node, tuple[tuple[Node, Node], ...]]] = [(node, ())]
    while pending:
        current, steps = pending.pop(0)
        rule = fold.rule_of.get(current)
        if current in fold.leaves or (rule is not None and rule.chooses_shift(current, fold)):
            yield _Route(current, steps)
            continue
        if rule is None:
            continue
        for operand in current.all_input_nodes:
            if operand not in fold.scale_of or rule.use(current, operand, None, fold) is not Use.PASS:
                continue
            others = (user for user in operand.users if user is not current and not _reads_part(user, fold))
            if operand not in fold.leaves and not all(_tolerates(u, operand, tolerant, fold) for u in others):
                continue
            if operand in fold.leaves and len(operand.users) > 1:
                continue
            pending.append((operand, ((operand, current), *steps)))


def _reads_part(user: Node, fold: Folding) -> bool:
    return isinstance(fold.rule_of.get(user), Split | Piece | Select | Slice)


def _reaches_others(route: _Route, change: np.ndarray, tolerant: set[Node], fold: Folding) -> bool:
    """Whether a change of the source's shift reaches a part that another reader on the way takes, and minds."""
    moved = change
    for operand, reader in route.steps:
        for user in operand.users:
            if user is not reader and _reads_part(user, fold) and _minds(user, operand, moved, tolerant, fold):
                return True
        moved = _moved(operand, reader, moved, fold)
    return False


def _minds(
    reader: Node, operand: Node, moved: np.ndarray | list[np.ndarray], tolerant: set[Node], fold: Folding
) -> bool:
    """Whether a reader of a part gets something of a change that it, or one behind it, cannot take."""
    if _tolerates(reader, operand, tolerant, fold):
        return False
    try:
        part = fold.rule_of[reader].carry(reader, operand, moved, collapse_equal, fold)
    except CannotCarry:
        return True
    if isinstance(part, list):
        return any(_minds(user, reader, part, tolerant, fold) for user in reader.users)
    return bool(part.any())


def _cost(source: Node, fold: Folding) -> int:
    """What a source pays: nothing where a bias exists, an addition where one is created, a copy of a table else."""
    rule = fold.rule_of.get(source)
    if rule is None or isinstance(rule, Embedding):
        return 2
    if isinstance(rule, Weighted):
        return 0 if rule.operands(source)[2] is not None else 1
    return 0


def _needed_at_source(route: _Route, fold: Folding) -> np.ndarray | None:
    """The change of the source's shift that cancels the shift at the end of the route; None where none does."""
    shape = fold.scale(route.source).shape
    entries = np.arange(int(np.prod(shape))).reshape(shape)
    factor = np.ones(shape)
    try:
        for operand, reader in route.steps:
            rule = fold.rule_of[reader]
            entries, factor = (rule.carry(reader, operand, a, collapse_equal, fold) for a in (entries, factor))
            if not isinstance(factor, list):
                factor = factor * rule.factor(reader, operand, fold)
                entries = np.broadcast_to(entries, factor.shape)
    except CannotCarry:
        return None
    shift = fold.shift_of[route.end]
    if np.broadcast_shapes(shift.shape, entries.shape) != entries.shape or not factor.all():
        return None
    change = np.zeros(int(np.prod(shape)))
    needed = -np.broadcast_to(shift, entries.shape) / factor
    change[entries] = needed
    return change.reshape(shape) if np.array_equal(change[entries], needed) else None


def _resettle(source: Node, last: int, order: dict[Node, int], fold: Folding) -> None:
    """Carry a changed shift on to every value up to position `last` that depends on it."""
    if source in fold.leaves:
        fold.shift_of[source] = fold.chosen[source]
    queue, queued = [(order[source], source)], {source}
    while queue:
        _position, node = heapq.heappop(queue)
        if node in fold.rule_of:
            fold.shift_of[node] = fold.rule_of[node].settle(node, fold)
        for user in node.users:
            if user in queued or order[user] > last or user.op == "output" or not fold.reads_values(user):
                continue
            if fold.rule_of[user].use(user, node, None, fold) is Use.PASS:
                queued.add(user)
                heapq.heappush(queue, (order[user], user))
