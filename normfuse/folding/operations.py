"""What operations are, as far as their schemas say it and a table where they do not.

Every part of folding that asks whether an operation is a view, a cast, a copy, or smooth arithmetic asks here.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from .nodes import tensors_of

aten = torch.ops.aten

#: Casts between dtypes, memory formats and devices.
CASTS = {
    *(aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten._to_copy.default, aten.type_as.default),
}
#: The same values in memory of their own.
COPIES = {aten.clone.default, aten.lift_fresh_copy.default, aten.detach_.default}
#: Dropout, which in evaluation returns its operand.
DROPOUTS = {aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default}
#: Operations that normalise, and what they are called.
NORMALISING = {
    aten.layer_norm.default: "LayerNorm",
    aten.native_layer_norm.default: "LayerNorm",
    aten.rms_norm.default: "RMSNorm",
    aten._fused_rms_norm.default: "RMSNorm",
    aten.group_norm.default: "GroupNorm",
    aten.native_group_norm.default: "GroupNorm",
    aten.instance_norm.default: "InstanceNorm",
    aten.batch_norm.default: "BatchNorm",
    aten.native_batch_norm.default: "BatchNorm",
    aten._native_batch_norm_legit.no_stats: "BatchNorm",
    aten._native_batch_norm_legit_no_training.default: "BatchNorm",
}
# Movements whose schemas announce no view, because they may or do copy.
_MOVEMENTS = {
    *(aten._unsafe_view.default, aten.repeat.default, aten.roll.default, aten.flip.default, aten.index_select.default),
    *(aten.gather.default, aten.cat.default, aten.stack.default, aten.constant_pad_nd.default, aten.tril.default),
    *(aten.repeat_interleave.self_int, aten.triu.default, aten.pad.default, aten.diag.default, aten.diag_embed.default),
}
# Functions that never fall, of each number or of several.
_RISING = {
    *(aten.relu.default, aten.relu6.default, aten.tanh.default, aten.sigmoid.default, aten.softplus.default),
    *(aten.hardtanh.default, aten.hardsigmoid.default, aten.clamp.default, aten.clamp_min.default, aten.erf.default),
    *(aten.leaky_relu.default, aten.elu.default, aten.exp.default, aten.amax.default, aten.amin.default),
    *(aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default, aten.mean.dim, aten.sum.dim_IntList),
    *(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default, aten.cumsum.default),
    *(aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default),
}
_SLOPED = {aten.leaky_relu.default, aten.elu.default}  # which rise only where no slope is negative
# Continuous functions and sums of products.
_SMOOTH = {
    *(aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Tensor, aten.rsub.Scalar),
    *(aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.neg.default, aten.reciprocal.default),
    *(aten.addcmul.default, aten.addcdiv.default, aten.lerp.Tensor, aten.lerp.Scalar, aten.square.default),
    *(aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar, aten.sqrt.default, aten.rsqrt.default),
    *(aten.exp.default, aten.expm1.default, aten.log.default, aten.log1p.default, aten.abs.default, aten.erf.default),
    *(aten.sin.default, aten.cos.default, aten.tanh.default, aten.sigmoid.default, aten.softplus.default),
    *(aten.relu.default, aten.clamp.default, aten.clamp_min.default, aten.maximum.default, aten.minimum.default),
    *(aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim, aten.prod.default, aten.cumsum.default),
    *(aten.linalg_vector_norm.default, aten.norm.Scalar, aten.norm.ScalarOpt_dim, aten.softmax.int),
    *(aten.matmul.default, aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default, aten.outer.default),
    *(aten.einsum.default, aten.linear.default, aten.addmm.default, aten.where.self, aten._weight_norm.default),
}


def is_view(node: Node) -> bool:
    """Whether the result is the operand's elements, in its memory or moved elsewhere, and nothing is computed."""
    if node.target is operator.getitem or node.target in COPIES | DROPOUTS:
        return True
    return node.target in _MOVEMENTS or returns_alias(node.target)


def returns_alias(target: Any) -> bool:
    """Whether an operation's schema says that its result may lie in its first operand's memory."""
    if not isinstance(target, torch._ops.OpOverload) or target in CASTS:
        return False
    returned = [value.alias_info for value in target._schema.returns]
    return bool(returned) and all(info is not None and not info.is_write for info in returned)


def rises(node: Node) -> bool:
    """Whether a result never falls when its first operand rises."""
    slopes = (*node.args[1:], *node.kwargs.values()) if node.target in _SLOPED else ()
    return node.target in _RISING and not any(isinstance(slope, int | float) and slope < 0 for slope in slopes)


def is_smooth(node: Node) -> bool:
    """Whether computing in float64 makes a value only more exact: nothing is rounded, compared or counted."""
    if node.target in CASTS:
        before, after = node.args[0].meta["val"].dtype, node.meta["val"].dtype
        return before.is_floating_point and after.is_floating_point and torch.promote_types(before, after) == after
    if node.target in _SMOOTH or is_view(node):
        floats = all(tensor.is_floating_point() for tensor in tensors_of(node))
        return floats and node.kwargs.get("dtype") is None and not _names_dtype(node)
    return False


def _names_dtype(node: Node) -> bool:
    return any(isinstance(argument, torch.dtype) for argument in node.args)
