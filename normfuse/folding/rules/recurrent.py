"""Recurrent layers and their cells: products of each step's input with weights, which take scales and shifts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.fx import Node, map_arg

from ..arrays import Collapse, take_first, varying
from ..gauge import Facts, Gauge
from ..nodes import tensors_of
from ..relations import Relations
from ..weight_edits import WeightEdits
from .base import Match, Use, is_float, rule_for

aten = torch.ops.aten


class _Entry(NamedTuple):
    """What multiplies the input of each step, and what is added to that."""

    weight: Node
    bias: Node | None


@rule_for(
    *(aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input),
    *(aten.lstm_cell.default, aten.gru_cell.default, aten.rnn_tanh_cell.default, aten.rnn_relu_cell.default),
)
class Recurrent(Match):
    """``W x + bias`` of the first layer in each direction: ``W' = W diag(s_x)``, ``bias' = bias + W t_x``.

    States and results are fixed, because activations stand between. Without biases a shift stops.
    """

    owns_constants = True

    def fits(self, facts: Facts) -> bool:
        if not is_float(self.args[0]) or facts.program.is_constant(self.args[0]):
            return False
        constants: list[Node] = []
        map_arg(self.args[2:], constants.append)
        read = [node for entry in self._entries() for node in entry if node is not None]
        return all(map(facts.usable_weight, read)) and all(constants.count(node) == 1 for node in read)

    def relate(self, relations: Relations) -> np.ndarray | list[np.ndarray] | None:
        reason = relations.gauge.describe(self.node)
        for state in self._states():
            relations.pin(state, reason)
        inner = relations.scale(self.args[0])
        self.carry(self.args[0], inner, relations.require_equal, relations.gauge)
        relations.stored.append(inner)
        if is_float(self.node):
            return relations.fixed(self.node, reason)
        results = [relations.scales.fresh((1,) * value.dim()) for value in tensors_of(self.node)]
        for result in results:
            relations.scales.pin(result, reason)
        return results

    def use(self, operand: Node, shift: np.ndarray | None, gauge: Gauge) -> Use:
        if operand is not self.args[0] or operand in self._states() or any(e.bias is None for e in self._entries()):
            return Use.STOP
        return Use.ABSORB if gauge.can_carry(self.node, operand, shift) else Use.STOP

    def carry(self, operand: Node, numbers: np.ndarray, collapse: Collapse, gauge: Gauge) -> np.ndarray:
        return collapse(numbers, tuple(axis for axis in varying(numbers) if axis != numbers.ndim - 1))

    def settle(self, gauge: Gauge) -> np.ndarray | list[np.ndarray]:
        results = [np.zeros((1,) * value.dim()) for value in tensors_of(self.node)]
        return results[0] if is_float(self.node) else results

    def rewrite(self, edits: WeightEdits) -> None:
        gauge, operand = edits.gauge, self.args[0]
        size = int(operand.meta["val"].shape[-1])
        scale = self.carry(operand, gauge.scales[gauge.scale(operand)], take_first, gauge)
        columns = edits.vector(scale, -1, size)
        constant = edits.vector(gauge.incoming(self.node, operand), -1, size)
        for weight, bias in self._entries():
            if constant.any():
                assert bias is not None  # without one a shift stops
                value = gauge.program.constant(bias) + gauge.program.constant(weight) @ constant
                edits.exchange(self.node, bias, value)
            if (columns != 1).any():
                edits.scale_weight(self.node, weight, columns[None, :])

    def _states(self) -> list[Node]:
        states = self.args[1]
        return list(states) if isinstance(states, list | tuple) else [states]

    def _entries(self) -> Iterator[_Entry]:
        """The weight and the bias of each direction."""
        if "params" not in (entry.name for entry in self.target._schema.arguments):
            yield _Entry(self.argument("w_ih"), self.argument("b_ih"))
            return
        weights, directions = self.argument("params"), 1 + self.argument("bidirectional")
        each = len(weights) // (directions * self.argument("num_layers"))
        for first in range(0, directions * each, each):
            yield _Entry(weights[first], weights[first + 2] if self.argument("has_biases") else None)
