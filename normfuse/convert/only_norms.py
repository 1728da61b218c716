"""Training nothing but norms, and taking out the channels that such training switches off."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..folding.dead import Dead, columns_of, find_dead, open_for_removal, weights_of
from ..folding.gauge import Gauge
from ..folding.nodes import module_of
from ..folding.rules.base import argument
from ..nn import MaskedBatchNorm, MovingAverageBatchNorm, PowerNorm, RepBatchNorm, UnifiedNorm
from ..nn._running_norm import check_choice
from ..nn.calibration import keep_modes
from ..nn.gains import gains_and_shifts, gains_of

INITS = ("keep", "one", "uniform")
_STATIC = (_BatchNorm, MaskedBatchNorm, MovingAverageBatchNorm, UnifiedNorm, PowerNorm)
_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@torch.no_grad()
def freeze_to_norms(
    model: nn.Module, *, also: str | None = None, init: str = "keep", generator: torch.Generator | None = None
) -> list[str]:
    """Freeze all parameters but the gains and biases of norms (Frankle et al., 2021, arXiv 2003.00152).

    Args:
        model: changed in place. Statistics are still updated in training mode.
        also: name of a module whose parameters are trained too, usually the output layer.
        init: gains as they are ("keep"), all 1 ("one"), or drawn from 0 to 1 ("uniform"); shifts become 0 with the
            latter two.
        generator: for "uniform".

    Returns:
        The names of the trained parameters; give these to the optimiser.

    Raises:
        ValueError: an option is not allowed, or no norm has a gain.

    Example:
        >>> from normfuse.convert import freeze_to_norms
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        >>> freeze_to_norms(model, also="2")
        ['1.weight', '1.bias', '2.weight', '2.bias']
    """
    check_choice("init", init, INITS)
    names = dict(model.named_modules())
    if also is not None and also not in names:
        raise ValueError(
            f"also={also!r} is not a module of the model; give one of its names, such as {list(names)[-1]!r}"
        )
    affine = {p: neutral for module in names.values() for p, neutral in gains_and_shifts(module).items()}
    if not affine:
        raise ValueError(f"model of class {type(model).__name__} has no norm with a gain to train")
    model.requires_grad_(False)
    for module in names.values():
        own = gains_and_shifts(module)
        if own:
            for parameter in module.parameters(recurse=False):  # with the learned scalars of a norm, such as alpha
                parameter.requires_grad_(True)
        if init != "keep":
            _restart(module, own, init, generator)
    if also is not None:
        names[also].requires_grad_(True)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _restart(module: nn.Module, own: dict[nn.Parameter, float], init: str, generator: torch.Generator | None) -> None:
    """Gains all 1 or drawn from 0 to 1, shifts 0."""
    for parameter, neutral in own.items():
        parameter.fill_(neutral)
    if init == "uniform":
        for parameter in gains_of(module):
            drawn = torch.rand(parameter.shape, generator=generator).to(parameter)
            # A gain that is stored as what is added to 1 starts at 0.
            parameter.add_(drawn - 1)


@dataclass(frozen=True)
class DeadChannels:
    """The channels that :func:`remove_dead_channels` removed.

    Attributes:
        removed: norm → (layer before, layers behind, indices of the channels when they were removed); of several norms
            in a row the first.
        kept: norm with dead channels → why they, or some of them, stay.
        parameters_before: number of parameters of the model before.
        parameters_after: their number now.
    """

    removed: dict[str, tuple[str, tuple[str, ...], list[int]]] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    parameters_before: int = 0
    parameters_after: int = 0

    def __str__(self) -> str:
        lines = [
            f"{n}: {len(c)} channels between {a} and {', '.join(b)} removed" for n, (a, b, c) in self.removed.items()
        ]
        lines += [f"{norm}: kept, {why}" for norm, why in self.kept.items()]
        return "\n".join([*lines, f"parameters: {self.parameters_before} -> {self.parameters_after}"])


@torch.no_grad()
def remove_dead_channels(
    model: nn.Module,
    example_inputs: Tensor | tuple[Tensor, ...],
    *,
    threshold: float = 0.0,
    kwargs: dict[str, Any] | None = None,
) -> DeadChannels:
    """Remove the channels that a static norm multiplies by (nearly) zero from the model.

    Such a channel carries a constant, which goes into the biases of the layers that read it; the channel goes from all
    layers and norms that hold it. Found is what :func:`normfuse.folding.remove_dead_channels` finds in the exported
    program, if modules of their own hold it: Linear and convolutions that are called once, and the static norms.

    Args:
        model: changed in place; parameters are replaced by smaller ones, so create optimisers afterwards.
        example_inputs: a tensor or a tuple of them to trace the model with, in evaluation mode.
        threshold: a channel is dead where the norm's ``|gain|`` is at most that. A normalised channel has a mean square
            of at most 1 over data with the norm's statistics, so behind the norm a removed channel changes by at most
            its gain in the root of the mean square; with 0 the function stays what it was. A
            :class:`normfuse.nn.RepBatchNorm` has a shortcut besides its gain and loses nothing.
        kwargs: further ones, by name.

    Returns:
        A :class:`DeadChannels`; ``print`` it. A norm whose dead channels cannot go is named there with the reason.

    Raises:
        ValueError: ``threshold`` is negative.

    Example:
        >>> from normfuse.convert import remove_dead_channels
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).eval()
        >>> _ = nn.init.zeros_(model[1].weight[:3])
        >>> dead = remove_dead_channels(model, torch.randn(5, 4))
        >>> model[0]
        Linear(in_features=4, out_features=5, bias=True)
    """
    if not threshold >= 0:
        raise ValueError(f"threshold={threshold} is not allowed; give a number of at least 0")
    if isinstance(example_inputs, Tensor):
        example_inputs = (example_inputs,)
    before = _count(model)
    gains = {m: m.weight.clone() for m in model.modules() if _multiplies(m)}
    small = {norm: gain.abs() <= threshold for norm, gain in gains.items()}
    removed: dict[str, tuple[str, tuple[str, ...], list[int]]] = {}
    kept: dict[str, str] = {}
    shrunk: set[Any] = set()
    try:
        for norm, where in small.items():
            norm.weight.masked_fill_(where, 0.0)
        with keep_modes(model):
            program = torch.export.export(model.eval(), example_inputs, kwargs)
        gauge = open_for_removal(program)
        for writer in weights_of(gauge):
            found = find_dead(writer, gauge)
            if not isinstance(found, Dead):
                if found is not None and found.reason:
                    kept[found.name] = found.reason
            elif why := _why_not(found, model, gauge):
                kept[found.norm] = why
            else:
                layers = [gauge.path(node) for node in (writer, *found.readers)]
                shrunk |= _shrink(found, model, gauge, gains)
                removed[found.norm] = (layers[0], tuple(layers[1:]), found.dead.nonzero()[0].tolist())
    finally:
        for norm, gain in gains.items():
            norm.weight.copy_(gain)
    for name, norm in model.named_modules():
        if norm in small and small[norm].any() and norm not in shrunk:
            kept.setdefault(name, "it does not stand between linear layers or ungrouped convolutions alone")
        elif norm in shrunk and (left := int((norm.weight.abs() <= threshold).sum())):
            kept[name] = (
                f"{left} of them: a padded convolution shows another number at its borders, or no other is left"
            )
    return DeadChannels(removed, kept, before, _count(model))


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _multiplies(norm: nn.Module) -> bool:
    """Whether the gain of a norm is all that its channels are multiplied by, but for constants that are not zero."""
    plain = isinstance(norm, _STATIC) and not isinstance(norm, RepBatchNorm) and not getattr(norm, "group_num", 0)
    return plain and norm.weight is not None


def _why_not(found: Dead, model: nn.Module, gauge: Gauge) -> str:
    """Why the model's modules cannot lose these channels; empty if they can."""
    held = set()
    for node in (found.writer, *found.readers):
        path = module_of(node)[0]
        layer, names = model.get_submodule(path), gauge.program.names(argument(node, "weight"))
        if type(layer) not in _WEIGHTED or names != [f"{path}.weight"]:
            return f"{gauge.describe(node)} is not a call of a plain linear layer or convolution"
        held |= {f"{path}.weight", f"{path}.bias"}
    for node in found.inside:
        constants = [c for c in node.all_input_nodes if gauge.program.is_constant(c) and c.meta["val"].numel() > 1]
        if node is not found.writer and constants:
            path = module_of(node)[0]
            if not isinstance(model.get_submodule(path), _STATIC):
                return f"{gauge.describe(node)} has constants of its own for these channels"
            held |= {f"{path}.{name}" for name in model.get_submodule(path).state_dict()}
    inside = {found.writer, *found.readers, *found.inside}
    for node in gauge.program.graph.nodes:
        constants = [] if node in inside or gauge.program.is_constant(node) else node.all_input_nodes
        for constant in filter(gauge.program.is_constant, constants):
            for name in held.intersection(gauge.program.names(constant)):
                return f"{name} is read at another place, too"
    return ""


def _shrink(found: Dead, model: nn.Module, gauge: Gauge, gains: dict[nn.Module, Tensor]) -> set[nn.Module]:
    """Cut the channels out of layers and norms, and of the gains that are to come back; returns the norms."""
    for reader in found.readers:
        layer = model.get_submodule(gauge.path(reader))
        index, _, number = columns_of(reader, found.inside, gauge)
        lost = found.dead[index]
        taps = layer.weight.double()
        extra = (taps.flatten(2).sum(2) if taps.dim() > 2 else taps) @ _like(np.where(lost, number, 0.0), taps)
        if extra.any():
            bias = torch.zeros_like(extra) if layer.bias is None else layer.bias.double()
            layer.bias = _parameter((bias + extra).to(layer.weight.dtype), layer.bias)
        layer.weight = _parameter(layer.weight[:, _like(~lost, taps)], layer.weight)
        _count_channels(layer, "in", 1)
    layer = model.get_submodule(gauge.path(found.writer))
    keep = torch.from_numpy(~found.dead).to(layer.weight.device)
    layer.weight = _parameter(layer.weight[keep], layer.weight)
    if layer.bias is not None:
        layer.bias = _parameter(layer.bias[keep], layer.bias)
    _count_channels(layer, "out", 0)
    norms = set()
    for node, channels in found.inside.items():
        norm = model.get_submodule(module_of(node)[0])
        if isinstance(norm, _STATIC) and norm not in norms:  # one norm can take several operations
            _shrink_norm(norm, _like(~found.dead[channels.channel.ravel()], layer.weight), gains)
            norms.add(norm)
    return norms


def _shrink_norm(norm: nn.Module, keep: Tensor, gains: dict[nn.Module, Tensor]) -> None:
    for label, parameter in list(norm._parameters.items()):
        if parameter is not None and parameter.dim():
            setattr(norm, label, _parameter(parameter[keep], parameter))
    for label, buffer in list(norm._buffers.items()):
        if buffer is not None and buffer.dim() and buffer.is_floating_point():
            setattr(norm, label, buffer[..., keep].clone())
    norm.num_features = int(keep.sum())
    if norm in gains:
        gains[norm] = gains[norm][keep]


def _count_channels(layer: nn.Module, side: str, axis: int) -> None:
    setattr(layer, f"{side}_features" if isinstance(layer, nn.Linear) else f"{side}_channels", layer.weight.shape[axis])


def _like(values: np.ndarray, tensor: Tensor) -> Tensor:
    return torch.from_numpy(values).to(tensor.device)


def _parameter(value: Tensor, like: nn.Parameter | None) -> nn.Parameter:
    return nn.Parameter(value.clone(), requires_grad=like is None or like.requires_grad)
