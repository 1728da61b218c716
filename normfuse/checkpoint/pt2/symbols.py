"""Sizes that depend on inputs: a small language of expressions, read without evaluating text.

torch writes such a size as sympy prints it, ``Mul(Integer(2), Symbol('s77', positive=True, integer=True))``, and reads
it with a parser that evaluates Python. Here the text is taken apart by a grammar::

    expression = function "(" expression { "," expression } ")"
               | "Symbol" "(" "'" name "'" { "," assumption "=" ("True" | "False") } ")"
               | "Integer" "(" integer ")" | "Rational" "(" integer "," integer ")"
               | "Float" "(" "'" number "'" "," "precision" "=" integer ")"
               | "true" | "false"

Its value at the sizes of the example is computed first, with bounds on every number in between. Only then sympy's
objects are made from it, which simplify themselves and would not end on large powers.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import sympy
from torch.utils._sympy import functions

from normfuse.checkpoint.errors import CheckpointError
from normfuse.errors import one_line

LARGEST_SIZE = 1 << 48
_LONGEST = 4000
_DEEPEST = 24
_MOST_OPERANDS = 16
_TOKEN = re.compile(
    r"\s*(?:(?P<word>[A-Za-z_]\w*)|(?P<integer>-?\d{1,20})(?![\w.])|(?P<text>'[^'\\]*')|(?P<mark>[(),=]))",
    re.ASCII,
)
_SYMBOL = re.compile(r"s\d{1,9}", re.ASCII)
_ASSUMPTIONS = {"integer", "positive", "nonnegative"}

Number = int | float | bool | Fraction


def _power(base: Number, exponent: Number) -> Number:
    if exponent not in (2, 3, 4):
        raise ArithmeticError("a power other than 2, 3 and 4")
    return base**exponent


# Name → how to compute it, how sympy builds it, and how many operands it has.
_FUNCTIONS: dict[str, tuple[Callable[..., Number], Callable[..., Any], int | None]] = {
    "Add": (lambda *a: sum(a), sympy.Add, None),
    "Mul": (lambda *a: math.prod(a), sympy.Mul, None),
    "Max": (max, sympy.Max, None),
    "Min": (min, sympy.Min, None),
    "Pow": (_power, sympy.Pow, 2),
    "PowByNatural": (_power, functions.PowByNatural, 2),
    "FloorDiv": (operator.floordiv, functions.FloorDiv, 2),
    "CleanDiv": (operator.floordiv, functions.CleanDiv, 2),
    "CeilDiv": (lambda a, b: -(-a // b), functions.CeilDiv, 2),
    "Mod": (operator.mod, functions.Mod, 2),
    "PythonMod": (operator.mod, functions.PythonMod, 2),
    "ModularIndexing": (lambda a, b, c: a // b % c, functions.ModularIndexing, 3),
    "IntTrueDiv": (operator.truediv, functions.IntTrueDiv, 2),
    "FloatTrueDiv": (operator.truediv, functions.FloatTrueDiv, 2),
    "ToFloat": (float, functions.ToFloat, 1),
    "TruncToInt": (math.trunc, functions.TruncToInt, 1),
    "FloorToInt": (math.floor, functions.FloorToInt, 1),
    "CeilToInt": (math.ceil, functions.CeilToInt, 1),
    "RoundToInt": (round, functions.RoundToInt, 1),
    "Identity": (lambda a: a, functions.Identity, 1),
    "Where": (lambda c, a, b: a if c else b, functions.Where, 3),
    "Equality": (operator.eq, sympy.Eq, 2),
    "Unequality": (operator.ne, sympy.Ne, 2),
    "LessThan": (operator.le, sympy.Le, 2),
    "StrictLessThan": (operator.lt, sympy.Lt, 2),
    "GreaterThan": (operator.ge, sympy.Ge, 2),
    "StrictGreaterThan": (operator.gt, sympy.Gt, 2),
    "And": (lambda *a: all(a), sympy.And, None),
    "Or": (lambda *a: any(a), sympy.Or, None),
    "Not": (operator.not_, sympy.Not, 1),
}


@dataclass(frozen=True)
class Expression:
    """One expression.

    ``value`` is its value at the sizes of the example, ``sympy`` its form for torch, and ``symbol`` its name if it is a
    symbol and nothing else.
    """

    value: Number
    sympy: Any
    symbol: str | None = None


@dataclass
class Symbols:
    """The symbols of a program and their sizes in the example; expressions that were read before are kept.

    Args:
        sizes: the size of each symbol in the example.
    """

    sizes: Mapping[str, int]
    _symbols: dict[str, sympy.Symbol] = field(default_factory=dict)
    _known: dict[str, Expression] = field(default_factory=dict)

    def read(self, text: str) -> Expression:
        """The expression of a text.

        CheckpointError if the grammar does not have it or a number in it leaves its bounds.
        """
        if text not in self._known:
            try:
                if len(text) > _LONGEST:
                    raise _Unfit("it is too long")
                tree = _Parser(text).whole()
                value = _value(tree, self.sizes)
                self._known[text] = Expression(value, self._build(tree), tree[1] if tree[0] == "Symbol" else None)
            except Exception as error:  # arithmetic and sympy raise what they like for sizes that make no sense
                raise CheckpointError(f"size {one_line(text, 60)!r} cannot be used ({one_line(error, 120)})") from error
        return self._known[text]

    def occurs(self, symbol: str) -> bool:
        """Whether an expression that was read contains the symbol."""
        return symbol in self._symbols

    def _build(self, tree: tuple) -> Any:
        name, *parts = tree
        match name:
            case "Symbol":
                symbol, assumptions = parts
                made = self._symbols.setdefault(symbol, sympy.Symbol(symbol, **assumptions))
                if made.assumptions0 != sympy.Symbol(symbol, **assumptions).assumptions0:
                    raise _Unfit(f"{symbol} is assumed to be one thing here and another there")
                return made
            case "Integer":
                return sympy.Integer(*parts)
            case "Rational":
                return sympy.Rational(*parts)
            case "Float":
                return sympy.Float(*parts)
            case "true" | "false":
                return sympy.true if name == "true" else sympy.false
        return _FUNCTIONS[name][1](*map(self._build, parts))


def symbol_of(text: str) -> str | None:
    """The name of the symbol if a text is a symbol and nothing else, None for any other text."""
    try:
        tree = _Parser(text).whole() if len(text) <= _LONGEST else ("",)
    except _Unfit:
        return None
    return tree[1] if tree[0] == "Symbol" else None


class _Unfit(Exception):
    pass


def _value(tree: tuple, sizes: Mapping[str, int]) -> Number:
    name, *parts = tree
    match name:
        case "Symbol":
            if parts[0] not in sizes:
                raise _Unfit(f"{parts[0]} has no size in the example")
            return sizes[parts[0]]
        case "Integer" | "Float":
            return parts[0]
        case "Rational":
            return Fraction(*parts)
        case "true" | "false":
            return name == "true"
    if name in ("Pow", "PowByNatural") and (parts[1][0] != "Integer" or _has_power(parts[0])):
        raise _Unfit("a power with a variable exponent, or of a power")
    value: Any = _FUNCTIONS[name][0](*(_value(part, sizes) for part in parts))
    if not abs(value) < 1 << 62:
        raise _Unfit("a number leaves 62 bits")
    return value


def _has_power(tree: tuple) -> bool:
    return tree[0] in ("Pow", "PowByNatural") or any(_has_power(part) for part in tree[1:] if isinstance(part, tuple))


class _Parser:
    """From text to nested tuples ``(function, operand, …)``."""

    def __init__(self, text: str) -> None:
        self._tokens: list[tuple[str, str]] = []
        position, text = 0, text.rstrip()
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None:
                raise _Unfit(f"{text[position : position + 12]!r} is not part of the grammar")
            self._tokens.append((str(match.lastgroup), match[match.lastgroup or 0]))
            position = match.end()
        self._tokens.reverse()

    def whole(self) -> tuple:
        tree = self._expression(0)
        if self._tokens:
            raise _Unfit(f"{self._tokens[-1][1]!r} follows where it should end")
        return tree

    def _take(self, kind: str, text: str | None = None) -> str:
        if not self._tokens or self._tokens[-1][0] != kind or text not in (None, self._tokens[-1][1]):
            found = self._tokens[-1][1] if self._tokens else "the end"
            raise _Unfit(f"{found!r} stands where {text or kind} belongs")
        return self._tokens.pop()[1]

    def _next_is(self, mark: str) -> bool:
        return bool(self._tokens) and self._tokens[-1] == ("mark", mark)

    def _expression(self, depth: int) -> tuple:
        if depth > _DEEPEST:
            raise _Unfit("it is nested too deeply")
        name = self._take("word")
        if name in ("true", "false"):
            return (name,)
        self._take("mark", "(")
        match name:
            case "Symbol":
                tree = self._symbol()
            case "Integer":
                tree = (name, int(self._take("integer")))
            case "Rational":
                tree = (name, int(self._take("integer")), self._denominator())
            case "Float":
                tree = (name, self._float())
            case _:
                tree = (name, *self._operands(name, depth))
        self._take("mark", ")")
        return tree

    def _operands(self, name: str, depth: int) -> list[tuple]:
        if name not in _FUNCTIONS:
            raise _Unfit(f"{name!r} is not a function of sizes")
        operands = [self._expression(depth + 1)]
        while self._next_is(","):
            self._take("mark", ",")
            operands.append(self._expression(depth + 1))
        arity = _FUNCTIONS[name][2]
        if len(operands) > _MOST_OPERANDS or arity not in (None, len(operands)):
            raise _Unfit(f"{name} of {len(operands)} operands")
        return operands

    def _symbol(self) -> tuple:
        name = self._take("text")[1:-1]
        if not _SYMBOL.fullmatch(name):
            raise _Unfit(f"{name!r} is not a size of an input")
        assumptions = {}
        while self._next_is(","):
            self._take("mark", ",")
            assumption = self._take("word")
            self._take("mark", "=")
            value = self._take("word")
            if assumption not in _ASSUMPTIONS or value not in ("True", "False"):
                raise _Unfit(f"{assumption}={value} is not an assumption")
            assumptions[assumption] = value == "True"
        return ("Symbol", name, assumptions)

    def _denominator(self) -> int:
        self._take("mark", ",")
        denominator = int(self._take("integer"))
        if denominator < 1:
            raise _Unfit("a denominator is not positive")
        return denominator

    def _float(self) -> float:
        try:
            number = float(self._take("text")[1:-1])
        except ValueError:
            raise _Unfit("a Float holds no number") from None
        self._take("mark", ",")
        self._take("word", "precision")
        self._take("mark", "=")
        self._take("integer")
        if not math.isfinite(number):
            raise _Unfit("a Float is not finite")
        return number
