"""What rules ask about a program while it is folded, and the results of the steps that know the answers."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch.fx import Node

from .arrays import CannotCarry, collapse_equal
from .nodes import CALLED, module_of, operation_name
from .operations import ABOUT_SIZES
from .program import Program
from .results import Cancelling, Centring, Matches, Shifts, Solution
from .scales import Outcome, Scales


@dataclass(frozen=True)
class Options:
    """How a program is folded, see :func:`normfuse.fold`; the last ones change where a first attempt falls short.

    Attributes:
        zero_rows: whether gains of zero go into the weights in front, where nothing else reads what these write.
        fold_zeros: whether norms with gains of zero fold where only weights read the result, by columns of zeros. The
            channels in front of them then hold something, which takes part in the steps of integers.
        fixed_equations: powers and products whose equations cannot be met: their scales are fixed before all demands.
        mixing: products with constants that mix positions, of which each channel keeps its scale: see
            :class:`normfuse.folding.rules.attention.Mixture`.
        kept_maps: affine maps that stay, see :mod:`normfuse.folding.balance`.
        untouched: names of norms and other maps that stay exactly as they are, with the reason: their numbers would
            leave the dtype of a weight.
    """

    copy_shared: bool = True
    carry_biases: bool = False
    max_scale_range: float = 2.0**40
    keep_dynamic_norms: bool = False
    zero_rows: bool = True
    fold_zeros: bool = True
    fixed_equations: frozenset[Node] = frozenset()
    mixing: frozenset[Node] = frozenset()
    kept_maps: frozenset[Node] = frozenset()
    untouched: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Facts:
    """A program and how it is folded: all that decides which rule matches an operation."""

    program: Program
    options: Options

    def usable_weight(self, node: object) -> bool:
        """Whether a weight is constant, has entries and may be replaced."""
        if not self.program.is_constant(node) or node.meta["val"].numel() == 0:
            return False
        return self.options.copy_shared or not self.program.shared(node)

    def reads_values(self, node: Node) -> bool:
        """Whether a node looks at the values of tensors, not only at their sizes."""
        return node.target not in ABOUT_SIZES

    def returns(self, reader: Node, value: Node) -> bool:
        """Whether a reader is the output, or makes one of the outputs that lie in the memory of this value."""
        return reader.op == "output" or reader in self.program.shared_by_outputs.get(value, ())

    def untouched(self, node: Node) -> str:
        """Why a norm or another map stays exactly as it is; empty for others."""
        return self.options.untouched.get(node.name, "")

    def path(self, node: Node) -> str:
        return module_of(node)[0] or node.name

    def describe(self, node: Node) -> str:
        if node.target is operator.getitem:
            node = node.args[0]
        name, path = node.meta.get(CALLED) or operation_name(node), module_of(node)[0]
        shared = [
            self.program.name(c)
            for c in node.all_input_nodes
            if not self.options.copy_shared and self.program.is_constant(c) and self.program.shared(c)
        ]
        because = f", whose weight {shared[0]!r} is shared and may not be copied," if shared else ""
        return (f"{name} in {path}" if path else name) + because


@dataclass(frozen=True)
class Gauge(Facts):
    """``original = scale * folded + shift`` for every value: what is known of it so far.

    Every step returns its result, and :meth:`knowing` makes a gauge that answers with it. A step's own result is still
    open while it asks the rules; afterwards it is closed.
    """

    scales: Scales
    matches: Matches
    solution: Solution = field(default_factory=Solution)
    shifts: Shifts = field(default_factory=Shifts)
    centring: Centring = field(default_factory=Centring)
    cancelling: Cancelling = field(default_factory=Cancelling)
    _shift_shapes: dict[Node, Any] = field(default_factory=dict)

    def knowing(self, **results: Any) -> Gauge:
        """The same with the results of another step."""
        return replace(self, **results)

    def scale(self, node: Node) -> Any:
        """The scale variables of a value (a list for several results)."""
        return self.matches.scale_of[node]

    def is_fixed(self, node: Node) -> bool:
        """Whether a value's scale is one already."""
        return not self.program.is_constant(node) and self.scales.is_pinned(self.scale(node))

    # -- shifts ------------------------------------------------------------------------------------------------

    def no_shift(self, node: Node) -> np.ndarray:
        return np.zeros((1,) * node.meta["val"].dim())

    def any_shift(self, node: Node) -> Any:
        """A shift that differs wherever one can: what can be done with it can be done with any."""
        if not self._shift_shapes:
            self._shift_shapes.update(self._find_shift_shapes())
        shapes = self._shift_shapes[node]
        several = isinstance(shapes, list)
        shifts = [np.arange(1.0, math.prod(shape) + 1.0).reshape(shape) for shape in (shapes if several else [shapes])]
        return shifts if several else shifts[0]

    def _find_shift_shapes(self) -> dict[Node, Any]:
        """The shapes that the shifts of values can have (lists for several results): some vary where scales do not.

        Found by settling shifts of zero.
        """
        shapes: dict[Node, Any] = {}
        trial = Shifts()
        empty = self.knowing(shifts=trial)
        for node in self.program.graph.nodes:
            scale, rule = self.matches.scale_of.get(node), self.matches.of.get(node)
            if scale is None:
                continue
            shift = self.no_shift(node) if rule is None else rule.settle(empty)
            if isinstance(scale, list):
                pairs = zip(scale, shift, strict=True)
                shapes[node] = [np.broadcast_shapes(*(a.shape for a in pair)) for pair in pairs]
                trial.of[node] = [np.zeros(shape) for shape in shapes[node]]
            else:
                shapes[node] = np.broadcast_shapes(scale.shape, shift.shape)
                trial.of[node] = np.zeros(shapes[node])
        return shapes

    def chosen_shift(self, node: Node) -> np.ndarray:
        """The shift that was chosen for the result of a weight operation; none unless a norm asked for one."""
        return self.shifts.chosen.get(node, self.no_shift(node))

    def incoming(self, node: Node, operand: Node) -> np.ndarray:
        """The shift with which `operand` arrives at `node`: none where it has been written out."""
        if node in self.shifts.materialised_shifts.get(operand, ()):
            return self.no_shift(operand)
        return self.shifts.of.get(operand, self.no_shift(operand))

    def carried(self, node: Node, operand: Node) -> Any:
        """An operand's shift, arranged as the result's."""
        several = isinstance(self.matches.scale_of[operand], list)
        shift = self.shifts.of[operand] if several else self.incoming(node, operand)
        return self.matches.of[node].carry(operand, shift, collapse_equal, self)

    def can_carry(self, node: Node, operand: Node, shift: np.ndarray | None) -> bool:
        """Whether the operation can arrange this shift as its result's; an unknown one counts as possible."""
        if shift is None:
            return True
        try:
            self.matches.of[node].carry(operand, shift, collapse_equal, self)
        except CannotCarry:
            return False
        return True

    def scales_behind(self, node: Node) -> np.ndarray:
        """The scale variables of a value and of those that are it, rearranged or mapped, and nothing else."""
        found, pending = [], [node]
        while pending:
            current = pending.pop()
            scale = self.matches.scale_of[current]
            found += [part.ravel() for part in (scale if isinstance(scale, list) else [scale])]
            for user in current.users:
                mapped = user in self.matches.affine and user not in self.solution.kept
                rule = self.matches.of.get(user)
                if user in self.matches.scale_of and (mapped or (rule is not None and rule.moves)):
                    pending.append(user)
        return np.concatenate(found)

    def why_not(self, outcome: Outcome) -> str:
        """Why a demand was refused, apart from what fixes its two sides."""
        if outcome is Outcome.RANGE:
            allowed = self.options.max_scale_range
            return f"the scales in one channel of its stream would span more than a factor of {allowed:g}"
        if outcome is Outcome.BOUND:
            return "its scales would take values between two weights out of the range of float16"
        if outcome is Outcome.SIGN:
            return "some of its scales are negative, and what stands between two weights passes positive ones only"
        return ""
