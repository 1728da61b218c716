"""The table of translations, and the operands that they take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

OPERATIONS: dict[str, Callable[..., Any]] = {}


class Untranslated(ValueError):
    """An operation, or a form of it, that the importer does not know; one line."""


def operation(*kinds: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers what operations mean; those that are not ONNX's own are named with their domain.

    A function gives one result, or a tuple of as many as the operation may have, None for those it does not know.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        OPERATIONS.update(dict.fromkeys(kinds, function))
        return function

    return register


def is_sizes(value: object) -> bool:
    return not isinstance(value, Tensor)


def tensor(value: Any) -> Tensor:
    """An operand where a tensor is needed."""
    if isinstance(value, Tensor):
        return value
    if any(isinstance(size, torch.SymInt) for size in (value if isinstance(value, list) else [value])):
        parts = [torch.full((), size, dtype=torch.int64) for size in sizes(value)]
        return torch.stack(parts) if isinstance(value, list) else parts[0]
    return torch.tensor(value)


def sizes(value: Any) -> list[int]:
    """An operand where a list of sizes or axes is needed."""
    if isinstance(value, Tensor):
        raise Untranslated("a shape or an axis is computed from data")
    return value if isinstance(value, list) else [value]


def is_scalar(value: object) -> bool:
    """Whether PyTorch's arithmetic takes an operand as it is."""
    return isinstance(value, Tensor | int | float)


def axes_of(node: ir.Node, operand: Any) -> list[int] | None:
    """Axes from the operand, or from the attribute that older operator sets have."""
    if operand is not None:
        return sizes(operand)
    given = node.attributes.get_ints("axes", None)
    return None if given is None else list(given)
