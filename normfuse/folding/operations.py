"""What operations are, as far as their schemas say it and a table where they do not.

Every part of folding that asks whether an operation is a view, a cast, a copy, or smooth arithmetic asks here.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from .nodes import argument, tensors_of

aten = torch.ops.aten

#: Casts between dtypes, memory formats and devices.
CASTS = {
    *(aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten._to_copy.default, aten.type_as.default),
}
#: The same values in memory of their own.
COPIES = {aten.clone.default, aten.lift_fresh_copy.default, aten.detach_.default}
#: Dropout, which in evaluation returns its operand.
DROPOUTS = {aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default}
#: Other ways to hand the same values on.
HANDED_ON = {aten.contiguous.default, aten.alias.default, aten.detach.default}
#: The same axes in another order.
PERMUTATIONS = {
    *(aten.permute.default, aten.transpose.int, aten.t.default, aten.numpy_T.default, aten.mT.default),
    *(aten.adjoint.default, aten.mH.default, aten.movedim.int, aten.movedim.intlist),
}
#: Another shape for the same elements in the same order, with new sizes that are named.
RESHAPES = {
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unflatten.int, aten.ravel.default),
}
#: The same, with sizes that follow from those before.
SQUEEZES = {
    *(aten.flatten.using_ints, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
}
#: Repetition along axes of size one.
EXPANSIONS = {aten.expand.default, aten.broadcast_to.default}
#: Consecutive pieces along an axis.
SPLITS = {
    *(aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int),
    *(aten.tensor_split.sections, aten.tensor_split.indices),
}
#: Sums of two values, each times a number.
SUMS = {aten.add.Tensor, aten.sub.Tensor, aten.rsub.Tensor, aten.lerp.Scalar}
#: Products of matrices, with the names of their factors, and of those that have one, of the bias.
FACTORS = {
    aten.linear.default: ("input", "weight"),
    aten.mm.default: ("self", "mat2"),
    aten.bmm.default: ("self", "mat2"),
    aten.mv.default: ("self", "vec"),
    aten.outer.default: ("self", "vec2"),
    aten.addmm.default: ("mat1", "mat2"),
    aten.addmv.default: ("mat", "vec"),
    aten.baddbmm.default: ("batch1", "batch2"),
    aten.addbmm.default: ("batch1", "batch2"),
    aten.matmul.default: ("self", "other"),
    aten.inner.default: ("self", "other"),
    aten.dot.default: ("self", "tensor"),
    aten.linalg_vecdot.default: ("x", "y"),
    aten.tensordot.default: ("self", "other"),
    aten.einsum.default: ("tensors",),
}
BIASES = {
    aten.linear.default: "bias",
    **dict.fromkeys((aten.addmm.default, aten.addmv.default, aten.baddbmm.default, aten.addbmm.default), "self"),
}
#: Which values are above, below or at a number.
COMPARISONS = {aten.gt.Scalar, aten.ge.Scalar, aten.lt.Scalar, aten.le.Scalar}
#: Bounds of values, by numbers.
BOUNDS = {
    *(aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default, aten.hardtanh.default),
    aten.threshold.default,
}
#: Two slopes that meet at zero, which arguments or weights give, or are known.
SLOPES = {aten.leaky_relu.default, aten.abs.default, aten.prelu.default, aten.rrelu.default}
#: Functions that fall until a number and rise from it on; GELU in its form with tanh at another one.
VALLEYS = {
    aten.gelu.default: -0.7517915246935645,
    aten.silu.default: -1.2784645427610738,
    aten.hardswish.default: -1.5,
}
#: Convolutions, but for transposed ones.
CONVOLUTIONS = {
    *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default),
    *(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding),
}
#: Entries along axes that an argument names, chosen, repeated or in another order.
REARRANGED = {
    *(aten.slice.Tensor, aten.narrow.default, aten.flip.default, aten.roll.default, aten.index_select.default),
    aten.repeat_interleave.self_int,
}
#: One number for all entries along axes.
REDUCTIONS = {
    *(aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.linalg_vector_norm.default),
    *(aten.nansum.default, aten.std.dim, aten.std.correction),
}
#: The powers to which operations raise a value; that of ``pow`` is an argument.
EXPONENTS = {
    aten.square.default: 2.0,
    aten.sqrt.default: 0.5,
    aten.rsqrt.default: -0.5,
    aten.reciprocal.default: -1.0,
}
#: Tensors with one number everywhere, which the operation names; of others it is an argument.
FILLS = {
    **dict.fromkeys((aten.zeros_like.default, aten.new_zeros.default, aten.zeros.default), 0.0),
    **dict.fromkeys((aten.ones_like.default, aten.new_ones.default, aten.ones.default), 1.0),
    **dict.fromkeys((aten.full_like.default, aten.new_full.default, aten.full.default), None),
}
#: Tensors that hold anything, as nothing has been written yet.
UNWRITTEN = {
    *(aten.empty_like.default, aten.new_empty.default, aten.empty.memory_format),
}
#: Operations that look at the shape of a tensor, not at its numbers.
ABOUT_SIZES = {
    *(aten.sym_size.int, aten.sym_size.default, aten.sym_numel.default, aten.sym_stride.int),
    *(aten.sym_storage_offset.default, aten._assert_tensor_metadata.default),
    *FILLS,
    *UNWRITTEN,
}
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
    *(aten.maximum.default, aten.minimum.default, aten.nansum.default),
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


def filled_with(value: object) -> float | None:
    """The number that a tensor of any size holds everywhere; None where the operation that makes it does not say so."""
    while isinstance(value, Node) and value.target in EXPANSIONS | COPIES | HANDED_ON:
        value = value.args[0]
    if not isinstance(value, Node) or value.target not in FILLS:
        return None
    named = FILLS[value.target]
    number = argument(value, "fill_value") if named is None else named
    return float(number) if isinstance(number, int | float) else None


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
