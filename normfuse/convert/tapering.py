"""Dynamic norms that fade into constants while a model trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..nn._running_norm import check_fraction, check_positive
from ..ops._layout import accumulation_dtype
from ..ops._recompute import in_reentrant_checkpoint, is_second_run, refuse_reentrant
from .progressive import Conversion, Schedule, progressive
from .swap import Where


def taper(
    model: nn.Module,
    schedule: Schedule | int = 10_000,
    *,
    to: str = "batch",
    keep_last: bool = True,
    momentum: float = 0.02,
    where: Where | None = None,
    valid_mask: str | None = "attention_mask",
    **options: Any,
) -> Conversion:
    """Fade dynamic norms into constants during training, from scratch or from a trained model (arXiv 2602.10408).

    TaperNorm (arXiv 2602.10408), by :func:`progressive`: the norms stay as they are until ``schedule.start``, and
    moving averages of what they see and give are kept; from these a static norm is fitted to each, in closed form. Then
    its share grows along a cosine, while gain and bias learn and statistics stay: no training step uses statistics of
    its batch, so that training and evaluation are one function throughout.

    ```python
    conversion = taper(model, Schedule(steps=10_000, start=0.2, end=0.8, shape="cosine"))
    for batch in loader:
        ...                       # loss.backward(); optimizer.step()
        conversion.step()
    conversion.finish()
    ```

    Args:
        model: changed in place; create the optimiser afterwards.
        schedule: when the share of the originals falls, at the earliest after one step; a number stands for
            ``Schedule(steps=number, start=0.2, end=0.8, shape="cosine")``.
        to: as for :func:`progressive`.
        keep_last: leave the last norm in the order of the model alone. Without a norm in front of the head, a language
            model can lower its loss with ever larger logits. To remove this norm too, add the loss of
            :class:`ScaleAnchor`.
        momentum: of the moving averages.
        where: as for :func:`progressive`.
        valid_mask: as for :func:`progressive`.
        options: as for :func:`progressive`.

    Returns:
        A :class:`Conversion`; there is nothing to calibrate.

    Raises:
        ValueError, TypeError: as :func:`progressive`, or the share falls from the first step on. The model is then as
            before.

    Example:
        >>> from normfuse.convert import Schedule, taper
        >>> model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8), nn.LayerNorm(8))
        >>> conversion = taper(model, Schedule(steps=10, start=0.2, end=0.8, shape="cosine"))
        >>> list(conversion.norms)  # the last norm stays
        ['0']
    """
    if isinstance(schedule, int):
        schedule = Schedule(schedule, start=0.2, end=0.8, shape="cosine")
    check_fraction("momentum", momentum, "new")
    if round(schedule.steps * schedule.start) < 1:
        raise ValueError(
            f"start={schedule.start} of {schedule.steps} steps leaves no step to measure in; give at least "
            f"{1 / schedule.steps:g}"
        )
    return progressive(
        model,
        to,
        schedule,
        where=where,
        moving_average=momentum,
        keep_last=keep_last,
        valid_mask=valid_mask,
        **options,
    )


class ScaleAnchor:
    """A loss that keeps the scale of a module's input, usually the head's, if no norm does (arXiv 2602.10408).

    Args:
        module: a hook on it keeps the root mean square of its input, [..., C], in every training forward.
        target: that root mean square; None: the one of the first training forward.
        weight: of the loss, ``weight * mean((rms / target - 1)²)`` over positions.

    Example:
        >>> from normfuse.convert import ScaleAnchor
        >>> head = nn.Linear(4, 2)
        >>> anchor = ScaleAnchor(head, target=1.0)
        >>> loss = head(torch.randn(8, 4)).square().mean() + anchor.loss()
    """

    def __init__(self, module: nn.Module, target: float | None = None, weight: float = 0.1) -> None:
        if target is not None:
            check_positive("target", target)
        check_positive("weight", weight)
        self.weight = weight
        self.target: Any = None if target is None else torch.tensor(target)
        self._scale: Tensor | None = None
        self._hook = module.register_forward_pre_hook(self._keep)

    def _keep(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if not module.training or is_second_run():
            return
        if in_reentrant_checkpoint():
            refuse_reentrant("the loss of a ScaleAnchor")
        x = arguments[0]
        self._scale = x.to(accumulation_dtype(x.dtype)).square().mean(-1).sqrt()
        if self.target is None:
            self.target = self._scale.detach().mean()

    def loss(self) -> Tensor:
        """The loss of the last training forward.

        Returns:
            A scalar.

        Raises:
            RuntimeError: the module has not run in training mode since the last call.
        """
        if self._scale is None:
            raise RuntimeError("the module has not run in training mode; call loss() after a forward of the model")
        scale, self._scale = self._scale, None
        return self.weight * (scale / self.target.to(scale.device) - 1).square().mean()

    def close(self) -> None:
        """Remove the hook."""
        self._hook.remove()
