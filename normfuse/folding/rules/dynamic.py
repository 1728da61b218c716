"""Norms that compute their statistics from each input: a core that stays, and a gain and a shift that can go."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from ..gauge import Gauge
from ..scales import AGREEMENT
from ..weight_edits import WeightEdits
from .base import MeanRole, Rule, argument, is_float, rule_for

aten = torch.ops.aten


@rule_for(
    *(aten.layer_norm.default, aten.rms_norm.default, aten.group_norm.default),
    *(aten.instance_norm.default, aten.batch_norm.default),
)
class DynamicNorm(Rule):
    """``y = gain * core(x) + shift``, over the last axes (LayerNorm, RMSNorm) or axis 1 (GroupNorm, InstanceNorm, and
    BatchNorm that measures each batch).

    The core measures x against a fixed eps, so x stays as it is. With ``y = s_y * f_y + t_y``:

        gain'  = gain / s_y
        shift' = (shift - t_y) / s_y

    Any ``s_y`` can be had, and any ``t_y`` where there is a shift. Wanted are ``s_y = gain`` (a ratio to the core,
    demanded after all others, because a gain inside the operation costs nothing) and ``t_y = shift``: then the
    weights behind take both, and the core is all that is left.
    """

    owns_constants = True
    mean = MeanRole.MEASURES

    def matches(self, node: Node, gauge: Gauge) -> bool:
        constants = (argument(node, "weight"), argument(node, "bias"))
        measures = argument(node, "training", True) and argument(node, "use_input_stats", True)
        return measures and is_float(node.args[0]) and all(c is None or gauge.usable_weight(c) for c in constants)

    def axes(self, node: Node) -> tuple[int, ...]:
        """The axes of gain and shift."""
        shape = argument(node, "normalized_shape")
        rank = node.meta["val"].dim()
        return (1,) if shape is None else tuple(range(rank - len(shape), rank))

    def chooses_shift(self, node: Node, gauge: Gauge) -> bool:
        return node.target is not aten.rms_norm.default

    def relate(self, node: Node, gauge: Gauge) -> None:
        gauge.pin(node.args[0], f"the statistics of {gauge.describe(node)}")
        gauge.free_axes(node, self.axes(node))
        gauge.matches.dynamic.append(node)

    def gain(self, node: Node, gauge: Gauge) -> np.ndarray:
        """The gain along the result's channels; ones where there is none."""
        return self._constant(node, "weight", 1.0, gauge)

    def shift(self, node: Node, gauge: Gauge) -> np.ndarray:
        """The shift along the result's channels; zeros where there is none."""
        return self._constant(node, "bias", 0.0, gauge)

    def gain_is_gone(self, node: Node, gauge: Gauge) -> bool:
        """Whether the weights behind have all of the gain, but for rounding."""
        gone = np.allclose(gauge.scales[gauge.scale(node)], self.gain(node, gauge), rtol=AGREEMENT, atol=0.0)
        return bool(gone)

    def settle(self, node: Node, gauge: Gauge) -> np.ndarray:
        return gauge.chosen_shift(node)

    def rewrite(self, node: Node, edits: WeightEdits) -> None:
        gauge = edits.gauge
        gain, shift = self.gain(node, gauge), self.shift(node, gauge)
        s_y, t_y = gauge.scales[gauge.scale(node)], gauge.shifts.of[node]
        if node in gauge.cancelling.cancelled:
            left = np.ones(()) if self.gain_is_gone(node, gauge) else gain / np.where(s_y == 0, 1.0, s_y)
            edits.replace(node, edits.multiply(node.args[0], left, before=node))
            return
        weight = argument(node, "weight")
        if self.gain_is_gone(node, gauge):
            if weight is not None:
                edits.set_argument(node, "weight", None)
        elif weight is None:
            edits.create_weight(node, "weight", self._stored(node, gain / s_y))
        elif (s_y != 1).any():
            # Where the scale is zero, so is the gain, and whatever is stored counts for nothing.
            edits.scale_weight(node, weight, 1.0 / self._stored(node, np.where(s_y == 0, 1.0, s_y)))
        if self.chooses_shift(node, gauge) and (t_y.any() or (s_y != 1).any()):
            rest = shift - t_y
            assert not rest[np.broadcast_to(s_y == 0, rest.shape)].any(), (
                "a scale is zero only where all weights take shifts"
            )
            rest = np.divide(rest, s_y, out=np.zeros_like(rest), where=s_y != 0)
            bias = argument(node, "bias")
            name = f"{gauge.path(node)}.bias"
            edits.set_bias(node, "bias", bias, self._stored(node, rest), name=name, like=node.args[0])
        if node in gauge.centring.without_mean:
            shape, eps = argument(node, "normalized_shape"), argument(node, "eps")
            args = (node.args[0], shape, argument(node, "weight"), eps)
            node.target, node.args, node.kwargs = aten.rms_norm.default, args, {}

    def _stored(self, node: Node, numbers: np.ndarray) -> Tensor:
        """Numbers about the result's channels, as the operation holds them."""
        axes = self.axes(node)
        others = tuple(axis for axis in range(numbers.ndim) if axis not in axes)
        return torch.from_numpy(np.broadcast_to(numbers.squeeze(others), self._shape(node)).copy())

    def _shape(self, node: Node) -> tuple[int, ...]:
        return tuple(int(node.meta["val"].shape[axis]) for axis in self.axes(node))

    def _constant(self, node: Node, name: str, default: float, gauge: Gauge) -> np.ndarray:
        value, axes, shape = argument(node, name), self.axes(node), node.meta["val"].shape
        numbers = np.full(self._shape(node), default) if value is None else gauge.program.constant(value).numpy()
        return numbers.reshape([int(shape[axis]) if axis in axes else 1 for axis in range(len(shape))])
