"""The gains and shifts of norms, of whatever shape, and what each is where it changes nothing."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ._running_norm import ChannelNorm
from .batch_channel_norm import BatchChannelNorm
from .dynamic_activation import Derf, DyT
from .foreign_norms import ForeignNorm, is_foreign_norm, is_measurable, measure
from .head_affine import HeadAffine
from .region_norm import RegionNorm
from .time_layer_norm import OffsetRMSNorm, TimeRamp

_PLAIN = (
    *(nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _BatchNorm, _InstanceNorm),
    *(ChannelNorm, DyT, Derf, RegionNorm, OffsetRMSNorm, HeadAffine),
)


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
    measured = _measured(module)  # runs the norm, so once
    gains, shifts = _gains(module, measured), _shifts(module, measured)
    return gains | dict.fromkeys(shifts, 0.0)


def gains_of(module: nn.Module) -> list[nn.Parameter]:
    """Those of :func:`gains_and_shifts` that are gains."""
    return list(_gains(module, _measured(module)))


def _gains(module: nn.Module, measured: ForeignNorm | None) -> dict[nn.Parameter, float]:
    if isinstance(module, TimeRamp):
        neutral = dict.fromkeys(("start", "end") * bool(module.neutral), module.neutral)
    elif isinstance(module, BatchChannelNorm):
        neutral = {"group_weight": 1.0}
    elif measured is not None:
        return {} if measured.gain_parameter is None else {measured.gain_parameter: measured.neutral}
    elif _is_plain(module):
        added = isinstance(module, RegionNorm) or getattr(module, "unit_offset", False)
        neutral = {"weight": 0.0 if added else 1.0}
    else:
        neutral = {}
    found = {getattr(module, name, None): value for name, value in neutral.items()}
    return {p: value for p, value in found.items() if isinstance(p, nn.Parameter)}


def _shifts(module: nn.Module, measured: ForeignNorm | None) -> list[nn.Parameter]:
    names: tuple[str, ...] = ()
    if isinstance(module, TimeRamp):
        names = ("slope", "offset") if module.neutral else ("start", "end", "slope", "offset")
    elif isinstance(module, BatchChannelNorm):
        names = ("group_bias",)
    elif measured is not None:
        return [] if measured.shift_parameter is None else [measured.shift_parameter]
    elif _is_plain(module):
        names = ("bias",)
    return [p for p in (getattr(module, name, None) for name in names) if isinstance(p, nn.Parameter)]


def _is_plain(module: nn.Module) -> bool:
    return isinstance(module, _PLAIN) or is_foreign_norm(module)


def _measured(module: nn.Module) -> ForeignNorm | None:
    return measure(module) if is_measurable(module) else None
