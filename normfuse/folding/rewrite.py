"""The last step of folding: the rules put scales and shifts into the weights, and what nothing needs goes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch.fx import Node

from .arrays import subtract_means
from .gauge import Gauge
from .report import OutOfRange
from .weight_edits import WRITTEN_OUT, WeightEdits, note

aten = torch.ops.aten


class Overflow(Exception):
    """A weight of an operation, or what would be added behind it, would leave its dtype."""

    def __init__(self, node: Node, error: OutOfRange) -> None:
        super().__init__(str(error))
        self.node, self.error = node, error


@contextmanager
def _written_at(node: Node) -> Iterator[None]:
    try:
        yield
    except OutOfRange as error:
        raise Overflow(node, error) from error


def rewrite(gauge: Gauge) -> WeightEdits:
    """Rewrite the program's graph; returns what was changed. Raises :class:`Overflow`."""
    edits, program, shifts = WeightEdits(gauge), gauge.program, gauge.shifts
    for node, rule in list(gauge.matches.of.items()):
        if node in gauge.matches.scale_of:
            with _written_at(node):
                rule.rewrite(edits)
    replaced = dict[Node, Node]()
    for constant in gauge.matches.free_constants:
        with _written_at(constant):
            replaced[constant] = _rewrite_constant(constant, edits)
    for node, bias in edits.biases:
        added = program.insert(node.next, aten.add.Tensor, (node, bias), node)
        program.redirect(node, added)
        replaced[node] = added
    for node, users in shifts.materialised_shifts.items():
        value = replaced.get(node, node)
        shift = shifts.of[node] / gauge.scales[gauge.scale(node)]
        if node in gauge.centring.centred:
            shift = subtract_means(torch.from_numpy(shift), gauge.centring.centred[node]).numpy()
        with _written_at(node):
            added = edits.add(value, shift, after=value)
        if added is not value:
            note(added, WRITTEN_OUT, 1.0)
        for user in users:
            program.redirect(value, added, [user])
    # Nodes are replaced only after every rule has read the graph as it was.
    for node, by in edits.replacements:
        while replaced.get(by, by) is not by:
            by = replaced[by]
        program.replace(node, by)
        replaced[node] = by
    return edits


def _rewrite_constant(constant: Node, edits: WeightEdits) -> Node:
    """Let what reads a constant as a value read the folded one, which is returned."""
    gauge = edits.gauge
    scale, shift = gauge.scales[gauge.scale(constant)], gauge.shifts.of[constant]
    centre = gauge.centring.centred.get(constant)
    if (scale == 1).all() and not shift.any() and centre is None:
        return constant
    # The numbers of a constant without axes are no arrays of numpy.
    shift, scale = (torch.from_numpy(np.array(numbers)) for numbers in (shift, scale))
    new = (gauge.program.constant(constant) - shift) / scale
    if centre is not None:
        new = subtract_means(new, centre)
    node = gauge.program.add_parameter(gauge.program.name(constant), new, constant)
    for user in list(constant.users):
        rule = gauge.matches.of.get(user)
        if rule is not None and not rule.owns_constants:
            user.replace_input_with(constant, node)
            edits.absorbed.setdefault(user, []).append(gauge.program.name(constant))
    return node
