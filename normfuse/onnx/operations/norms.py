"""Norms, softmax, attention and reductions."""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional as F

from normfuse.onnx.operations.registry import Untranslated, axes_of, is_sizes, operation, sizes


@operation("BatchNormalization")
def _batch_norm(node: ir.Node, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    if node.attributes.get_int("training_mode", 0):
        raise Untranslated("a BatchNormalization in training mode")
    return F.batch_norm(x, mean, variance, scale, bias, False, 0.1, node.attributes.get_float("epsilon", 1e-5))


@operation("LayerNormalization")
def layer_norm(node: ir.Node, x: Tensor, scale: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    shape = _normalized(node, x, scale)
    return F.layer_norm(x, shape, scale, bias, node.attributes.get_float("epsilon", eps))


@operation("RMSNormalization", "SimplifiedLayerNormalization")  # the latter is ONNX Runtime's, in ONNX's own domain
def rms_norm(node: ir.Node, x: Tensor, scale: Tensor, eps: float = 1e-5) -> Tensor:
    return F.rms_norm(x, _normalized(node, x, scale), scale, node.attributes.get_float("epsilon", eps))


def _normalized(node: ir.Node, x: Tensor, scale: Tensor) -> list[int]:
    shape = list(x.shape[node.attributes.get_int("axis", -1) :])
    if list(scale.shape) != shape:
        raise Untranslated(f"a {node.op_type} whose scale broadcasts")
    return shape


@operation("InstanceNormalization")
def _instance_norm(node: ir.Node, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return F.group_norm(x, scale.shape[0], scale, bias, node.attributes.get_float("epsilon", 1e-5))


@operation("GroupNormalization")
def _group_norm(node: ir.Node, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    groups, channels = node.attributes["num_groups"].as_int(), x.shape[1]
    if scale.shape[0] != channels:  # one for each group, before operator set 21
        scale, bias = (numbers.repeat_interleave(channels // groups) for numbers in (scale, bias))
    return F.group_norm(x, groups, scale, bias, node.attributes.get_float("epsilon", 1e-5))


@operation("Softmax", "LogSoftmax")
def _softmax(node: ir.Node, x: Tensor) -> Tensor:
    function = torch.softmax if node.op_type == "Softmax" else torch.log_softmax
    return function(x, node.attributes.get_int("axis", -1))


@operation("Attention")
def _attention(node: ir.Node, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *past: Any) -> Tensor:
    known = {"is_causal", "scale", "qk_matmul_output_mode", "softcap", "q_num_heads", "kv_num_heads"}
    if set(node.attributes) - known or node.attributes.get_float("softcap", 0.0) or any(p is not None for p in past):
        raise Untranslated("this form of Attention")
    joined = q.dim() == 3
    if joined:
        counts = [node.attributes[name].as_int() for name in ("q_num_heads", "kv_num_heads", "kv_num_heads")]
        q, k, v = (heads_of(x, count) for x, count in zip((q, k, v), counts, strict=True))
    if k.shape[1] != q.shape[1]:
        repeats = q.shape[1] // k.shape[1]
        k, v = (x.unsqueeze(2).expand(-1, -1, repeats, -1, -1).flatten(1, 2) for x in (k, v))
    causal, scale = bool(node.attributes.get_int("is_causal", 0)), node.attributes.get_float("scale", None)
    if causal and mask is not None:
        raise Untranslated("an Attention with a mask that is causal too")
    result = F.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=scale)
    return joined_heads(result) if joined else result


def heads_of(x: Tensor, count: int) -> Tensor:
    """[B, S, H·D] as [B, H, S, D]."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def joined_heads(x: Tensor) -> Tensor:
    """[B, H, S, D] as [B, S, H·D]."""
    return x.transpose(1, 2).flatten(2)


@operation("RotaryEmbedding")
def _rotary(node: ir.Node, x: Tensor, cos: Tensor, sin: Tensor, positions: Any = None) -> Tensor:
    count, width = node.attributes.get_int("num_heads", 0), node.attributes.get_int("rotary_embedding_dim", 0)
    joined = x.dim() == 3
    x = heads_of(x, count) if joined else x
    cos, sin = ((c if positions is None else F.embedding(positions, c)).unsqueeze(1) for c in (cos, sin))
    turned, rest = (x[..., :width], x[..., width:]) if width else (x, None)
    if node.attributes.get_int("interleaved", 0):
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    result = turned if rest is None else torch.cat((turned, rest), -1)
    return joined_heads(result) if joined else result


def _root_of_squares(x: Tensor, axes: list[int], keepdim: bool) -> Tensor:
    return x.square().sum(axes, keepdim=keepdim).sqrt()


_REDUCTIONS = {
    "ReduceMean": torch.mean,
    "ReduceSum": torch.sum,
    "ReduceMax": torch.amax,
    "ReduceMin": torch.amin,
    "ReduceL1": lambda x, axes, keepdim: x.abs().sum(axes, keepdim=keepdim),
    "ReduceL2": _root_of_squares,
    "ReduceSumSquare": lambda x, axes, keepdim: x.square().sum(axes, keepdim=keepdim),
    "ReduceLogSumExp": torch.logsumexp,
}


@operation(*_REDUCTIONS)
def _reduce(node: ir.Node, x: Tensor, axes: Any = None) -> Tensor:
    where, keep = axes_of(node, axes), bool(node.attributes.get_int("keepdims", 1))
    if not where and node.attributes.get_int("noop_with_empty_axes", 0):
        if node.op_type not in ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin"):
            raise Untranslated(f"a {node.op_type} over no axis")
        return x
    return _REDUCTIONS[node.op_type](x, where or list(range(x.dim())), keepdim=keep)


@operation("ReduceProd")
def _product(node: ir.Node, x: Any, axes: Any = None) -> Any:
    keep = bool(node.attributes.get_int("keepdims", 1))
    if is_sizes(x):
        total = math.prod(sizes(x))
        return [total] if keep else total
    where = axes_of(node, axes) or list(range(x.dim()))
    for axis in sorted((axis % x.dim() for axis in where), reverse=True):
        x = torch.prod(x, axis, keepdim=keep)
    return x


@operation("ArgMax", "ArgMin")
def _argmax(node: ir.Node, x: Tensor) -> Tensor:
    if node.attributes.get_int("select_last_index", 0):
        raise Untranslated(f"an {node.op_type} that takes the last of several")
    function = torch.argmax if node.op_type == "ArgMax" else torch.argmin
    return function(x, node.attributes.get_int("axis", 0), keepdim=bool(node.attributes.get_int("keepdims", 1)))
