"""What a model gives on the inputs that its other forms are compared on: computed once for all of them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from normfuse.checkpoint import ExportableModel
from normfuse.errors import NormfuseError, one_line, some_of
from normfuse.onnx import trials
from normfuse.onnx.trials import Trial
from normfuse.programs import own_rounding, relative_difference

# Between a live model and its program, in the dtype that the live one computes in: the program is in float32.
_LIVE_RTOL = {torch.float32: 1e-5, torch.float64: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_LIVE_CHOICES = 0.02  # the share of integers, such as indices of a largest value, that other rounding may change
TIMES_ITS_OWN = 10  # rounding that another form of a program may have; what is wrong is off by more
_DRAWS = 8  # a random input for which the module itself gives NaN proves nothing and is drawn again
_MOST_BYTES = 2**29  # of outputs that are kept; more are computed each time


class VerificationError(NormfuseError):
    """Two forms of the model differ, or one of them cannot be run.

    One line: which, for which shapes, by how much.
    """


class References:
    """The inputs to compare on, with the model's outputs.

    Args:
        model: the model.
        rounds: random inputs.
        seed: of the random inputs.
        edges: whether edge cases are tried.
    """

    def __init__(self, model: ExportableModel, *, rounds: int = 4, seed: int = 0, edges: bool = True) -> None:
        self.model = model
        self._options = (rounds, seed, edges)
        self._kept: list[tuple[Trial, list[Tensor] | None]] | None = None
        self._unknown: list[Trial] = []
        self._pace = math.inf
        #: Seconds that the longest run of the model took.
        self.slowest = 0.0

    def on(self, half: bool = False) -> Iterator[tuple[Trial, list[Tensor]]]:
        """The trials for a form that computes in float16 (``half``), or for others.

        The second time, nothing is computed: all forms are compared on the same inputs.

        Raises:
            VerificationError: the model fails on its own inputs, or its program is not the live model.
        """
        for trial, outputs in self._all():
            if (tried := trial.in_half() if half else trial) is not None:
                yield tried, self.model.run(trial.tensors) if outputs is None else outputs

    def notes(self, half: bool = False) -> list[str]:
        """In words, where nothing could be compared."""
        unknown = [trial.label for trial in self._unknown if not half or trial.in_half() is not None]
        return [f"where the model gives NaN nothing is compared: {some_of(unknown)}"] if unknown else []

    def _all(self) -> Iterator[tuple[Trial, list[Tensor] | None]]:
        """Every trial with the model's outputs; None where they are too large to be kept."""
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[tuple[Trial, list[Tensor] | None]] = []
        size, self._unknown = 0, []
        for trial, outputs in self._compute():
            size += sum(output.nbytes for output in outputs)
            kept.append((trial, outputs if size <= _MOST_BYTES else None))
            yield trial, outputs
        self._kept = kept

    def _compute(self) -> Iterator[tuple[Trial, list[Tensor]]]:
        rounds, seed, edges = self._options
        trial = trials.example(self.model)
        yield trial, _live(self.model, trial, self._run(trial))
        generator = torch.Generator().manual_seed(seed)
        for number in range(rounds):
            for _ in range(_DRAWS):
                trial = trials.random(self.model, number, generator)
                try:
                    outputs = self._run(trial)
                except Exception as error:  # a program is free to fail in its own way
                    raise VerificationError(f"the module itself fails on {trial.label}: {one_line(error)}") from error
                if not _has_nan(outputs):
                    yield trial, outputs
                    break
        for trial in trials.edges(self.model, generator, self._pace) if edges else ():
            try:
                outputs = self._run(trial)
            except Exception:  # it takes no such inputs, so neither need the other forms
                continue
            if _has_nan(outputs):
                self._unknown.append(trial)
            yield trial, outputs

    def _run(self, trial: Trial) -> list[Tensor]:
        """The model's outputs; notes how long a run takes for its size, after whatever the first run has to set up."""
        start = time.perf_counter()
        outputs = self.model.run(trial.tensors)
        entries = sum(tensor.numel() for tensor in trial.tensors)
        seconds = time.perf_counter() - start
        self._pace, self.slowest = min(self._pace, seconds / max(entries, 1) ** 2), max(self.slowest, seconds)
        return outputs


def _live(model: ExportableModel, trial: Trial, traced: list[Tensor]) -> list[Tensor]:
    """What the live model gave on the examples, after the traced program was seen to give the same."""
    live = model.expected_outputs or traced  # a program from elsewhere is the model itself
    if _has_nan(live):
        raise VerificationError("the module itself gives NaN on its example inputs; no export of it can be verified")
    rounding: list[float] = []
    for index, (got, want) in enumerate(zip(traced, live, strict=True)):
        difference = relative_difference(got, want)
        if difference > _LIVE_RTOL.get(want.dtype, _LIVE_CHOICES):
            rounding = rounding or own_rounding(model.program, traced, trial.tensors)
            coarser = torch.finfo(want.dtype).eps / torch.finfo(torch.float32).eps if want.is_floating_point() else 1
            if difference > TIMES_ITS_OWN * rounding[index] * coarser:
                raise VerificationError(
                    f"the traced program differs from the live model on {trial.label}: output {index} by "
                    f"{difference:.2e} of its largest value; torch.export does not see a part that the model computes "
                    "in Python"
                )
    return [want if want.dtype == torch.float32 else got for want, got in zip(live, traced, strict=True)]


def _has_nan(outputs: list[Tensor] | tuple[Tensor, ...]) -> bool:
    return any(bool(output.isnan().any()) for output in outputs)
