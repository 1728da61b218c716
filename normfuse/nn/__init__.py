"""The norms, most of which fold into their neighbours once training is over; what each does: docs/norms.md."""

from ..ops import keep_norms
from . import _torch_encoder  # noqa: F401 (it registers a hook)
from .adaptive_instance_norm import AdaptiveInstanceNorm
from .batch_channel_norm import BatchChannelNorm, EstimatedBatchNorm, set_momentum
from .batch_norm import MaskedBatchNorm, RegularizedBatchNorm, batch_norm_penalty
from .calibration import calibrate
from .domain_split import DomainSplitNorm, choose_domain
from .dynamic_activation import Derf, DyT
from .intervals import norm_bounds
from .monitoring import Monitor, monitor
from .moving_average_norm import MovingAverageBatchNorm
from .placement import NormedBranch, layer_placements
from .power_norm import PowerNorm
from .progressive_norm import ProgressiveNorm
from .region_norm import LearnableRegionNorm, RegionNorm
from .rep_batch_norm import RepBatchNorm
from .row_norm import CRMSNorm, LayerNorm, RMSNorm
from .sigma_reparam import sigma_reparam
from .sync import convert_sync
from .time_layer_norm import TimeDependentLayerNorm
from .transformer import FeedForward, SelfAttention, TransformerBlock, TransformerStack
from .unified_norm import UnifiedNorm
from .weight_standardization import center_weight, weight_standardization

__all__ = [
    "AdaptiveInstanceNorm",
    "BatchChannelNorm",
    "CRMSNorm",
    "Derf",
    "DomainSplitNorm",
    "DyT",
    "EstimatedBatchNorm",
    "FeedForward",
    "LayerNorm",
    "LearnableRegionNorm",
    "MaskedBatchNorm",
    "Monitor",
    "MovingAverageBatchNorm",
    "NormedBranch",
    "PowerNorm",
    "ProgressiveNorm",
    "RMSNorm",
    "RegionNorm",
    "RegularizedBatchNorm",
    "RepBatchNorm",
    "SelfAttention",
    "TimeDependentLayerNorm",
    "TransformerBlock",
    "TransformerStack",
    "UnifiedNorm",
    "batch_norm_penalty",
    "calibrate",
    "center_weight",
    "choose_domain",
    "convert_sync",
    "keep_norms",
    "layer_placements",
    "monitor",
    "norm_bounds",
    "set_momentum",
    "sigma_reparam",
    "weight_standardization",
]
