"""How large the values inside a program become, for types whose exponents end early."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree

from normfuse.checkpoint import ExportableModel
from normfuse.checkpoint.archive import some_of
from normfuse.folding import FoldReport

# Largest ratio between the scales of one channel in different places, see normfuse.fold; in float16 half of the bits of
# exponent are left to the values themselves. Where values of the example inputs need more, the next range is tried.
SCALE_RANGES = {"float32": (2.0**40,), "float16": (2.0**10, 2.0**5, 2.0**2)}
LARGEST = {"float16": float(np.finfo(np.float16).max)}

Folded = tuple[ExportedProgram, FoldReport]


class RangeError(ValueError):
    """Folded, a value leaves the type of the file. One line: which, how large it is, and was before."""


@dataclass(frozen=True)
class Growth:
    """The largest values inside the model and inside the folded program, on the example inputs.

    Only operations are counted whose results fit the type in the model itself: what does not, such as what a mask adds,
    is beyond it with and without folding.

    Attributes:
        largest: of the folded program, by absolute value.
        at: the operation that gives it: the path of its module, and its name.
        original: the largest one in the model.
        limit: the largest number of the type.
        beyond: the operations whose results go beyond the limit in the folded program only, with both sizes.
        already: the operations whose results go beyond it in the model.
    """

    largest: float
    at: str
    original: float
    limit: float
    beyond: tuple[str, ...] = ()
    already: tuple[str, ...] = ()


def largest_values(program: ExportedProgram, model: ExportableModel) -> dict[str, tuple[str, float]]:
    """What every operation gives on the example inputs: its name to its description and largest finite entry."""
    watch = _Watch(program.module())
    with torch.no_grad():
        watch.run(*model.example_inputs, enable_io_processing=False)
    return watch.largest


def growth(folded: ExportedProgram, own: dict[str, tuple[str, float]], model: ExportableModel, limit: float) -> Growth:
    """Compare a folded program with what :func:`largest_values` says of the program it came from."""
    already = tuple(f"{what} ({size:.3g})" for what, size in own.values() if size > limit)
    masks = [size for _, size in own.values() if size > limit]
    values = {
        name: entry
        for name, entry in largest_values(folded, model).items()
        if not any(math.isclose(entry[1], size, rel_tol=1e-3) for size in masks)  # folding may give it another name
        and not own.get(name, ("", 0.0))[1] > limit
    }
    at, largest = max(values.values(), key=lambda entry: entry[1], default=("", 0.0))
    original = max((size for _, size in own.values() if not size > limit), default=0.0)
    beyond = tuple(
        f"{what} ({size:.3g}" + (f", {own[name][1]:.3g} in the model)" if name in own else ")")
        for name, (what, size) in values.items()
        if size > limit
    )
    return Growth(largest, at, original, limit, beyond, already)


def fold_in_range(
    fold: Callable[[float], Folded],
    own: dict[str, tuple[str, float]] | None,
    model: ExportableModel,
    dtype: str,
    at_most: float = math.inf,
) -> tuple[Folded, float, Growth | None, str]:
    """Fold with the widest range of scales with which no value leaves the type on the example inputs.

    Args:
        fold: folds with a given bound on the range of scales.
        own: the model's own largest values; None for a type whose exponents are float32's.
        model: has the example inputs.
        dtype: of the file.
        at_most: a bound on the range that the caller asks for.

    Returns:
        What `fold` gave, the range, the growth of values, and what was decided in words, if it was not the usual.

    Raises:
        RangeError: values leave the type with every range.
    """
    first: Growth | None = None
    for scale_range in dict.fromkeys(min(bound, at_most) for bound in SCALE_RANGES[dtype]):
        folded = fold(scale_range)
        if own is None:
            return folded, scale_range, None, ""
        grown = growth(folded[0], own, model, LARGEST[dtype])
        if not grown.beyond:
            if first is None:
                return folded, scale_range, grown, ""
            span = f"{dtype}: the scales of a channel span {scale_range:g} at most"
            return folded, scale_range, grown, f"{span}; with more, values exceed {dtype}: {some_of(first.beyond)}"
        first = first or grown
    raise RangeError(
        f"{dtype} holds numbers up to {grown.limit:.0f}; after folding, {len(grown.beyond)} value(s) exceed it on the "
        f"example inputs, but not in the model: {some_of(grown.beyond)}; export float32"
    )


class _Watch(Interpreter):
    """Runs a graph and notes how large each result is."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self.largest: dict[str, tuple[str, float]] = {}

    def run_node(self, node: Node) -> Any:
        result = super().run_node(node)
        if node.op == "call_function":
            sizes = [
                float(leaf[leaf.isfinite()].abs().max()) if leaf.isfinite().any() else 0.0
                for leaf in pytree.tree_leaves(result)
                if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
            ]
            if sizes:
                self.largest[node.name] = (_describe(node), max(sizes))
        return result


def _describe(node: Node) -> str:
    name = str(getattr(node.target, "_opname", None) or getattr(node.target, "__name__", node.target))
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = stack[-1][0] if stack else ""
    return f"{name} in {path}" if path and not path.startswith("_empty_nn_module_stack") else name
