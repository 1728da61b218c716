"""Typed access to what an fx node holds."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch.fx import Node

# What schemas call numbers that may have a fraction.
_NUMBERS = ("number", "Optional[number]", "float", "Optional[float]")


def argument(node: Node, name: str, default: Any = None) -> Any:
    """An argument of an ATen operation by its schema's name, given by position, by keyword or not at all."""
    schema = node.target._schema.arguments
    for position, entry in enumerate(schema):
        if entry.name == name:
            if position < len(node.args):
                return node.args[position]
            if name in node.kwargs:
                return node.kwargs[name]
            return entry.default_value if entry.has_default_value() else default
    return default


def computes_number(node: Node) -> bool:
    """Whether an argument that is a number of any kind, and no size, is computed when the program runs."""
    return isinstance(node.target, torch._ops.OpOverload) and any(
        str(entry.type) in _NUMBERS and isinstance(argument(node, entry.name), Node)
        for entry in node.target._schema.arguments
    )


def is_float(node: object) -> TypeGuard[Node]:
    """Whether a node is a floating-point tensor."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def tensors_of(node: Node) -> list[torch.Tensor]:
    """What a node holds: one tensor, several, or none."""
    value = node.meta.get("val")
    parts = value if isinstance(value, list | tuple) else [value]
    return list(parts) if all(isinstance(part, torch.Tensor) for part in parts) else []


def coarseness(node: Node) -> float:
    """The distance from one to the next number in the coarsest floating-point dtype of what a node holds."""
    return max((torch.finfo(part.dtype).eps for part in tensors_of(node) if part.is_floating_point()), default=0.0)


def module_of(node: Node) -> tuple[str, str]:
    """Path and class name of the innermost module that an operation belongs to."""
    stack = node.meta.get("nn_module_stack") or {}
    entries = [entry for entry in stack.values() if not entry[0].startswith("_empty_nn_module_stack")]
    if not entries:
        return "", ""
    path, cls = entries[-1]
    return path, (cls if isinstance(cls, str) else cls.__name__).rpartition(".")[2]


#: Where a node's ``meta`` holds what its operation is called in the file that the program was read from.
CALLED = "called"


def operation_name(node: Node) -> str:
    """What an operation is called, without its overload."""
    return str(getattr(node.target, "_opname", None) or getattr(node.target, "__name__", node.target))
