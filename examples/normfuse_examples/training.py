"""What both trainings share: the optimiser, its schedule, a progress bar."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from normfuse.convert import Conversion, taper

from .blocks import NORMS

TAPERED = "tapered"
TRAININGS = (TAPERED, *NORMS)  # how a model can be trained: tapered, or with one of the norms throughout


def optimizer_and_schedule(
    model: nn.Module, learning_rate: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW without decay of gains and biases; a tenth of the steps warm up, then the rate falls along a cosine."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]  # gains, biases
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))
    warm_up = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * step / steps))),
    )
    return optimizer, schedule


def tapered(model: nn.Module, norm: str, steps: int) -> Conversion | None:
    """For "tapered": the model's LayerNorms fade into constants in the middle of the training, all of them."""
    return taper(model, steps, keep_last=False) if norm == TAPERED else None


def train(
    model: nn.Module,
    loss_of_step: Callable[[int], Tensor],
    steps: int,
    *,
    learning_rate: float,
    title: str,
    conversion: Conversion | None = None,
    after_step: Callable[[int], str | None] = lambda step: None,
) -> list[float]:
    """AdamW with warm-up, a cosine schedule and clipped gradients; returns the loss of every step.

    Args:
        model: trained in place, left in training mode.
        loss_of_step: the loss of a step, 0 to steps − 1, with its graph.
        steps: number of updates.
        learning_rate: the highest one.
        title: stands before the progress bar.
        conversion: of the model's norms within the training, see :func:`tapered`; finished at the end.
        after_step: called after each update; what it returns (if not None) is shown behind the bar.
    """
    optimizer, schedule = optimizer_and_schedule(model, learning_rate, steps)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    losses = []
    with Progress(*columns, TextColumn("{task.fields[shown]}")) as progress:
        bar = progress.add_task(title, total=steps, shown="")
        model.train()
        for step in range(steps):
            loss = loss_of_step(step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if conversion is not None:
                conversion.step()
            losses.append(loss.item())
            shown = after_step(step)
            progress.update(bar, advance=1, **({} if shown is None else {"shown": shown}))
    if conversion is not None:
        conversion.finish()
    return losses
