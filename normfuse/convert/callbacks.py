"""A conversion inside the training loops of other libraries, which are imported only when asked for."""

from __future__ import annotations

from typing import Any

from .progressive import Conversion


def trainer_callback(conversion: Conversion) -> Any:
    """A ``transformers.TrainerCallback`` that counts the steps of the optimiser for ``conversion``.

    For a loss against the original give ``Trainer`` also ``compute_loss_func=distillation.compute_loss``. A run that
    ``Trainer.train(resume_from_checkpoint=…)`` takes up again goes on at the stored λ.

    Args:
        conversion: whose λ takes the steps.

    Returns:
        A ``transformers.TrainerCallback``.

    Raises:
        ModuleNotFoundError: transformers is not installed.

    Example:
        >>> from normfuse.convert import trainer_callback
        >>> Trainer(model, callbacks=[trainer_callback(conversion)])  # doctest: +SKIP
    """
    from transformers import TrainerCallback

    class ProgressiveCallback(TrainerCallback):
        def on_step_end(self, *arguments: Any, **options: Any) -> None:
            conversion.step()

    return ProgressiveCallback()


def lightning_callback(conversion: Conversion) -> Any:
    """A Lightning ``Callback`` that counts the steps of the optimiser for ``conversion``.

    With gradient accumulation λ takes a step when the optimiser does. For a loss against the original add
    ``distillation.loss()`` in ``training_step``.

    Args:
        conversion: whose λ takes the steps.

    Returns:
        A ``lightning.pytorch.Callback``.

    Raises:
        ModuleNotFoundError: lightning is not installed.

    Example:
        >>> from normfuse.convert import lightning_callback
        >>> Trainer(callbacks=[lightning_callback(conversion)])  # doctest: +SKIP
    """
    from lightning.pytorch import Callback

    class ProgressiveCallback(Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            self.seen = trainer.global_step

        def on_train_batch_end(self, trainer: Any, *others: Any, **options: Any) -> None:
            conversion.step(trainer.global_step - self.seen)
            self.seen = trainer.global_step

    return ProgressiveCallback()
