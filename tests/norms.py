"""The norms of the registry as tests want them: a new row is tested wherever norms are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from normfuse.nn import PowerNorm, UnifiedNorm
from normfuse.nn._running_norm import ChannelNorm, RunningNorm
from normfuse.nn.registry import NORMS


def running(channels: int, *names: str) -> dict[str, Callable[..., RunningNorm]]:
    """Unified and Power Norm in the forms of these names, or in all, soon past warm-up; they take further options."""
    forms = {
        "unified": partial(UnifiedNorm, channels, warmup_iters=2, window_size=2),
        "unified, filtered": partial(UnifiedNorm, channels, warmup_iters=2, window_size=3, outlier_filtration=True),
        "power": partial(PowerNorm, channels, warmup_iters=2, group_num=2),
        "power, no groups": partial(PowerNorm, channels, warmup_iters=2, group_num=None),
        "power, paper": partial(PowerNorm, channels, warmup_iters=2, group_num=None, backward="paper"),
    }
    return {name: forms[name] for name in names or forms}


def with_statistics(channels: int, static: bool = False, **wanted: object) -> dict[str, Callable[..., ChannelNorm]]:
    """Every row that is a norm with running statistics itself, by its name, with those of the options that it has.

    ``static``: only those that are one affine map in evaluation.
    """
    found = {}
    for entry in NORMS:
        norm = entry.make(8)
        if isinstance(norm, ChannelNorm) and (entry.static or not static):
            options = {name: value for name, value in wanted.items() if hasattr(norm, name)}
            found[entry.name] = partial(entry.make, channels, **options)
    return found
