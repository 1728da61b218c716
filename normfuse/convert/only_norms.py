"""Training nothing but norms, and taking out the channels that such training switches off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ..fold.program import Program
from ..nn import Derf, DyT, MaskedBatchNorm, MovingAverageBatchNorm, PowerNorm, RepBatchNorm, UnifiedNorm
from ..nn._running_norm import ChannelNorm, check_choice
from .swap import _is_norm

aten = torch.ops.aten
INITS = ("keep", "one", "uniform")
_DYNAMIC = (nn.GroupNorm, _InstanceNorm, DyT, Derf)
_STATIC = (_BatchNorm, MaskedBatchNorm, MovingAverageBatchNorm, UnifiedNorm, PowerNorm)
_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_POINTWISE = {
    *(aten.relu.default, aten.gelu.default, aten.silu.default, aten.tanh.default, aten.sigmoid.default),
    *(aten.leaky_relu.default, aten.elu.default, aten.hardswish.default, aten.hardtanh.default, aten.mish.default),
    *(aten.softplus.default, aten.relu6.default, aten.dropout.default, aten.batch_norm.default, aten.addcmul.default),
    *(aten.clone.default, aten.alias.default, aten.contiguous.default, aten.detach.default),
}


@torch.no_grad()
def freeze_to_norms(
    model: nn.Module, *, also: str | None = None, init: str = "keep", generator: torch.Generator | None = None
) -> list[str]:
    """Let only gains and shifts of norms learn (Frankle et al., 2021, arXiv 2003.00152).

    Args:
        model: changed in place. Statistics go on moving in training mode.
        also: name of a module whose parameters learn too, usually the output layer.
        init: gains as they are ("keep"), all 1 ("one"), or drawn from 0 to 1 ("uniform"); shifts become 0 with the
            latter two.
        generator: for "uniform".

    Returns:
        The names of the parameters that learn; give those to the optimiser.

    Raises:
        ValueError: an option is not allowed, or no norm has a gain.
    """
    check_choice("init", init, INITS)
    names = {name: module for name, module in model.named_modules()}
    if also is not None and also not in names:
        raise ValueError(f"also={also!r} is no module of the model; give one of its names, such as {list(names)[-1]!r}")
    norms = [m for m in names.values() if _is_norm(m) or isinstance(m, (ChannelNorm, *_DYNAMIC))]
    gains = [norm for norm in norms if isinstance(getattr(norm, "weight", None), Tensor)]
    if not gains:
        raise ValueError(f"model of class {type(model).__name__} has no norm with a gain to train")
    model.requires_grad_(False)
    for norm in gains:
        norm.requires_grad_(True)
        if init != "keep":
            start = torch.ones(norm.weight.shape)
            norm.weight.copy_(start if init == "one" else torch.rand(start.shape, generator=generator))
            if norm.bias is not None:
                norm.bias.zero_()
    if also is not None:
        names[also].requires_grad_(True)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@dataclass(frozen=True)
class DeadChannels:
    """What :func:`remove_dead_channels` did.

    Attributes:
        removed: norm → (layer before, layer behind, indices of the channels when they were removed).
        kept: norm with dead channels → why they stay.
        parameters_before, parameters_after: numbers of parameters of the model.
    """

    removed: dict[str, tuple[str, str, list[int]]] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    parameters_before: int = 0
    parameters_after: int = 0

    def __str__(self) -> str:
        lines = [f"{n}: {len(c)} channels between {a} and {b} removed" for n, (a, b, c) in self.removed.items()]
        lines += [f"{norm}: kept, {why}" for norm, why in self.kept.items()]
        return "\n".join([*lines, f"parameters: {self.parameters_before} -> {self.parameters_after}"])


@torch.no_grad()
def remove_dead_channels(
    model: nn.Module,
    example_inputs: tuple[Tensor, ...],
    *,
    threshold: float = 0.0,
    kwargs: dict[str, Any] | None = None,
) -> DeadChannels:
    """Take the channels out of the model that a static norm multiplies by (nearly) zero.

    Between two linear layers or convolutions with nothing but norms and pointwise functions between them, a channel
    whose gain is zero carries a constant: it goes into the bias of the layer behind, and the channel goes from both
    layers and from what lies between. With gains of zero the function stays what it was.

    Args:
        model: changed in place; parameters are replaced by smaller ones, so create optimisers afterwards.
        example_inputs, kwargs: to trace the model with, in evaluation mode.
        threshold: a channel is dead where its deviation behind the norm, ``|gain|`` for a BatchNorm, is at most that.
            Above 0 the function changes by what is removed.

    Returns:
        A :class:`DeadChannels`; ``print`` it. A norm whose dead channels cannot go is named there with the reason.

    Raises:
        ValueError: ``threshold`` is negative.
    """
    if not threshold >= 0:
        raise ValueError(f"threshold={threshold} is not allowed; give a number of at least 0")
    training = model.training
    try:
        program = torch.export.export(model.eval(), example_inputs, kwargs)
    finally:
        model.train(training)
    before, removed, kept = _count(model), {}, {}
    opened, shrunk, again = Program(program), set(), False
    for name, norm in model.named_modules():
        dead = _dead(norm, threshold)
        if dead is None or not dead.any():
            continue
        if norm in shrunk:  # a norm beside it has lost channels already: the program shows it as it was
            again = True
            continue
        done = _remove(name, norm, dead, model, opened)
        if isinstance(done, str):
            kept[name] = done
            continue
        layers, norms = done
        removed[name] = (*layers, dead.nonzero().flatten().tolist())
        shrunk.update(norms)
    if again:
        rest = remove_dead_channels(model, example_inputs, threshold=threshold, kwargs=kwargs)
        removed, kept = removed | rest.removed, kept | rest.kept
    return DeadChannels(removed, kept, before, _count(model))


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _dead(norm: nn.Module, threshold: float) -> Tensor | None:
    """Which channels vary by at most ``threshold`` behind a static norm, bool [C]; None for everything else."""
    if not isinstance(norm, _STATIC) or norm.weight is None or getattr(norm, "group_num", 0):
        return None
    strength = norm.weight.abs()
    if isinstance(norm, RepBatchNorm):
        strength = (norm.weight + norm.alpha * torch.sqrt(norm.running_var + norm.eps)).abs()
    return strength <= threshold


def _remove(
    name: str, norm: nn.Module, dead: Tensor, model: nn.Module, program: Program
) -> tuple[tuple[str, str], list[nn.Module]] | str:
    """Remove the channels; the names of the layers around and the norms between, or why nothing was removed."""
    nodes = [n for n in program.graph.nodes if _path(n) == name and not program.is_constant(n)]
    nodes = [n for n in nodes if n.target in _POINTWISE]
    if len(nodes) != 1:
        return "the model uses the norm at several places, or not at all"
    before, why = _follow(nodes[0], lambda n: _data_inputs(n, program), "its input", program)
    if before is None:
        return why
    behind, why = _follow(nodes[0], lambda n: list(n.users), "its result", program)
    if behind is None:
        return why
    layers = [model.get_submodule(_path(node)) for node in (before[-1], behind[-1])]
    for layer, node in zip(layers, (before[-1], behind[-1]), strict=True):
        if type(layer) not in _WEIGHTED or getattr(layer, "groups", 1) != 1:
            return f"{_path(node)} is a {type(layer).__name__} that is no plain linear layer or ungrouped convolution"
        if (
            sum(parameter is layer.weight for module in model.modules() for parameter in module._parameters.values())
            > 1
        ):
            return f"the weight of {_path(node)} is used at several places"
    constant = _constant(norm, nodes[0], behind[:-1], program)
    first, second = layers
    padding = getattr(second, "padding", ())
    padded = padding == "same" or any(amount for amount in padding if padding != "valid")
    if padded and constant[dead].any():
        return f"{_path(behind[-1])} pads with zeros, where the channels' constants are not zero"
    keep = ~dead
    keep[0] |= not keep.any()  # a layer without channels is none
    between = [model.get_submodule(_path(n)) for n in (*before[:-1], nodes[0], *behind[:-1])]
    norms = list(dict.fromkeys(m for m in between if isinstance(m, _STATIC)))
    _shrink(first, second, norms, keep, constant)
    dead.copy_(~keep)
    return (_path(before[-1]), _path(behind[-1])), norms


def _path(node: Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return list(stack.values())[-1][0] if stack else ""


def _data_inputs(node: Node, program: Program) -> list[Node]:
    return [operand for operand in node.all_input_nodes if not program.is_constant(operand)]


def _follow(
    node: Node, step: Callable[[Node], list[Node]], what: str, program: Program
) -> tuple[list[Node] | None, str]:
    """The operations from a norm's up to and with the first that has a weight."""
    found = []
    while True:
        neighbours = step(node)
        if len(neighbours) != 1 or len(_data_inputs(neighbours[0], program)) > 1:
            return None, f"{what} meets other values"
        (node,) = neighbours
        found.append(node)
        if node.op != "call_function":
            return None, f"{what} is the model's {'output' if node.op == 'output' else 'input'}"
        name = node.target.__name__.partition(".")[0]
        if name in ("linear", "conv1d", "conv2d", "conv3d"):
            if what == "its input" and len(node.users) != 1:
                return None, f"{what} meets other values"
            return found, ""
        if node.target not in _POINTWISE or len(node.users) != 1:
            return None, f"{what} passes {name}, which is not computed channel by channel"


def _constant(norm: nn.Module, node: Node, behind: list[Node], program: Program) -> Tensor:
    """What each channel carries in front of the next weight when the norm's input is at its mean, float64 [C]."""
    mean = getattr(norm, "running_mean", None)
    value = torch.zeros_like(norm.weight) if mean is None else mean
    rank = node.meta["val"].dim()
    last = isinstance(norm, ChannelNorm) and norm.channel_dim % rank == rank - 1
    shape = [1] * rank
    shape[rank - 1 if last else min(1, rank - 1)] = -1
    value, held = value.double().reshape(shape), {}
    for current in (node, *behind):
        source = held.get(_data_inputs(current, program)[0], value)

        def resolve(argument: Any, source: Tensor = source) -> Any:
            return program.constant(argument) if program.is_constant(argument) else source

        arguments = torch.fx.map_arg(current.args, resolve)
        held[current] = current.target(*arguments, **torch.fx.map_arg(current.kwargs, resolve))
    return held[behind[-1] if behind else node].flatten()


def _shrink(first: nn.Module, second: nn.Module, norms: list[nn.Module], keep: Tensor, constant: Tensor) -> None:
    taps = second.weight.double().flatten(2).sum(2) if second.weight.dim() > 2 else second.weight.double()
    extra = taps[:, ~keep] @ constant[~keep]
    if extra.any():
        bias = torch.zeros_like(extra) if second.bias is None else second.bias.double()
        second.bias = _parameter((bias + extra).to(second.weight.dtype), second.bias)
    first.weight = _parameter(first.weight[keep], first.weight)
    if first.bias is not None:
        first.bias = _parameter(first.bias[keep], first.bias)
    second.weight = _parameter(second.weight[:, keep], second.weight)
    left = int(keep.sum())
    for layer, kind in ((first, "out"), (second, "in")):
        setattr(layer, f"{kind}_features" if isinstance(layer, nn.Linear) else f"{kind}_channels", left)
    for norm in norms:
        for label, parameter in list(norm._parameters.items()):
            if parameter is not None and parameter.dim():
                setattr(norm, label, _parameter(parameter[keep], parameter))
        for label, buffer in list(norm._buffers.items()):
            if buffer is not None and buffer.dim() and buffer.is_floating_point():
                setattr(norm, label, buffer[..., keep].clone())
        norm.num_features = left


def _parameter(value: Tensor, like: nn.Parameter | None) -> nn.Parameter:
    return nn.Parameter(value.clone(), requires_grad=like is None or like.requires_grad)
