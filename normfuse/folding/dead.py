"""Channels that hold a constant, because a norm's gain is zero there, leave the weights on both sides.

A channel written by a weight operation and read by weight operations only is *dead* if every one of them finds the same
number in it whatever the input is: after a gain of zero it holds the norm's bias β, and what follows element by element
maps that number to another, v. The reader's ``W x`` then has the constant part ``W[:, c] v``, which goes into its bias;
row c of the writer, entry c of what stands between, and column c of the reader are not needed any more. The result is
exact up to rounding. Zero padding in a reading convolution shows it another number at the borders: there, v must be 0.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch.export import ExportedProgram
from torch.fx import Node

from .arrays import CannotCarry, along_axis, collapse_equal, keep_axis, varying
from .gauge import Gauge, Options
from .operations import NORMALISING, PERMUTATIONS, SQUEEZES
from .program import Program
from .relate import relate
from .report import RemovedChannels
from .rules.base import Use, argument, is_float
from .weight_edits import WeightEdits

aten = torch.ops.aten


class Channels(NamedTuple):
    """What a value holds of the writer's channels, as arrays over its axes (see :mod:`normfuse.folding.arrays`)."""

    channel: np.ndarray  # which of them
    constant: np.ndarray  # whether its number is the same whatever the input is
    number: np.ndarray  # that number, else 0


class Dead(NamedTuple):
    """Dead channels between two weights.

    Attributes:
        norm: path of the first norm that made a channel constant.
        writer: the operation whose result has the channels.
        readers: the operations whose weights read them.
        inside: what the writer's result and every value up to the readers hold of them.
        dead: which channels are not needed, bool.
    """

    norm: str
    writer: Node
    readers: list[Node]
    inside: dict[Node, Channels]
    dead: np.ndarray


class _Stop(Exception):
    """The values cannot be followed to weights; says why."""


def remove_dead_channels(program: ExportedProgram) -> tuple[ExportedProgram, list[RemovedChannels]]:
    """Take channels that hold a constant out of the weights around them.

    Writers and readers are linear layers and ungrouped convolutions whose weights nothing else reads. Between them may
    stand norms with constant statistics and other constant affine maps, activations and whatever else works element by
    element, dropout, pooling, permutations and flattening. Channels of a residual stream, of heads, and of gated
    products stay. At least one channel stays.

    Args:
        program: an exported program in evaluation mode, before any decomposition and folding. It is not changed.

    Returns:
        The program without those channels, equal to `program` up to rounding, and one record for every place where
        channels are constant, with the reason where they stay.

    Example:
        >>> from normfuse.folding import remove_dead_channels
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).eval()
        >>> _ = nn.init.zeros_(model[1].weight[:3])
        >>> program = torch.export.export(model, (torch.randn(5, 4),))
        >>> smaller, (removed,) = remove_dead_channels(program)
        >>> removed.channels, removed.num_features
        (3, 8)
    """
    gauge = open_for_removal(program)
    records = []
    for writer in weights_of(gauge):
        found = find_dead(writer, gauge)
        if isinstance(found, Dead):
            names = _shrink(found, gauge)
            found = RemovedChannels(found.norm, int(found.dead.sum()), found.dead.size, names)
        records += [found] if found is not None else []
    return gauge.program.finish(), records


def open_for_removal(program: ExportedProgram) -> Gauge:
    """The program with the rules of its operations."""
    return relate(Program(program), Options(max_scale_range=np.inf, zero_rows=False))


def weights_of(gauge: Gauge) -> list[Node]:
    """The linear layers and ungrouped convolutions, in the order of the program."""
    return [node for node in gauge.program.graph.nodes if _is_plain_weight(node, gauge)]


def _is_plain_weight(node: Node, gauge: Gauge) -> bool:
    rule = gauge.matches.of.get(node)
    return rule is not None and rule.writes_rows()


def find_dead(writer: Node, gauge: Gauge) -> Dead | RemovedChannels | None:
    """The dead channels of one writer's result, a record of why constant ones stay, or None if there are none."""
    rank, (axis,) = writer.meta["val"].dim(), gauge.matches.of[writer].output_axes()
    size = int(writer.meta["val"].shape[axis])
    if size == 1:
        return None  # and one stays
    shape = [1] * rank
    shape[axis] = size
    inside = {writer: Channels(np.arange(size).reshape(shape), np.zeros(shape, bool), np.zeros(shape))}
    norms: list[str] = []
    try:
        readers = _follow(writer, inside, norms, gauge)
        dead = np.logical_and.reduce([_not_needed(reader, inside, size, gauge) for reader in readers])
        if not dead.any():
            raise _Stop("a padded convolution shows its readers another number at the borders")
    except _Stop as stop:
        return RemovedChannels(norms[0], 0, size, [], str(stop)) if norms else None
    dead[:1] &= not dead.all()
    return Dead(norms[0], writer, readers, inside, dead)


def _follow(writer: Node, inside: dict[Node, Channels], norms: list[str], gauge: Gauge) -> list[Node]:
    """Finds the values between the writer and its readers; returns the readers.

    Fills `inside` with these values, and `norms` with the names of those that make constants.
    """
    readers = []
    for node in gauge.program.graph.nodes:
        operands = [operand for operand in node.all_input_nodes if operand in inside]
        if not operands:
            continue
        if node.op == "output":
            raise _Stop("the model's output is among its readers")
        if len(operands) > 1:
            raise _Stop(f"{gauge.describe(node)} brings several values together")
        (operand,) = operands
        channels = inside[operand]
        if not gauge.reads_values(node):
            if node.target is aten.sym_size.int and node.args[1] % channels.channel.ndim not in varying(
                channels.channel
            ):
                continue
            raise _Stop(f"{gauge.describe(node)} depends on the number of channels")
        if _is_plain_weight(node, gauge):
            if gauge.program.shared(argument(node, "weight")):
                raise _Stop(f"the weight of {gauge.describe(node)} is read at another place, too")
            readers.append(node)
            continue
        inside[node] = _behind(node, operand, channels, gauge)
        if inside[node].constant.sum() > channels.constant.sum():
            norms.append(gauge.path(node))
    if gauge.program.shared(argument(writer, "weight")):
        raise _Stop(f"the weight of {gauge.describe(writer)} is read at another place, too")
    if not readers:
        raise _Stop("nothing reads its result")
    return readers


def _behind(node: Node, operand: Node, channels: Channels, gauge: Gauge) -> Channels:
    """What an operation between two weights leaves of the channels."""
    rule, (index, constant, number) = gauge.matches.of.get(node), channels
    if node in gauge.matches.affine:
        _, a, b = gauge.matches.affine[node]
        if np.broadcast_shapes(index.shape, a.shape, b.shape) == index.shape and len(varying(index)) <= 1:
            constant = constant | (a == 0)
            return Channels(index, constant, _rounded(np.where(a == 0, 0.0, a) * number + b, constant, node))
    elif _is_elementwise(node):
        value = torch.from_numpy(number).to(operand.meta["val"].dtype)
        args, kwargs = (torch.fx.map_arg(part, lambda _: value) for part in (node.args, node.kwargs))
        return Channels(index, constant, _rounded(node.target(*args, **kwargs).double().numpy(), constant, node))
    elif rule is not None and (rule.keeps_channels() or node.target in PERMUTATIONS | SQUEEZES):
        if rule.use(operand, number, gauge) is not Use.PASS:
            constant = constant & (number == 0)
        try:
            return Channels(*(rule.carry(operand, part, collapse_equal, gauge) for part in (index, constant, number)))
        except CannotCarry:
            pass
    raise _Stop(f"{gauge.describe(node)} is among its readers")


def _rounded(number: np.ndarray, constant: np.ndarray, node: Node) -> np.ndarray:
    """The constants in the precision of the program, which a step such as floor behind them depends on."""
    rounded = torch.from_numpy(np.asarray(number, np.float64)).to(node.meta["val"].dtype)
    return np.where(constant, rounded.double().numpy(), 0.0)


def _is_elementwise(node: Node) -> bool:
    """Whether an operation maps every number of its one operand to another, always in the same way."""
    if not isinstance(node.target, torch._ops.OpOverload) or len(node.all_input_nodes) != 1 or not is_float(node):
        return False
    tags = node.target.tags
    return torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags


def columns_of(reader: Node, inside: dict[Node, Channels], gauge: Gauge) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Index, constancy and number of the channel that each column of a reader's weight reads."""
    operand, (axis,) = argument(reader, "input"), gauge.matches.of[reader].input_axes()
    size = int(operand.meta["val"].shape[axis])
    try:
        channel, constant, number = (keep_axis(part, axis, size, collapse_equal) for part in inside[operand])
        return channel, constant, number
    except CannotCarry as error:
        raise _Stop(f"{gauge.describe(reader)} reads the channels along another axis") from error


def _not_needed(reader: Node, inside: dict[Node, Channels], size: int, gauge: Gauge) -> np.ndarray:
    """Which channels one reader can do without."""
    operand, rule = argument(reader, "input"), gauge.matches.of[reader]
    index, constant, number = columns_of(reader, inside, gauge)
    if rule.use(operand, inside[operand].number, gauge) is not Use.ABSORB:
        constant = constant & (number == 0)
    needed = np.zeros(size, bool)
    needed[index[~constant]] = True
    return ~needed


def _shrink(found: Dead, gauge: Gauge) -> list[str]:
    """Cut the dead channels out of every constant; returns the names of the weights."""
    _, writer, readers, inside, dead = found
    program = gauge.program

    def cut(node: Node, constant: Node, axis: int, index: np.ndarray) -> None:
        value = program.constant(constant).index_select(axis, torch.from_numpy(np.flatnonzero(~dead[index])))
        node.replace_input_with(constant, program.add_parameter(program.name(constant), value, constant))

    names = [program.name(argument(node, "weight")) for node in (writer, *readers)]
    for reader in readers:
        rule, (index, _, number) = gauge.matches.of[reader], columns_of(reader, inside, gauge)
        _, weight, bias = rule.operands()
        (axis,) = rule.input_axes()
        shift = along_axis(np.where(dead[index], number, 0.0), axis, argument(reader, "input").meta["val"].dim())
        if shift.any():
            constant = rule.through(weight, shift, gauge)
            if bias is not None:
                constant = constant + rule.bias_of(program.constant(bias).numpy())
            rule.set_bias(weight, bias, constant, WeightEdits(gauge))
        cut(reader, weight, 1, index)
    for written in gauge.matches.of[writer].operands()[1:]:
        if written is not None:
            cut(writer, written, 0, inside[writer].channel.ravel())
    for node, channels in inside.items():
        (along,) = varying(channels.channel)
        for constant in () if node is writer else node.all_input_nodes:
            first = node.target in NORMALISING  # whose vectors are not laid out as the input is
            axis = 0 if first else constant.meta["val"].dim() - channels.channel.ndim + along
            if program.is_constant(constant) and axis >= 0 and constant.meta["val"].shape[axis] != 1:
                cut(node, constant, axis, channels.channel.ravel())
        value, shape = node.meta["val"], list(node.meta["val"].shape)
        shape[along] = int((~dead[channels.channel]).sum())
        with value.fake_mode:
            node.meta["val"] = value.new_empty(shape)
    return names
