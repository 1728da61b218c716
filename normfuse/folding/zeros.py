"""Gains of zero go into the weights in front of them: ``0 * (W x + c) + b = 1 * (0 x + 0) + b``.

A gain of zero has no ratio. Where a norm alone reads what a weight writes, rows of zeros in the weight say the same,
and the gain is one: then the norm folds, whoever reads its result. Other maps may stand between. What is padded with
zeros, say, passes no constant: then the weight writes the number of which the maps in front of it make zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType

import numpy as np
from torch.fx import Node, map_arg

from .arrays import CannotCarry, collapse_equal, varying
from .follow import Followed
from .gauge import Gauge
from .rules import Match, Use
from .rules.base import Coefficients


def zero_rows(gauge: Gauge) -> Mapping[Node, Match]:
    """The matches, with weights that write constants in the place of gains that are zero."""
    matches = dict(gauge.matches.of)
    for node, match in gauge.matches.of.items():
        if match.coefficients is None or match.coefficients.a.all():
            continue
        if (found := _moved(node, matches, gauge)) is not None:
            writer, held, coefficients = found
            matches[writer] = replace(matches[writer], held=held)
            matches[node] = replace(match, coefficients=coefficients)
    return MappingProxyType(matches)


def _moved(node: Node, matches: Mapping[Node, Match], gauge: Gauge) -> tuple[Node, np.ndarray, Coefficients] | None:
    """The operation whose weights write for a map alone, what its channels are to hold, and the map's new coefficients.

    None where there is no such operation, or the map multiplies one of these channels also by something else.
    """
    steps, map_ = _way_back(node, matches, gauge), matches[node].coefficients
    if not steps or map_ is None:
        return None
    writer = steps[0][0]
    held = _held(matches[writer])
    try:
        followed, stopped = _follow(held, steps[:-1], matches, gauge)
    except CannotCarry:
        return None
    channels, zero = np.broadcast_arrays(followed.channels, map_.a == 0)
    constant = np.isin(np.arange(held.size), channels[zero])
    if constant[channels[~zero]].any():
        return None
    numbers = np.where(constant & np.isnan(held.ravel()), 0.0, held.ravel())
    if not all(value.become_zero(numbers, constant[value.channels]) for value in stopped):
        return None
    left = followed.factor * numbers[channels] + followed.shift
    b = np.where(map_.a == 0, map_.b - left, map_.b)
    if len(varying(b)) > 1:
        return None
    return writer, numbers.reshape(held.shape), map_._replace(a=np.where(map_.a == 0, 1.0, map_.a), b=b)


def _way_back(node: Node, matches: Mapping[Node, Match], gauge: Gauge) -> list[tuple[Node, Node]]:
    """The steps (operand, reader) from weights to a map, through what computes each channel from itself; or none."""
    steps: list[tuple[Node, Node]] = []
    while not steps or not matches[node].writes_constants:
        match = matches[node]
        if match.coefficients is None and not match.moves:
            return []
        operand = match.operand() if match.coefficients is None else match.coefficients.operand
        if operand not in matches or not _reads_alone(node, operand, gauge):
            return []
        steps.insert(0, (operand, node))
        node = operand
    return steps


def _held(writer: Match) -> np.ndarray:
    """The numbers that the channels of a weight operation's result hold already, as an array over them."""
    axes, sizes = writer.output_axes(), writer.value.shape
    shape = [int(size) if axis in axes else 1 for axis, size in enumerate(sizes)]
    return np.full(shape, np.nan) if writer.held is None else np.broadcast_to(writer.held, shape)


def _follow(
    held: np.ndarray, steps: Iterable[tuple[Node, Node]], matches: Mapping[Node, Match], gauge: Gauge
) -> tuple[Followed, list[Followed]]:
    """What the last value holds of the numbers of a weight's result, and the values in front of what passes zeros only.

    Numbers that are held already are no more to be chosen. Raises :class:`CannotCarry`.
    """
    known = ~np.isnan(held)
    followed = Followed.along(held.shape)._replace(factor=np.where(known, 0.0, 1.0), shift=np.where(known, held, 0.0))
    stopped = []
    for operand, reader in steps:
        rule, several = matches[reader], isinstance(followed.factor, list)
        use = Use.PASS if several else rule.use(operand, followed.factor + followed.shift, gauge)
        if use is Use.PASS:
            followed = followed.behind(rule, operand, gauge)
            continue
        stopped += [followed] if use is Use.STOP else []
        channels = rule.carry(operand, followed.channels, collapse_equal, gauge)
        if isinstance(channels, list):
            raise CannotCarry
        followed = Followed(channels, np.zeros(channels.shape), np.zeros(channels.shape))
    return followed, stopped


def _reads_alone(reader: Node, operand: Node, gauge: Gauge) -> bool:
    """Whether an operation reads a value once, and nothing else does."""
    places: list[Node] = []
    map_arg((reader.args, reader.kwargs), places.append)
    others = [user for user in operand.users if user is not reader and gauge.reads_values(user)]
    return not others and places.count(operand) == 1
