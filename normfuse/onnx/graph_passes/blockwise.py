"""Attention in blocks, for long sequences and large batches."""

from __future__ import annotations

import onnx_ir as ir

from .editing import Editor, dims

_DOMAIN = "com.microsoft"
_MEANINGLESS = {"is_causal", "qk_matmul_output_mode", "softcap"}  # where they are zero


def blockwise_attention(model: ir.Model) -> int:
    """Let ONNX Runtime's ``MultiHeadAttention`` compute attention on [B, S, H·D]; says for how many nodes.

    *Algebra.* Both compute softmax(q kᵀ · scale) v for each head. ``Attention`` holds all products of queries and keys,
    B·H·S² numbers; ``MultiHeadAttention`` goes through blocks of them that fit the cache and corrects as it goes on.

    *Needs* nodes of ``attention3d`` without mask that are not causal: with one, ONNX Runtime does not work in blocks.

    *Saves* time and memory from several hundred queries on, or from a hundred in large batches; it costs time below.
    The file then runs in ONNX Runtime only.
    """
    editor = Editor(model, "blockwise")
    count = sum(_rewrite(node, editor) for node in list(model.graph) if node.op_type == "Attention")
    if count:
        model.opset_imports[_DOMAIN] = 1
    return count


def _rewrite(node: ir.Node, editor: Editor) -> bool:
    heads = [node.attributes.get_int(name, 0) for name in ("q_num_heads", "kv_num_heads")]
    odd = any(node.attributes[name].value for name in _MEANINGLESS & set(node.attributes))
    if node.domain or not heads[0] or heads[0] != heads[1] or odd or any(v is not None for v in node.inputs[3:]):
        return False
    old = node.outputs[0]
    new = editor.node("MultiHeadAttention", node.inputs[:3], old, [dims(old)], {"num_heads": heads[0]})
    new.domain = _DOMAIN
    if "scale" in node.attributes:
        new.attributes["scale"] = node.attributes["scale"]
    editor.graph.insert_after(node, new)
    editor.replace(old, new.outputs[0])
    editor.drop(old)
    return True
