"""Attention as one operation: what it gives are averages of the values, so scales and shifts of these pass."""

from __future__ import annotations

from torch.fx import Node

from .calls import Call, aten
from .translating import operation


@operation("Attention")
def _attention(call: Call) -> bool:
    """Of operator sets from 23 on, without keys and values of earlier tokens."""
    heads = call.get("q_num_heads", 0), call.get("kv_num_heads", 0)
    return _averages(call, *heads, mask=3, causal=bool(call.get("is_causal", 0)))


@operation("MultiHeadAttention", domain="com.microsoft")
def _multi_head(call: Call) -> bool:
    """ONNX Runtime's own, without biases of its own."""
    heads = call.get("num_heads", 0)
    return _averages(call, heads, heads, mask=5, causal=bool(call.get("unidirectional", 0)))


def _averages(call: Call, heads: int, value_heads: int, *, mask: int, causal: bool) -> bool:
    """Of queries, keys and values [batch, heads, positions, width], or with the heads in the width."""
    given = [number for number, operand in enumerate(call.operands) if operand is not None]
    if given not in ([0, 1, 2], [0, 1, 2, mask]) or not call.only_first() or (causal and mask in given):
        return False
    kinds = {(call.tensor(place).dtype, len(call.shape(place))) for place in range(3)}
    flat = len(call.shape(0)) == 3
    if len(kinds) > 1 or (flat and not heads * value_heads):
        return False
    parts = [node for node in call.operands[:3] if node is not None]
    if flat:
        parts = [_apart(call, place, value_heads if place else heads) for place in range(3)]
    query, key, value = parts
    own, shared = (node.meta["val"].shape[1] for node in (query, value))
    if own != shared:
        key, value = (_repeated(call, node, own) for node in (key, value))
    args = (query, key, value, call.operand(mask), 0.0, causal)
    if not flat:
        return call.emit(aten.scaled_dot_product_attention.default, *args)
    averages = call.step(aten.scaled_dot_product_attention.default, *args)
    together = call.step(aten.permute.default, averages, [0, 2, 1, 3])
    return call.emit(aten.reshape.default, together, call.sizes())


def _apart(call: Call, place: int, heads: int) -> Node:
    """An operand with its heads on an axis of their own."""
    batch, positions, width = call.shape(place)
    split = call.step(aten.reshape.default, call.operands[place], [batch, positions, heads, width // heads])
    return call.step(aten.permute.default, split, [0, 2, 1, 3])


def _repeated(call: Call, node: Node, heads: int) -> Node:
    """Heads that several heads of the queries share, once for each of these."""
    batch, own, positions, width = node.meta["val"].shape
    apart = call.step(aten.unsqueeze.default, node, 2)
    expanded = call.step(aten.expand.default, apart, [batch, own, heads // own, positions, width])
    return call.step(aten.reshape.default, expanded, [batch, heads, positions, width])
