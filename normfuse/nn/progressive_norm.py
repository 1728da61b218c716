"""The way from a norm that computes its statistics from each input to one that folds away."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..ops._layout import accumulation_dtype, is_exporting
from ..ops._recompute import is_second_run
from ..ops._registry import register_forward
from ._affine_fit import paired_rows, set_affine
from ._running_norm import ChannelNorm, check_choice, check_count, check_fraction, refuse_negative_counters
from ._traced_as_one import Proxy, refuse_script, traced_as_one

SHAPES = ("linear", "cosine")


def _move_moments(
    u: Tensor, v: Tensor, pad_mask: Tensor | None, moments: Tensor, measured: Tensor, momentum: float
) -> None:
    """One step of the averages ``moments`` [5, C] and of their number, in place, from two norms' rows [R, C]."""
    if pad_mask is not None:
        valid = torch.logical_not(pad_mask)
        u, v = u[valid], v[valid]
    mean, target = u.mean(0), v.mean(0)
    # Centred in their own dtype, so that float32 keeps a variance that is small beside the mean.
    squares = [(a * b).mean(0) for a, b in ((u - mean, u - mean), (u - mean, v - target), (v - target, v - target))]
    mean, target = mean.double(), target.double()
    raw = (p.double() + q for p, q in zip(squares, (mean**2, mean * target, target**2), strict=True))
    found = torch.stack([mean, target, *raw])
    usable = found.isfinite().all()  # neither an empty batch nor one with infinities counts
    measured.add_(usable)
    share = torch.clamp(1 / measured.clamp(min=1).double(), min=momentum) * usable
    moments.lerp_(torch.where(usable, found, moments), share)


_, _move_moments_recompute_safe = register_forward(
    "progressive_norm_moments", _move_moments, lambda *_: None, statistics=("moments", "measured"), in_library=False
)


class ProgressiveNorm(nn.Module):
    """λ · ``original`` + (1 − λ) · ``static``, where λ falls from 1 to 0 as training goes on.

    With λ = 1 it is the original, with λ = 0 the static norm, bit for bit. :meth:`advance` counts an optimiser step; λ
    is 1 before step ``begin``, ``r0`` at it, 0 from step ``end`` on, and falls along ``shape`` in between. The count is
    part of ``state_dict``. Before ``begin`` the static norm does not run, and its statistics do not change, as in the
    authors' program. After that both norms run in every training forward until ``finish`` of the conversion puts the
    static one in its place; evaluation at λ = 0 runs the static one alone.

    Args:
        original: the norm that is replaced; called with the input alone.
        static: its replacement, with running statistics; called with the input and ``pad_mask``.
        begin: the step at which λ begins to fall, at least 0.
        end: the step from which on λ is 0, more than ``begin``.
        r0: λ at step ``begin``, from 0 to 1.
        frozen: keep ``static`` in evaluation mode while training, so that its statistics stay as they were calibrated;
            gain and shift learn.
        shape: "linear", or "cosine": flat at both ends.
        momentum: share of each training step's new value in moving averages of the moments of input and output, kept
            while the static norm rests. From them its statistics, gain and shift are set in closed form when ``begin``
            is reached, and λ falls from a static norm that is close to the original; with ``frozen`` this is tapering
            (TaperNorm, arXiv 2602.10408). With several processes the averages are those of all of them. None: nothing
            is kept.
        evaluate_static: use only the static norm in evaluation, whatever λ is, as the authors of PRepBN do. False:
            evaluation mixes both norms, as training does.

    Attributes:
        step: int64 buffer, optimiser steps counted so far.
        moments: with ``momentum``, float64 buffer [5, C]: averages of u, v, u², uv, v² for the static norm's input u
            and the original's output v; ``measured`` is an int64 buffer, the number of steps in them.
        pad_mask: used where ``forward`` gets none and the shape fits (x without its channel dimension); for models that
            call their norms with the input alone.

    Raises:
        TypeError, ValueError: a step or another option is not allowed.
        RuntimeError: the forward is traced for export while evaluation still needs the original.

    Example:
        >>> from normfuse.nn import ProgressiveNorm, RepBatchNorm
        >>> norm = ProgressiveNorm(nn.LayerNorm(8), RepBatchNorm(8), begin=0, end=100)
        >>> x = torch.randn(4, 8)
        >>> torch.equal(norm(x), nn.LayerNorm(8)(x))  # λ = 1
        True
    """

    __prepare_scriptable__ = refuse_script

    step: Tensor
    moments: Tensor
    measured: Tensor
    _share: Tensor

    def __init__(
        self,
        original: nn.Module,
        static: ChannelNorm,
        *,
        begin: int = 0,
        end: int,
        r0: float = 1.0,
        frozen: bool = False,
        shape: str = "linear",
        momentum: float | None = None,
        evaluate_static: bool = False,
    ) -> None:
        super().__init__()
        check_count("begin", begin, 0)
        check_count("end", end, begin + 1)
        check_fraction("r0", r0, "original's")
        check_choice("shape", shape, SHAPES)
        if momentum is not None:
            check_fraction("momentum", momentum, "new")
            if begin == 0:
                raise ValueError("momentum needs steps to measure in; give a begin of at least 1")
        self.original = original
        self.static = static
        self.begin = begin
        self.end = end
        self.r0 = r0
        self.frozen = frozen
        self.shape = shape
        self.momentum = momentum
        self.evaluate_static = evaluate_static
        self.pad_mask: Tensor | None = None
        device = next(static.buffers()).device
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=device))
        if momentum is not None:
            moments = torch.zeros(5, static.num_features, dtype=torch.float64, device=device)
            self.register_buffer("moments", moments)
            self.register_buffer("measured", torch.zeros((), dtype=torch.int64, device=device))
        # λ twice: where decisions are made without waiting for the device, and where compiled code finds it without
        # being compiled again for every value.
        self.share = 1.0
        self.register_buffer("_share", torch.ones((), device=device), persistent=False)
        self._set_step(0)
        self.train(original.training)

    def _set_step(self, step: int) -> None:
        self._step = step
        self.resting = step < self.begin
        left = min(1.0, max(0.0, (self.end - step) / (self.end - self.begin)))
        if self.shape == "cosine":
            left = 0.5 - 0.5 * math.cos(math.pi * left)
        self.share = 1.0 if self.resting else self.r0 * left
        self.step.fill_(step)
        self._share.fill_(self.share)

    @property
    def weight(self) -> Tensor | None:
        """That of the original: models ask a norm's weight for its dtype and device, as Mamba does."""
        return self.original.weight

    @property
    def bias(self) -> Tensor | None:
        """That of the original."""
        return self.original.bias

    def reset_parameters(self) -> None:
        """Set the count back to 0 and forget the averages; the norms inside have a reset of their own."""
        self._set_step(0)
        if self.momentum is not None:
            self.moments.zero_()
            self.measured.zero_()

    def advance(self, steps: int = 1) -> None:
        """Count ``steps`` more optimiser steps. Waits for the device only where λ begins to fall from averages.

        Args:
            steps: how many, at least 0.
        """
        check_count("steps", steps, 0)
        rested = self.resting
        self._set_step(self._step + steps)
        if rested and not self.resting and self.momentum is not None:
            self._fit()

    @torch.no_grad()
    def _measure(self, x: Tensor, y: Tensor, pad_mask: Tensor | None, momentum: float) -> None:
        dtype = accumulation_dtype(x.dtype)
        u, v = paired_rows(self.static, x.to(dtype), y.to(dtype), None)
        mask = None if pad_mask is None else pad_mask.reshape(-1)
        if not is_second_run():  # compiled code asks at run time
            move = _move_moments_recompute_safe if torch.compiler.is_compiling() else _move_moments
            move(u, v, mask, self.moments, self.measured, momentum)

    @torch.no_grad()
    def _fit(self) -> None:
        """Statistics, gain and shift of the static norm from the averages; as it was where nothing was measured."""
        moments = self.moments * self.measured
        total = self.measured.double()
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(moments)
            dist.all_reduce(total)
        if total == 0:
            raise RuntimeError(
                f"λ begins to fall at step {self.begin}, but the norm has not run in training mode before; call step() "
                "after each step of the optimiser, and leave out norms that do not train with `where`"
            )
        mean, target, square, product, target_square = moments / total
        var, target_var = ((s - m**2).clamp(min=0) for s, m in ((square, mean), (target_square, target)))
        set_affine(self.static, mean, var, target, target_var, product - mean * target)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ProgressiveNorm:
        moments = self._buffers.get("moments")
        super()._apply(fn, recurse)
        if moments is not None and self.moments.dtype != moments.dtype:
            self.moments = moments.to(self.step.device)
        # λ anew: a conversion to bfloat16 or float16 has rounded it.
        dtype, device = accumulation_dtype(self._share.dtype), self._share.device
        self._share = torch.full((), self.share, dtype=dtype, device=device)
        return self

    def train(self, mode: bool = True) -> ProgressiveNorm:
        super().train(mode)
        if self.frozen:
            self.static.eval()
        return self

    def forward(self, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        if isinstance(x, Proxy):
            return traced_as_one(self, x, pad_mask)
        self.static.check_input(x, pad_mask)
        if pad_mask is None and not is_exporting():  # comparing shapes would fix dynamic ones
            pad_mask = self.mask_for(x)
        if not self.training and (self.share == 0 or self.evaluate_static):
            return self.static(x, pad_mask)
        if self.share > 0 and is_exporting():
            raise RuntimeError(
                f"a ProgressiveNorm is still {self.share:.1%} {type(self.original).__name__} (step {self._step} of "
                f"{self.end}); train on until the conversion is done, call its finish(), then export"
            )
        original = self.original(x)
        if self.training and self.resting:
            # Not in a checkpoint's second run, which is part of the same step.
            if self.momentum is not None:
                self._measure(x, original, pad_mask, self.momentum)
            return original
        static = self.static(x, pad_mask).to(original.dtype)
        return torch.lerp(static, original, self._share.to(original.dtype))

    def mask_for(self, x: Tensor) -> Tensor | None:
        """``pad_mask`` if it has the shape of ``x`` without its channel dimension.

        Args:
            x: what the norm is given, [..., C].

        Returns:
            bool [...], True = padding; or None.
        """
        if self.pad_mask is None:
            return None
        rows = list(x.shape)
        del rows[self.static.channel_dim]
        return self.pad_mask if list(self.pad_mask.shape) == rows else None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        counters = ["step"] if self.momentum is None else ["step", "measured"]
        refuse_negative_counters(self, state_dict, prefix, counters, args[-1])
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.step.is_meta:
            return
        if self._share.is_meta:  # the others have left with assign=True
            self._share = torch.zeros_like(self._share, device=self.step.device)
        self._set_step(int(self.step))

    def extra_repr(self) -> str:
        shown = f"share={self.share:.3g}, step={self._step}, begin={self.begin}, end={self.end}, r0={self.r0}"
        shown += f", frozen={self.frozen}" + (f", shape={self.shape!r}" if self.shape != SHAPES[0] else "")
        shown += f", momentum={self.momentum}" if self.momentum is not None else ""
        return shown + (", evaluate_static=True" if self.evaluate_static else "")
