"""The scale variables of a program's values while rules relate them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from .arrays import take_first
from .gauge import Gauge
from .nodes import is_float
from .operations import UNWRITTEN, filled_with
from .program import largest_entry
from .scales import NARROW_BITS

# A constant that flows as a value gets one scale per entry; beyond this many entries it stays as it is.
MAX_FREE_ENTRIES = 1 << 22
# Dtypes with so few exponents that scales take them away from the values: one byte leaves none to spare.
_FEW_EXPONENTS = {
    *(torch.float16, torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
}


def _stands_for_infinity(constant: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a constant is a mask: it holds infinities, or numbers such as ``torch.finfo(dtype).min``.

    Scales up to 2**40, or those that few exponents allow, take no other number out of its dtype.
    """
    if not dtype.is_floating_point:
        return not bool(constant.isfinite().all())
    room = 2.0**NARROW_BITS if dtype in _FEW_EXPONENTS else 2.0**40
    return not largest_entry(constant) <= torch.finfo(dtype).max / room


class Relations:
    """What matches ask for and say while they are related, in the order of the program.

    Attributes:
        gauge: what is known of the program; it answers with the scale variables that there are so far.
        scales: the solver.
        scale_of, stored, free_constants, equations: see :class:`normfuse.folding.results.Matches`.
        mixing: products with constants whose operand has scales along axes that the constant does not read.
    """

    def __init__(self, gauge: Gauge, scale_of: dict[Node, Any]) -> None:
        self.gauge, self.scales = gauge, gauge.scales
        self.scale_of = scale_of
        self.stored: list[np.ndarray] = []
        self.free_constants: list[Node] = []
        self.equations: list[Node] = []
        self.mixing: list[Node] = []

    def scale(self, node: Node) -> Any:
        """The scale variables of a value; a constant that is asked for becomes a value with free entries."""
        if node not in self.scale_of:
            value, program = node.meta["val"], self.gauge.program
            known = tuple(size if isinstance(size, int) else 1 for size in value.shape)
            if program.is_constant(node) and value.numel() == 0:  # what has no entries has them at any scale
                self.scale_of[node] = self.scales.fresh(tuple(size or 1 for size in value.shape))
            # Zeros are zeros at any scale, also where their number is not known.
            elif (filled_with(node) == 0 or node.target in UNWRITTEN) and math.prod(known) <= MAX_FREE_ENTRIES:
                self.scale_of[node] = self.scales.fresh(known)
            elif (
                program.is_constant(node)
                and value.numel() <= MAX_FREE_ENTRIES
                and not _stands_for_infinity(program.constant(node), value.dtype)
            ):
                self.scale_of[node] = self.scales.fresh(tuple(value.shape))
                self.stored.append(self.scale_of[node])
                self.free_constants.append(node)
                self.bound(node)
            else:
                self.scale_of[node] = self.scales.pinned((1,) * value.dim())
        return self.scale_of[node]

    def is_fixed(self, node: Node) -> bool:
        """Whether a value's scale is one already."""
        return not self.gauge.program.is_constant(node) and self.scales.is_pinned(self.scale(node))

    def pin(self, node: Node, reason: str) -> None:
        """Fix the scale of an operand to one."""
        if node in self.scale_of:
            if is_float(node):
                self.scales.pin(self.scale_of[node], reason)
        elif (scale := self.fixed(node, reason)) is not None:
            self.scale_of[node] = scale

    def fixed(self, node: Node, reason: str) -> np.ndarray | None:
        """The scale of a value that stays as it is; None for one that is no floating-point tensor."""
        if not is_float(node):
            return None
        scale = self.scales.fresh((1,) * node.meta["val"].dim())
        self.scales.pin(scale, reason)
        return scale

    def require_equal(self, index: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
        """Require equal scales along `axes`."""
        first = take_first(index, axes)
        self.scales.equate(index, first)
        return first

    def free(self, node: Node, axes: tuple[int, ...]) -> np.ndarray:
        """Scales for the result of a weight operation, which are free along some axes."""
        shape = [int(size) if axis in axes else 1 for axis, size in enumerate(node.meta["val"].shape)]
        scale = self.scales.fresh(tuple(shape))
        self.stored.append(scale)
        return scale

    def bound(self, node: Node) -> None:
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
