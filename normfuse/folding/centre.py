"""LayerNorm becomes RMSNorm where every writer of its input can be made to write a mean of zero.

LayerNorm is RMSNorm of its input less the mean over channels. Subtracting that mean is a projection, which passes
additions and everything else that is linear and treats all channels alike, back to the operations that write the
stream: weights, embeddings and parameters subtract it from themselves once and for all. What it takes is that nobody
reads what they no longer write: whatever else reads the stream is a LayerNorm over the same channels as well.

The property travels as arrays of groups, in the way scales do (see :mod:`normfuse.folding.arrays`): of the value's
rank, with the channel axes at full size and positions at size one. Entries with the same number belong to one group,
whose mean becomes zero; -1 stands for entries that stay as they are (the values next to queries and keys, say).
"""

from __future__ import annotations

import itertools
import operator

import numpy as np
import torch
from torch.fx import Node

from .arrays import CannotCarry, Collapse, collapse_equal, to_rank, varying
from .gauge import Gauge
from .results import Centring, closed
from .rules.base import MeanRole, argument, is_float


class _Refused(Exception):
    """The mean of a stream is read, or cannot be subtracted: the reason in words."""


def centre(gauge: Gauge) -> Gauge:
    """Find the LayerNorms that become RMSNorms, and the writers that pay; scales and shifts are settled."""
    gauge = gauge.knowing(centring=Centring())
    if gauge.options.keep_dynamic_norms:
        return gauge
    refused: list[tuple[dict[Node, np.ndarray], str]] = []
    for node in gauge.matches.dynamic:
        if (
            not gauge.matches.of[node].subtracts_mean
            or node in gauge.centring.without_mean
            or node in gauge.centring.with_mean
        ):
            continue
        rest = gauge.matches.of[node].shift(gauge) - gauge.shifts.of[node]
        if len(axes := gauge.matches.of[node].axes()) > 1:
            gauge.centring.with_mean[node] = f"it normalises over {len(axes)} axes at once"
        elif rest.any():
            why = gauge.shifts.kept_shift.get(node)
            gauge.centring.with_mean[node] = "its shift stays in it" + (f" ({why})" if why else "")
        if node in gauge.centring.with_mean:
            continue
        known = (why for groups, why in refused if _same(groups.get(node.args[0]), _groups_of(node, gauge)))
        why = next(known, None)
        if why is None:
            stream = _Stream(gauge)
            try:
                stream.follow(node)
            except _Refused as reason:
                why = str(reason)
                refused.append((stream.groups, why))
            else:
                gauge.centring.without_mean.update(stream.norms)
                for writer, groups in stream.writers.items():
                    gauge.centring.centred[writer] = _merge(gauge.centring.centred.get(writer), groups)
                gauge.centring.centred.update(
                    (v, g) for v, g in stream.groups.items() if v in gauge.shifts.materialised_shifts
                )
        if why is not None:
            gauge.centring.with_mean[node] = why
    return gauge.knowing(centring=closed(gauge.centring))


class _Stream:
    """The values that are centred together: those from which a LayerNorm's input is made, and what is made of them.

    Attributes:
        groups: the groups of channels of every value.
        writers: the operations and parameters that subtract the means.
        norms: the LayerNorms that find a mean of zero.
    """

    def __init__(self, gauge: Gauge) -> None:
        self.gauge = gauge
        self.groups: dict[Node, np.ndarray] = {}
        self.writers: dict[Node, np.ndarray] = {}
        self.norms: list[Node] = []
        self._pending: list[Node] = []

    def follow(self, norm: Node) -> None:
        """Visit every value that the input of a LayerNorm is tied to. Raises :class:`_Refused` with the reason."""
        self._visit(norm.args[0], _groups_of(norm, self.gauge))
        while self._pending:
            value = self._pending.pop(0)
            self._write(value, self.groups[value])
            for reader in value.users:
                if reader.op == "output":
                    raise _Refused("the model's output is the stream itself, mean included")
                if reader in self.gauge.matches.of and self.gauge.reads_values(reader):
                    self._read(reader, value, self.groups[value])

    def _visit(self, value: Node, groups: np.ndarray) -> None:
        if not (groups >= 0).any():
            return
        groups = _positions_dropped(groups)
        if value not in self.groups:
            self.groups[value] = groups
            self._pending.append(value)
        elif not _same(self.groups[value], groups):
            raise _Refused(f"the result of {self.gauge.describe(value)} is normalised over different channels")

    # -- readers -----------------------------------------------------------------------------------------------

    def _read(self, reader: Node, value: Node, groups: np.ndarray) -> None:
        gauge, rule = self.gauge, self.gauge.matches.of[reader]
        if rule.subtracts_mean:
            if len(rule.axes()) > 1:
                raise _Refused(f"{gauge.describe(reader)} normalises over other channels")
            if not _same_along(groups, groups.ndim - 1):
                raise _Refused(f"{gauge.describe(reader)} normalises over other channels")
            full = np.broadcast_to(groups, (*groups.shape[:-1], int(reader.args[0].meta["val"].shape[-1])))
            whole = (full >= 0).all() and (np.unique(full, return_counts=True)[1] == full.shape[-1]).all()
            if whole and not (rule.shift(gauge) - gauge.shifts.of[reader]).any():
                self.norms.append(reader)
            return
        if rule.moves:
            if value is not rule.operand():
                return  # only its shape is read
            if isinstance(gauge.matches.scale_of[reader], list):
                for piece in reader.users:
                    self._visit(piece, self._forward(piece, value, groups))
                return
        self._visit(reader, self._forward(reader, value, groups))

    def _forward(self, reader: Node, operand: Node, groups: np.ndarray) -> np.ndarray:
        """The groups of a result, from those of one operand."""
        result = self._arranged(reader, operand, groups)
        entries = self._arranged(reader, operand, np.arange(groups.size).reshape(groups.shape))
        _refuse_repeated(np.broadcast_to(entries, result.shape)[result >= 0], self.gauge.describe(reader))
        return result

    def _arranged(self, reader: Node, operand: Node, numbers: np.ndarray) -> np.ndarray:
        """Numbers about an operand's channels, arranged as the result's; refused where channels are not alike."""
        gauge, rule = self.gauge, self.gauge.matches.of[reader]
        rank = reader.meta["val"].dim()
        if rule.mean is MeanRole.MAPS and reader in gauge.solution.kept:
            raise _Refused(f"{gauge.describe(reader)} stays and scales each channel differently")
        if rule.mean is MeanRole.SCALES:
            gates = (x for x in reader.all_input_nodes if x is not operand)
            if rule.divides_by(operand) or not all(_uniform(gate, to_rank(numbers, rank)) for gate in gates):
                raise _Refused(f"{gauge.describe(reader)} scales each channel differently")
        if rule.mean is MeanRole.JOINS:
            return self._concatenated(reader, operand, numbers)
        if self._moves(reader):
            return rule.arranged(operand, numbers, self._collapse(reader), gauge)
        if rule.mean not in (MeanRole.MAPS, MeanRole.SCALES, MeanRole.ADDS):
            raise _Refused(f"{gauge.describe(reader)} reads it, mean included")
        return to_rank(numbers, rank)

    def _moves(self, node: Node) -> bool:
        """Whether a result is one operand rearranged; one of several results, whether they all are."""
        rules = self.gauge.matches.of
        whole = (node.args[0],) if node.target is operator.getitem else ()
        return all(rules[x].mean is MeanRole.MOVES for x in (node, *whole))

    def _concatenated(self, reader: Node, operand: Node, numbers: np.ndarray) -> np.ndarray:
        axis = argument(reader, "dim") % reader.meta["val"].dim()
        if numbers.shape[axis] == 1:
            return numbers
        parts = []
        for part in reader.args[0]:
            shape = [int(part.meta["val"].shape[a]) if a == axis else size for a, size in enumerate(numbers.shape)]
            parts.append(numbers if part is operand else np.full(shape, -1))
        return np.concatenate(parts, axis)

    def _collapse(self, node: Node) -> Collapse:
        def collapse(array: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
            try:
                return collapse_equal(array, axes)
            except CannotCarry:
                raise _Refused(f"{self.gauge.describe(node)} mixes or divides its channels") from None

        return collapse

    # -- writers -----------------------------------------------------------------------------------------------

    def _write(self, value: Node, groups: np.ndarray) -> None:
        gauge, what = self.gauge, self.gauge.describe(value)
        if value in gauge.matches.free_constants:
            self.writers[value] = groups
        elif gauge.program.is_constant(value):
            raise _Refused(f"the constant {gauge.program.name(value)!r} is too large to be rewritten as a value")
        elif value.op == "placeholder":
            raise _Refused("the model's input is part of it")
        elif (rule := gauge.matches.of[value]).mean is MeanRole.WRITES:
            if not set(varying(groups)) <= set(rule.output_axes()):
                raise _Refused(f"the channels that are normalised together are not the output channels of {what}")
            if not rule.can_centre(groups):
                raise _Refused(f"{what} is grouped: each output channel sees other inputs")
            self.writers[value] = groups
        elif rule.mean is MeanRole.MEASURES:
            raise _Refused(f"it is made of the result of {what} (post-norm), whose gain gives it a mean")
        elif rule.mean is MeanRole.JOINS:
            self._parts(value, groups)
        else:
            for operand in self._summands(value, groups):
                self._back(value, operand, groups)

    def _summands(self, value: Node, groups: np.ndarray) -> list[Node]:
        """The operands of which a result is made, so that its mean is the sum of theirs."""
        rule = self.gauge.matches.of[value]
        if rule.mean is MeanRole.MAPS and value not in self.gauge.solution.kept:
            return [self.gauge.matches.affine[value].operand]
        if rule.mean is MeanRole.ADDS:
            return [operand for operand in value.all_input_nodes if is_float(operand)]
        if self._moves(value):
            return [rule.source(self.gauge)]
        scaled = [x for x in value.all_input_nodes if not _uniform(x, groups)]
        if rule.mean is MeanRole.SCALES and len(scaled) == 1 and not rule.divides_by(scaled[0]):
            return scaled
        what = self.gauge.describe(value)
        raise _Refused(f"{what} writes it and has no weight that could subtract the mean")

    def _parts(self, value: Node, groups: np.ndarray) -> None:
        """Back to the parts of a concatenation; a group that spans parts has no writer of its own."""
        axis, start, seen = argument(value, "dim") % groups.ndim, 0, set[int]()
        for part in value.args[0]:
            own = groups
            if groups.shape[axis] != 1:
                own = groups.take(range(start, start + int(part.meta["val"].shape[axis])), axis)
                start += own.shape[axis]
                numbers = set(own[own >= 0].tolist())
                if numbers & seen:
                    raise _Refused(f"{self.gauge.describe(value)} joins the channels of several values")
                seen |= numbers
            self._visit(part, own)

    def _back(self, node: Node, operand: Node, groups: np.ndarray) -> None:
        """The groups of an operand, found as those that the operation arranges into its result's."""
        shape = [size if isinstance(size, int) else 1 for size in operand.meta["val"].shape]
        axes = [axis for axis, size in enumerate(shape) if size != 1]
        # Where scales vary there are channels, more than this result may hold; else the fewest axes that explain it.
        choices = [tuple(a for a in varying(self.gauge.scale(operand)) if a in axes)]
        for count in range(1, len(axes) + 1):
            choices += itertools.combinations(reversed(axes), count)
        for chosen in choices:
            kept = [size if axis in chosen else 1 for axis, size in enumerate(shape)]
            try:
                entries = self._arranged(node, operand, np.arange(int(np.prod(kept))).reshape(kept))
                full = np.broadcast_to(groups, np.broadcast_shapes(groups.shape, entries.shape))
                if entries.shape != full.shape:
                    continue
                _refuse_repeated(entries[full >= 0], "")
            except _Refused:
                continue
            own = np.full(int(np.prod(kept)), -1)
            own[entries] = _split(full, groups)
            self._visit(operand, own.reshape(kept))
            return
        raise _Refused(f"{self.gauge.describe(node)} makes its channels out of positions or of other channels")


def _groups_of(norm: Node, gauge: Gauge) -> np.ndarray:
    """One group for each stretch of channels that a LayerNorm normalises."""
    value = norm.args[0].meta["val"]
    return np.zeros((1,) * (value.dim() - 1) + (int(value.shape[-1]),), np.int64)


def _positions_dropped(groups: np.ndarray) -> np.ndarray:
    """The same groups with size one along axes whose entries have equal groups of their own: they are positions."""
    for axis in varying(groups):
        slices = [groups.take([i], axis) for i in range(groups.shape[axis])]
        numbers = [set(s[s >= 0].tolist()) for s in slices]
        if all(_same(slices[0], s) for s in slices) and sum(map(len, numbers)) == len(set().union(*numbers)):
            groups = slices[0]
    return groups


def _split(full: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Groups along axes that were positions: every position has groups of its own."""
    added = tuple(size if groups.shape[axis] == 1 else 1 for axis, size in enumerate(full.shape))
    position = np.broadcast_to(np.arange(int(np.prod(added))).reshape(added), full.shape)
    return np.where(full >= 0, position * (groups.max() + 1) + full, -1)


def _merge(known: np.ndarray | None, groups: np.ndarray) -> np.ndarray:
    """The groups of two streams that one operation writes, each into its own channels."""
    if known is None:
        return groups
    shape = np.broadcast_shapes(known.shape, groups.shape)
    known, groups = (_split(np.broadcast_to(g, shape), g) for g in (known, groups))
    return np.where(groups >= 0, groups + known.max() + 1, known)


def _same(a: np.ndarray | None, b: np.ndarray) -> bool:
    """Whether two arrays hold the same groups, however they are numbered."""
    if a is None or a.shape != b.shape:
        return False
    pairs = np.unique(np.stack([a.ravel(), b.ravel()]), axis=1)
    return all(len(np.unique(side)) == pairs.shape[1] for side in pairs) and bool(((a < 0) == (b < 0)).all())


def _same_along(groups: np.ndarray, axis: int) -> bool:
    return bool((groups == groups.take([0], axis)).all())


def _refuse_repeated(entries: np.ndarray, what: str) -> None:
    """One channel at several places of the result: they come from different positions, with means of their own."""
    if len(np.unique(entries)) != entries.size:
        raise _Refused(f"{what} makes channels out of positions")


def _uniform(gate: Node, groups: np.ndarray) -> bool:
    """Whether a factor or a mask is the same for all channels of a group."""
    value = gate.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return True
    shape = (1,) * (groups.ndim - value.dim()) + tuple(value.shape)
    return all(shape[axis] == 1 for axis in varying(groups)) if len(shape) == groups.ndim else False
