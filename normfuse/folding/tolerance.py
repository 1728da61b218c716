"""Which values may have any shift, because all that reads them can take it."""

from __future__ import annotations

from collections.abc import Container, Iterator

from torch.fx import Node

from .gauge import Gauge
from .rules import Use


def tolerant_values(gauge: Gauge, *, bending: bool = False) -> set[Node]:
    """Values whose every reader has weights that take any shift along channels, or carries it on to such readers.

    With `bending`, also those whose readers take one if they are written otherwise (:meth:`.Match.last_resort`).
    """
    tolerant: set[Node] = set()
    for node in reversed(gauge.program.graph.nodes):
        readers = (tolerates(user, node, tolerant, gauge, bending=bending) for user in node.users)
        if node in gauge.matches.scale_of and all(readers):
            tolerant.add(node)
    return tolerant


def tolerates(user: Node, node: Node, tolerant: set[Node], gauge: Gauge, *, bending: bool = False) -> bool:
    """Whether a reader takes any shift of a value, or carries it on to a tolerant one."""
    if gauge.returns(user, node):
        return False
    if user not in gauge.matches.of or not gauge.reads_values(user):
        return True
    rule = gauge.matches.of[user]
    use = rule.use(node, gauge.any_shift(node), gauge)
    if use is Use.STOP and bending:
        use = rule.last_resort()
    return use is Use.ABSORB or (use is Use.PASS and user in tolerant)


def _taken(node: Node, gauge: Gauge) -> Iterator[tuple[Node, Use, bool]]:
    """The readers of a value that get its shift, what becomes of it there, and whether they are written otherwise."""
    for user in node.users:
        if user in gauge.matches.of and gauge.reads_values(user):
            use = gauge.matches.of[user].use(node, gauge.any_shift(node), gauge)
            bent = use is Use.STOP
            yield user, gauge.matches.of[user].last_resort() if bent else use, bent


def to_bend(node: Node, tolerant: set[Node], gauge: Gauge) -> tuple[set[Node], set[Node]]:
    """The readers that have to be written otherwise for a value to be tolerant, and the values that are so then."""
    readers, values, pending = set[Node](), set[Node](), [node]
    while pending:
        current = pending.pop()
        if current in tolerant or current in values:
            continue
        values.add(current)
        for user, use, bent in _taken(current, gauge):
            if bent:
                readers.add(user)
            if use is Use.PASS:
                pending.append(user)
    return readers, values


def wants_adds(node: Node, gauge: Gauge, passing: Container[Node] = ()) -> set[Node]:
    """The products without a bias to which a shift of a value would come, to be an Add behind each.

    Args:
        node: the value.
        gauge: what is known.
        passing: products behind which it would go on instead.
    """
    seen, pending, products = set[Node](), [node], set[Node]()
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        for user, use, _ in _taken(current, gauge):
            if use is Use.PASS:
                pending.append(user)
            elif use is Use.ABSORB and _appends_add(user, gauge) and user not in passing:
                products.add(user)
    return products


def _appends_add(user: Node, gauge: Gauge) -> bool:
    """Whether what a constant adds to an operation's result is an operation of its own."""
    return gauge.matches.of[user].weighs and not gauge.matches.of[user].has_bias
