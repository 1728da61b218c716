"""Masks of attention that hide a whole row, such as an empty request in a batch, as PyTorch reads them.

A row whose entries are all -inf, or all False, has no weights: the result is zero. A row whose entries are all the
lowest finite number is a row of equal numbers: the result is the mean.
"""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import torch

from normfuse.onnx.graph_passes.editing import Editor, constant, dtype_of, producer

_ATTENTION_SINCE = 23  # the operator set that Attention came with; before, torch.onnx writes Softmax and products
_MASKED = re.compile(r"scaled_dot_product_attention\.default\]\(args = \((?:%\w+, ){3}%|attn_mask: %")
_FLOATS = {ir.DataType.FLOAT: torch.float32, ir.DataType.FLOAT16: torch.float16, ir.DataType.DOUBLE: torch.float64}
_FX_NODE = "pkg.torch.onnx.fx_node"  # where torch.onnx notes what a node was translated from


def mask_as_torch(model: ir.Model, half: bool = False) -> int:
    """Mend what is masked otherwise in ONNX Runtime, or as torch.onnx writes it; says at how many places.

    Args:
        model: is changed in place.
        half: whether it is to be converted to float16.
    """
    editor = Editor(model, "masked")
    if model.opset_imports.get("", 0) >= _ATTENTION_SINCE:
        return _raise_lowest(model, editor, half)
    nodes = [node for node in model.graph if node.op_type == "Softmax" and _is_masked_attention(node)]
    return sum(_empty_rows(node, editor) for node in nodes)


def _raise_lowest(model: ir.Model, editor: Editor, half: bool) -> int:
    """Half the lowest finite number in the place of the lowest.

    ONNX Runtime's ``Attention`` takes the lowest for -inf. Both hide what stands beside anything higher, and next to
    both the products of queries and keys vanish.
    """
    raised: dict[ir.Value, ir.Value] = {}
    count = 0
    for node in list(model.graph):
        mask = node.inputs[3] if node.op_type == "Attention" and len(node.inputs) > 3 else None
        if mask is None or mask.dtype not in _FLOATS:
            continue
        if mask not in raised:
            raised[mask] = _raised(mask, node, editor, torch.float16 if half else _FLOATS[mask.dtype])
        node.replace_input_with(3, raised[mask])
        count += raised[mask] is not mask
    return count


def _raised(mask: ir.Value, before: ir.Node, editor: Editor, dtype: torch.dtype) -> ir.Value:
    lowest = torch.finfo(dtype).min
    tensor = None if mask.is_graph_input() else ir.convenience.get_const_tensor(mask)
    if tensor is not None and not np.any(tensor.numpy() == lowest):
        return mask
    floor = editor.constant(np.array(lowest / 2, dtype_of(mask).numpy()), f"{mask.name}_floor")
    shape = None if mask.shape is None else list(mask.shape)
    infinite = editor.node("IsInf", [mask], mask, [shape], dtype=ir.DataType.BOOL)
    higher = editor.node("Clip", [mask, floor], mask, [shape])  # Max would stay float32 in a float16 file
    result = editor.node("Where", [infinite.outputs[0], mask, higher.outputs[0]], mask, [shape])
    editor.graph.insert_before(before, [infinite, higher, result])
    return result.outputs[0]


def _is_masked_attention(node: ir.Node) -> bool:
    return _MASKED.search(node.metadata_props.get(_FX_NODE, "")) is not None


def _empty_rows(softmax: ir.Node, editor: Editor) -> bool:
    """Zeros for rows of -inf, which Softmax alone makes NaN.

    For boolean masks torch.onnx has that, but hides with the lowest finite number, so that the row is a mean.
    """
    weights = softmax.outputs[0]
    if any(use.node.op_type == "IsNaN" for use in weights.uses()):
        return _hide_with_infinity(softmax, editor)
    zero = editor.constant(np.zeros((), dtype_of(weights).numpy()), f"{weights.name}_zero")
    shape = None if weights.shape is None else list(weights.shape)
    empty = editor.node("IsNaN", [weights], weights, [shape], dtype=ir.DataType.BOOL)
    filled = editor.node("Where", [empty.outputs[0], zero, weights], weights, [shape])
    editor.graph.insert_after(softmax, [empty, filled])
    editor.replace(weights, filled.outputs[0])
    for node, place in ((empty, 0), (filled, 2)):
        node.replace_input_with(place, weights)
    return True


def _hide_with_infinity(softmax: ir.Node, editor: Editor) -> bool:
    scores = producer(softmax.inputs[0], "Add")
    masks = [] if scores is None else [producer(value, "Where") for value in scores.inputs]
    for mask in masks:
        hidden = None if mask is None else constant(mask.inputs[2])
        if mask is not None and hidden is not None and hidden.size == 1 and hidden.item() < 0:
            infinity = editor.constant(np.full(hidden.shape, -np.inf, hidden.dtype), f"{softmax.name}_hidden")
            mask.replace_input_with(2, infinity)
            return True
    return False
