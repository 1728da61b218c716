"""What a case is, and the shapes that cases use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

aten = torch.ops.aten
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """``apply(*operands, *constants)``; operands are computed, constants are parameters."""

    apply: Callable[..., Tensor | list[Tensor]]
    shapes: tuple[Shape, ...]
    constants: tuple[Shape, ...] = ()


SEQUENCE: Shape = (2, 4, 6)
IMAGE: Shape = (2, 6, 4, 8)
# Operands of an operation with broadcasting: equal ranks, a size of one on either side, fewer axes on either side.
BROADCAST: tuple[tuple[Shape, Shape], ...] = (
    ((2, 4, 6), (2, 4, 6)),
    ((2, 4, 6), (2, 1, 6)),
    ((2, 4, 6), (2, 4, 1)),
    ((2, 4, 1), (2, 1, 6)),
    ((1, 4, 6), (2, 4, 1)),
    ((2, 4, 6), (6,)),
    ((2, 4, 6), (1,)),
    ((4, 6), (2, 4, 6)),
    ((4, 1), (2, 1, 6)),
)
COUNTS = {0: 2, 1: 4, 2: 6}
MASK = torch.ones(4, 6, dtype=torch.bool).triu()
CONSTANTS: tuple[Shape, ...] = ((6,), (1,), (4, 1), (4, 6), (2, 1, 1), (2, 4, 6), (3, 2, 4, 6), (3, 1, 1, 1))


def unary(function: Callable[..., Tensor | list[Tensor]], *arguments: tuple, shape: Shape = SEQUENCE) -> list[Case]:
    """One case for every tuple of further arguments."""
    return [Case(lambda x, a=a: function(x, *a), (shape,)) for a in arguments or ((),)]


def binary(function: Callable[..., Tensor], step: int = 1) -> list[Case]:
    """Two computed operands of every pair of shapes, and one with every constant, on both sides; one with itself.

    A step of two takes half of the shapes.
    """
    return [
        *(Case(function, shapes) for shapes in BROADCAST[::step]),
        *(Case(function, (SEQUENCE,), (shape,)) for shape in CONSTANTS[::step]),
        *(Case(lambda x, c: function(c, x), (SEQUENCE,), (shape,)) for shape in CONSTANTS[::3]),
        Case(lambda x: function(x, x), (SEQUENCE,)),
        Case(lambda x: function(x, 1.5), (SEQUENCE,)),
    ]
