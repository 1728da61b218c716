"""Changes to a live model."""

from .adaptation import AlphaBatchNorm, DecayingBatchNorm, UnMixBatchNorm, adapt, freeze
from .callbacks import lightning_callback, trainer_callback
from .distillation import Distillation, distill, output_error, relative_error
from .progressive import Conversion, Schedule, progressive
from .reconstruction import reconstruct
from .swap import LastDimBatchNorm, Swap, SwapReport, swap_norms

__all__ = [
    "AlphaBatchNorm",
    "Conversion",
    "DecayingBatchNorm",
    "Distillation",
    "LastDimBatchNorm",
    "Schedule",
    "Swap",
    "SwapReport",
    "UnMixBatchNorm",
    "adapt",
    "distill",
    "freeze",
    "lightning_callback",
    "output_error",
    "progressive",
    "reconstruct",
    "relative_error",
    "swap_norms",
    "trainer_callback",
]
