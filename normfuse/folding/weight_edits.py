"""What rewriting writes: new weights, biases and factors, put into the program's graph."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch.fx import Node

from .arrays import GroupMeans, collapse_equal, keep_axis, without_leading_ones
from .gauge import Gauge
from .program import largest_entry, piece

aten = torch.ops.aten

_FLOAT16 = torch.finfo(torch.float16)
# Notes in the program, by which another fold leaves what this one has left.
REFUSED = "normfuse_refused_range"  # of maps that stay for the range of scales: which was allowed
WRITTEN_OUT = "normfuse_written_out"  # of shifts that stand as an Add


class WeightEdits:
    """The changes that one fold makes to a program.

    Attributes:
        absorbed: names of the weights that changed, by the operation that reads them.
        weight_growth: largest factor by which the biggest entry of any weight grew.
        replacements: nodes that go once every rule has read the graph as it was, and what their readers read instead.
        biases: operations that an Add follows, and what it adds.
    """

    def __init__(self, gauge: Gauge) -> None:
        self.gauge = gauge
        self.program = gauge.program
        self.absorbed: dict[Node, list[str]] = {}
        self.weight_growth = 1.0
        self.replacements: list[tuple[Node, Node]] = []
        self.biases: list[tuple[Node, Node]] = []

    def vector(self, numbers: np.ndarray, axis: int, size: int) -> torch.Tensor:
        """Numbers along one axis as a float64 vector."""
        return torch.from_numpy(np.array(keep_axis(numbers, axis, size, collapse_equal)))

    def scale_weight(
        self,
        node: Node,
        weight: Node,
        *factors: torch.Tensor,
        minus: torch.Tensor | None = None,
        centre: np.ndarray | None = None,
    ) -> None:
        """Let an operation read ``(weight - minus) * factors`` less its means, stored in the weight's dtype.

        Factors, `minus` and the groups of which `centre` subtracts the mean (see :func:`subtract_means`) are laid
        against the weight: on each axis of its size or of size one.
        """

        def blocks() -> Iterator[tuple[slice, float, torch.Tensor]]:
            for rows, block in self.program.blocks(weight):
                new = block - piece(minus, rows) if minus is not None else block.clone()
                for factor in factors:
                    new.mul_(piece(factor, rows))
                yield rows, largest_entry(block), new

        old_largest, new_largest = 0.0, 0.0
        stored = torch.empty(weight.meta["val"].shape, dtype=weight.meta["val"].dtype)
        means = None
        if centre is not None:  # where groups span blocks, all of them are seen before the first is written
            means = GroupMeans(centre)
            for rows, _, new in blocks() if means.across_rows else ():
                means.add(new, rows)
        for rows, largest, new in blocks():
            if means is not None:
                means.subtract(new, rows)
            stored[rows] = new
            old_largest, new_largest = max(old_largest, largest), max(new_largest, largest_entry(new))
        self.exchange(node, weight, stored)
        if old_largest > 0:
            self.weight_growth = max(self.weight_growth, new_largest / old_largest)

    def exchange(self, node: Node, constant: Node, value: torch.Tensor) -> None:
        """Let an operation read another value in the place of a constant."""
        name = self.program.name(constant)
        node.replace_input_with(constant, self.program.add_parameter(name, value, constant))
        self.absorbed.setdefault(node, []).append(name)

    def create_weight(self, node: Node, argument: str, value: torch.Tensor) -> None:
        """Give an operation a weight it did not have, in the dtype of its input."""
        name = f"{self.gauge.path(node)}.{argument}"
        self.set_argument(node, argument, self.program.add_parameter(name, value, node.args[0]))
        self.absorbed.setdefault(node, []).append(name)

    def set_bias(
        self, node: Node, argument: str, bias: Node | None, value: torch.Tensor, *, name: str, like: Node
    ) -> None:
        """Let an operation read `value` for its bias: created where there was none, dropped where it is zero."""
        optional = any(e.name == argument and "Optional" in str(e.type) for e in node.target._schema.arguments)
        if optional and not value.any():
            if bias is not None:
                self.set_argument(node, argument, None)
            return
        name = self.program.name(bias) if bias is not None else name
        self.set_argument(node, argument, self.program.add_parameter(name, value, bias or like))
        self.absorbed.setdefault(node, []).append(name)

    def append_add(self, node: Node, value: np.ndarray, *, name: str, like: Node) -> None:
        """Follow an operation that has no bias of its own by an Add."""
        self.biases.append((node, self.program.add_parameter(name, torch.from_numpy(np.array(value)), like)))
        self.absorbed.setdefault(node, []).append(name)

    def multiply(self, operand: Node, *factors: np.ndarray, before: Node) -> Node:
        """``operand`` times all factors, or the operand itself where they make one.

        One constant holds their product, unless it leaves float16 and they do not: a program in float32 may be written
        in float16 later on.
        """
        product = np.asarray(math.prod(factors))
        if (product == 1).all():
            return operand
        together = _fits_float16(product) or not all(map(_fits_float16, factors))
        for factor in [product] if together else factors:
            operand = self.apply(aten.mul.Tensor, operand, factor, name="scale", before=before)
            if before in self.gauge.solution.refused_range:
                note(operand, REFUSED, self.gauge.solution.refused_range[before])
        return operand

    def apply(self, target: object, operand: Node, numbers: np.ndarray, *more: int, name: str, before: Node) -> Node:
        """An operation with the operand, constant numbers and further arguments."""
        constant = self._constant(f"{self.gauge.path(before)}.{name}", numbers, operand)
        return self.program.insert(before, target, (operand, constant, *more), before)

    def add(self, operand: Node, shift: np.ndarray, *, before: Node | None = None, after: Node | None = None) -> Node:
        """``operand + shift``, or the operand itself for a shift of zero."""
        if not shift.any():
            return operand
        place = after.next if after is not None else before
        constant = self._constant(f"{self.gauge.path(after or before)}.shift", shift, operand)
        return self.program.insert(place, aten.add.Tensor, (operand, constant), after or before)

    def replace(self, node: Node, by: Node) -> None:
        """Replace a node once every rule has read the graph as it was."""
        self.replacements.append((node, by))

    def _constant(self, name: str, value: np.ndarray, like: Node) -> Node:
        return self.program.add_parameter(name, torch.from_numpy(np.array(without_leading_ones(value))), like)

    def set_argument(self, node: Node, name: str, value: Node | None) -> None:
        """Replace an argument of an ATen operation, given by its schema's name."""
        entries = node.target._schema.arguments
        position = [entry.name for entry in entries].index(name)
        if name in node.kwargs:
            node.kwargs = {**node.kwargs, name: value}
            return
        args = list(node.args)
        args += [entry.default_value for entry in entries[len(args) : position + 1]]
        args[position] = value
        node.args = tuple(args)


def note(node: Node, name: str, value: float) -> None:
    """Leave a note at an operation."""
    node.meta["custom"] = {**node.meta.get("custom", {}), name: value}


def noted(node: Node, name: str) -> float:
    """What an earlier fold has noted at an operation; 0 if nothing."""
    return node.meta.get("custom", {}).get(name, 0.0)


def _fits_float16(numbers: np.ndarray) -> bool:
    """Whether float16 holds all of them with all its digits, or as zero."""
    sizes = np.abs(numbers[numbers != 0])
    return bool((sizes <= _FLOAT16.max).all() and (sizes >= _FLOAT16.tiny).all())
