"""What a transfer rule is, and the rule for every operation without one."""

from __future__ import annotations

import enum
from typing import Any, TypeVar

import numpy as np
from torch.fx import Node

from ..arrays import CannotCarry, Collapse
from ..gauge import Gauge
from ..nodes import argument, is_float
from ..weight_edits import WeightEdits

# Constants with more entries are not searched for zeros.
MAX_LOOKED_AT = 1 << 22


class Use(enum.Enum):
    """What an operation does with a shift that an operand carries."""

    ABSORB = "its weights take it"
    PASS = "its result carries it on"
    JOIN = "all operands must have the same"
    STOP = "it must be zero"


class MeanRole(enum.Enum):
    """What an operation does with a mean over channels that a stream is to lose (see :mod:`..centre`)."""

    READS = "its result depends on it"
    WRITES = "its weights can subtract it"
    MEASURES = "it normalises"
    MAPS = "folded, its result is its operand"
    ADDS = "a sum of its operands"
    SCALES = "one operand, times numbers or zeros that depend on positions"
    JOINS = "its operands side by side"
    MOVES = "one operand, rearranged"


class Rule:
    """How scales and shifts behave around one kind of operation.

    Everywhere ``original = scale * folded + shift``. A rule states the algebra of its operation once, in the docstring
    of its class, and answers four questions in the order in which folding asks them.
    """

    #: Whether constant operands are coefficients of the operation, not values that flow through it.
    owns_constants = False
    #: What it does with a mean over channels.
    mean = MeanRole.READS
    #: Whether it is a linear map with a weight, and adds a bias by itself.
    weighs, has_bias = False, True
    #: Whether it is an addition, where a residual stream takes a branch up.
    adds = False
    #: Whether it reads a part of its operand, so that a change of other parts does not reach it.
    reads_part = False
    #: Whether it moves one operand's elements and computes nothing with them that depends on a channel's scale.
    moves = False

    def matches(self, node: Node, gauge: Gauge) -> bool:
        """Whether the rule covers this use of the operation; otherwise the operation is :class:`Opaque`."""
        return True

    def chooses_shift(self, node: Node, gauge: Gauge) -> bool:
        """Whether the operation's own weights can give its result any shift."""
        return False

    def relate(self, node: Node, gauge: Gauge) -> None:
        """Record the scale variables of the result in ``fold.scale_of`` and what they demand of the operands'."""
        raise NotImplementedError

    def use(self, node: Node, operand: Node, shift: np.ndarray | None, gauge: Gauge) -> Use:
        """What becomes of an operand's shift; `shift` is None while it is not known yet."""
        return Use.STOP

    def carry(self, node: Node, operand: Node, numbers: np.ndarray, collapse: Collapse, gauge: Gauge) -> Any:
        """Numbers about the operand's channels, arranged as the result's channels (for :attr:`Use.PASS`)."""
        raise CannotCarry

    def factor(self, node: Node, operand: Node, gauge: Gauge) -> np.ndarray | float:
        """The factor between an operand's shift and its part in the result's (for :attr:`Use.PASS`)."""
        return 1.0

    def settle(self, node: Node, gauge: Gauge) -> Any:
        """The shift of the result, all shifts of the operands being known."""
        return gauge.no_shift(node)

    def constant_part(self, node: Node, gauge: Gauge) -> np.ndarray:
        """What the result holds whatever the input is (of weights, and of affine maps that stay)."""
        raise NotImplementedError

    def bends(self, node: Node) -> bool:
        """Whether a bound of the operation can take a shift."""
        return False

    def price(self, node: Node) -> int:
        """What another shift of its result costs: nothing, an addition (1), or a copy of a table (2)."""
        return 0

    def keeps_channels(self, node: Node) -> bool:
        """Whether it works on each channel by itself, however many there are."""
        return False

    def writes_rows(self, node: Node) -> bool:
        """Whether each channel of the operand is one column of a weight, and each of the result one row."""
        return False

    # Answered by rules that write (MeanRole.WRITES), move (MOVES) and measure (MEASURES); nobody else is asked.

    def output_axes(self, node: Node) -> tuple[int, ...]:
        """The axes of the result that the weight writes."""
        raise NotImplementedError

    def input_axes(self, node: Node) -> tuple[int, ...]:
        """The axes of the input that the weight reads."""
        raise NotImplementedError

    def can_centre(self, node: Node, groups: np.ndarray) -> bool:
        """Whether the weight can produce its result less means over groups of its entries."""
        raise NotImplementedError

    def operands(self, node: Node) -> tuple[Node, Node, Node | None]:
        """Input, weight and bias."""
        raise NotImplementedError

    def through(self, node: Node, weight: Node, shift: np.ndarray, gauge: Gauge) -> np.ndarray:
        """What a constant input contributes to the result, as an array over the result's channels."""
        raise NotImplementedError

    def bias_of(self, node: Node, value: np.ndarray) -> np.ndarray:
        """The operation's bias as an array over the result."""
        raise NotImplementedError

    def set_bias(self, node: Node, weight: Node, bias: Node | None, value: np.ndarray, edits: WeightEdits) -> None:
        """Let the operation add `value`, an array over the result's channels."""
        raise NotImplementedError

    def operand(self, node: Node) -> Node:
        """The operand whose elements are moved; of others, only the shape is read."""
        raise NotImplementedError

    def source(self, node: Node, gauge: Gauge) -> Node:
        """The value whose elements the result has."""
        raise NotImplementedError

    def arranged(self, node: Node, source: Node, numbers: np.ndarray, collapse: Collapse, gauge: Gauge) -> np.ndarray:
        """Numbers about the source's channels, arranged as the result's."""
        raise NotImplementedError

    def gain(self, node: Node, gauge: Gauge) -> np.ndarray:
        """The gain along the result's channels; ones where there is none."""
        raise NotImplementedError

    def shift(self, node: Node, gauge: Gauge) -> np.ndarray:
        """The shift along the result's channels; zeros where there is none."""
        raise NotImplementedError

    def gain_is_gone(self, node: Node, gauge: Gauge) -> bool:
        """Whether the weights behind have all of the gain, but for rounding."""
        raise NotImplementedError

    def axes(self, node: Node) -> tuple[int, ...]:
        """The axes of gain and shift."""
        raise NotImplementedError

    def rewrite(self, node: Node, edits: WeightEdits) -> None:
        """Put scales and shifts into the weights."""


class Opaque(Rule):
    """Activations, softmax, anything unknown: operands and results stay exactly as they were."""

    def relate(self, node: Node, gauge: Gauge) -> None:
        if not gauge.reads_values(node):
            return
        reason = gauge.describe(node)
        for operand in node.all_input_nodes:
            gauge.pin(operand, reason)
        gauge.pin(node, reason)


__all__ = ["OPAQUE", "MeanRole", "Opaque", "Rule", "Use", "argument", "find_rule", "is_float", "rule_for"]

_RULES: dict[object, list[Rule]] = {}
OPAQUE = Opaque()
R = TypeVar("R", bound=type[Rule])


def rule_for(*targets: object) -> Any:
    """Register a rule for operations; where several match, the first registered wins."""

    def register(cls: R) -> R:
        rule = cls()
        for target in targets:
            _RULES.setdefault(target, []).append(rule)
        return cls

    return register


def find_rule(node: Node, gauge: Gauge) -> Rule:
    """The rule of an operation."""
    if node.op == "call_function":
        for rule in _RULES.get(node.target, ()):
            if rule.matches(node, gauge):
                return rule
    return OPAQUE
