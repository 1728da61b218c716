"""A program that runs changes nothing but what it made itself."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.export import ExportedProgram
from torch.fx import Node


def copy_what_changes(program: ExportedProgram) -> None:
    """Lets in-place operations on weights, buffers and inputs work on copies, in the program itself.

    Needs a program none of whose outputs is one of these itself. The tensors of a traced module are the program's own,
    so that running it would count on in the module's buffers. A copy that no output depends on is taken out again, with
    all that was computed from it.
    """
    graph = program.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for placeholder in _changed(placeholders, list(graph.nodes)):
        users = list(placeholder.users)
        with graph.inserting_after(placeholders[-1]):
            copied = graph.call_function(torch.ops.aten.clone.default, (placeholder,))
        copied.meta = {"val": placeholder.meta["val"]}
        for user in users:
            user.replace_input_with(placeholder, copied)
        _drop_idle(graph, copied)
    program.graph_module.recompile()


def _changed(placeholders: list[Node], nodes: list[Node]) -> list[Node]:
    """The placeholders that an operation writes to, itself or through views of them."""
    shares = {node: {node} for node in placeholders}
    changed: dict[Node, None] = {}
    for node in nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        for operand, alias in _aliases(node):
            roots = shares.get(operand, set())
            shares.setdefault(node, set()).update(roots)
            if alias.is_write:
                changed.update(dict.fromkeys(root for root in placeholders if root in roots))
    return list(changed)


def _aliases(node: Node) -> Iterator[tuple[Node, torch._C._AliasInfo]]:
    """The operands that a result may be a view of, or that are written to."""
    for place, argument in enumerate(node.target._schema.arguments):
        value = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
        for operand in value if isinstance(value, (list, tuple)) else (value,):
            if argument.alias_info is not None and isinstance(operand, Node):
                yield operand, argument.alias_info


def _drop_idle(graph: torch.fx.Graph, copied: Node) -> None:
    reached, ahead = {copied: None}, [copied]
    while ahead:
        for user in ahead.pop().users:
            if user.op == "output":
                return
            if user not in reached:
                reached[user] = None
                ahead.append(user)
    if any(_writes_outside(node, reached) for node in reached):
        return
    for node in reversed([node for node in graph.nodes if node in reached]):
        graph.erase_node(node)


def _writes_outside(node: Node, inside: dict[Node, None]) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and any(
        alias.is_write and operand not in inside for operand, alias in _aliases(node)
    )
