"""Folding: constant affine maps vanish into the weights around them, by one algebra (docs/folding.md)."""

from .api import fold, fuse
from .report import FoldError, FoldReport, NormRecord

__all__ = ["FoldError", "FoldReport", "NormRecord", "fold", "fuse"]
