"""Training a changed model to compute what the original does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..nn import ProgressiveNorm
from ..nn._running_norm import ChannelNorm, check_count
from ..nn.calibration import keep_modes, run_batch
from ..ops._recompute import in_reentrant_checkpoint, refuse_reentrant
from .fitting import static_alone
from .progressive import Conversion, given_as

OutputLoss = Callable[[Any, Any], Tensor]


def relative_error(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean squared difference of [..., C] over the teacher's mean variance per channel: 0 if equal, about 1 if unlike.

    Args:
        student: [..., C].
        teacher: like it.
        valid: bool or numbers, the shape of the values without their channels: positions that count; None: all.

    Returns:
        A scalar.

    Example:
        >>> from normfuse.convert import relative_error
        >>> x = torch.randn(100, 8)
        >>> float(relative_error(x, x))
        0.0
    """
    student, teacher = (t[valid] if valid is not None else t.reshape(-1, t.shape[-1]) for t in (student, teacher))
    student, teacher = student.float(), teacher.float()
    return (student - teacher).square().mean() / teacher.var(0, correction=0).mean().clamp(min=1e-12)


def output_error(student: Any, teacher: Any) -> Tensor:
    """Mean :func:`relative_error` of the floating tensors in two outputs of one kind; a "loss" is left out.

    Args:
        student: what the student's ``forward`` returned: a tensor, or tensors in any structure.
        teacher: what the teacher's returned, in the same structure.

    Returns:
        A scalar.

    Raises:
        ValueError: the outputs hold no floating tensors, or not the same number of them.

    Example:
        >>> from normfuse.convert import output_error
        >>> logits = torch.randn(3, 4)
        >>> float(output_error({"logits": logits}, {"logits": logits}))
        0.0
    """
    pairs = [
        (s, t)
        for s, t in zip(_tensors(student), _tensors(teacher), strict=True)
        if s.is_floating_point() and s.dim() > 0
    ]
    if not pairs:
        raise ValueError("the model's output holds no floating tensor to compare; give output_loss")
    return torch.stack([relative_error(s, t) for s, t in pairs]).mean()


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = [value for name, value in output.items() if name != "loss"]
    return [tensor for part in output for tensor in _tensors(part)] if isinstance(output, (tuple, list)) else []


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of ``model`` by name, also as they are called without DistributedDataParallel or torch.compile."""
    known = dict(model.named_modules())
    bare = {".".join(p for p in name.split(".") if p not in ("module", "_orig_mod")): m for name, m in known.items()}
    return {**bare, **known}


class Distillation:
    """Loss of a student against a frozen teacher: at modules inside and at the output.

    Hooks do the work: whenever the student runs with gradients enabled, the teacher runs on the same arguments, and
    :meth:`loss` compares what both have left. So it fits into any training loop, and the student's ``forward`` and
    signature stay as they are.

    Args:
        student: the model that trains.
        teacher: the original, usually a ``copy.deepcopy`` made before :func:`progressive`. Put into evaluation mode and
            frozen.
        at: names of modules, the same in both, whose outputs [..., C] are compared with :func:`relative_error`; a
            :class:`Conversion` stands for its norms. Outputs at a norm are the states of a layer in the scale in
            which the model uses them.
        hidden_weight: of the mean over ``at`` in the loss.
        output_weight: of the output in the loss.
        output_loss: function of both outputs that returns a scalar; None: :func:`output_error`.
        valid_mask: the argument of the student's ``forward`` that is not 0 where a position is valid; others
            are left out of the comparison at modules whose output has such positions.

    Raises:
        ValueError: a name in ``at`` is unknown to one of the models.

    Example:
        >>> import copy
        >>> from normfuse.convert import Distillation
        >>> student = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> distillation = Distillation(student, copy.deepcopy(student), at=["0"])
        >>> _ = student(torch.randn(3, 4))
        >>> distillation.loss().item()  # the two are still the same
        0.0
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        at: Iterable[str] | Conversion = (),
        *,
        hidden_weight: float = 1.0,
        output_weight: float = 1.0,
        output_loss: OutputLoss | None = None,
        valid_mask: str = "attention_mask",
    ) -> None:
        self.student = student
        self.teacher = teacher.eval().requires_grad_(False)
        self.hidden_weight = hidden_weight
        self.output_weight = output_weight
        self.output_loss = output_error if output_loss is None else output_loss
        self.valid_mask = valid_mask
        self.terms: dict[str, float] = {}
        self._kept: dict[nn.Module, dict[str, list[Tensor]]] = {student: {}, teacher: {}}
        self._outputs: tuple[Any, Any] | None = None
        self._valid: Tensor | None = None
        names = list(at.norms if isinstance(at, Conversion) else at)
        for kind, model in (("student", student), ("teacher", teacher)):
            known = _modules(model)
            unknown = [name for name in names if name not in known]
            if unknown:
                raise ValueError(
                    f"at names {unknown[0]!r}, which the {kind} of class {type(model).__name__} does not have"
                )
        self._hooks = [student.register_forward_hook(self._run_teacher, with_kwargs=True)]
        self._hooks.append(student.register_forward_pre_hook(self._begin))
        for model in (student, teacher):
            known = _modules(model)
            for name in names:
                self._hooks.append(known[name].register_forward_hook(self._keeper(model, name)))

    def _begin(self, *_: Any) -> None:
        for kept in self._kept.values():
            kept.clear()
        self._outputs = None

    def _keeper(self, model: nn.Module, name: str) -> Callable[..., None]:
        # Outside of what torch.compile traces, which takes no module for a key.
        kept, learns = self._kept[model], model is self.student

        def keep(module: nn.Module, arguments: Any, output: Tensor) -> None:
            # A checkpointed block runs again while gradients are computed; the loss exists by then.
            if self._outputs is None:
                if learns and in_reentrant_checkpoint():
                    refuse_reentrant(f"the loss at {name}")
                kept.setdefault(name, []).append(output)

        return keep

    def _run_teacher(self, student: nn.Module, arguments: Any, options: dict[str, Any], output: Any) -> None:
        if not torch.is_grad_enabled():
            self._begin()
            return
        with torch.no_grad():
            self._outputs, expected = None, self.teacher(*arguments, **options)
        self._outputs = output, expected
        mask = given_as(student, self.valid_mask, arguments, options)
        self._valid = None if mask is None else mask != 0

    def loss(self) -> Tensor:
        """The loss of the student's last forward; its parts are in ``terms`` afterwards (as detached tensors).

        Returns:
            A scalar.

        Raises:
            RuntimeError: the student has not run with gradients enabled since the last call.
        """
        if self._outputs is None:
            raise RuntimeError(
                "no forward of the student to compare; call it once, with gradients enabled, before loss()"
            )
        student, teacher = self._kept.values()
        errors = [
            relative_error(s, t, self._valid if self._valid is not None and self._valid.shape == s.shape[:-1] else None)
            for name, values in student.items()
            for s, t in zip(values, teacher[name], strict=True)
        ]
        parts = {"output": self.output_weight * self.output_loss(*self._outputs)}
        if errors:
            parts["hidden"] = self.hidden_weight * torch.stack(errors).mean()
        self._begin()
        self.terms = {name: part.detach() for name, part in parts.items()}
        return torch.stack(list(parts.values())).sum()

    def error(self, batches: Iterable[Any]) -> float:
        """Mean of :meth:`loss` over batches; the student is in evaluation mode, with its static norms alone (λ = 0).

        Args:
            batches: as ``loader`` of :func:`distill`.

        Returns:
            The mean loss over them.

        Raises:
            ValueError: there is no batch.
        """
        norms = {n: m for n, m in self.student.named_modules() if isinstance(m, ProgressiveNorm)}
        device = next(self.student.parameters()).device
        losses = []
        with keep_modes(self.student), static_alone(norms):
            self.student.eval()
            for batch in batches:
                run_batch(self.student, batch, device)
                losses.append(self.loss().detach())
        if not losses:
            raise ValueError("there is no batch to measure the error on; give at least one")
        return torch.stack(losses).mean().item()

    def compute_loss(self, outputs: Any, labels: Any = None, num_items_in_batch: Any = None) -> Tensor:
        """:meth:`loss` in the form of transformers' ``Trainer(compute_loss_func=…)``.

        Args:
            outputs: not used: hooks have seen them.
            labels: not used.
            num_items_in_batch: not used.

        Returns:
            A scalar.
        """
        return self.loss()

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __enter__(self) -> Distillation:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def distill(
    distillation: Distillation,
    loader: Iterable[Any],
    *,
    steps: int,
    optimizer: Optimizer,
    scheduler: LRScheduler | None = None,
    conversion: Conversion | None = None,
    max_grad_norm: float | None = 1.0,
    dropout: bool = False,
    autocast: torch.dtype | None = None,
    validation: Iterable[Any] | None = None,
    validate_every: int = 100,
    after_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Train the student on its distillation loss alone.

    To resume a run, store the ``state_dict`` of the student, the optimiser and the scheduler, and the position in the
    data. There is no other state.

    Args:
        distillation: of the student, which is trained in place and whose mode is restored.
        loader: batches, each a tensor or a mapping of keyword arguments, or a tuple or list that begins with
            either; begun anew when it ends.
        steps: number of optimiser steps.
        optimizer: of the student's parameters.
        scheduler: takes a step with each of the optimiser's; None: a constant learning rate.
        conversion: its λ takes a step with each of the optimiser's.
        max_grad_norm: gradients are clipped to this norm; None: not at all.
        dropout: whether dropout is on. Without it every part of the model but its norms is in evaluation mode.
        autocast: run the student and the teacher under ``torch.autocast`` with this dtype.
        validation: batches that are not trained on, to be iterated over again and again. The student's error on them,
            with its static norms alone, is measured at the start, every ``validate_every`` steps and at the end; in the
            end the student gets back the parameters and buffers (but not λ's count) of the lowest. So it never ends
            worse than it began. None: it ends with the last step.
        validate_every: steps between two measurements.
        after_step: called with the number of the step, from 1, and its loss, a detached tensor.

    Returns:
        The loss of every step, [steps].

    Raises:
        ValueError: ``steps`` or ``validate_every`` is not positive; ``loader`` or ``validation`` is empty.

    Example:
        >>> import copy
        >>> from normfuse.convert import Distillation, distill
        >>> student = nn.Linear(4, 2)
        >>> distillation = Distillation(student, copy.deepcopy(student))
        >>> optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        >>> distill(distillation, [torch.randn(8, 4)], steps=3, optimizer=optimizer)
        tensor([0., 0., 0.])
    """
    check_count("steps", steps, 1)
    check_count("validate_every", validate_every, 1)
    best = None if validation is None else _Best(distillation, validation)
    student = distillation.student
    with keep_modes(student):
        student.train(dropout)
        frozen = {
            module.static for module in student.modules() if isinstance(module, ProgressiveNorm) and module.frozen
        }
        for module in student.modules():
            if isinstance(module, (ProgressiveNorm, ChannelNorm)) and module not in frozen:
                module.train()
        device = next(student.parameters()).device
        losses = []
        batches = iter(_endless(loader))
        for step in range(1, steps + 1):
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                run_batch(student, next(batches), device)
                loss = distillation.loss()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if max_grad_norm is not None:
                nn.utils.clip_grad_norm_(student.parameters(), max_grad_norm)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            if conversion is not None:
                conversion.step()
            losses.append(loss.detach())
            if after_step is not None:
                after_step(step, losses[-1])
            if best is not None and (step % validate_every == 0 or step == steps):
                best.look()
    if best is not None:
        best.restore()
    return torch.stack(losses)


class _Best:
    """The state of a student in which its error on some batches was lowest."""

    def __init__(self, distillation: Distillation, batches: Iterable[Any]) -> None:
        self.distillation = distillation
        self.batches = batches
        self.error = math.inf
        self.state: dict[str, Tensor] = {}
        self.look()

    def _tensors(self) -> dict[str, Tensor]:
        steps = {m.step for m in self.distillation.student.modules() if isinstance(m, ProgressiveNorm)}
        named = self.distillation.student.state_dict(keep_vars=True)
        return {name: value for name, value in named.items() if isinstance(value, Tensor) and value not in steps}

    def look(self) -> None:
        error = self.distillation.error(self.batches)
        if error < self.error or not self.state:
            self.error = error
            self.state = {name: value.detach().clone() for name, value in self._tensors().items()}

    @torch.no_grad()
    def restore(self) -> None:
        for name, value in self._tensors().items():
            value.copy_(self.state[name])


def _endless(loader: Iterable[Any]) -> Iterable[Any]:
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise ValueError("loader gave no batch; give one that can be iterated over again, or that never ends")
