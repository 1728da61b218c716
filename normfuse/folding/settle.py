"""The second step of folding: one topological pass carries the shifts to the weights that absorb them.

Where a shift reaches an operation that cannot take it, a weight operation on the way is asked to produce the opposite
one: its bias pays. Only where none can, the shift is written out as an Add.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from torch.fx import Node

from . import opposites
from .gains import adds_constant, choose_shifts, keep_shift
from .gauge import Gauge
from .nodes import CALLED
from .opposites import cancel_shift, give_shift, root_mean_square
from .results import Shifts, closed
from .rules import Use
from .rules.base import is_float
from .tolerance import to_bend, tolerant_values, tolerates, wants_adds

# How often shifts of norms are sent out; afterwards all of them stay where they are.
_ATTEMPTS = 8


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
        new_adds = [value for value in shifts.materialised_shifts if not adds_constant(value, gauge)]
        back = travelling & sources_of_shift(new_adds, gauge).keys()
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
        # A shift that will be stopped somewhere is best cancelled where it arises, before readers multiply; one that
        # would be an Add behind a product, where a bias in front can take it.
        arises = node in gauge.matches.affine and node not in gauge.solution.kept
        passes = node in tolerant
        products = wants_adds(node, gauge, flexible) if arises and passes else set()
        better = arises and (not passes or bool(products))
        if better and cancel_shift(node, order, tolerant, gauge, only_biases=passes):
            continue
        # Read from a file, each of them is an operation, of which one in front does the same.
        new = [product for product in products if CALLED in node.meta and not _meets_a_summand(product, gauge)]
        if len(new) > 1 and not (_rides(node, gauge) or _meets_a_summand(node, gauge)):
            gauge.shifts.materialised_shifts[node] = [user for user in node.users if user in gauge.matches.of]
            continue
        constants[node] = _constants(node, constants, gauge)
        grown = (
            node in gauge.matches.affine
            and root_mean_square(gauge.shifts.of[node]) > opposites.GROWTH * constants[node].size
        )
        if grown and _rides(node, gauge) and cancel_shift(node, order, tolerant, gauge):
            gauge.shifts.settled_early.append(node)
            continue
        if _stopping(node, gauge) and not cancel_shift(node, order, tolerant, gauge):
            for user in _stopping(node, gauge):
                if tolerates(user, node, flexible, gauge, bending=True):
                    gauge.shifts.bent.add(user)
            if _stopping(node, gauge):
                gauge.shifts.materialised_shifts[node] = _stopping(node, gauge)


def _join_shifts(node: Node, order: dict[Node, int], tolerant: set[Node], gauge: Gauge) -> None:
    """Where a result can carry one shift only, and its operands have different ones: they are to have none.

    If one of them has to keep its shift, the others get it as well, such as tokens that are put in front of a sequence.
    """
    joined = [x for x in node.all_input_nodes if x in gauge.matches.scale_of and is_float(x)]
    if not any(_use_of_its_shift(node, operand, gauge) is Use.JOIN for operand in joined):
        return
    carried = [gauge.carried(node, operand) for operand in joined]
    if all(np.equal(carried[0], shift).all() for shift in carried[1:]):
        return
    stuck = [
        operand
        for operand in joined
        if gauge.incoming(node, operand).any() and not cancel_shift(operand, order, tolerant, gauge)
    ]
    if not stuck:
        return
    others = [operand for operand in joined if operand not in stuck]
    if len(stuck) > 1 or not give_shift(node, others, gauge.carried(node, stuck[0]), order, tolerant, gauge):
        for operand in stuck:
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
        gain = root_mean_square(a * before) / root_mean_square(before) if before.any() else 0.0
        return _Constants(0.0, math.hypot(gain * fresh, min(gain, 1.0) * old, root_mean_square(b)))
    made_here = node in gauge.shifts.chosen or not arriving
    return _Constants(root_mean_square(gauge.shifts.of[node]), 0.0) if made_here else _Constants(fresh, old)


def _rides(node: Node, gauge: Gauge) -> bool:
    """Whether a value goes into an addition, possibly rearranged."""
    rules = [(user, gauge.matches.of[user]) for user in node.users if user in gauge.matches.of]
    return any(rule.adds or (rule.moves and _rides(user, gauge)) for user, rule in rules)


def _meets_a_summand(node: Node, gauge: Gauge) -> bool:
    """Whether maps that go add something behind a value, wherever it is read: its shift becomes part of that."""
    readers = [user for user in node.users if gauge.reads_values(user)]
    for user in readers:
        goes = user in gauge.matches.affine and user not in gauge.solution.kept
        if goes and gauge.matches.affine[user].b.any():
            continue
        moves = user in gauge.matches.of and gauge.matches.of[user].moves
        if not (goes or moves) or not _meets_a_summand(user, gauge):
            return False
    return bool(readers)


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
