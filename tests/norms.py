"""The norms of the registry as tests want them: a new row is tested wherever norms are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from normfuse.nn import PowerNorm, UnifiedNorm
from normfuse.nn.registry import NORMS


def running(channels: int, *names: str) -> dict[str, Callable[..., nn.Module]]:
    """Unified and Power Norm in the forms of these names, or in all, soon past warm-up; they take further options."""
    forms = {
        "unified": partial(UnifiedNorm, channels, warmup_iters=2, window_size=2),
        "unified, filtered": partial(UnifiedNorm, channels, warmup_iters=2, window_size=3, outlier_filtration=True),
        "power": partial(PowerNorm, channels, warmup_iters=2, group_num=2),
        "power, no groups": partial(PowerNorm, channels, warmup_iters=2, group_num=None),
        "power, paper": partial(PowerNorm, channels, warmup_iters=2, group_num=None, backward="paper"),
    }
    return {name: forms[name] for name in names or forms}


def has_statistics(module: nn.Module) -> bool:
    """Whether a module has running statistics itself."""
    return any(name.startswith("running_") for name, _ in module.named_buffers(recurse=False))


def makers(static: bool = False, **wanted: object) -> dict[str, Callable[..., nn.Module]]:
    """Every row that is a norm with running statistics itself, by its name: builds it for a number of channels.

    Args:
        static: only those that are one affine map in evaluation.
        wanted: options, for the norms that have them.
    """
    found = {}
    for entry in NORMS:
        norm = entry.make(8)
        if has_statistics(norm) and (entry.static or not static):
            found[entry.name] = partial(entry.make, **{name: o for name, o in wanted.items() if hasattr(norm, name)})
    return found


def with_statistics(channels: int, static: bool = False, **wanted: object) -> dict[str, Callable[..., nn.Module]]:
    """The same norms for a number of channels."""
    return {name: partial(make, channels) for name, make in makers(static, **wanted).items()}
