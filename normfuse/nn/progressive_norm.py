"""The way from a norm that computes its statistics from each input to one that folds away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..ops._layout import accumulation_dtype
from ._running_norm import ChannelNorm, check_count, check_fraction, refuse_negative_counters
from ._traced_as_one import Proxy, traced_as_one


class ProgressiveNorm(nn.Module):
    """λ · ``original`` + (1 − λ) · ``static``, where λ falls from 1 to 0 as training goes on.

    With λ = 1 it is the original, with λ = 0 the static norm, bit for bit. :meth:`advance` counts an optimiser step;
    λ is 1 before step ``begin``, ``r0`` at it, 0 from step ``end`` on, and falls linearly in between. The count is part
    of ``state_dict``. Before ``begin`` the static norm rests: it does not run, and its statistics stay as they are, as
    in the authors' program. After that both norms run in every training forward until ``finish`` of the conversion puts
    the static one in its place; evaluation at λ = 0 runs the static one alone.

    Args:
        original: the norm that is replaced; called with the input alone.
        static: its replacement, with running statistics; called with the input and ``pad_mask``.
        begin, end: the steps between which λ falls, 0 <= begin < end.
        r0: λ at step ``begin``, from 0 to 1.
        frozen: keep ``static`` in evaluation mode while training, so that its statistics stay as they were calibrated;
            gain and shift learn.
        evaluate_static: evaluate the static norm alone whatever λ is, as the authors of PRepBN do, who train from the
            start this way. Otherwise evaluation mixes as training does.

    Attributes:
        step: int64 buffer, optimiser steps counted so far.
        pad_mask: used where ``forward`` gets none and the shape fits (x without its channel dimension); for models that
            call their norms with the input alone.

    Raises:
        TypeError, ValueError: a step is not allowed.
        RuntimeError: the forward is traced for export while evaluation still needs the original.
    """

    def __init__(
        self,
        original: nn.Module,
        static: ChannelNorm,
        *,
        begin: int = 0,
        end: int,
        r0: float = 1.0,
        frozen: bool = False,
        evaluate_static: bool = False,
    ) -> None:
        super().__init__()
        check_count("begin", begin, 0)
        check_count("end", end, begin + 1)
        check_fraction("r0", r0, "original's")
        self.original = original
        self.static = static
        self.begin = begin
        self.end = end
        self.r0 = r0
        self.frozen = frozen
        self.evaluate_static = evaluate_static
        self.pad_mask: Tensor | None = None
        device = next(static.buffers()).device
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=device))
        # λ twice: where decisions are made without waiting for the device, and where compiled code finds it without
        # being compiled again for every value.
        self.share = 1.0
        self.register_buffer("_share", torch.ones((), device=device), persistent=False)
        self._set_step(0)
        self.train(original.training)

    def _set_step(self, step: int) -> None:
        self._step = step
        self.resting = step < self.begin
        falling = self.r0 * min(1.0, max(0.0, (self.end - step) / (self.end - self.begin)))
        self.share = 1.0 if self.resting else falling
        self.step.fill_(step)
        self._share.fill_(self.share)

    def advance(self, steps: int = 1) -> None:
        """Count ``steps`` more optimiser steps. Does not wait for the device."""
        check_count("steps", steps, 0)
        self._set_step(self._step + steps)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ProgressiveNorm:
        super()._apply(fn, recurse)
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
        if pad_mask is None and not torch.compiler.is_exporting():  # comparing shapes would fix dynamic ones
            pad_mask = self.mask_for(x)
        if not self.training and (self.share == 0 or self.evaluate_static):
            return self.static(x, pad_mask)
        if self.share > 0 and torch.compiler.is_exporting():
            raise RuntimeError(
                f"a ProgressiveNorm is still {self.share:.1%} {type(self.original).__name__} (step {self._step} of "
                f"{self.end}); train on until the conversion is done, call its finish(), then export"
            )
        original = self.original(x)
        if self.training and self.resting:
            return original
        static = self.static(x, pad_mask).to(original.dtype)
        return torch.lerp(static, original, self._share.to(original.dtype))

    def mask_for(self, x: Tensor) -> Tensor | None:
        """``pad_mask`` if it has the shape of ``x`` without its channel dimension."""
        if self.pad_mask is None:
            return None
        rows = list(x.shape)
        del rows[self.static.channel_dim]
        return self.pad_mask if list(self.pad_mask.shape) == rows else None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        refuse_negative_counters(self, state_dict, prefix, ["step"], args[-1])
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.step.is_meta:
            return
        if self._share.is_meta:  # the others have left with assign=True
            self._share = torch.zeros_like(self._share, device=self.step.device)
        self._set_step(int(self.step))

    def extra_repr(self) -> str:
        shown = f"share={self.share:.3g}, step={self._step}, begin={self.begin}, end={self.end}, r0={self.r0}"
        shown += f", frozen={self.frozen}"
        return shown + (", evaluate_static=True" if self.evaluate_static else "")
