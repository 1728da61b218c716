"""Folding: constant affine maps vanish into the weights around them, by one algebra (docs/folding.md)."""

from .api import fold
from .bounds import Interval, interval_bounds
from .dead import remove_dead_channels
from .report import DynamicNormRecord, FoldError, FoldReport, NormRecord, RemovedChannels

__all__ = [
    "DynamicNormRecord",
    "FoldError",
    "FoldReport",
    "Interval",
    "NormRecord",
    "RemovedChannels",
    "fold",
    "interval_bounds",
    "remove_dead_channels",
]
