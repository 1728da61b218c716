"""Whether an edited file gives what the original gives, both as they are written, in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from normfuse.onnx.protos import for_runtime
from normfuse.onnx.runtime import RuntimeFailure, Session
from normfuse.onnx.verifier import RTOL, Case, VerificationError, runtime_problem

from .inner import is_bounded
from .onnx_file import OnnxFile
from .trial import Trial, plain_session, run_session

# Beyond the tolerance, a difference may be this many times as large as the one between the original as it is written
# and the original as ONNX Runtime optimises it: two orders of the same sums, as folding is a third.
_OWN = 4.0
_QUANTISED = 2e-2  # one step in fifty, where a rounding decides between two integers


class Comparison:
    """Compares files with an original.

    Args:
        file: the original.
        trials: inputs, and what the original gives for them.
        dtype: the narrowest floating-point type in it.
        quantised: whether it computes with integers.
        rtol, atol: allowed difference, relative to the largest value of an output, and on top; None for rtol is what
            the type gives.
    """

    def __init__(
        self, file: OnnxFile, trials: Sequence[Trial], *, dtype: str, quantised: bool, rtol: float | None, atol: float
    ) -> None:
        self._file, self._trials, self._atol = file, trials, atol
        self._given = rtol is not None
        self._rtol = rtol if rtol is not None else max(RTOL.get(dtype, RTOL["float32"]), _QUANTISED * quantised)
        plain = plain_session(str(file.path))
        self.names = [output.name for output in plain.outputs]
        once, again = (run_session(plain, trials[0]) for _ in range(2))
        #: Names of results that differ from run to run.
        self.random = [name for name, a, b in zip(self.names, once, again, strict=True) if not _same(a, b)]
        #: Results that lie between -1 and 1 by what writes them: what that reads is compared beside them.
        self._bounded = [name for name in self.names if is_bounded(file, name)]

    def compare(self, path: Path, inner: Sequence[tuple[str, str]] = ()) -> list[Case]:
        """Every result for every input, and values inside.

        Args:
            path: the changed file.
            inner: values that it shares with the original, by their names in both.

        Raises:
            VerificationError: one line, for the first that differs too much.
        """
        inner = () if self.random else inner  # what is made from random numbers may be random
        names = [*self.names, *(f"{name} (inside)" for name, _ in inner)]
        before = _Sessions(self._file.proto, self._file.path, [name for name, _ in inner])
        after = _Sessions(onnx.load(path, load_external_data=False), path, [name for _, name in inner])
        return [case for trial in self._trials for case in self._compare(before, after, names, trial)]

    def _compare(self, before: _Sessions, after: _Sessions, names: Sequence[str], trial: Trial) -> list[Case]:
        wanted = before.plain(trial) if len(names) > len(self.names) else trial.outputs
        try:
            outputs = after.plain(trial)
        except RuntimeFailure as error:
            raise VerificationError(f"after folding it fails on {trial.shapes}: {runtime_problem(error)}") from error
        cases: list[Case] = []
        own: list[Any] | None = None
        for place, (name, want, got) in enumerate(zip(names, wanted, outputs, strict=True)):
            if name in self.random:
                continue
            difference, largest = _difference(want, got)
            largest = max(largest, float(name in self._bounded))
            allowed = self._atol + self._rtol * largest
            if difference > allowed and not self._given:
                own = own or before.optimised(trial)
                optimised = _difference(want, own[place])[0]
                allowed = max(allowed, _OWN * optimised if np.isfinite(optimised) else 0.0)
            relative = difference / largest if largest else difference
            case = Case(trial.shapes, "ONNX file", name, relative, difference, allowed)
            if not case.passed:
                raise VerificationError(
                    f"after folding it differs on {trial.shapes}: {name!r} by {difference:.3g} ({relative:.2e} of its "
                    f"largest value), allowed are {allowed:.3g}"
                )
            cases.append(case)
        return cases


class _Sessions:
    """A model with further outputs, run as it is written or as ONNX Runtime optimises it."""

    def __init__(self, model: onnx.ModelProto, path: Path, further: Sequence[str]) -> None:
        self._source: str | bytes = str(path)
        self._folder = ""
        if further:
            wider = onnx.ModelProto()
            wider.CopyFrom(model)
            wider.graph.output.extend(onnx.ValueInfoProto(name=name) for name in further)
            self._source, self._folder = for_runtime(wider, path)

    def plain(self, trial: Trial) -> list[Any]:
        return run_session(self._plain, trial)

    def optimised(self, trial: Trial) -> list[Any]:
        return run_session(self._optimised, trial)

    @cached_property
    def _plain(self) -> Session:
        return plain_session(self._source, self._folder)

    @cached_property
    def _optimised(self) -> Session:
        return plain_session(self._source, self._folder, optimised="")


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
