"""Models whose ``forward`` takes and returns less than its own signature allows."""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn


def calling(
    model: nn.Module,
    names: Sequence[str],
    fixed: Mapping[str, Any],
    select: Callable[[Any], Mapping[str, torch.Tensor]],
    arrange: Callable[[dict[str, torch.Tensor]], dict[str, Any]] = dict,
) -> nn.Module:
    """A shallow copy of a model, with its parameters and under its name, that is called with these arguments only.

    Args:
        model: is not changed.
        names: of the arguments that ``forward`` takes.
        fixed: further arguments of the model's own ``forward``.
        select: makes of its outputs what is returned.
        arrange: makes of the arguments what its ``forward`` takes.
    """

    def forward(self: nn.Module, *args: torch.Tensor, **kwargs: torch.Tensor) -> Mapping[str, torch.Tensor]:
        given = dict(zip(names, args, strict=False)) | kwargs
        return select(type(self).forward(self, **arrange(given), **fixed))

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature([inspect.Parameter(name, kind) for name in ("self", *names)])
    setattr(forward, "__signature__", signature)  # noqa: B010
    called = copy.copy(model)
    called.forward = types.MethodType(forward, called)  # a bound method is copied along with its object
    return called
