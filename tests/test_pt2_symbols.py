"""Sizes in a file: which texts are sizes, and what is not evaluated."""

import contextlib

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st
from sympy.printing.repr import srepr
from torch.utils._sympy import functions

from normfuse.checkpoint import CheckpointError
from normfuse.checkpoint.pt2.symbols import Symbols, symbol_of

S = sympy.Symbol("s77", positive=True, integer=True)
T = sympy.Symbol("s0", integer=True, nonnegative=True)
SIZES = {"s77": 6, "s0": 4}


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        (S, 6),
        (2 * S, 12),
        (S + T - 3, 7),
        (S**2, 36),
        (sympy.Rational(1, 2) * S, 3),
        (functions.FloorDiv(S, 4), 1),
        (functions.Mod(S, 4), 2),
        (functions.PythonMod(S - 9, 4), 1),
        (functions.ModularIndexing(S, 2, 2), 1),
        (functions.CeilToInt(functions.IntTrueDiv(S, 4)), 2),
        (functions.TruncToInt(0.5 * functions.ToFloat(S)), 3),
        (sympy.Max(S, T, 5), 6),
        (sympy.Min(S, T), 4),
        (functions.FloatTrueDiv(functions.ToFloat(S), 4.0), 1.5),
        (sympy.Eq(S, T), False),
        (S > T, True),
        (sympy.And(S < 8, T < 8), True),
        (functions.Where(S < T, S, T), 4),
        (sympy.true, True),
    ],
)
def test_what_torch_writes_is_read_and_computed(expression, value):
    read = Symbols(SIZES).read(srepr(expression))
    assert read.sympy == expression
    assert read.value == value


def test_a_symbol_alone_is_known_as_one():
    assert symbol_of(srepr(S)) == "s77"
    assert symbol_of(srepr(2 * S)) is None
    assert symbol_of("__import__('os')") is None
    assert Symbols(SIZES).read(srepr(S)).symbol == "s77"


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "().__class__.__base__",
        "2*s77",  # no infix: nothing that a parser of Python would be needed for
        "9**9**9",
        "Pow(Integer(9), Pow(Integer(9), Integer(9)))",
        "Pow(Pow(Symbol('s77', integer=True), Integer(4)), Integer(4))",
        "Pow(Symbol('s77', integer=True), Integer(1000))",
        "PowByNatural(Symbol('s77', integer=True), Symbol('s0', integer=True))",
        "Mul(" * 30 + "Integer(1)" + ")" * 30,
        "Mul(" + ", ".join(["Integer(2)"] * 17) + ")",
        "Mul(Integer(4611686018427387904), Integer(4))",
        "Integer(" + "9" * 5000 + ")",
        "Integer(1) Integer(1)",
        "Integer(1.5)",
        "Integer(True)",
        "Rational(1, 0)",
        "Rational(1, -2)",
        "FloorDiv(Symbol('s77', integer=True), Integer(0))",
        "Float('nan', precision=53)",
        "Float('1e999', precision=53)",
        "Symbol('x', integer=True)",
        "Symbol('s5', integer=True)",  # has no size in the example
        "Symbol('u0', integer=True)",  # depends on values
        "Symbol('s77', commutative=False)",
        "Symbol('s77', integer=1)",
        "Symbol(s77)",
        'Symbol("s77")',
        "Symbol('s77\\x41')",
        "Function('f')(Integer(1))",
        "Lambda(Symbol('s77'), Symbol('s77'))",
        "Add",
        "Add()",
        "Not(Integer(1), Integer(2))",
        "Where(Integer(1))",
        "true.__class__",
        "lambda: 0",
        "",
        "\x00",
        "Ｓymbol('s77')",
        "Integer(٣)",
    ],
)
def test_everything_else_is_refused_in_one_line(text):
    with pytest.raises(CheckpointError) as caught:
        Symbols(SIZES).read(text)
    assert len(str(caught.value)) <= 400 and str(caught.value).isprintable()


def test_a_symbol_has_one_set_of_assumptions():
    symbols = Symbols(SIZES)
    symbols.read(srepr(S))
    with pytest.raises(CheckpointError, match="one thing here and another there"):
        symbols.read("Add(Symbol('s77', positive=False, integer=True), Integer(1))")


@settings(max_examples=300, deadline=2000)
@given(st.text(alphabet="SymbolIntegrAdPwFv('s70, =True)_.*-9\\", max_size=60))
def test_no_text_does_anything_but_be_read_or_refused(text):
    with contextlib.suppress(CheckpointError):
        Symbols(SIZES).read(text)
