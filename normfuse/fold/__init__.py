"""Folding: constant affine maps vanish into the weights around them, by one algebra (docs/folding.md)."""

from .api import fold, fuse
from .bounds import Interval, interval_bounds
from .report import FoldError, FoldReport, NormRecord

__all__ = ["FoldError", "FoldReport", "Interval", "NormRecord", "fold", "fuse", "interval_bounds"]
