"""Modules whose normalisation folds into their neighbours once training is over."""

from ..ops import keep_norms
from .power_norm import PowerNorm
from .sync import convert_sync
from .unified_norm import UnifiedNorm

__all__ = ["PowerNorm", "UnifiedNorm", "convert_sync", "keep_norms"]
