"""Forms of an ONNX graph that ONNX Runtime runs faster, each pass for itself.

Passes change an ``onnx_ir.Model`` in place, keep what they do not recognise, and say how often they applied.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import onnx_ir as ir

from normfuse.options import PASS_NAMES, TARGETS, passes_for

from .attention import attention3d
from .blockwise import blockwise_attention
from .flatten import gemm2d
from .running import run_counted
from .single_token import single_token

# In this order: heads must be split by Attention before streams become matrices.
PASSES: dict[str, Callable[[ir.Model], int]] = {
    "attention3d": attention3d,
    "blockwise_attention": blockwise_attention,
    "single_token": single_token,
    "gemm2d": gemm2d,
}


def run_passes(model: ir.Model, names: Collection[str]) -> dict[str, int]:
    """Run those of the passes that are among ``names``, in place.

    Args:
        model: is changed.
        names: of passes; others than those of this package count for nothing.

    Returns:
        How often each one applied.

    Raises:
        Exception: what a pass raised.
    """
    return run_counted(model, {name: function for name, function in PASSES.items() if name in names})


__all__ = [
    "PASSES",
    "PASS_NAMES",
    "TARGETS",
    "attention3d",
    "blockwise_attention",
    "gemm2d",
    "passes_for",
    "run_passes",
    "single_token",
]
