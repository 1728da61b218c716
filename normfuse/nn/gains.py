"""The gains and shifts of norms, of whatever shape, and what each is where it changes nothing."""

from __future__ import annotations

import re

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ._running_norm import ChannelNorm
from .batch_channel_norm import BatchChannelNorm
from .dynamic_activation import Derf, DyT
from .region_norm import RegionNorm
from .time_layer_norm import OffsetRMSNorm, TimeRamp

# Other libraries write norms of their own, without a base class; their names all end like this.
FOREIGN = re.compile(r"(Layer_?Norm|RMS_?Norm)(2d)?$", re.IGNORECASE)
_PLAIN = (
    *(nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _BatchNorm, _InstanceNorm),
    *(ChannelNorm, DyT, Derf, RegionNorm, OffsetRMSNorm),
)


def is_foreign_norm(module: nn.Module) -> bool:
    """Whether another library's module without children is a LayerNorm or RMSNorm by its name."""
    return next(module.children(), None) is None and FOREIGN.search(type(module).__name__) is not None


def gains_and_shifts(module: nn.Module) -> dict[nn.Parameter, float]:
    """The parameters of a norm itself (not of modules in it) that scale and shift its result.

    Args:
        module: any module; one that is no norm has none.

    Returns:
        Each such parameter, with the number that is everywhere in it where it changes nothing: 1 or 0 for gains, 0 for
        shifts.

    Example:
        >>> [tuple(p.shape) for p in gains_and_shifts(BatchChannelNorm(8, 2))]
        [(2,), (2,)]
    """
    if isinstance(module, TimeRamp):
        own = {"start": module.neutral, "end": module.neutral, "slope": 0.0, "offset": 0.0}
    elif isinstance(module, BatchChannelNorm):
        own = {"group_weight": 1.0, "group_bias": 0.0}
    elif isinstance(module, _PLAIN) or is_foreign_norm(module):
        added = isinstance(module, RegionNorm) or getattr(module, "unit_offset", False)
        own = {"weight": 0.0 if added else 1.0, "bias": 0.0}
    else:
        own = {}
    found = {getattr(module, name, None): neutral for name, neutral in own.items()}
    return {p: neutral for p, neutral in found.items() if isinstance(p, nn.Parameter)}


def gains_of(module: nn.Module) -> list[nn.Parameter]:
    """Those of :func:`gains_and_shifts` that are gains."""
    names = ("weight", "group_weight") if not isinstance(module, TimeRamp) else ("start", "end") * bool(module.neutral)
    own = gains_and_shifts(module)
    return [p for p in (getattr(module, name, None) for name in names) if p in own]
