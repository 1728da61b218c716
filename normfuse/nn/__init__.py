"""Modules whose normalisation folds into their neighbours once training is over."""

from ..ops import keep_norms
from .calibration import calibrate
from .monitoring import Monitor, monitor
from .power_norm import PowerNorm
from .sync import convert_sync
from .unified_norm import UnifiedNorm

__all__ = [
    "Monitor",
    "PowerNorm",
    "UnifiedNorm",
    "calibrate",
    "convert_sync",
    "keep_norms",
    "monitor",
]
