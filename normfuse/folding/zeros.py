"""Gains of zero go into the weights in front of them: ``0 * (W x + c) + b = 1 * (0 x + 0) + b``.

A gain of zero has no ratio. Where a norm alone reads what a weight writes, rows of zeros in the weight say the same,
and the gain is one: then the norm folds, whoever reads its result.
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
    """The matches, with weights that write zeros in the place of gains that are zero."""
    matches = dict(gauge.matches.of)
    for node, match in gauge.matches.of.items():
        if match.coefficients is None or match.coefficients.a.all():
            continue
        if (found := _moved(node, matches, gauge)) is not None:
            writer, zeroed, coefficients = found
            known = matches[writer].zeroed
            matches[writer] = replace(matches[writer], zeroed=zeroed if known is None else known | zeroed)
            matches[node] = replace(match, coefficients=coefficients)
    return MappingProxyType(matches)


def _moved(node: Node, matches: Mapping[Node, Match], gauge: Gauge) -> tuple[Node, np.ndarray, Coefficients] | None:
    """The operation whose weights write for a map alone, the channels to write zeros in, and the map's coefficients.

    None where there is no such operation, or the map multiplies one of these channels also by something else.
    """
    way = [node]  # from the map back to the weights, through what computes each channel from itself
    while way[-1] is node or not matches[way[-1]].writes_zeros:
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
    channels: Any = np.arange(int(np.prod(shape))).reshape(shape)
    values: Any = gauge.no_shift(writer)  # what a channel of zeros holds further on
    zeros, operand = list[tuple[Any, Any]](), writer
    try:
        for reader in reversed(way[1:]):
            rule = matches[reader]
            use = rule.use(operand, values, gauge)
            if use is Use.STOP:
                zeros.append((channels, values))
            channels = rule.carry(operand, channels, collapse_equal, gauge)
            if use is not Use.PASS:
                if isinstance(channels, list):
                    return None
                values = gauge.no_shift(reader)
                operand = reader
                continue
            values = rule.carry(operand, values, collapse_equal, gauge)
            if not isinstance(values, list):
                values = values * rule.factor(operand, gauge)
            if (map_ := rule.coefficients) is not None:
                values = values + map_.b
            operand = reader
    except CannotCarry:
        return None
    map_ = matches[node].coefficients
    assert map_ is not None
    spread, zero = np.broadcast_arrays(channels, map_.a == 0)
    zeroed = np.isin(np.arange(int(np.prod(shape))), spread[zero])
    b = np.where(map_.a == 0, map_.b - values, map_.b)
    needed = (np.broadcast_arrays(*pair) for pair in zeros)
    if zeroed[spread[~zero]].any() or any(v[zeroed[c]].any() for c, v in needed) or len(varying(b)) > 1:
        return None
    a = np.where(map_.a == 0, 1.0, map_.a)
    return writer, zeroed.reshape(shape), map_._replace(a=a, b=b)


def _reads_alone(reader: Node, operand: Node, gauge: Gauge) -> bool:
    """Whether an operation reads a value once, and nothing else does."""
    places: list[Node] = []
    map_arg((reader.args, reader.kwargs), places.append)
    others = [user for user in operand.users if user is not reader and gauge.reads_values(user)]
    return not others and places.count(operand) == 1
