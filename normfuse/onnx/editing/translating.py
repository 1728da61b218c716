"""Which operations of ONNX have a rule in folding; all others are opaque to it."""

from __future__ import annotations

from collections.abc import Callable

from .calls import Call, NotATensor

_TABLE: dict[tuple[str | None, str], Callable[[Call], bool]] = {}
# What is translated completely, so that the value of a result may be computed where all operands are constants.
_EXACT = frozenset(
    "Abs Add Cast Concat Div Dropout Expand Flatten Identity Mul Neg Relu Reshape Squeeze Sub Transpose "
    "Unsqueeze".split()
)


_ABOUT_SIZES = ("Shape", "Size")


def translate(call: Call) -> bool:
    """Put an operation into the program as one that folding knows; False if there is none."""
    if call.front is not None:
        return call.emit_pair()
    translation = _TABLE.get((call.domain, call.node.op_type))
    first = next((number for number, name in enumerate(call.node.output) if name), None)
    if translation is None or first is None:
        return False
    try:
        if call.node.op_type in _ABOUT_SIZES:
            return translation(call)
        known = call.result(first).is_floating_point() and call.is_tensor(0)
        return known and (call.node.op_type in _EXACT or not call.is_fixed()) and translation(call)
    except NotATensor:
        return False


def operation(*kinds: str, domain: str = "") -> Callable:
    """Registers a translation of these operations."""

    def register(function: Callable[[Call], bool]) -> Callable[[Call], bool]:
        _TABLE.update(dict.fromkeys([(domain, kind) for kind in kinds], function))
        return function

    return register


def rank_of(call: Call, operand: int) -> int | None:
    """The number of an operand's axes, if it is known."""
    return len(call.shape(operand)) if call.is_tensor(operand) else None


def axis_of(call: Call, default: int) -> int:
    """The attribute ``axis``, counted from 0."""
    return call.get("axis", default) % len(call.shape(0))


def axes_of(call: Call, place: int = 1) -> list[int] | None:
    """Axes from the attribute of older operator sets, or from an operand that is constant."""
    axes = call.get("axes")
    if axes is None and call.operand(place) is not None:
        number = call.number(place)
        axes = None if number is None else number.ravel().tolist()
    return None if axes is None else [int(axis) for axis in axes]
