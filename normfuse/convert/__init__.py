"""Changes to a live model."""

from .callbacks import lightning_callback, trainer_callback
from .distillation import Distillation, distill, output_error, relative_error
from .progressive import Conversion, Schedule, progressive
from .swap import LastDimBatchNorm, Swap, SwapReport, swap_norms

__all__ = [
    "Conversion",
    "Distillation",
    "LastDimBatchNorm",
    "Schedule",
    "Swap",
    "SwapReport",
    "distill",
    "lightning_callback",
    "output_error",
    "progressive",
    "relative_error",
    "swap_norms",
    "trainer_callback",
]
