"""Numbers that no training leaves behind."""

from __future__ import annotations

import torch
from torch import nn

from normfuse.checkpoint.archive import CheckpointError

_SECOND_MOMENTS = ("running_var", "running_phi")


def check_numbers(module: nn.Module, source: str) -> None:
    """Refuses, naming the tensor, parameters and norm statistics that are not finite, NaN in any other buffer
    (masks may hold infinities), and a negative ``running_var`` or ``running_phi``."""

    def refuse(name: str, what: str) -> None:
        raise CheckpointError(f"{source}: {name} {what}; the training it comes from has diverged or the file is wrong")

    for prefix, part in module.named_modules():
        statistics = any(isinstance(getattr(part, name, None), torch.Tensor) for name in _SECOND_MOMENTS)
        for own, tensor in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
            name = f"{prefix}.{own}" if prefix else own
            if not (tensor.is_floating_point() or tensor.is_complex()):
                continue
            if tensor.isnan().any():
                refuse(name, f"holds NaN ({int(tensor.isnan().sum())} of {tensor.numel()} values)")
            if (statistics or isinstance(tensor, nn.Parameter)) and not tensor.isfinite().all():
                refuse(name, f"holds infinity ({int(tensor.isinf().sum())} of {tensor.numel()} values)")
            if own in _SECOND_MOMENTS and (tensor < 0).any():
                refuse(
                    name,
                    f"is negative (as low as {tensor.min().item():.3g}), which no mean of squares can be",
                )
