"""Attention masks in the form that ONNX Runtime takes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


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
        query = node.inputs[0]
        rank = len(mask.shape)
        rows = ir.node("Shape", [query], {"start": 2, "end": 3})
        target = ir.node("Concat", [_ones(model, rank - 2), rows.outputs[0], _ones(model, 1)], {"axis": 0})
        expanded = ir.node("Expand", [mask, target.outputs[0]])
        names = ("mask_rows", "mask_shape", "expanded_mask")
        for new, name in zip((rows, target, expanded), names, strict=True):
            new.outputs[0].name = f"{node.name}_{name}"
            new.name = f"{node.name}_{name}_node"
        rows.outputs[0].dtype = target.outputs[0].dtype = ir.DataType.INT64
        expanded.outputs[0].dtype = mask.dtype
        expanded.outputs[0].shape = ir.Shape([*mask.shape[:-2], query.shape[2], mask.shape[-1]])
        model.graph.insert_before(node, [rows, target, expanded])
        node.replace_input_with(3, expanded.outputs[0])
        count += 1
    return count


def _ones(model: ir.Model, count: int) -> ir.Value:
    """An initializer of `count` ones, one for all masks."""
    name = f"ones_{count}"
    if name not in model.graph.initializers:
        tensor = ir.tensor(np.ones(count, np.int64), name=name)
        value = ir.Value(name=name, shape=ir.Shape([count]), type=ir.TensorType(ir.DataType.INT64), const_value=tensor)
        model.graph.register_initializer(value)
    return model.graph.initializers[name]
