"""Operations of the domain com.microsoft, into which ONNX Runtime fuses others when it saves what it optimised."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional as F

from normfuse.onnx.operations.norms import heads_of, joined_heads, layer_norm, rms_norm
from normfuse.onnx.operations.registry import Untranslated, operation, tensor
from normfuse.onnx.operations.weighted import convolution, gemm

_DOMAIN = "com.microsoft."
_EPS = 1e-12  # of its norms, where ONNX's have 1e-5


def _own(*kinds: str) -> Any:
    return operation(*(_DOMAIN + kind for kind in kinds))


@_own("Gelu", "BiasGelu", "FastGelu")
def _gelu(node: ir.Node, x: Tensor, bias: Tensor | None = None) -> Tensor:
    x = x if bias is None else x + bias
    return F.gelu(x, approximate="tanh" if node.op_type == "FastGelu" else "none")


@_own("QuickGelu")
def _quick_gelu(node: ir.Node, x: Tensor) -> Tensor:
    alpha = node.attributes.get_float("alpha", 1.702)
    return F.silu(x) if alpha == 1 else x * torch.sigmoid(alpha * x)


@_own("FusedMatMul")
def _matmul(node: ir.Node, a: Tensor, b: Tensor) -> Tensor:
    if any(node.attributes.get_int(name, 0) for name in ("transBatchA", "transBatchB")):
        raise Untranslated("a product that moves its first axis")
    a, b = (
        x.transpose(-1, -2) if node.attributes.get_int(name, 0) else x for x, name in ((a, "transA"), (b, "transB"))
    )
    alpha = node.attributes.get_float("alpha", 1.0)
    product = torch.matmul(a, b)
    return product if alpha == 1 else alpha * product


_ACTIVATIONS = {"Relu": F.relu, "Tanh": torch.tanh, "Sigmoid": torch.sigmoid, "HardSwish": F.hardswish}


def _activated(node: ir.Node, x: Tensor) -> Tensor:
    kind = node.attributes.get_string("activation", "")
    numbers = list(node.attributes.get_floats("activation_params", []))
    if kind == "LeakyRelu":
        slope = numbers[0] if numbers else node.attributes.get_float("activation_alpha", 0.01)
        return F.leaky_relu(x, slope)
    if kind == "Clip" and len(numbers) == 2:
        return torch.clamp(x, *numbers)
    if kind not in _ACTIVATIONS:
        raise Untranslated(f"the activation {kind!r}")
    return _ACTIVATIONS[kind](x)


@_own("FusedConv")
def _convolution(node: ir.Node, x: Tensor, weight: Tensor, bias: Any = None, added: Any = None) -> Tensor:
    result = convolution(node, x, weight, bias)
    return _activated(node, result if added is None else result + added)


@_own("FusedGemm")
def _product(node: ir.Node, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    return _activated(node, gemm(node, a, b, c))


@_own("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
def _skip_norm(node: ir.Node, x: Tensor, skip: Tensor, gain: Tensor, *more: Tensor | None) -> tuple[Any, ...]:
    plain = node.op_type == "SkipLayerNormalization"
    shift, bias = [*more, None, None][:2] if plain else [None, *more, None][:2]
    total = x + skip if bias is None else x + skip + bias
    result = layer_norm(node, total, gain, shift, _EPS) if plain else rms_norm(node, total, gain, _EPS)
    return result, None, None, total  # mean and deviation are for training


@_own("EmbedLayerNormalization")
def _embeddings(
    node: ir.Node, tokens: Tensor, segments: Any, words: Tensor, places: Tensor, kinds: Any, gain: Tensor,
    shift: Tensor, mask: Any = None, positions: Any = None,
) -> tuple[Any, ...]:  # fmt: skip
    if mask is not None:
        raise Untranslated("embeddings that count a mask")
    where = torch.arange(tokens.shape[1]).unsqueeze(0) if positions is None else positions
    total = F.embedding(tokens, words) + F.embedding(where, places)
    total = total if segments is None else total + F.embedding(segments, kinds)
    return layer_norm(node, total, gain, shift, _EPS), None, total


@_own("MultiHeadAttention")
def _heads(
    node: ir.Node, q: Tensor, k: Any = None, v: Any = None, bias: Any = None, kept: Any = None, added: Any = None,
    *past: Any,
) -> Tensor:  # fmt: skip
    if k is None or v is None or not q.dim() == k.dim() == v.dim() == 3 or any(p is not None for p in past):
        raise Untranslated("this form of MultiHeadAttention")
    if bias is not None:
        widths = [q.shape[-1], k.shape[-1], v.shape[-1]]
        q, k, v = (x + b for x, b in zip((q, k, v), bias.split(widths), strict=True))
    return _attention(node, (q, k, v), kept, added)


@_own("Attention")
def _packed(
    node: ir.Node, x: Tensor, weight: Tensor, bias: Any = None, kept: Any = None, past: Any = None, added: Any = None,
    *more: Any,
) -> Tensor:  # fmt: skip
    if past is not None or any(m is not None for m in more) or node.attributes.get_int("do_rotary", 0):
        raise Untranslated("this form of Attention")
    widths = list(node.attributes.get_ints("qkv_hidden_sizes", [weight.shape[1] // 3] * 3))
    product = F.linear(x, weight.t(), bias)
    return _attention(node, product.split(widths, -1), kept, added)


def _attention(node: ir.Node, qkv: Any, kept: Any, added: Tensor | None) -> Tensor:
    """Attention over heads of [B, S, C]; `kept` [B, S] is zero where keys are padding."""
    q, k, v = (heads_of(x, node.attributes["num_heads"].as_int()) for x in qkv)
    causal = bool(node.attributes.get_int("unidirectional", 0))
    if kept is not None:
        kept = tensor(kept)
        if kept.dim() != 2 or causal:
            raise Untranslated("an attention mask other than [batch, sequence]")
        filtered = torch.where(kept[:, None, None, :] != 0, 0.0, node.attributes.get_float("mask_filter_value", -1e4))
        added = filtered if added is None else added + filtered
    if causal and added is not None:
        raise Untranslated("an attention with a bias that is causal too")
    scale = node.attributes.get_float("scale", 0.0) or None
    return joined_heads(F.scaled_dot_product_attention(q, k, v, added, 0.0, causal, scale=scale))
