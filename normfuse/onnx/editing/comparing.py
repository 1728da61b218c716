"""Whether an edited file gives what the original gives, both as they are written, in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from normfuse.onnx.verifier import RTOL, Case, VerificationError, runtime_problem, session

from .trial import Trial, plain_session, run_session

# Beyond the tolerance, a difference may be this many times as large as the one between the original as it is written
# and the original as ONNX Runtime optimises it: two orders of the same sums, as folding is a third.
_OWN = 4.0
_QUANTISED = 2e-2  # one step in fifty, where a rounding decides between two integers


class Comparison:
    """Compares files with an original.

    Args:
        path: the original.
        trials: inputs, and what the original gives for them.
        dtype: the narrowest floating-point type in it.
        quantised: whether it computes with integers.
        rtol, atol: allowed difference, relative to the largest value of an output, and on top; None for rtol is what
            the type gives.
    """

    def __init__(
        self, path: Path, trials: Sequence[Trial], *, dtype: str, quantised: bool, rtol: float | None, atol: float
    ) -> None:
        self._path, self._trials, self._atol = path, trials, atol
        self._given = rtol is not None
        self._rtol = rtol if rtol is not None else max(RTOL.get(dtype, RTOL["float32"]), _QUANTISED * quantised)
        plain = plain_session(str(path))
        self.names = [output.name for output in plain.get_outputs()]
        once, again = (run_session(plain, trials[0].feeds) for _ in range(2))
        #: Names of results that differ from run to run.
        self.random = [name for name, a, b in zip(self.names, once, again, strict=True) if not _same(a, b)]
        self._optimised: onnxruntime.InferenceSession | None = None

    def compare(self, path: Path) -> list[Case]:
        """Every result for every input. Raises VerificationError, one line, for the first that differs too much."""
        changed = plain_session(str(path))
        return [case for number in range(len(self._trials)) for case in self._compare(changed, number)]

    def _compare(self, changed: onnxruntime.InferenceSession, number: int) -> list[Case]:
        trial, cases = self._trials[number], []
        try:
            outputs = run_session(changed, trial.feeds)
        except Exception as error:  # a dozen exception types of ONNX Runtime, without a common base
            raise VerificationError(f"folded, it fails on {trial.shapes}: {runtime_problem(error)}") from error
        own: list[Any] | None = None
        for place, (name, want, got) in enumerate(zip(self.names, trial.outputs, outputs, strict=True)):
            if name in self.random:
                continue
            difference, largest = _difference(want, got)
            allowed = self._atol + self._rtol * largest
            if difference > allowed and not self._given:
                own = own or run_session(self._optimised_session(), trial.feeds)
                allowed = max(allowed, _OWN * _difference(want, own[place])[0])
            error = difference / largest if largest else difference
            case = Case(trial.shapes, "ONNX file", name, error, difference, allowed)
            if not case.passed:
                raise VerificationError(
                    f"folded, it differs on {trial.shapes}: {name!r} by {difference:.3g} ({error:.2e} of its largest "
                    f"value), allowed are {allowed:.3g}"
                )
            cases.append(case)
        return cases

    def _optimised_session(self) -> onnxruntime.InferenceSession:
        if self._optimised is None:
            self._optimised = session(self._path, threads=1)
        return self._optimised


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.shape == b.shape and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b


def _difference(want: Any, got: Any) -> tuple[float, float]:
    """The largest difference and the largest value; for integers how many differ, and none may."""
    if isinstance(want, list):
        if not isinstance(got, list) or len(want) != len(got):
            return np.inf, 0.0
        parts = [_difference(a, b) for a, b in zip(want, got, strict=True)]
        return max((p[0] for p in parts), default=0.0), max((p[1] for p in parts), default=0.0)
    if isinstance(want, dict):
        return _difference(list(want.values()), list(got.values())) if want.keys() == got.keys() else (np.inf, 0.0)
    want, got = np.asarray(want), np.asarray(got)
    if want.shape != got.shape:
        return np.inf, 0.0
    if want.dtype.kind != "f":
        return float((want != got).sum()), 0.0
    left, right = got.astype(np.float64), want.astype(np.float64)
    with np.errstate(invalid="ignore"):
        distance = np.where((left == right) | (np.isnan(left) & np.isnan(right)), 0.0, np.abs(left - right))
    finite = np.abs(right[np.isfinite(right)])
    return float(np.nan_to_num(distance, nan=np.inf).max(initial=0.0)), float(finite.max(initial=0.0))
