"""Which outputs of a program share memory, with each other or with inputs; and keeping that as it was.

Who writes into a result would change another one, or an input or a weight, where they share memory. So a folded program
shares what the original does and nothing else, though an operation that has gone can have been what copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import getitem
from typing import Any

import torch
from torch.export.graph_signature import ExportGraphSignature, TensorArgument
from torch.fx import Graph, Node

from .nodes import argument
from .operations import CASTS, DROPOUTS, returns_alias

aten = torch.ops.aten


def memory_of(node: Node) -> Node:
    """The value in whose memory a value lies; itself where it has its own."""
    return list(_way(node))[-1]


def shared_by_outputs(graph: Graph) -> dict[Node, list[Node]]:
    """Operations in whose result several outputs lie, and the readers that lead to these outputs."""
    groups: dict[Node, set[Node]] = {}
    for output in output_values(graph):
        groups.setdefault(memory_of(output), set()).add(output)
    readers: dict[Node, list[Node]] = {}
    for memory, outputs in groups.items():
        ways = [list(_way(output)) for output in outputs] if len(outputs) > 1 else []
        readers[memory] = [way[-2] for way in ways if len(way) > 1]
    return {memory: leading for memory, leading in readers.items() if leading}


def output_values(graph: Graph) -> list[Node]:
    """The tensors that a graph returns."""
    return [value for value in graph.output_node().args[0] if isinstance(value, Node)]


def separate_outputs(graph: Graph, signature: ExportGraphSignature, before: list[Node], is_constant: Any) -> None:
    """Copy what outputs share since folding, with each other, with inputs or with constants.

    Args:
        graph: the folded program.
        signature: names its outputs.
        before: in whose memory each output lay, in the original program.
        is_constant: whether a node of either program is a constant.
    """
    owner: dict[Node, Node] = {}
    copies: dict[tuple[Node, Node], dict[Node, Node]] = {}
    output = graph.output_node()
    results, position = list(output.args[0]), -1
    for index, value in enumerate(results):
        if not isinstance(value, Node):
            continue
        position += 1
        was, way = before[position], list(_way(value))
        memory = way[-1]
        if memory.op == "placeholder":
            alike = memory.name == was.name or (is_constant(memory) and is_constant(was))
        else:
            alike = owner.setdefault(memory, was) is was
        if alike:
            continue
        with graph.inserting_before(output):
            moved = copies.setdefault((memory, was), {})
            if memory not in moved:
                moved[memory] = graph.call_function(aten.clone.default, (memory,))
                moved[memory].meta = dict(memory.meta)
            for node in reversed(way[:-1]):
                if node not in moved:
                    moved[node] = graph.node_copy(node, lambda n, moved=moved: moved.get(n, n))
        results[index] = moved[value]
        signature.output_specs[index].arg = TensorArgument(moved[value].name)
    output.args = (type(output.args[0])(results), *output.args[1:])


def _way(node: Node) -> Iterator[Node]:
    """A value, what it is a view of, and so on."""
    current: Node | None = node
    while current is not None:
        yield current
        current = _viewed(current)


def _viewed(node: Node) -> Node | None:
    """The operand in whose memory a result lies."""
    if node.op != "call_function" or not node.args:
        return None
    operand: Any = node.args[0]
    if node.target is getitem or node.target in DROPOUTS:
        return operand
    if node.target in CASTS:
        return operand if _casts_nothing(node) else None
    if not returns_alias(node.target) or not isinstance(operand, Node):
        return None
    return operand if _lies_in(node, operand) else None


def _casts_nothing(node: Node) -> bool:
    before, after = node.args[0].meta["val"], node.meta["val"]
    same = (before.dtype, before.device) == (after.dtype, after.device)
    return same and node.target is not aten._to_copy.default and not argument(node, "copy")


def _lies_in(node: Node, operand: Node) -> bool:
    """Whether an operation that may copy does not, for the layout of its operand."""
    value = operand.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return True
    args, kwargs = (torch.fx.map_arg(part, lambda n: n.meta["val"]) for part in (node.args, node.kwargs))
    with value.fake_mode:
        results = node.target(*args, **kwargs)
    result = results[0] if isinstance(results, list | tuple) else results
    return result.untyped_storage()._cdata == value.untyped_storage()._cdata
