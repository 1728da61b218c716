"""What trainings put around a model, and how to look through it."""

from __future__ import annotations

from torch import nn
from torch.optim.swa_utils import AveragedModel

_AROUND = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


def unwrapped(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """The module inside DataParallel, DistributedDataParallel, AveragedModel and torch.compile, and what is to be said
    of it."""
    while isinstance(model, _AROUND) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, _AROUND) else model._orig_mod
    return model, []
