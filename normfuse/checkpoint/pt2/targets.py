"""Which functions a graph from a file may call.

ATen operations that are functions of their operands, or write into one of them, and Python's operators on sizes. Not
those that read files, print, touch devices, take storage apart or write into a tensor called ``out``; not the private
ones, whose operands nobody checks, but for those that torch.export itself writes. Operations of other libraries are
refused as well: nobody knows what they do.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from normfuse.checkpoint.errors import CheckpointError
from normfuse.errors import one_line

_ATEN = re.compile(r"torch\.ops\.aten\.([A-Za-z_][A-Za-z0-9_]*)\.([A-Za-z_][A-Za-z0-9_]*)", re.ASCII)
_PRIVATE = frozenset(
    """
    __and__ __iand__ __ior__ __ixor__ __lshift__ __or__ __rshift__ __xor__ _adaptive_avg_pool2d
    _adaptive_avg_pool3d _addmm_activation _assert_scalar _assert_tensor_metadata _cdist_forward _conj
    _conv_depthwise2d _convolution _embedding_bag _embedding_bag_forward_only _euclidean_dist _fft_c2c _fft_c2r
    _fft_r2c _fused_rms_norm _is_all_true _linalg_det _linalg_eigh _linalg_slogdet _linalg_solve_ex _linalg_svd
    _log_softmax _native_batch_norm_legit _native_batch_norm_legit_no_training _pdist_forward _prelu_kernel
    _reshape_alias _safe_softmax _scaled_dot_product_attention_math _scaled_dot_product_flash_attention_for_cpu
    _shape_as_tensor _softmax _to_copy _trilinear _unsafe_index _unsafe_view _upsample_bicubic2d_aa
    _upsample_bilinear2d_aa _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d
    _weight_norm _weight_norm_interface
    """.split()
)
_REFUSED = frozenset(
    """
    from_file pin_memory is_pinned record_stream resize resize_ resize_as resize_as_ resize_as_sparse_ set set_
    set_data data retain_grad requires_grad_ sym_constrain_range sym_constrain_range_for_size
    """.split()
)
# Parts of names of operations that are no functions of dense tensors on the CPU in evaluation.
_REFUSED_PARTS = re.compile(
    "backward|quantize|sparse|mkldnn|cudnn|miopen|fbgemm|nested|named|rename|fused_moving|int_repr|_values|"
    "q_zero_point|q_scale|q_per_channel|csr|csc|bsr|bsc|ccol|crow"
)
_PYTHON: dict[str, Callable[..., Any]] = {
    **{
        f"_operator.{name}": getattr(operator, name)
        for name in (
            *("add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "neg", "pos", "abs"),
            *("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_", "lshift", "rshift"),
        )
    },
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc")},
    **{
        f"torch.{name}": getattr(torch, name)
        for name in "sym_int sym_float sym_max sym_min sym_not sym_ite sym_sqrt".split()
    },
}
GRAD_REGION = "torch.ops.higher_order.wrap_with_set_grad_enabled"
AUTOCAST_REGION = "torch.ops.higher_order.wrap_with_autocast"


def is_on_sizes(target: str) -> bool:
    """Whether a target is one of Python's operators on sizes."""
    return target in _PYTHON


@cache
def resolve(target: str) -> Callable[..., Any]:
    """The function that a graph's target names: an OpOverload or one of Python's operators on sizes.

    CheckpointError for every other.
    """
    if target in _PYTHON:
        return _PYTHON[target]
    match = _ATEN.fullmatch(target)
    if match is None:
        raise CheckpointError(f"it calls {one_line(target, 80)!r}; only ATen operations and arithmetic on sizes may be")
    name, overload = match.groups()
    if name in _REFUSED or _REFUSED_PARTS.search(name) or (name.startswith("_") and name not in _PRIVATE):
        raise CheckpointError(f"it calls aten.{one_line(name, 60)}, which is not a function of its operands")
    found = getattr(getattr(torch.ops.aten, name, None), overload, None)
    if not isinstance(found, torch._ops.OpOverload):
        raise CheckpointError(f"it calls aten.{one_line(name, 60)}.{one_line(overload, 40)}, which this torch has not")
    if any(argument.is_out for argument in found._schema.arguments):
        raise CheckpointError(f"it calls {found}, which writes into an operand")
    if name in ("lstm", "gru", "rnn_tanh", "rnn_relu") and overload != "input":
        raise CheckpointError(f"it calls {found}, which takes packed sequences")
    return found
