"""What a transfer rule is, and the rule for every operation without one."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from torch.fx import Node

from ..arrays import CannotCarry, Collapse
from ..nodes import argument, is_float

if TYPE_CHECKING:
    from ..engine import Folding


# Constants with more entries are not searched for zeros.
MAX_LOOKED_AT = 1 << 22


class Use(enum.Enum):
    """What an operation does with a shift that an operand carries."""

    ABSORB = "its weights take it"
    PASS = "its result carries it on"
    JOIN = "all operands must have the same"
    STOP = "it must be zero"


class Rule:
    """How scales and shifts behave around one kind of operation.

    Everywhere ``original = scale * folded + shift``. A rule states the algebra of its operation once, in the docstring
    of its class, and answers four questions in the order in which folding asks them.
    """

    #: Whether constant operands are coefficients of the operation, not values that flow through it.
    owns_constants = False
    #: Whether it is linear and treats all channels alike, so that what is the same in all of them stays so.
    alike = False

    def matches(self, node: Node, fold: Folding) -> bool:
        """Whether the rule covers this use of the operation; otherwise the operation is :class:`Opaque`."""
        return True

    def chooses_shift(self, node: Node, fold: Folding) -> bool:
        """Whether the operation's own weights can give its result any shift."""
        return False

    def relate(self, node: Node, fold: Folding) -> None:
        """Record the scale variables of the result in ``fold.scale_of`` and what they demand of the operands'."""
        raise NotImplementedError

    def use(self, node: Node, operand: Node, shift: np.ndarray | None, fold: Folding) -> Use:
        """What becomes of an operand's shift; `shift` is None while it is not known yet."""
        return Use.STOP

    def carry(self, node: Node, operand: Node, numbers: np.ndarray, collapse: Collapse, fold: Folding) -> Any:
        """Numbers about the operand's channels, arranged as the result's channels (for :attr:`Use.PASS`)."""
        raise CannotCarry

    def factor(self, node: Node, operand: Node, fold: Folding) -> np.ndarray | float:
        """The factor between an operand's shift and its part in the result's (for :attr:`Use.PASS`)."""
        return 1.0

    def settle(self, node: Node, fold: Folding) -> Any:
        """The shift of the result, all shifts of the operands being known."""
        return fold.no_shift(node)

    def rewrite(self, node: Node, fold: Folding) -> None:
        """Put scales and shifts into the weights."""


class Opaque(Rule):
    """Activations, softmax, anything unknown: operands and results stay exactly as they were."""

    def relate(self, node: Node, fold: Folding) -> None:
        if not fold.reads_values(node):
            return
        reason = fold.describe(node)
        for operand in node.all_input_nodes:
            fold.pin(operand, reason)
        fold.pin(node, reason)


__all__ = ["OPAQUE", "Opaque", "Rule", "Use", "argument", "find_rule", "is_float", "rule_for"]

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


def find_rule(node: Node, fold: Folding) -> Rule:
    """The rule of an operation."""
    if node.op == "call_function":
        for rule in _RULES.get(node.target, ()):
            if rule.matches(node, fold):
                return rule
    return OPAQUE
