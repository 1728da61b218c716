"""Gains of zero go into the weights in front of them: ``0 * (W x + c) + b = 1 * (0 x + 0) + b``.

A gain of zero has no ratio. Where a norm alone reads what a weight writes, rows of zeros in the weight say the same,
and the gain is one: then the norm folds, whoever reads its result. Other maps may stand between. What is padded with
zeros, say, passes no constant: then the weight writes the number of which the maps in front of it make zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
from torch.fx import Node, map_arg

from .arrays import CannotCarry, collapse_equal, varying
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
    way = [node]  # from the map back to the weights, through what computes each channel from itself
    while way[-1] is node or not matches[way[-1]].writes_constants:
        match = matches[way[-1]]
        if match.coefficients is None and not match.moves:
            return None
        operand = match.operand() if match.coefficients is None else match.coefficients.operand
        if operand not in matches or not _reads_alone(way[-1], operand, gauge):
            return None
        way.append(operand)
    writer = way.pop()
    axes = matches[writer].output_axes()
    shape = [int(size) if axis in axes else 1 for axis, size in enumerate(writer.meta["val"].shape)]
    known = matches[writer].held
    held = np.full(shape, np.nan) if known is None else np.broadcast_to(known, shape)
    # Of a number w that a channel holds, ``factor * w + shift`` is left further on.
    channels: Any = np.arange(held.size).reshape(shape)
    factor: Any = np.where(np.isnan(held), 1.0, 0.0)
    shift: Any = np.where(np.isnan(held), 0.0, held)
    zeros: list[tuple[np.ndarray, ...]] = []  # the same in front of what only passes zeros
    operand, before = writer, channels
    for reader in reversed(way[1:]):
        rule = matches[reader]
        use = Use.PASS if isinstance(factor, list) else rule.use(operand, factor + shift, gauge)
        try:
            channels = rule.carry(operand, channels, collapse_equal, gauge)
            if use is Use.PASS:
                factor, shift = (rule.carry(operand, n, collapse_equal, gauge) for n in (factor, shift))
        except CannotCarry:
            return None
        if use is not Use.PASS:
            if isinstance(channels, list):
                return None
            zeros += [np.broadcast_arrays(before, factor, shift)] if use is Use.STOP else []
            factor = shift = gauge.no_shift(reader)
        elif not isinstance(factor, list):
            factor, shift = (n * rule.factor(operand, gauge) for n in (factor, shift))
            shift = shift + (0.0 if rule.coefficients is None else rule.coefficients.b)
        operand, before = reader, channels
    map_ = matches[node].coefficients
    assert map_ is not None
    spread, zero = np.broadcast_arrays(channels, map_.a == 0)
    constant = np.isin(np.arange(held.size), spread[zero])
    if constant[spread[~zero]].any():
        return None
    numbers = np.where(constant & np.isnan(held.ravel()), 0.0, held.ravel())
    for entries, a, b in zeros:
        found = constant[entries]
        if (b[found & (a == 0)] != 0).any():
            return None
        free = found & (a != 0)
        needed = -b[free] / a[free]
        numbers[entries[free]] = needed
        if (numbers[entries[free]] != needed).any():
            return None
    left = factor * numbers[spread] + shift
    b = np.where(map_.a == 0, map_.b - left, map_.b)
    if len(varying(b)) > 1:
        return None
    return writer, numbers.reshape(shape), map_._replace(a=np.where(map_.a == 0, 1.0, map_.a), b=b)


def _reads_alone(reader: Node, operand: Node, gauge: Gauge) -> bool:
    """Whether an operation reads a value once, and nothing else does."""
    places: list[Node] = []
    map_arg((reader.args, reader.kwargs), places.append)
    others = [user for user in operand.users if user is not reader and gauge.reads_values(user)]
    return not others and places.count(operand) == 1
