"""Changes to a live model."""

from .adaptation import AlphaBatchNorm, DecayingBatchNorm, UnMixBatchNorm, adapt, freeze
from .callbacks import lightning_callback, trainer_callback
from .distillation import Distillation, distill, output_error, relative_error
from .placement import Placed, place
from .progressive import Conversion, Schedule, progressive
from .reconstruction import reconstruct
from .swap import LastDimBatchNorm, Swap, SwapReport, swap_norms

__all__ = [
    "AlphaBatchNorm",
    "Conversion",
    "DecayingBatchNorm",
    "Distillation",
    "LastDimBatchNorm",
    "Placed",
    "Schedule",
    "Swap",
    "SwapReport",
    "UnMixBatchNorm",
    "adapt",
    "distill",
    "freeze",
    "lightning_callback",
    "output_error",
    "place",
    "progressive",
    "reconstruct",
    "relative_error",
    "swap_norms",
    "trainer_callback",
]
