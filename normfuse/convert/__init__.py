"""Changes to a live model."""

from .adaptation import adapt, freeze
from .adapting_norms import AlphaBatchNorm, DecayingBatchNorm, UnMixBatchNorm
from .around import reparametrize, split_domains
from .callbacks import lightning_callback, trainer_callback
from .distillation import Distillation, distill, output_error, relative_error
from .only_norms import DeadChannels, freeze_to_norms, remove_dead_channels
from .originals import load_original
from .placement import Placed, place
from .pretrained import from_pretrained
from .progressive import Conversion, Schedule, progressive
from .reconstruction import reconstruct
from .swap import Swap, SwapReport, swap_norms
from .tapering import ScaleAnchor, taper

__all__ = [
    "AlphaBatchNorm",
    "Conversion",
    "DeadChannels",
    "DecayingBatchNorm",
    "Distillation",
    "Placed",
    "ScaleAnchor",
    "Schedule",
    "Swap",
    "SwapReport",
    "UnMixBatchNorm",
    "adapt",
    "distill",
    "freeze",
    "freeze_to_norms",
    "from_pretrained",
    "lightning_callback",
    "load_original",
    "output_error",
    "place",
    "progressive",
    "reconstruct",
    "relative_error",
    "remove_dead_channels",
    "reparametrize",
    "split_domains",
    "swap_norms",
    "taper",
    "trainer_callback",
]
