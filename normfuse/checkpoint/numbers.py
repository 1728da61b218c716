"""Numbers that no training leaves behind."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from normfuse.checkpoint.archive import CheckpointError

_SECOND_MOMENTS = ("running_var", "running_phi")


def check_numbers(module: nn.Module, source: str) -> None:
    """Refuses the parameters and buffers of a module as :func:`check_tensors` does."""
    check_tensors({**dict(module.named_parameters()), **dict(module.named_buffers())}, source)


@torch.no_grad()
def check_tensors(tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Refuses numbers that no training leaves behind, naming the tensor.

    These are parameters and norm statistics that are not finite, NaN in any other buffer (masks may hold infinities),
    and a negative ``running_var`` or ``running_phi``.

    Args:
        tensors: by the names that they have in the module; parameters are of that class.
        source: for messages.
    """

    def refuse(name: str, what: str) -> None:
        raise CheckpointError(f"{source}: {name} {what}; the training it comes from has diverged or the file is wrong")

    paths = {name: name.rpartition(".") for name in tensors}
    norms = {prefix for prefix, _, own in paths.values() if own in _SECOND_MOMENTS}
    for name, tensor in tensors.items():
        prefix, _, own = paths[name]
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        if tensor.isnan().any():
            refuse(name, f"holds NaN ({int(tensor.isnan().sum())} of {tensor.numel()} values)")
        if (prefix in norms or isinstance(tensor, nn.Parameter)) and not tensor.isfinite().all():
            refuse(name, f"holds infinity ({int(tensor.isinf().sum())} of {tensor.numel()} values)")
        if own in _SECOND_MOMENTS and (tensor < 0).any():
            refuse(name, f"is negative (as low as {tensor.min().item():.3g}), which no mean of squares can be")
