"""Operands that ONNX Runtime does not broadcast where ONNX, or who wrote the graph, does."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from normfuse.onnx.graph_passes.editing import dtype_of, operand


def expand_attention_masks(model: ir.Model) -> int:
    """Spell out masks that broadcast over the queries, and say how many there were.

    ONNX lets the mask of ``Attention`` broadcast to [batch, heads, queries, keys]; ONNX Runtime's CPU kernel takes one
    entry where batch or heads are meant, but wants as many rows as there are queries. A padding mask
    [batch, 1, 1, keys] therefore becomes [batch, 1, queries, keys].
    """
    count = 0
    for node in list(model.graph):
        mask = node.inputs[3] if node.op_type == "Attention" and len(node.inputs) > 3 else None
        if mask is None or mask.shape is None or len(mask.shape) < 2 or mask.shape[-2] != 1:
            continue
        query = operand(node, 0)
        rank = len(mask.shape)
        rows = ir.node("Shape", [query], {"start": 2, "end": 3})
        target = ir.node("Concat", [_ones(model, rank - 2), rows.outputs[0], _ones(model, 1)], {"axis": 0})
        expanded = _expand(model, mask, rows, target, f"{node.name}_mask", before=node)
        queries = None if query.shape is None else query.shape[2]
        expanded.shape = ir.Shape([*mask.shape[:-2], queries, mask.shape[-1]])
        node.replace_input_with(3, expanded)
        count += 1
    return count


def expand_rotary_caches(model: ir.Model) -> int:
    """Give cosines and sines of rotations a row for each element of the batch, and say how many there were.

    Without position numbers the caches of ``RotaryEmbedding`` are [batch, sequence, half a head]. torch.onnx fuses
    rotations into it whose caches have one row for the whole batch, which ONNX Runtime refuses.
    """
    expanded: dict[ir.Value, ir.Value] = {}
    for node in list(model.graph):
        if node.op_type != "RotaryEmbedding" or (len(node.inputs) > 3 and node.inputs[3] is not None):
            continue
        x = operand(node, 0)
        for place in (1, 2):
            cache = operand(node, place)
            if cache.shape is not None and x.shape is not None and cache.shape[0] == x.shape[0]:
                continue
            if cache not in expanded:
                batch = ir.node("Shape", [x], {"start": 0, "end": 1})
                target = ir.node("Concat", [batch.outputs[0], _ones(model, 2)], {"axis": 0})
                expanded[cache] = _expand(model, cache, batch, target, str(cache.name), before=node)
            node.replace_input_with(place, expanded[cache])
    return len(expanded)


def _expand(
    model: ir.Model, value: ir.Value, size: ir.Node, target: ir.Node, label: str, *, before: ir.Node
) -> ir.Value:
    """The value, expanded to what `target` makes of `size`; all three nodes are put in the graph."""
    expand = ir.node("Expand", [value, target.outputs[0]])
    for new, name in zip((size, target, expand), ("size", "shape", "expanded"), strict=True):
        new.outputs[0].name = f"{label}_{name}"
        new.name = f"{label}_{name}_node"
    size.outputs[0].dtype = target.outputs[0].dtype = ir.DataType.INT64
    expand.outputs[0].dtype = value.dtype or dtype_of(operand(before, 0))  # torch.onnx leaves that of caches out
    model.graph.insert_before(before, [size, target, expand])
    return expand.outputs[0]


def _ones(model: ir.Model, count: int) -> ir.Value:
    """An initializer of `count` ones, one for all."""
    name = f"ones_{count}"
    if name not in model.graph.initializers:
        tensor = ir.tensor(np.ones(count, np.int64), name=name)
        value = ir.Value(name=name, shape=ir.Shape([count]), type=ir.TensorType(ir.DataType.INT64), const_value=tensor)
        model.graph.register_initializer(value)
    return model.graph.initializers[name]
