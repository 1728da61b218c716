"""Operations that write one value into another at some positions."""

from __future__ import annotations

import numpy as np
import torch
from torch.fx import Node

from ..arrays import CannotCarry, Collapse, same_size, to_rank, varying
from ..gauge import Facts, Gauge
from ..relations import Relations
from .base import Match, Use, is_float, rule_for
from .combine import equate

aten = torch.ops.aten


@rule_for(
    *(aten.slice_scatter.default, aten.select_scatter.default, aten.index_copy.default, aten.scatter.src),
    *(aten.index_add.default, aten.scatter_add.default, aten.index_put.default),
    *(aten.scatter_reduce.two, aten.index_reduce.default),
)
class Overwrite(Match):
    """Some positions along an axis hold another value's entries: both have one scale, and one shift.

    Where the entries are added, the other value has none. Nobody knows of how many a mean or an extreme is taken: then
    neither has a shift. Of a known range of channels the result has the other value's numbers.
    """

    def fits(self, facts: Facts) -> bool:
        base, written = self._values()
        if not all(is_float(x) and x.meta["val"].dtype == self.value.dtype for x in (base, written)):
            return False
        if self.target is aten.index_put.default:
            return self._places() is not None
        if self._reduction() == "prod":
            return False
        sizes = list(written.meta["val"].shape)
        if self.target is aten.select_scatter.default:
            sizes.insert(self._axis(), 1)
        own = base.meta["val"].shape
        return all(axis == self._axis() or same_size(own[axis], size) for axis, size in enumerate(sizes))

    def relate(self, relations: Relations) -> np.ndarray:
        gauge, scales = relations.gauge, [relations.scale(x) for x in self._values()]
        if (part := self._channels(gauge)) is not None:
            return self._placed(part, *scales)
        carried = zip(self._values(), scales, strict=True)
        scale = equate([self.carry(x, s, relations.require_equal, gauge) for x, s in carried], relations)
        if self._reduction() in ("amax", "amin"):
            relations.scales.require_positive(scale)
        return scale

    def use(self, operand: Node, shift: np.ndarray | None, gauge: Gauge) -> Use:
        base, written = self._values()
        if operand in (base, written) and self._channels(gauge) is not None:
            return Use.PASS
        if operand not in (base, written) or self._reduction() or not gauge.can_carry(self.node, operand, shift):
            return Use.STOP
        if self._adds():
            return Use.STOP if operand is written else Use.PASS
        return Use.JOIN

    def carry(self, operand: Node, numbers: np.ndarray, collapse: Collapse, gauge: Gauge) -> np.ndarray:
        if self._channels(gauge) is not None:
            raise CannotCarry
        if self.target is aten.select_scatter.default and numbers.ndim < self.value.dim():
            return np.expand_dims(numbers, self._axis())
        if self.target is aten.index_put.default:
            return self._put(operand, numbers, collapse)
        return collapse(numbers, tuple(axis for axis in varying(numbers) if axis == self._axis()))

    def settle(self, gauge: Gauge) -> np.ndarray:
        if (part := self._channels(gauge)) is not None:
            return self._placed(part, *(gauge.incoming(self.node, x) for x in self._values()))
        return gauge.no_shift(self.node) if self._reduction() else gauge.carried(self.node, self.args[0])

    def _values(self) -> tuple[Node, Node]:
        return self.args[0], self.argument("src", self.argument("source", self.argument("values")))

    def _axis(self) -> int:
        return self.argument("dim") % self.value.dim()

    def _adds(self) -> bool:
        return self.target in (aten.index_add.default, aten.scatter_add.default) or bool(self.argument("accumulate"))

    def _reduction(self) -> str:
        """How entries are brought together where they are neither put nor added; empty elsewhere."""
        return self.argument("reduce", "")

    def _channels(self, gauge: Gauge) -> slice | None:
        """The range that is overwritten, where each entry along the axis can have a scale of its own."""
        if self.target is aten.slice_scatter.default:
            bounds = [self.argument(name) for name in ("start", "end", "step")]
        elif self.target is aten.select_scatter.default:
            bounds = [self.argument("index"), self.argument("index") + 1 or None, 1]
        else:
            return None
        size = self.value.shape[self._axis()]
        if not all(bound is None or isinstance(bound, int) for bound in (*bounds, size)):
            return None
        part, single = slice(*bounds), self.target is aten.select_scatter.default
        scales = [gauge.scale(x) for x in self._values()]
        own = [scales[0].shape[self._axis()] != 1, single or scales[1].shape[self._axis()] != 1]
        counts = size, len(range(*part.indices(size)))
        free = zip(own, counts, self._values(), strict=True)
        several = own[0] or (own[1] and not single)
        return part if several and all(o or count == 1 or gauge.is_fixed(x) for o, count, x in free) else None

    def _placed(self, part: slice, base: np.ndarray, written: np.ndarray) -> np.ndarray:
        """Numbers about a range of channels in the place of others."""
        if written.ndim < self.value.dim():
            written = np.expand_dims(written, self._axis())
        axis, rank = self._axis(), self.value.dim()
        shape = list(np.broadcast_shapes(*((*x.shape[:axis], 1, *x.shape[axis + 1 :]) for x in (base, written))))
        shape[axis] = int(self.value.shape[axis])
        result = np.array(np.broadcast_to(base, shape))
        result[(slice(None),) * axis + (part,) + (slice(None),) * (rank - axis - 1)] = written
        return result

    def _put(self, operand: Node, numbers: np.ndarray, collapse: Collapse) -> np.ndarray:
        """Numbers about ``x`` or ``values`` of ``x[:, index] = values``, equal along what is indexed."""
        places, rank = self._places(), self.value.dim()
        assert places is not None  # it matches
        before, indexed, axes = places
        if operand is self.args[0]:
            return collapse(numbers, tuple(a for a in varying(numbers) if before <= a < before + indexed))
        numbers = to_rank(numbers, rank - indexed + axes)
        numbers = collapse(numbers, tuple(a for a in varying(numbers) if before <= a < before + axes))
        return numbers.reshape(*numbers.shape[:before], *[1] * indexed, *numbers.shape[before + axes :])

    def _places(self) -> tuple[int, int, int] | None:
        """How many axes stand before those that are indexed, how many these are, and how many the values have there.

        None where other axes stand between them.
        """
        chosen = [index for index in self.args[1] if index is not None]
        before = next((at for at, index in enumerate(self.args[1]) if index is not None), 0)
        if not chosen or list(self.args[1][before : before + len(chosen)]) != chosen:
            return None
        masks = [index.meta["val"].dtype in (torch.bool, torch.uint8) for index in chosen]
        ranks = [index.meta["val"].dim() for index in chosen]
        indexed = sum(rank if mask else 1 for mask, rank in zip(masks, ranks, strict=True))
        return before, indexed, max(1 if mask else rank for mask, rank in zip(masks, ranks, strict=True))
