"""Folding in three steps: relate the scales, settle the shifts, rewrite the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Set
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from .arrays import (
    CannotCarry,
    GroupMeans,
    collapse_equal,
    example_size,
    keep_axis,
    same_size,
    subtract_means,
    take_first,
    without_leading_ones,
)
from .gains import assign_zero_gain, demand_gains, has_zero_gain
from .nodes import is_float, module_of, operation_name
from .operations import NORMALISING
from .program import Program, largest_entry, piece
from .report import FoldError
from .rules import Rule, find_rule
from .rules.affine import Coefficients
from .rules.carry import Carry
from .rules.powers import settle_powers
from .scales import Outcome, Scales
from .settle import shift_shapes, tolerant_values

aten = torch.ops.aten

_ABOUT_SIZES = {
    *(aten.sym_size.int, aten.sym_size.default, aten.sym_numel.default, aten.sym_stride.int),
    *(aten.sym_storage_offset.default, aten._assert_tensor_metadata.default),
    *(aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default),
    *(aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default),
}
# A constant that flows as a value gets one scale per entry; beyond this many entries it stays as it is.
MAX_FREE_ENTRIES = 1 << 22
# Dtypes with so few exponents that scales take them away from the values: one byte leaves none to spare.
_FEW_EXPONENTS = {
    *(torch.float16, torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
}
_REFUSED = "normfuse_refused_range"  # under this name, what stays for its range says for which
_ZERO = "a scale is zero, and not only weights read the result"
_ZERO_BEFORE_ADD = "a scale is zero, and a shift behind one would have to be written out"


class Folding:
    """The state of one fold: what the rules read and write.

    Attributes:
        scale_of: scale variables of every floating-point value (a list for operations with several results).
        shift_of: shifts of the values, once settled.
        affine: coefficients of every affine map with constant coefficients.
        demands: the affine maps that ask for a ratio.
        powers: the powers, whose scales are settled once all ratios are.
        kept: affine maps that stay, with the reason.
        refused_range: those that stay for the range of scales, and which was allowed.
        stored: scale variables that go into weights.
        fold_zeros: whether norms with gains of zero fold where only weights read the result.
        bent: ReLUs and their like whose bound takes a shift, which their result carries on.
        settled_early: norms whose shift had grown too large to travel further.
        dynamic: the norms that compute their statistics from each input.
        kept_gain, kept_shift: those whose gain or shift stays in them, with the reason.
        without_mean: LayerNorms whose input is made to have a mean of zero; they become RMSNorms.
        with_mean: LayerNorms that stay, with the reason.
        cancelled: norms whose division nothing sees, with the norms that measure again.
        not_cancelled: those that were asked to go and stay, with the reason.
        centred: values whose writers subtract a mean over channels: which channels belong together (-1: none).
    """

    def __init__(
        self,
        program: Program,
        *,
        copy_shared: bool,
        carry_biases: bool,
        max_scale_range: float,
        keep_dynamic_norms: bool = False,
        fold_zeros: bool = True,
        fixed_powers: Set[Node] = frozenset(),
    ) -> None:
        self.program = program
        self.copy_shared = copy_shared
        self.carry_biases = carry_biases
        self.keep_dynamic_norms = keep_dynamic_norms
        self.max_scale_range = max_scale_range
        self.fold_zeros = fold_zeros
        self.fixed_powers = fixed_powers
        self.scales = Scales(max_scale_range)
        self.rule_of: dict[Node, Rule] = {}
        self.scale_of: dict[Node, Any] = {}
        self.shift_of: dict[Node, Any] = {}
        self.affine: dict[Node, Coefficients] = {}
        self.demands: list[Node] = []
        self.powers: list[Node] = []
        self.kept: dict[Node, str] = {}
        self.refused_range: dict[Node, float] = {}
        self.stored: list[np.ndarray] = []
        self.leaves: list[Node] = []
        self.chosen: dict[Node, np.ndarray] = {}
        self.spilled: dict[Node, list[Node]] = {}
        self.bent: set[Node] = set()
        self.settled_early: list[Node] = []
        self.absorbed: dict[Node, list[str]] = {}
        self.dynamic: list[Node] = []
        self.kept_gain: dict[Node, str] = {}
        self.kept_shift: dict[Node, str] = {}
        self.without_mean: set[Node] = set()
        self.with_mean: dict[Node, str] = {}
        self.cancelled: dict[Node, list[Node]] = {}
        self._shift_shapes: dict[Node, Any] = {}
        self.not_cancelled: dict[Node, str] = {}
        self.centred: dict[Node, np.ndarray] = {}
        self.weight_growth = 1.0
        self._replacements: list[tuple[Node, Node]] = []
        self._biases: list[tuple[Node, Node]] = []

    # -- the three steps ---------------------------------------------------------------------------------------

    def relate(self) -> None:
        for node in self.program.graph.nodes:
            if self.program.is_constant(node) or node.op == "get_attr":
                continue
            if node.op == "output":
                for operand in node.all_input_nodes:
                    self.pin(operand, "the model's output")
            elif node.op == "placeholder":
                self.pin(node, "the model's input")
            else:
                self.rule_of[node] = find_rule(node, self)
                self.rule_of[node].relate(node, self)
                self._bound(node)

    def _bound(self, node: Node) -> None:
        """Keep the scales of values that are stored in few exponents close to one, whatever other values allow."""
        scale, value = self.scale_of.get(node), node.meta.get("val")
        pieces = zip(scale, value, strict=True) if isinstance(scale, list) else [(scale, value)]
        for index, part in pieces:
            if index is None or not isinstance(part, torch.Tensor) or part.dtype not in _FEW_EXPONENTS:
                continue
            if part.itemsize == 1:
                self.scales.pin(index, f"its dtype {str(part.dtype).removeprefix('torch.')}")
            else:
                self.scales.bound(index)

    def solve(self) -> Node | None:
        """Meet the demands one after another, those that save most first; what contradicts stays.

        Returns a power whose scales cannot be met, if there is one: it is to be fixed before all demands.
        """
        with_zeros = set()
        for stored in self.stored:
            self.scales.store(stored)
        for node in sorted(self.demands, key=self._saved, reverse=True):
            operand, a, b = self.affine[node]
            if not (np.isfinite(a).all() and np.isfinite(b).all()):
                self._refuse_not_finite(node)
                self.kept[node] = "a constant factor is not finite"
            elif not a.all():
                with_zeros.add(node)
            elif not (outcome := self._demand(node)):
                self.kept[node] = self.why_not(outcome) or self._what_fixes(node)
                if outcome in (Outcome.RANGE, Outcome.BOUND):
                    self.refused_range[node] = self.max_scale_range if outcome is Outcome.RANGE else math.inf
        if not self.keep_dynamic_norms:
            demand_gains(self)
        if (contradicts := settle_powers(self)) is not None:
            return contradicts
        self.scales.solve(np.concatenate([np.zeros(1, np.int64), *(s.ravel() for s in self.stored)]))
        tolerant = tolerant_values(self) if self.fold_zeros else set()
        dynamic = set() if self.keep_dynamic_norms else {n for n in self.dynamic if has_zero_gain(n, self)}
        for node in self.program.graph.nodes:  # in its order: a map builds on the scale in front of it
            if node in dynamic:
                assign_zero_gain(node, self, tolerant)
            elif node in with_zeros:
                operand, a, b = self.affine[node]
                values = a * self.scales[self.scale(operand)]
                if node not in tolerant or not self.scales.rescale(self.scale(node), values, self.scales_behind(node)):
                    self.kept[node] = _ZERO if self.fold_zeros else _ZERO_BEFORE_ADD
        for node, (_, _, b) in self.affine.items():
            if not np.isfinite(b).all():
                self._refuse_not_finite(node)
        return None

    def _demand(self, node: Node) -> Outcome:
        # What an earlier fold kept for its range it would not keep again: all scales begin at one once more.
        if node.meta.get("custom", {}).get(_REFUSED, 0.0) >= self.max_scale_range:
            return Outcome.RANGE
        operand, a, _ = self.affine[node]
        return self.scales.demand(self.scale(node), self.scale(operand), a)

    def scales_behind(self, node: Node) -> np.ndarray:
        """The scale variables of a value and of those that are it, rearranged or mapped, and nothing else."""
        found, pending = [], [node]
        while pending:
            current = pending.pop()
            scale = self.scale_of[current]
            found += [part.ravel() for part in (scale if isinstance(scale, list) else [scale])]
            for user in current.users:
                if (user in self.affine and user not in self.kept) or isinstance(self.rule_of.get(user), Carry):
                    pending += [user] if user in self.scale_of else []
        return np.concatenate(found)

    def rewrite(self) -> None:
        for node, rule in list(self.rule_of.items()):
            if node in self.scale_of:
                rule.rewrite(node, self)
        replaced = {leaf: self._rewrite_leaf(leaf) for leaf in self.leaves}
        for node, bias in self._biases:
            added = self.program.insert(node.next, aten.add.Tensor, (node, bias), node)
            self.program.redirect(node, added)
            replaced[node] = added
        for node, users in self.spilled.items():
            value = replaced.get(node, node)
            shift = self.shift_of[node] / self.scales[self.scale(node)]
            if node in self.centred:
                shift = subtract_means(torch.from_numpy(shift), self.centred[node]).numpy()
            added = self.add(value, shift, after=value)
            for user in users:
                self.program.redirect(value, added, [user])
        for node, by in self._replacements:
            while replaced.get(by, by) is not by:
                by = replaced[by]
            self.program.replace(node, by)
            replaced[node] = by

    # -- scales ------------------------------------------------------------------------------------------------

    def scale(self, node: Node) -> Any:
        """The scale variables of a value; a constant that is asked for becomes a value with free entries."""
        if node not in self.scale_of:
            value = node.meta["val"]
            if self.program.is_constant(node) and value.numel() <= MAX_FREE_ENTRIES:
                self.scale_of[node] = self.scales.fresh(tuple(value.shape))
                self.stored.append(self.scale_of[node])
                self.leaves.append(node)
                self._bound(node)
            else:
                self.scale_of[node] = self.scales.pinned((1,) * value.dim())
        return self.scale_of[node]

    def pin(self, node: Node, reason: str) -> None:
        """Fix a value's scale to one."""
        if not is_float(node):
            return
        if node in self.scale_of:
            self.scales.pin(self.scale_of[node], reason)
        else:
            self.scale_of[node] = self.scales.fresh((1,) * node.meta["val"].dim())
            self.scales.pin(self.scale_of[node], reason)

    def is_fixed(self, node: Node) -> bool:
        """Whether a value's scale is one already."""
        return not self.program.is_constant(node) and self.scales.is_pinned(self.scale(node))

    def require_equal(self, index: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
        """Require equal scales along `axes`."""
        first = take_first(index, axes)
        self.scales.equate(index, first)
        return first

    def free_axes(self, node: Node, axes: tuple[int, ...]) -> None:
        """Give the result of a weight operation free scales along some axes."""
        value = node.meta["val"]
        shape = [int(size) if axis in axes else 1 for axis, size in enumerate(value.shape)]
        self.scale_of[node] = self.scales.fresh(tuple(shape))
        self.stored.append(self.scale_of[node])

    def usable_weight(self, node: object) -> bool:
        """Whether a weight is constant and may be replaced."""
        return self.program.is_constant(node) and (self.copy_shared or not self.program.shared(node))

    # -- shifts ------------------------------------------------------------------------------------------------

    def no_shift(self, node: Node) -> np.ndarray:
        return np.zeros((1,) * node.meta["val"].dim())

    def any_shift(self, node: Node) -> Any:
        """A shift that differs wherever one can: what can be done with it can be done with any."""
        if not self._shift_shapes:
            self._shift_shapes = shift_shapes(self)
        shapes = self._shift_shapes[node]
        several = isinstance(shapes, list)
        shifts = [np.arange(1.0, math.prod(shape) + 1.0).reshape(shape) for shape in (shapes if several else [shapes])]
        return shifts if several else shifts[0]

    def chosen_shift(self, node: Node) -> np.ndarray:
        """The shift that was chosen for the result of a weight operation; none unless a norm asked for one."""
        return self.chosen.get(node, self.no_shift(node))

    def incoming(self, node: Node, operand: Node) -> np.ndarray:
        """The shift with which `operand` arrives at `node`: none where it has been written out."""
        if node in self.spilled.get(operand, ()):
            return self.no_shift(operand)
        return self.shift_of.get(operand, self.no_shift(operand))

    def carried(self, node: Node, operand: Node) -> Any:
        """An operand's shift, arranged as the result's."""
        several = isinstance(self.scale_of[operand], list)
        shift = self.shift_of[operand] if several else self.incoming(node, operand)
        return self.rule_of[node].carry(node, operand, shift, collapse_equal, self)

    def can_carry(self, node: Node, operand: Node, shift: np.ndarray | None) -> bool:
        """Whether the operation can arrange this shift as its result's; an unknown one counts as possible."""
        if shift is None:
            return True
        try:
            self.rule_of[node].carry(node, operand, shift, collapse_equal, self)
        except CannotCarry:
            return False
        return True

    # -- rewriting ---------------------------------------------------------------------------------------------

    def vector(self, numbers: np.ndarray, axis: int, size: int) -> torch.Tensor:
        """Numbers along one axis as a float64 vector."""
        return torch.from_numpy(np.array(keep_axis(numbers, axis, size, collapse_equal)))

    def scale_weight(
        self,
        node: Node,
        weight: Node,
        *factors: torch.Tensor,
        minus: torch.Tensor | None = None,
        centre: np.ndarray | None = None,
    ) -> None:
        """Let an operation read ``(weight - minus) * factors`` less its means, stored in the weight's dtype.

        Factors, `minus` and the groups of which `centre` subtracts the mean (see :func:`subtract_means`) are laid
        against the weight: on each axis of its size or of size one.
        """

        def blocks() -> Iterator[tuple[slice, float, torch.Tensor]]:
            for rows, block in self.program.blocks(weight):
                new = block - piece(minus, rows) if minus is not None else block.clone()
                for factor in factors:
                    new.mul_(piece(factor, rows))
                yield rows, largest_entry(block), new

        name, old_largest, new_largest = self.program.name(weight), 0.0, 0.0
        stored = torch.empty(weight.meta["val"].shape, dtype=weight.meta["val"].dtype)
        means = None
        if centre is not None:  # where groups span blocks, all of them are seen before the first is written
            means = GroupMeans(centre)
            for rows, _, new in blocks() if means.across_rows else ():
                means.add(new, rows)
        for rows, largest, new in blocks():
            if means is not None:
                means.subtract(new, rows)
            stored[rows] = new
            old_largest, new_largest = max(old_largest, largest), max(new_largest, largest_entry(new))
        node.replace_input_with(weight, self.program.add_parameter(name, stored, weight))
        self.absorbed.setdefault(node, []).append(name)
        if old_largest > 0:
            self.weight_growth = max(self.weight_growth, new_largest / old_largest)

    def create_weight(self, node: Node, argument: str, value: torch.Tensor) -> None:
        """Give an operation a weight it did not have, in the dtype of its input."""
        name = f"{self.path(node)}.{argument}"
        self.set_argument(node, argument, self.program.add_parameter(name, value, node.args[0]))
        self.absorbed.setdefault(node, []).append(name)

    def set_bias(
        self, node: Node, argument: str, bias: Node | None, value: torch.Tensor, *, name: str, like: Node
    ) -> None:
        """Let an operation read `value` for its bias: created where there was none, dropped where it is zero."""
        optional = any(e.name == argument and "Optional" in str(e.type) for e in node.target._schema.arguments)
        if optional and not value.any():
            if bias is not None:
                self.set_argument(node, argument, None)
            return
        name = self.program.name(bias) if bias is not None else name
        self.set_argument(node, argument, self.program.add_parameter(name, value, bias or like))
        self.absorbed.setdefault(node, []).append(name)

    def append_add(self, node: Node, value: np.ndarray, *, name: str, like: Node) -> None:
        """Follow an operation that has no bias of its own by an Add."""
        self._biases.append((node, self.program.add_parameter(name, torch.from_numpy(np.array(value)), like)))
        self.absorbed.setdefault(node, []).append(name)

    def multiply(self, operand: Node, factor: np.ndarray, *, before: Node) -> Node:
        """``operand * factor``, or the operand itself for a factor of one."""
        if (factor == 1).all():
            return operand
        product = self.apply(aten.mul.Tensor, operand, factor, name="scale", before=before)
        if before in self.refused_range:
            product.meta["custom"] = {**product.meta.get("custom", {}), _REFUSED: self.refused_range[before]}
        return product

    def apply(self, target: object, operand: Node, numbers: np.ndarray, *, name: str, before: Node) -> Node:
        """An operation with the operand and constant numbers."""
        constant = self._constant(f"{self.path(before)}.{name}", numbers, operand)
        return self.program.insert(before, target, (operand, constant), before)

    def add(self, operand: Node, shift: np.ndarray, *, before: Node | None = None, after: Node | None = None) -> Node:
        """``operand + shift``, or the operand itself for a shift of zero."""
        if not shift.any():
            return operand
        place = after.next if after is not None else before
        constant = self._constant(f"{self.path(after or before)}.shift", shift, operand)
        return self.program.insert(place, aten.add.Tensor, (operand, constant), after or before)

    def replace(self, node: Node, by: Node) -> None:
        """Replace a node once every rule has read the graph as it was."""
        self._replacements.append((node, by))

    def _constant(self, name: str, value: np.ndarray, like: Node) -> Node:
        return self.program.add_parameter(name, torch.from_numpy(np.array(without_leading_ones(value))), like)

    def set_argument(self, node: Node, name: str, value: Node | None) -> None:
        """Replace an argument of an ATen operation, given by its schema's name."""
        entries = node.target._schema.arguments
        position = [entry.name for entry in entries].index(name)
        if name in node.kwargs:
            node.kwargs = {**node.kwargs, name: value}
            return
        args = list(node.args)
        args += [entry.default_value for entry in entries[len(args) : position + 1]]
        args[position] = value
        node.args = tuple(args)

    def _rewrite_leaf(self, leaf: Node) -> Node:
        """Let what reads a constant as a value read the folded one, which is returned."""
        scale, shift = self.scales[self.scale(leaf)], self.shift_of[leaf]
        if (scale == 1).all() and not shift.any() and leaf not in self.centred:
            return leaf
        old = self.program.constant(leaf)
        new = (old - torch.from_numpy(shift)) / torch.from_numpy(scale)
        if leaf in self.centred:
            new = subtract_means(new, self.centred[leaf])
        node = self.program.add_parameter(self.program.name(leaf), new, leaf)
        for user in list(leaf.users):
            rule = self.rule_of.get(user)
            if rule is not None and not rule.owns_constants:
                user.replace_input_with(leaf, node)
                self.absorbed.setdefault(user, []).append(self.program.name(leaf))
        return node

    # -- words -------------------------------------------------------------------------------------------------

    def reads_values(self, node: Node) -> bool:
        """Whether a node looks at the values of tensors, not only at their sizes."""
        return node.target not in _ABOUT_SIZES

    def returns(self, reader: Node, value: Node) -> bool:
        """Whether a reader is the output, or makes one of the outputs that lie in the memory of this value."""
        return reader.op == "output" or reader in self.program.shared_by_outputs.get(value, ())

    def same_shape(self, a: Node, b: Node) -> bool:
        shapes = (a.meta["val"].shape, b.meta["val"].shape)
        return all(same_size(x, y) for x, y in zip(*shapes, strict=True))

    def module(self, node: Node) -> tuple[str, str]:
        """Path and class name of the innermost module that an operation belongs to."""
        return module_of(node)

    def path(self, node: Node) -> str:
        return self.module(node)[0] or node.name

    def describe(self, node: Node) -> str:
        name, path = operation_name(node), self.module(node)[0]
        shared = [
            self.program.name(c)
            for c in node.all_input_nodes
            if not self.copy_shared and self.program.is_constant(c) and self.program.shared(c)
        ]
        because = f", whose weight {shared[0]!r} is shared and may not be copied," if shared else ""
        return (f"{name} in {path}" if path else name) + because

    def _refuse_not_finite(self, node: Node) -> None:
        # Elsewhere, an infinite number can be a mask.
        if node.target in NORMALISING or node.target is aten.addcmul.default:
            path, kind = self.module(node)
            raise FoldError(
                f"{kind or operation_name(node)} {path or node.name!r}: its scale or shift is not finite; its weight, "
                "bias and running statistics must be finite and the running variance not negative"
            )

    def _saved(self, node: Node) -> int:
        """How many results of operations are never computed when a demand is met, for the example's sizes."""
        _, a, b = self.affine[node]
        return (int((a != 1).any()) + int(b.any())) * math.prod(map(example_size, node.meta["val"].shape))

    def why_not(self, outcome: Outcome) -> str:
        """Why a demand was refused, apart from what fixes its two sides."""
        if outcome is Outcome.RANGE:
            return f"the scales in one channel of its stream would span more than a factor of {self.max_scale_range:g}"
        if outcome is Outcome.BOUND:
            return "its scales would take values between two weights out of the range of float16"
        if outcome is Outcome.SIGN:
            return "some of its scales are negative, and what stands between two weights passes positive ones only"
        return ""

    def _what_fixes(self, node: Node) -> str:
        before = self.scales.why_pinned(self.scale(self.affine[node].operand))
        behind = self.scales.why_pinned(self.scale(node))
        if before and behind:
            return f"its input is fixed by {before}, its result by {behind}: no weight between them can take the scale"
        return (
            "its result meets its own input again (in an addition) or is mixed over its channels: "
            "no weight between them can take the scale"
        )
