"""What a transfer rule is, and the rule for every operation without one."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from torch.fx import Node

from ..arrays import CannotCarry, Collapse
from ..gauge import Facts, Gauge
from ..nodes import argument, computes_number, is_float
from ..relations import Relations
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


class Coefficients(NamedTuple):
    """``original_out = a * original_in + b`` with arrays over the operand's channels (float64)."""

    operand: Node
    a: np.ndarray
    b: np.ndarray


@dataclass(frozen=True, eq=False)
class Match:
    """One operation, and how scales and shifts behave around it.

    Everywhere ``original = scale * folded + shift``. A rule is a subclass, which states the algebra of its operations
    once, in its docstring. Its matches answer what the steps of folding ask; they write only weights, at the end.

    Attributes:
        node: the operation.
        coefficients: of an affine map with constant coefficients.
        held: the numbers that channels of the result are to hold whatever the input is, as an array over the result;
            not a number for the other channels.
    """

    node: Node
    coefficients: Coefficients | None = None
    held: np.ndarray | None = None

    #: Whether nothing is known of it: operands and results stay exactly as they were.
    opaque = False
    #: Whether constant operands are coefficients of the operation, not values that flow through it.
    owns_constants = False
    #: What it does with a mean over channels.
    mean = MeanRole.READS
    #: Whether it is a linear map with a weight, and adds a bias by itself.
    weighs, has_bias = False, True
    #: Whether its weights can write constants (:attr:`held`).
    writes_constants = False
    #: Whether it is an addition, where a residual stream takes a branch up.
    adds = False
    #: Whether it reads a part of its operand, so that a change of other parts does not reach it.
    reads_part = False
    #: Whether it moves one operand's elements and computes nothing with them that depends on a channel's scale.
    moves = False

    @property
    def target(self) -> Any:
        """The ATen operation."""
        return self.node.target

    @property
    def args(self) -> Any:
        """Its arguments by position, as they were given."""
        return self.node.args

    @property
    def value(self) -> Any:
        """Its result without numbers: shape and dtype (several of them for several results)."""
        return self.node.meta["val"]

    def argument(self, name: str, default: Any = None) -> Any:
        """An argument by its name in the operation's schema."""
        return argument(self.node, name, default)

    @classmethod
    def of(cls, node: Node, facts: Facts) -> Match | None:
        """The match of an operation that this rule is registered for; None where it does not cover this use of it."""
        made = cls(node)
        return made if made.fits(facts) else None

    def fits(self, facts: Facts) -> bool:
        """Whether the rule covers this use of the operation."""
        return True

    def chooses_shift(self, gauge: Gauge) -> bool:
        """Whether the operation's own weights can give its result any shift."""
        return False

    def relate(self, relations: Relations) -> Any:
        """The scale variables of the result (a list for several results); says what they demand of the operands'."""
        raise NotImplementedError

    def use(self, operand: Node, shift: np.ndarray | None, gauge: Gauge) -> Use:
        """What becomes of an operand's shift; `shift` is None while it is not known yet."""
        return Use.STOP

    def carry(self, operand: Node, numbers: np.ndarray, collapse: Collapse, gauge: Gauge) -> Any:
        """Numbers about the operand's channels, arranged as the result's channels (for :attr:`Use.PASS`)."""
        raise CannotCarry

    def factor(self, operand: Node, gauge: Gauge) -> np.ndarray | float:
        """The factor between an operand's shift and its part in the result's (for :attr:`Use.PASS`)."""
        return 1.0

    def settle(self, gauge: Gauge) -> Any:
        """The shift of the result, all shifts of the operands being known."""
        return gauge.no_shift(self.node)

    def constant_part(self, gauge: Gauge) -> np.ndarray:
        """What the result holds whatever the input is (of weights, and of affine maps that stay)."""
        raise NotImplementedError

    def last_resort(self) -> Use:
        """What becomes of a shift that nothing else takes, where the operation can be written such that it takes one.

        :attr:`Use.PASS` where the result carries it on (ReLU), :attr:`Use.ABSORB` where it does not (squares). It costs
        no operation, but the usual one.
        """
        return Use.STOP

    def parts(self, numbers: np.ndarray, gauge: Gauge) -> list[tuple[Node, np.ndarray]]:
        """Numbers about the result's channels as numbers about those of the operands it is put together from.

        Empty where a result is not put together so, or the numbers are none that they can have.
        """
        return []

    def price(self, gauge: Gauge) -> int:
        """What another shift of its result costs: nothing, a table's numbers (1), an Add (2), or another table (3)."""
        return 0

    def keeps_channels(self) -> bool:
        """Whether it works on each channel by itself, however many there are."""
        return False

    def writes_rows(self) -> bool:
        """Whether each channel of the operand is one column of a weight, and each of the result one row."""
        return False

    @property
    def subtracts_mean(self) -> bool:
        """Whether it is a norm that subtracts its input's mean over the last axes."""
        return False

    @property
    def asks_ratio(self) -> bool:
        """Whether it is an affine map that asks for a ratio of scales."""
        return self.coefficients is not None and bool((self.coefficients.a != 1).any())

    # Answered by rules that say an equation (Matches.equations), write (MeanRole.WRITES), move (MOVES) and measure
    # (MEASURES); nobody else is asked.

    def sides(self, gauge: Gauge) -> tuple[np.ndarray, ...]:
        """The scale variables of its equation."""
        raise NotImplementedError

    def is_determined(self, gauge: Gauge) -> bool:
        """Whether its equation has one unknown at most."""
        raise NotImplementedError

    def meet(self, gauge: Gauge) -> bool:
        """Meet its equation, choosing what is free; False where it contradicts what is known."""
        raise NotImplementedError

    def output_axes(self) -> tuple[int, ...]:
        """The axes of the result that the weight writes."""
        raise NotImplementedError

    def input_axes(self) -> tuple[int, ...]:
        """The axes of the input that the weight reads."""
        raise NotImplementedError

    def can_centre(self, groups: np.ndarray) -> bool:
        """Whether the weight can produce its result less means over groups of its entries."""
        raise NotImplementedError

    def operands(self) -> tuple[Node, Node, Node | None]:
        """Input, weight and bias."""
        raise NotImplementedError

    def through(self, weight: Node, shift: np.ndarray, gauge: Gauge) -> np.ndarray:
        """What a constant input contributes to the result, as an array over the result's channels."""
        raise NotImplementedError

    def bias_of(self, value: np.ndarray) -> np.ndarray:
        """The operation's bias as an array over the result."""
        raise NotImplementedError

    def set_bias(self, weight: Node, bias: Node | None, value: np.ndarray, edits: WeightEdits) -> None:
        """Let the operation add `value`, an array over the result's channels."""
        raise NotImplementedError

    def divides_by(self, operand: Node) -> bool:
        """Whether it divides by an operand."""
        return False

    def operand(self) -> Node:
        """The operand whose elements are moved; of others, only the shape is read."""
        raise NotImplementedError

    def source(self, gauge: Gauge) -> Node:
        """The value whose elements the result has."""
        raise NotImplementedError

    def arranged(self, source: Node, numbers: np.ndarray, collapse: Collapse, gauge: Gauge) -> np.ndarray:
        """Numbers about the source's channels, arranged as the result's."""
        raise NotImplementedError

    def gain(self, gauge: Gauge) -> np.ndarray:
        """The gain along the result's channels; ones where there is none."""
        raise NotImplementedError

    def shift(self, gauge: Gauge) -> np.ndarray:
        """The shift along the result's channels; zeros where there is none."""
        raise NotImplementedError

    def gain_is_gone(self, gauge: Gauge) -> bool:
        """Whether the weights behind have all of the gain, but for rounding."""
        raise NotImplementedError

    def axes(self) -> tuple[int, ...]:
        """The axes of gain and shift."""
        raise NotImplementedError

    def rewrite(self, edits: WeightEdits) -> None:
        """Put scales and shifts into the weights."""


class Opaque(Match):
    """Activations, softmax, anything unknown: operands and results stay exactly as they were."""

    opaque = True

    def relate(self, relations: Relations) -> Any:
        if not relations.gauge.reads_values(self.node):
            return None
        reason = relations.gauge.describe(self.node)
        for operand in self.node.all_input_nodes:
            relations.pin(operand, reason)
        return relations.fixed(self.node, reason)


__all__ = ["RULES", "Match", "MeanRole", "Opaque", "Use", "argument", "is_float", "match", "rule_for"]

#: Of each operation the rules that may match it, in order.
RULES: dict[object, list[type[Match]]] = {}
R = TypeVar("R", bound=type[Match])


def rule_for(*targets: object) -> Any:
    """Register a rule for operations; where several match, the first registered wins."""

    def register(rule: R) -> R:
        for target in targets:
            RULES.setdefault(target, []).append(rule)
        return rule

    return register


def match(node: Node, facts: Facts) -> Match | None:
    """The match of an operation, by the first rule that covers it; None for what no rule knows.

    No rule knows a factor, an exponent or a bound that is computed, from a size say.
    """
    candidates = RULES.get(node.target, ()) if node.op == "call_function" and not computes_number(node) else ()
    return next((found for rule in candidates if (found := rule.of(node, facts)) is not None), None)
