"""Forms of an ONNX graph that ONNX Runtime runs faster, each pass for itself.

Passes change an ``onnx_ir.Model`` in place, keep what they do not recognise, and say how often they applied.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import onnx_ir as ir

from .attention import attention3d
from .blockwise import blockwise_attention
from .flatten import gemm2d

# In this order: heads must be split by Attention before streams become matrices.
PASSES: dict[str, Callable[[ir.Model], int]] = {
    "attention3d": attention3d,
    "blockwise_attention": blockwise_attention,
    "gemm2d": gemm2d,
}
STEPS = ("carry_biases", *PASSES)

# What a target gets. portable is the graph as torch writes it. Gemm saves an addition, but ONNX Runtime spreads its
# bias over the output on one thread, so only sessions of one thread and few tokens gain. Attention in blocks gains with
# many, and makes the only files with an operation that is not standard. On CUDA, ONNX Runtime fuses MatMul, Add and
# Gelu by itself, so there only the additions of travelling biases are saved: a conclusion, not a measurement.
TARGETS: dict[str, tuple[str, ...]] = {
    "portable": (),
    "cpu": ("carry_biases", "attention3d"),
    "cpu-single": ("carry_biases", "attention3d", "gemm2d"),
    "cpu-long": ("carry_biases", "attention3d", "blockwise_attention"),
    "cuda": ("carry_biases",),
}


def steps_for(target: str, skip: Collection[str] = ()) -> tuple[str, ...]:
    """The steps of a target without those to skip, in their order.

    Raises:
        ValueError: there is no such target, or no step of a name to skip.
    """
    if target not in TARGETS:
        raise ValueError(f"target {target!r} is not one of {', '.join(TARGETS)}")
    for name in skip:
        if name not in STEPS:
            raise ValueError(f"there is no shaping step {name!r} to leave out; there are {', '.join(STEPS)}")
    return tuple(name for name in TARGETS[target] if name not in skip)


def shape(model: ir.Model, steps: Collection[str]) -> dict[str, int]:
    """Applies those of the passes that are among ``steps``, in place; returns how often each one applied."""
    return {name: apply(model) for name, apply in PASSES.items() if name in steps}


__all__ = [
    "PASSES",
    "STEPS",
    "TARGETS",
    "attention3d",
    "blockwise_attention",
    "gemm2d",
    "shape",
    "steps_for",
]
