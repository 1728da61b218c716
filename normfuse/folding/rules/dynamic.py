"""Norms that compute their statistics from each input: a core that stays, and a gain and a shift that can go."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..gauge import Facts, Gauge
from ..relations import Relations
from ..scales import AGREEMENT
from ..weight_edits import WeightEdits
from .base import Match, MeanRole, is_float, rule_for

aten = torch.ops.aten


@rule_for(
    *(aten.layer_norm.default, aten.rms_norm.default, aten.group_norm.default),
    *(aten.instance_norm.default, aten.batch_norm.default),
)
class DynamicNorm(Match):
    """A norm that measures each input: ``y = gain * core(x) + shift``.

    It works over the last axes (LayerNorm, RMSNorm) or axis 1 (GroupNorm, InstanceNorm, and BatchNorm that measures
    each batch).

    The core measures x against a fixed eps, so x stays as it is. With ``y = s_y * f_y + t_y``:

        gain'  = gain / s_y
        shift' = (shift - t_y) / s_y

    Any ``s_y`` can be had, and any ``t_y`` where there is a shift. Wanted are ``s_y = gain`` (a ratio to the core,
    demanded after all others, because a gain inside the operation costs nothing) and ``t_y = shift``: then the
    weights behind take both, and the core is all that is left.
    """

    owns_constants = True
    mean = MeanRole.MEASURES

    @property
    def subtracts_mean(self) -> bool:
        return self.target is aten.layer_norm.default

    def fits(self, facts: Facts) -> bool:
        constants = (self.argument("weight"), self.argument("bias"))
        measures = self.argument("training", True) and self.argument("use_input_stats", True)
        return measures and is_float(self.args[0]) and all(c is None or facts.usable_weight(c) for c in constants)

    def axes(self) -> tuple[int, ...]:
        """The axes of gain and shift."""
        shape = self.argument("normalized_shape")
        rank = self.value.dim()
        return (1,) if shape is None else tuple(range(rank - len(shape), rank))

    def chooses_shift(self, gauge: Gauge) -> bool:
        return self.target is not aten.rms_norm.default

    def relate(self, relations: Relations) -> np.ndarray:
        relations.pin(self.args[0], f"the statistics of {relations.gauge.describe(self.node)}")
        return relations.free(self.node, self.axes())

    def gain(self, gauge: Gauge) -> np.ndarray:
        """The gain along the result's channels; ones where there is none."""
        return self._constant("weight", 1.0, gauge)

    def shift(self, gauge: Gauge) -> np.ndarray:
        """The shift along the result's channels; zeros where there is none."""
        return self._constant("bias", 0.0, gauge)

    def gain_is_gone(self, gauge: Gauge) -> bool:
        """Whether the weights behind have all of the gain, but for rounding."""
        gone = np.allclose(gauge.scales[gauge.scale(self.node)], self.gain(gauge), rtol=AGREEMENT, atol=0.0)
        return bool(gone)

    def settle(self, gauge: Gauge) -> np.ndarray:
        return gauge.chosen_shift(self.node)

    def rewrite(self, edits: WeightEdits) -> None:
        gauge = edits.gauge
        gain, shift = self.gain(gauge), self.shift(gauge)
        s_y, t_y = gauge.scales[gauge.scale(self.node)], gauge.shifts.of[self.node]
        if self.node in gauge.cancelling.cancelled:
            left = np.ones(()) if self.gain_is_gone(gauge) else gain / np.where(s_y == 0, 1.0, s_y)
            edits.replace(self.node, edits.multiply(self.args[0], left, before=self.node))
            return
        weight = self.argument("weight")
        if self.gain_is_gone(gauge):
            if weight is not None:
                edits.set_argument(self.node, "weight", None)
        elif weight is None:
            edits.create_weight(self.node, "weight", self._stored(gain / s_y))
        elif (s_y != 1).any():
            # Where the scale is zero, so is the gain, and whatever is stored counts for nothing.
            edits.scale_weight(self.node, weight, 1.0 / self._stored(np.where(s_y == 0, 1.0, s_y)))
        if self.chooses_shift(gauge) and (t_y.any() or (s_y != 1).any()):
            rest = shift - t_y
            assert not rest[np.broadcast_to(s_y == 0, rest.shape)].any(), (
                "a scale is zero only where all weights take shifts"
            )
            rest = np.divide(rest, s_y, out=np.zeros_like(rest), where=s_y != 0)
            bias = self.argument("bias")
            name = f"{gauge.path(self.node)}.bias"
            edits.set_bias(self.node, "bias", bias, self._stored(rest), name=name, like=self.args[0])
        if self.node in gauge.centring.without_mean:
            shape, eps = self.argument("normalized_shape"), self.argument("eps")
            args = (self.args[0], shape, self.argument("weight"), eps)
            self.node.target, self.node.args, self.node.kwargs = aten.rms_norm.default, args, {}

    def _stored(self, numbers: np.ndarray) -> Tensor:
        """Numbers about the result's channels, as the operation holds them."""
        axes = self.axes()
        others = tuple(axis for axis in range(numbers.ndim) if axis not in axes)
        return torch.from_numpy(np.broadcast_to(numbers.squeeze(others), self._shape()).copy())

    def _shape(self) -> tuple[int, ...]:
        return tuple(int(self.value.shape[axis]) for axis in self.axes())

    def _constant(self, name: str, default: float, gauge: Gauge) -> np.ndarray:
        value, axes, shape = self.argument(name), self.axes(), self.value.shape
        numbers = np.full(self._shape(), default) if value is None else gauge.program.constant(value).numpy()
        return numbers.reshape([int(shape[axis]) if axis in axes else 1 for axis in range(len(shape))])
