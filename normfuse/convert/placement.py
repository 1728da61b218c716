"""Other places for the norms of a live model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..nn import NormedBranch, TransformerBlock, TransformerStack
from ..nn.placement import layer_placements

_OURS = (TransformerBlock, NormedBranch)
_TORCH = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


@dataclass(frozen=True)
class Placed:
    """One layer whose norms were placed.

    Attributes:
        name: of the layer in the model.
        before: the placement of its norms before.
        after: their placement now.
    """

    name: str
    before: str
    after: str


def _placement(layer: nn.Module) -> str:
    return layer.placement if isinstance(layer, _OURS) else "pre" if layer.norm_first else "post"


def _stacks(model: nn.Module) -> list[tuple[nn.Module | None, dict[str, nn.Module]]]:
    """Layers by the module that holds them, in the order of the model; a stack of ours comes with itself."""
    groups: dict[str, tuple[nn.Module | None, dict[str, nn.Module]]] = {}
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in inside):
            continue
        if isinstance(module, TransformerStack):
            layers = {f"{name}.blocks.{i}".lstrip("."): block for i, block in enumerate(module.blocks)}
            groups[f"{name}.blocks"] = (module, layers)
        elif isinstance(module, (*_OURS, *_TORCH)):
            groups.setdefault(name.rpartition(".")[0], (None, {}))[1][name] = module
        else:
            continue
        inside.append(f"{name}." if name else "")
    return list(groups.values())


def place(model: nn.Module, placement: str, *, fraction: float = 0.25, count: int | None = None) -> list[Placed]:
    """Change the placement of the norms of ``model`` in place.

    This changes the function of the model, so train it afterwards.

    Found are :class:`normfuse.nn.TransformerStack`, :class:`~normfuse.nn.TransformerBlock`,
    :class:`~normfuse.nn.NormedBranch`, and torch's TransformerEncoderLayer and TransformerDecoderLayer, which know
    "pre" and "post". Layers that one module holds are one stack. Norms keep what they have learned; those that
    "peri" adds are fresh.

    Args:
        model: changed in place.
        placement: "pre", "post", "peri", or "mix", the first layers of each stack "post", the others "pre".
        fraction: for "mix", see :func:`normfuse.nn.layer_placements`.
        count: for "mix", see :func:`normfuse.nn.layer_placements`.

    Returns:
        One entry per layer.

    Raises:
        ValueError: an option is not allowed, there is no such layer, or one has no such placement. The model is then
            as before.

    Example:
        >>> from normfuse.convert import place
        >>> from normfuse.nn import TransformerStack
        >>> place(TransformerStack(16, depth=2, num_heads=2), "post")[0]
        Placed(name='blocks.0', before='pre', after='post')
    """
    stacks = _stacks(model)
    if not stacks:
        raise ValueError(
            f"model of class {type(model).__name__} has no layer whose placement can be changed; build it from "
            "normfuse.nn.NormedBranch or torch.nn.TransformerEncoderLayer"
        )
    wanted = [layer_placements(len(layers), placement, fraction=fraction, count=count) for _, layers in stacks]
    for (_, layers), placements in zip(stacks, wanted, strict=True):
        for (name, layer), own in zip(layers.items(), placements, strict=True):
            if isinstance(layer, _TORCH) and own == "peri":
                raise ValueError(f"{name}, a {type(layer).__name__}, has no place for the outer norms of 'peri'")
    report = []
    for (stack, layers), placements in zip(stacks, wanted, strict=True):
        for (name, layer), own in zip(layers.items(), placements, strict=True):
            report.append(Placed(name, _placement(layer), own))
            if isinstance(layer, _OURS):
                layer.placement = own
            else:
                layer.norm_first = own == "pre"
        if stack is not None:
            stack.place(placement, fraction=fraction, count=count)
    return report
