"""Sizes for the dynamic dimensions of an ONNX file's inputs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

_BATCH = re.compile(r"batch|^(n|b|bs|bsz|bsize)$", re.IGNORECASE)
_CHANNELS = re.compile(r"channel|^c$", re.IGNORECASE)
_PIXELS = re.compile(r"height|width|^(h|w)$", re.IGNORECASE)
_WORD = re.compile(r"[A-Za-z_][\w.]*")
_SUM = re.compile(r"[\w.]+(\s*[+*-]\s*[\w.]+)*")
_MANY, _PICTURE, _COLOURS = 128, 224, 3
# What is tried where a file cannot take the usual size: bounds are often powers of two; recordings need more.
_OTHERS = (64, 32, 16, 8, 4, 2, 1, 256, 512, 4096, 16000)


def label(size: object, name: str, axis: int) -> str:
    """The name of a dynamic dimension; one without a name is called after its input and axis (``x.0``)."""
    return str(size) if size else f"{name}.{axis}"


def no_dimension(name: str, known: Iterable[str]) -> str:
    """In words, that a size is for none of the dynamic dimensions."""
    names = ", ".join(known)
    return f"size {name!r} names no dynamic dimension of the inputs" + (f"; there are {names}" if names else "")


def words(dimension: str) -> list[str]:
    """The sizes that a dimension is made of: ``past + 1`` of one, ``past + seq`` of two."""
    return _WORD.findall(dimension) if _SUM.fullmatch(dimension) else [dimension]


def usual(dimension: str, axis: int, rank: int, named: bool) -> int:
    """A batch is 1, a picture 224 wide with 3 colours, anything else 128.

    Names decide; without one, or with one that a program made up (``s27``, ``unk__5``), the place does.
    """
    if named and not re.fullmatch(r"(s|u|unk_*|dim_*|d)\d+", dimension):
        for pattern, size in ((_BATCH, 1), (_CHANNELS, _COLOURS), (_PIXELS, _PICTURE)):
            if pattern.search(dimension):
                return size
        return _MANY
    if axis == 0:
        return 1
    return ((1, _COLOURS, _PICTURE, _PICTURE) if rank == 4 else (_MANY,) * rank)[axis]


def value(dimension: str, sizes: Mapping[str, int]) -> int:
    """The size of a dimension, which may be a sum or product of named sizes."""
    if dimension in sizes:
        return sizes[dimension]
    terms = re.split(r"\s*([+*-])\s*", dimension)
    numbers = [int(term) if term.isdecimal() else sizes[term] for term in terms[::2]]
    total, sign = 0, 1
    product = numbers[0]
    for operator, number in zip(terms[1::2], numbers[1:], strict=True):
        if operator == "*":
            product *= number
        else:
            total, sign, product = total + sign * product, 1 if operator == "+" else -1, number
    return total + sign * product


def attempts(sizes: Mapping[str, int], given: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """The sizes to try, the usual ones first; those that were given never change."""
    yield {**sizes, **given}
    free = [name for name in sizes if name not in given and sizes[name] > 1]
    for other in _OTHERS if free else ():
        yield {**sizes, **{name: min(other, sizes[name]) if other < _MANY else other for name in free}, **given}
