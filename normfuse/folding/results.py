"""What the steps of folding find, one after another; each is written by its step alone and read by those behind it.

A step hands on what it has found :func:`closed`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from torch.fx import Node

if TYPE_CHECKING:
    from .rules import Match
    from .rules.base import Coefficients


@dataclass(frozen=True)
class Matches:
    """What is known of every operation by itself, and the scale variables that are related.

    Attributes:
        of: the match of every operation.
        scale_of: scale variables of every floating-point value (a list for operations with several results).
        affine: coefficients of every affine map with constant coefficients.
        demands: the affine maps that ask for a ratio.
        equations: powers and products of two values, whose scales are settled once all ratios are.
        dynamic: the norms that compute their statistics from each input.
        stored: scale variables that go into weights.
        free_constants: constants that flow as values and may get any scale and shift.
    """

    of: Mapping[Node, Match]
    scale_of: Mapping[Node, Any]
    affine: Mapping[Node, Coefficients] = field(default_factory=dict)
    demands: tuple[Node, ...] = ()
    equations: tuple[Node, ...] = ()
    dynamic: tuple[Node, ...] = ()
    stored: tuple[np.ndarray, ...] = ()
    free_constants: tuple[Node, ...] = ()


@dataclass(frozen=True)
class Solution:
    """Which demands were not met; the scales themselves are in the solver.

    Attributes:
        kept: affine maps that stay, with the reason.
        refused_range: those that stay for the range of scales, and which was allowed.
        kept_gain: norms that measure their input whose gain stays in them, with the reason.
    """

    kept: dict[Node, str] = field(default_factory=dict)
    refused_range: dict[Node, float] = field(default_factory=dict)
    kept_gain: dict[Node, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Shifts:
    """The shift of every value.

    Attributes:
        of: shifts of the values (a list for operations with several results).
        chosen: shifts that weights, norms and added parameters were asked for.
        materialised_shifts: values whose shift is written out, and the readers that get it.
        bent: operations that are written otherwise to take a shift: ReLUs with another bound, squares of differences.
        settled_early: norms whose shift had grown too large to travel further.
        kept_shift: norms that measure their input whose shift stays in them, with the reason.
    """

    of: dict[Node, Any] = field(default_factory=dict)
    chosen: dict[Node, np.ndarray] = field(default_factory=dict)
    materialised_shifts: dict[Node, list[Node]] = field(default_factory=dict)
    bent: set[Node] = field(default_factory=set)
    settled_early: list[Node] = field(default_factory=list)
    kept_shift: dict[Node, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Centring:
    """The means that go.

    Attributes:
        without_mean: LayerNorms whose input is made to have a mean of zero; they become RMSNorms.
        with_mean: LayerNorms that stay, with the reason.
        centred: values whose writers subtract a mean over channels: which channels belong together (-1: none).
    """

    without_mean: set[Node] = field(default_factory=set)
    with_mean: dict[Node, str] = field(default_factory=dict)
    centred: dict[Node, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Cancelling:
    """The norms that go because later ones undo their division.

    Attributes:
        cancelled: norms whose division nothing sees, with the norms that measure again.
        not_cancelled: those that were asked to go and stay, with the reason.
    """

    cancelled: dict[Node, list[Node]] = field(default_factory=dict)
    not_cancelled: dict[Node, str] = field(default_factory=dict)


Result = TypeVar("Result", Solution, Shifts, Centring)


def closed(result: Result) -> Result:
    """The same result, in which nothing can be changed any more."""
    return replace(result, **{entry.name: _read_only(getattr(result, entry.name)) for entry in fields(result)})


def _read_only(collection: Any) -> Any:
    if isinstance(collection, dict):
        return MappingProxyType(collection)
    return frozenset(collection) if isinstance(collection, set) else tuple(collection)
