"""What tracing found out about dynamic dimensions: which are bounded, fixed, equal, or follow from others."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import sympy

from normfuse.checkpoint.archive import CheckpointError
from normfuse.checkpoint.inputs import Axis, Derived, Dimension, InputSpec
from normfuse.checkpoint.inputs import dimensions as dimensions_of
from normfuse.checkpoint.loops import loop_over
from normfuse.checkpoint.tracing import Traced, linear, user_sizes


def found(
    traced: Traced, asked: Sequence[InputSpec], unnamed: Collection[str]
) -> tuple[tuple[InputSpec, ...], list[str]]:
    """The dimensions of a program's inputs.

    Args:
        traced: the program.
        asked: the dimensions that were to be dynamic.
        unnamed: names among them that nobody gave.

    Returns:
        The inputs as they are, and in words what differs from what was asked: ``seq <= 64``.

    Raises:
        CheckpointError: a size follows from others in a way that is no sum.
    """
    sizes = user_sizes(traced.program)
    axes = [(spec, axis, dim, size) for spec, row in zip(asked, sizes, strict=True)
            for axis, (dim, size) in enumerate(zip(spec.dims, row, strict=True))]  # fmt: skip
    symbols = _name_symbols(traced, asked, axes, unnamed)
    notes: list[str] = []
    dims = [_axis(traced, spec, axis, dim, size, symbols, unnamed, notes) for spec, axis, dim, size in axes]
    wanted = dimensions_of(asked)
    for dim in symbols.values():
        before = wanted.get(dim.name, Dimension(dim.name))
        if dim.maximum != before.maximum:
            notes.append(f"{dim.name} <= {dim.maximum}: the model takes no more")
        if dim.minimum != before.minimum:
            notes.append(f"{dim.name} >= {dim.minimum}: the model takes no less")
    rows = iter(dims)
    specs = tuple(replace(spec, dims=tuple(next(rows) for _ in spec.dims)) for spec in asked)
    return specs, list(dict.fromkeys(notes))


def _name_symbols(
    traced: Traced,
    asked: Sequence[InputSpec],
    axes: Sequence[tuple[InputSpec, int, Axis, Any]],
    unnamed: Collection[str],
) -> dict[sympy.Symbol, Dimension]:
    """A dimension for every symbol that is the size of an axis: the first name that somebody gave, with its bounds."""
    wanted = dimensions_of(asked)
    symbols: dict[sympy.Symbol, Dimension] = {}
    for given in (True, False):
        for _, _, dim, size in axes:
            if not (isinstance(dim, Dimension) and isinstance(size, sympy.Symbol)) or size in symbols:
                continue
            if (dim.name not in unnamed) is given:
                asked_for = wanted[dim.name]
                low, high = traced.bounds.get(size, (0, None))
                highs = [bound for bound in (high, asked_for.maximum) if bound is not None]
                symbols[size] = Dimension(dim.name, max(low, asked_for.minimum), min(highs, default=None))
    return symbols


def _axis(
    traced: Traced,
    spec: InputSpec,
    axis: int,
    dim: Axis,
    size: Any,
    symbols: dict[sympy.Symbol, Dimension],
    unnamed: Collection[str],
    notes: list[str],
) -> Axis:
    if isinstance(dim, int):
        return dim
    if isinstance(size, int) or size.is_Integer:
        label = f"axis {axis} of {spec.name}" if isinstance(dim, Derived) or dim.name in unnamed else dim.name
        loop = loop_over(traced.program, int(size))
        why = f"the model runs step by step along it ({loop})" if loop else "the model takes no other size"
        notes.append(f"{label} is fixed at {int(size)}: {why}")
        return int(size)
    affine = linear(size)
    if affine is None or not all(symbol in symbols for symbol, _ in affine[0]):
        if isinstance(dim, Derived):
            return dim  # of a dimension that is the size of no axis, such as 32 * height
        raise CheckpointError(
            f"axis {axis} of {spec.name!r} can only be {size} (in torch.export's symbols), which is not a sum of other "
            "dimensions: make it fixed"
        )
    terms = tuple((symbols[symbol], factor) for symbol, factor in affine[0])
    if affine[1] == 0 and len(terms) == 1 and terms[0][1] == 1:
        known: Axis = terms[0][0]
        label = terms[0][0].name
        follows = isinstance(dim, Dimension) and dim.name not in (label, *unnamed)
    else:
        known = Derived(terms, affine[1])
        follows = isinstance(dim, Dimension) and dim.name not in unnamed
        label = str(known)
    if follows and isinstance(dim, Dimension):
        notes.append(f"{dim.name} is always {label}")
    return known
