"""The normalisation operations in functional form; their modules are in :mod:`normfuse.nn`."""

from ._recompute import keep_norms
from .power_norm import PowerNormState, power_norm
from .unified_norm import UnifiedNormState, unified_norm

__all__ = ["PowerNormState", "UnifiedNormState", "keep_norms", "power_norm", "unified_norm"]
