"""Changes to a live model."""

from .swap import LastDimBatchNorm, Swap, SwapReport, swap_norms

__all__ = ["LastDimBatchNorm", "Swap", "SwapReport", "swap_norms"]
