"""Which axes of two factors and of their product belong together, for every operation that multiplies matrices."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
import torch
from torch.fx import Node

from ..arrays import Size, same_size
from ..operations import FACTORS
from .base import argument

aten = torch.ops.aten
Axes = tuple[str, ...]
_EINSUM = re.compile(r"(?P<left>[a-zA-Z]*(\.\.\.)?[a-zA-Z]*),(?P<right>[a-zA-Z]*(\.\.\.)?[a-zA-Z]*)(->(?P<result>.*))?")


class Contraction(NamedTuple):
    """``result = sum of left * right`` over the names that the result has not.

    Each axis has a name, as the letters of an einsum; an axis of size one that is broadcast has the empty name.
    """

    left: Axes
    right: Axes
    result: Axes


def factors_of(node: Node) -> tuple[Node, Node]:
    """The two factors of a product."""
    if node.target is aten.einsum.default:
        return tuple(node.args[1])
    return tuple(argument(node, name) for name in FACTORS[node.target])


def contraction_of(node: Node) -> Contraction | None:
    """The names of the axes of a product; None where it is none of two factors, or reads one's diagonal."""
    if node.target is aten.einsum.default and len(node.args[1]) != 2:
        return None
    shapes = [factor.meta["val"].shape for factor in factors_of(node)]
    named = _named(node, *map(len, shapes))
    if named is None or any(len(set(axes)) != len(axes) for axes in named):
        return None
    left, right, result = named
    sizes = dict(zip(left, shapes[0], strict=True)), dict(zip(right, shapes[1], strict=True))
    if not all(same_size(a, b) or same_size(a, 1) or same_size(b, 1) for a, b in _pairs(*sizes)):
        return None
    return Contraction(_known(left, *sizes), _known(right, *reversed(sizes)), result)


def lay(numbers: np.ndarray, along: Axes, onto: Axes) -> np.ndarray:
    """Numbers about axes with names, which vary only along those that `onto` has as well, in its order."""
    places = [along.index(name) for name in onto if name and name in along]
    rest = [axis for axis in range(numbers.ndim) if axis not in places]
    moved = numbers.transpose(*places, *rest)
    sizes = iter(moved.shape)
    return np.array(moved).reshape([next(sizes) if name and name in along else 1 for name in onto])


def _named(node: Node, left: int, right: int) -> Contraction | None:
    """The names of the axes of both factors, which have these ranks, and of the result."""
    target = node.target
    if target is aten.einsum.default:
        return _einsum(node.args[0].replace(" ", ""), left, right)
    if target is aten.linear.default:
        batch = _batch(left - 1)
        return Contraction((*batch, "i"), ("o", "i")[2 - right :], (*batch, "o")[: left - 2 + right])
    if target is aten.addbmm.default:
        return Contraction(("b", "r", "i"), ("b", "i", "o"), ("r", "o"))
    if target is aten.dot.default:
        return Contraction(("i",), ("i",), ())
    if target is aten.linalg_vecdot.default:
        batches = _batch(left - 1), _batch(right - 1)
        last = argument(node, "dim") in (-1, max(left, right) - 1)
        return Contraction((*batches[0], "i"), (*batches[1], "i"), max(batches, key=len)) if last else None
    if target is aten.outer.default:
        return Contraction(("r",), ("o",), ("r", "o"))
    if target in (aten.tensordot.default, aten.inner.default):
        over = ([-1], [-1]) if target is aten.inner.default else node.args[2:4]
        first = [f"r{axis}" for axis in range(left)]
        second = [f"o{axis}" for axis in range(right)]
        result = tuple(
            name for names, dims in zip((first, second), over, strict=True) for name in _without(names, dims)
        )
        for a, b in zip(*over, strict=True):
            second[b] = first[a]
        return Contraction(tuple(first), tuple(second), result)
    batches = _batch(left - 2), _batch(right - 2)
    rows, columns = ("r",)[: left - 1], ("o",)[: right - 1]
    result = (*max(batches, key=len), *rows, *columns)
    return Contraction((*batches[0], *rows, "i"), (*batches[1], "i", *columns), result)


def _einsum(equation: str, left: int, right: int) -> Contraction | None:
    found = _EINSUM.fullmatch(equation)
    if found is None:
        return None
    first, second = (_letters(found[side], rank) for side, rank in (("left", left), ("right", right)))
    others = max((_others(found[side], rank) for side, rank in (("left", left), ("right", right))), key=len)
    if found["result"] is not None:
        return Contraction(first, second, _letters(found["result"], None, others))
    letters = [name for name in (*first, *second) if name.isalpha()]
    once = tuple(name for name in sorted(set(letters)) if letters.count(name) == 1)
    return Contraction(first, second, (*others, *once))


def _letters(term: str, rank: int | None, others: Axes = ()) -> Axes:
    if rank is not None:
        others = _others(term, rank)
    before, dots, after = term.partition("...")
    return (*before, *(others if dots else ()), *after)


def _others(term: str, rank: int) -> Axes:
    """The axes that the three dots of a term stand for."""
    return _batch(rank - len(term.replace("...", ""))) if "..." in term else ()


def _batch(count: int) -> Axes:
    """Names of leading axes, which belong together from the last one on."""
    return tuple(str(number) for number in reversed(range(count)))


def _without(names: list[str], dims: list[int]) -> list[str]:
    return [name for axis, name in enumerate(names) if axis - len(names) not in dims and axis not in dims]


def _pairs(first: dict[str, Size], second: dict[str, Size]) -> list[tuple[Size, Size]]:
    return [(first[name], second[name]) for name in first if name in second]


def _known(axes: Axes, own: dict[str, Size], other: dict[str, Size]) -> Axes:
    """The names of one factor's axes, without those of size one that the other factor has in full."""
    return tuple(
        "" if name in other and same_size(own[name], 1) and not same_size(other[name], 1) else name for name in axes
    )
