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
        _ungroup_heads(graph)
        _give_four_axes(graph)
        _promote_subtractions(graph)
        for node in graph.find_nodes(op="call_function", target=aten._is_all_true.default):  # of masks in transformers
            node.target = aten.all.default
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


def _ungroup_heads(graph: Graph) -> None:
    """Queries with as many heads as keys are in no groups: torch.onnx takes the option for fewer heads of keys only."""
    for node in graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
        query, key = (x.meta["val"] for x in node.args[:2])
        if node.kwargs.get("enable_gqa") and query.shape[-3] == key.shape[-3]:
            node.kwargs = {name: value for name, value in node.kwargs.items() if name != "enable_gqa"}


def _give_four_axes(graph: Graph) -> None:
    """Attention has operands of four axes and of one batch, as torch.onnx and ONNX Runtime want them.

    [batch, queries, width] and [queries, width] have one head; what stands before the last three axes is one batch.
    """
    for node in graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
        *operands, mask = (*node.args, None)[:4]
        rank = node.meta["val"].dim()
        heads = {2: [0, 1], 3: [1]}.get(rank, [])
        if rank == 4 and len({(x.meta["val"].dim(), _is_one(x.meta["val"].shape[0])) for x in operands}) == 1:
            continue
        with graph.inserting_before(node):
            operands = [_unsqueezed(graph, x, [0] * (rank - x.meta["val"].dim()) + heads) for x in operands]
            batch = _batch_sizes(graph, operands)
            operands = [_as_one_batch(graph, x, batch) for x in operands]
            axes = 0 if mask is None else mask.meta["val"].dim()  # one of fewer axes broadcasts as it is
            if axes > 4 or 3 < axes < rank:
                mask = _as_one_batch(graph, _unsqueezed(graph, mask, [0] * (rank - axes)), batch)
            elif axes == rank:
                mask = _unsqueezed(graph, mask, heads)
        with graph.inserting_after(node):
            restored = (aten.squeeze.dims, (node, heads)) if heads else (aten.unflatten.int, (node, 0, batch))
            result = graph.call_function(*restored)
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result, delete_user_cb=lambda user, result=result: user is not result)
        node.args = (*operands, *([mask] if len(node.args) > 3 else []), *node.args[4:])


def _is_one(size: int | torch.SymInt) -> bool:
    return isinstance(size, int) and size == 1


def _batch_sizes(graph: Graph, operands: list[Node]) -> list[int | Node]:
    """Sizes of all axes but the last three that operands of as many axes broadcast to."""
    sizes: list[int | Node] = []
    for axis in range(operands[0].meta["val"].dim() - 3):
        given = ((x, x.meta["val"].shape[axis]) for x in operands)
        x, size = next(((x, size) for x, size in given if not _is_one(size)), (operands[0], 1))
        sizes.append(size if isinstance(size, int) else graph.call_function(aten.sym_size.int, (x, axis)))
    return sizes


def _as_one_batch(graph: Graph, x: Node, batch: list[int | Node]) -> Node:
    """[*sizes, a, b, c] as [product of the batch's sizes, a, b, c]."""
    shape = x.meta["val"].shape
    if any(_is_one(own) and not _is_one(wanted) for own, wanted in zip(shape, batch, strict=False)):
        x = graph.call_function(aten.expand.default, (x, [*batch, -1, -1, -1]))
    if len(batch) > 1:
        x = graph.call_function(aten.clone.default, (x,), {"memory_format": torch.contiguous_format})
        x = graph.call_function(aten.flatten.using_ints, (x, 0, -4))
    return x


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
