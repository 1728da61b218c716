"""Which parameters weight decay and projection are not for."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..nn.gains import gains_and_shifts


def no_decay(model: nn.Module, weight_decay: float = 0.01) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser: weights decay; biases and the gains and shifts of norms do not.

    Gains of more than one axis, such as a RegionNorm's [2, C] or a LayerNorm's over several dimensions, do not decay
    either, although they look like weights. In the group without decay ``delta`` is 0, so that AdamP and SGDP never
    project them either; other optimisers ignore it.

    Args:
        model: whose parameters to sort; those that do not require a gradient are left out, shared ones count once.
        weight_decay: of the first group.

    Returns:
        Two groups, weights first. Every parameter of one axis or none is in the second.

    Raises:
        ValueError: ``weight_decay`` is negative.

    Example:
        >>> from normfuse.optim import AdamP, no_decay
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        >>> optimizer = AdamP(no_decay(model, weight_decay=0.05), lr=1e-3)
        >>> [group["weight_decay"] for group in optimizer.param_groups]
        [0.05, 0.0]
    """
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay={weight_decay} is not allowed; give a number of at least 0")
    affine = {p for module in model.modules() for p in gains_and_shifts(module)}
    learning = [p for p in model.parameters() if p.requires_grad]
    exempt = [p for p in learning if p in affine or p.dim() <= 1]
    left = set(exempt)
    return [
        {"params": [p for p in learning if p not in left], "weight_decay": weight_decay},
        {"params": exempt, "weight_decay": 0.0, "delta": 0.0},
    ]
