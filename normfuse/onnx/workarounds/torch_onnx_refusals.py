"""Programs as torch.onnx can translate them: in a copy of the graph, what it refuses is spelled otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, Node

from normfuse.folding.exported import copy_graph

aten = torch.ops.aten


@contextmanager
def translatable(program: ExportedProgram) -> Iterator[None]:
    """Meanwhile the program has a graph of its own for torch.onnx; afterwards it has the one it had."""
    module, own = program.graph_module, program.graph
    graph = module.graph = copy_graph(own)
    try:
        _make_contiguous(graph)
        _add_heads(graph)
        _promote_subtractions(graph)
        graph.lint()
        module.recompile()
        yield
    finally:
        module.graph = own


def _make_contiguous(graph: Graph) -> None:
    """What is reshaped is made contiguous first.

    torch.onnx decides whether a reshape is a view from strides, when it decomposes the program, and refuses the view
    when strides differ the second time it looks; attention with a mask has such results. ONNX has no strides: nothing
    of this is left in the file.
    """
    for node in graph.find_nodes(op="call_function", target=aten.reshape.default):
        operand = node.args[0]
        value = operand.meta["val"].clone(memory_format=torch.contiguous_format)
        with graph.inserting_before(node):
            copy = graph.call_function(aten.clone.default, (operand,), {"memory_format": torch.contiguous_format})
        copy.meta = {**operand.meta, "val": value}
        node.replace_input_with(operand, copy)


def _add_heads(graph: Graph) -> None:
    """Attention of [batch, queries, width] or [queries, width] has one head: torch.onnx translates four axes only."""
    for node in graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
        value = node.meta["val"]
        if value.dim() not in (2, 3):
            continue
        axes = [1] if value.dim() == 3 else [0, 1]
        with graph.inserting_before(node):
            # A mask of fewer axes broadcasts as it is.
            same = [x is not None and x.meta["val"].dim() == value.dim() for x in node.args[:4]]
            operands = [_unsqueezed(graph, x, axes) if add else x for x, add in zip(node.args, same, strict=False)]
            node.args = (*operands, *node.args[4:])
        with graph.inserting_after(node):
            result = graph.call_function(aten.squeeze.dims, (node, axes))
        node.replace_all_uses_with(result, delete_user_cb=lambda user, result=result: user is not result)
        result.meta = dict(node.meta)
        for axis in axes:
            value = value.unsqueeze(axis)
        node.meta = {**node.meta, "val": value}


def _promote_subtractions(graph: Graph) -> None:
    """``number - alpha * x`` is computed in the result's dtype, by operations that torch.onnx can take apart.

    It turns the operation round without looking at dtypes, refuses ``1.0 - x`` of integers and any alpha but 1.
    """
    for node in graph.find_nodes(op="call_function", target=aten.rsub.Scalar):
        x, number, alpha = (*node.args, 1)[:3]
        result = node.meta["val"]
        with graph.inserting_before(node):
            if x.meta["val"].dtype != result.dtype:
                x = graph.call_function(aten.to.dtype, (x, result.dtype))
                x.meta = dict(node.meta)
            if alpha != 1:
                x = graph.call_function(aten.mul.Tensor, (x, alpha))
                x.meta = dict(node.meta)
        node.args = (x, number)


def _unsqueezed(graph: Graph, operand: Node, axes: list[int]) -> Node:
    for axis in axes:
        value = operand.meta["val"].unsqueeze(axis)
        operand = graph.call_function(aten.unsqueeze.default, (operand, axis))
        operand.meta = {"val": value}
    return operand
