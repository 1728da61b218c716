"""The normalisation operations in functional form; their modules are in :mod:`normfuse.nn`."""

from ._recompute import keep_norms
from .adaptive_instance_norm import adaptive_instance_norm, instance_statistics
from .batch_norm import BatchNormState, batch_norm
from .dynamic_activation import dynamic_erf, dynamic_tanh
from .moving_average_norm import MovingAverageNormState, moving_average_norm
from .power_norm import PowerNormState, power_norm
from .region_norm import region_norm
from .row_norm import crms_norm, layer_norm, rms_norm
from .unified_norm import UnifiedNormState, unified_norm

__all__ = [
    "BatchNormState",
    "MovingAverageNormState",
    "PowerNormState",
    "UnifiedNormState",
    "adaptive_instance_norm",
    "batch_norm",
    "crms_norm",
    "dynamic_erf",
    "dynamic_tanh",
    "instance_statistics",
    "keep_norms",
    "layer_norm",
    "moving_average_norm",
    "power_norm",
    "region_norm",
    "rms_norm",
    "unified_norm",
]
