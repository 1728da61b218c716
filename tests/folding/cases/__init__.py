"""At least one use of every operation that a folding rule is registered for; see test_every_operand.py.

Keys are overloads. A case says what shapes its floating-point operands have and what constants it reads; all else is
written out. Sizes differ from axis to axis, so that a number along a wrong axis is noticed.
"""

from __future__ import annotations

from . import arithmetic, movements, neighbourhoods, products, recurrent
from .base import Case

__all__ = ["CASES", "Case"]

CASES: dict[object, list[Case]] = {
    **arithmetic.CASES,
    **movements.CASES,
    **neighbourhoods.CASES,
    **products.CASES,
    **recurrent.CASES,
}
