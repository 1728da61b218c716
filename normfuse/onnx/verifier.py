"""Verification: the original module, the folded program and the ONNX file give the same outputs."""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from normfuse.checkpoint import ExportableModel
from normfuse.checkpoint.archive import one_line
from normfuse.checkpoint.kinds import what_instead_of_onnx
from normfuse.errors import check_kind
from normfuse.onnx.graph import GraphError, summarize
from normfuse.onnx.references import TIMES_ITS_OWN, References, VerificationError
from normfuse.onnx.runtime import LONGEST_RUN, SLOWER, RuntimeFailure, Session
from normfuse.onnx.trials import EXAMPLE, SOFT, Trial, shapes
from normfuse.options import INT8_FILE
from normfuse.programs import Runner, own_rounding

# Largest difference allowed, relative to the output's largest value. float32: a few hundred roundings of 6e-8 in a row;
# float16 rounds at 5e-4, and its sums in ONNX Runtime are as long.
# int8: of the output's size (root of summed squares), see compare_int8. A fifth is a cosine of 0.98.
RTOL = {"float32": 1e-4, "float16": 2e-2, "int8": 0.2}
_COARSER = torch.finfo(torch.float16).eps / torch.finfo(torch.float32).eps
# Where ONNX Runtime's message comes from in its sources: ``/path/upsample.h:314 ns::F(const T&) [with T = int] ``, and
# ``upsample.h:548 Validate ``.
_SIGNATURE = re.compile(r"(?<!\S)(?:/\S+:\d+ .*?\)(?: const)?(?: \[with .*?\])? (?=\S)|\w+\.(?:h|cc):\d+ \w+ (?=\S))")


@dataclass(frozen=True)
class Case:
    """One comparison. ``error`` is the largest difference ÷ the output's largest value."""

    inputs: str
    form: str
    output: str
    error: float
    difference: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.difference <= self.allowed


@dataclass(frozen=True)
class VerificationReport:
    """All comparisons that were made; every one passed.

    Attributes:
        cases: the comparisons.
        notes: in words, what could not be compared, and what the file does not do as the model does: empty batches that
            ONNX Runtime refuses, for example.
    """

    cases: list[Case]
    notes: list[str] = field(default_factory=list)

    def worst(self, form: str) -> float:
        """The largest relative error of a form of the model.

        Args:
            form: ``folded program``, ``ONNX file`` or ``int8 file``.

        Returns:
            A share of the output's largest value; 0 if the form was not compared.
        """
        return max((case.error for case in self.cases if case.form == form), default=0.0)

    @property
    def shapes(self) -> list[str]:
        """The inputs that were tried, in order."""
        return list(dict.fromkeys(case.inputs for case in self.cases))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data.

        Returns:
            A dictionary of everything above.
        """
        return {"cases": [asdict(case) for case in self.cases], "notes": self.notes}


def verify(
    model: ExportableModel,
    path: str | os.PathLike[str] | None,
    *,
    program: torch.export.ExportedProgram | None = None,
    rtol: float | None = None,
    atol: float = 0.0,
    rounds: int = 4,
    seed: int = 0,
    edges: bool = True,
    references: References | None = None,
    mapping: Mapping[str, str] | None = None,
) -> VerificationReport:
    """Compare the outputs of a model with those of its folded program and of its ONNX file in ONNX Runtime (CPU).

    The references are the outputs of the live model on the example inputs, and those of its traced program elsewhere.
    All run on the example inputs, on ``rounds`` random inputs whose dynamic dimensions take random sizes, 1 among them,
    and on edge cases: masks that hide nothing, a row and everything, integers at both ends of their range, the smallest
    and largest sizes, zeros, ones and large numbers, and an empty batch. Edge cases on which the program itself fails
    are left out; so are places where it gives NaN. On all but the example inputs, up to ten times the program's own
    rounding is allowed where that is more.

    A file with int8 products is compared on the example inputs alone. Its error is the root of the summed squares of
    the difference ÷ that of the output.

    Args:
        model: the original program with its inputs.
        path: the ONNX file; None compares the program only.
        program: the folded program; None compares the file only.
        rtol: allowed difference relative to the largest value of the output (per output, over all its
            numbers); None is 1e-4, 2e-2 for a float16 file, 0.2 for an int8 file.
        atol: allowed difference on top; not used for an int8 file.
        rounds: number of random inputs.
        seed: of the random inputs.
        edges: whether edge cases are tried.
        references: of `model`, where several forms are verified: the model runs once for all of them. They decide on
            `rounds`, `seed` and `edges`.
        mapping: for inputs that have other names in the file: from the model's name to the file's.

    Returns:
        Every comparison that was made.

    Raises:
        VerificationError: for the first difference beyond ``atol + rtol · largest value``, for outputs that
            are not finite, and for a file that ONNX Runtime cannot load or run. TypeError: `model` is something else.

    Example:
        >>> import normfuse
        >>> from normfuse.nn import UnifiedNorm
        >>> model = nn.Sequential(nn.Linear(4, 8), UnifiedNorm(8), nn.ReLU(), nn.Linear(8, 2))
        >>> model = normfuse.ExportableModel.from_model(model, torch.randn(3, 4))
        >>> _ = normfuse.onnx.export(model, "model.onnx")
        >>> all(case.passed for case in normfuse.onnx.verify(model, "model.onnx").cases)
        True
    """
    way_out = "what normfuse.load or normfuse.ExportableModel.from_model returns"
    check_kind("model", model, ExportableModel, way_out)
    references = references or References(model, rounds=rounds, seed=seed, edges=edges)
    names = mapping or {}
    if path is None or not _is_int8(Path(path)):
        file = None if path is None else Path(path)
        return compare_forms(references, file, program, rtol=rtol, atol=atol, mapping=names)
    cases = compare_int8(model, Path(path), [tuple(model.example_inputs)], rtol, names)
    if program is None:
        return VerificationReport(cases)
    exact = compare_forms(references, None, program, rtol=None, atol=atol)
    return replace(exact, cases=[*exact.cases, *cases])


def _is_int8(path: Path) -> bool:
    try:
        return summarize(path).dtype == "int8"
    except GraphError:  # ONNX Runtime says more about it
        return False


def compare_forms(
    references: References,
    path: Path | None,
    program: torch.export.ExportedProgram | None = None,
    *,
    rtol: float | None,
    atol: float,
    half: bool | None = None,
    mapping: Mapping[str, str] = MappingProxyType({}),
) -> VerificationReport:
    """What :func:`verify` does; `half` is whether the file holds float16, if that is known."""
    model = references.model
    forms: dict[str, Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]] = {}
    if program is not None:
        runner = Runner(program)
        forms["folded program"] = lambda tensors: runner(*tensors)
    if path is not None:
        forms["ONNX file"] = onnx_runner(path, model, lambda: LONGEST_RUN + SLOWER * references.slowest, mapping)
    if half is None:
        half = path is not None and summarize(path).dtype == "float16"
    if rtol is None:
        rtol = RTOL["float16" if half else "float32"]
    cases: list[Case] = []
    notes: list[str] = []
    granted: list[float] = []
    for trial, expected in references.on(half):
        rounding: list[float] | None = None
        scales = [_scale(want) for want in expected]
        granted = granted or [rtol + (atol / scale if scale else 0.0) for scale in scales]
        for form, run in forms.items():
            coarser = _COARSER if half and form == "ONNX file" else 1.0
            try:
                outputs = _run(form, run, trial, expected)
                for index, (got, want) in enumerate(zip(outputs, expected, strict=True)):
                    # Where numbers are larger than in the examples, so is what was allowed there.
                    allowed = max(atol + rtol * scales[index], granted[index] * scales[index])
                    case = _compare(trial.label, form, f"output {index}", got, want, scales[index], allowed)
                    if not case.passed:
                        if rounding is None:
                            rounding = own_rounding(model.program, expected, trial.tensors)
                        case = _judged(case, trial, rounding[index] * coarser, rtol)
                    cases.append(case)
            except VerificationError as error:
                if trial.kind != SOFT:
                    raise
                notes.append(str(error))
    return VerificationReport(cases, list(dict.fromkeys([*references.notes(half), *notes])))


def compare_int8(
    model: ExportableModel,
    path: Path,
    inputs: Sequence[Sequence[torch.Tensor]],
    rtol: float | None,
    mapping: Mapping[str, str] = MappingProxyType({}),
) -> list[Case]:
    """The error of an int8 file against the model in float32, for every output over all the inputs together.

    It is the root of the summed squares of the difference ÷ that of the output: rounding to integers is noise, and its
    size says more than its largest entry. Of an output of integers or flags it is the share of those that differ.

    Raises:
        VerificationError: an error is beyond ``rtol``, or the file cannot be run.
    """
    rtol = RTOL["int8"] if rtol is None else rtol
    run = onnx_runner(path, model, mapping=mapping)
    noise: list[float] = []
    signal: list[float] = []
    for tensors in inputs:
        try:
            got = run(tensors)
        except Exception as error:  # ONNX Runtime's failure, or outputs that are not tensors
            raise VerificationError(f"the {INT8_FILE} fails on inputs {shapes(tensors)}: {one_line(error)}") from error
        expected = model.run(tensors)
        noise = noise or [0.0] * len(expected)
        signal = signal or [0.0] * len(expected)
        for index, (value, want) in enumerate(zip(got, expected, strict=True)):
            if not want.is_floating_point():  # the share of numbers that differ
                noise[index] += float((value != want).sum())
                signal[index] += want.numel()
            else:
                finite = want.isfinite()
                noise[index] += float((value.double() - want.double())[finite].square().sum())
                signal[index] += float(want.double()[finite].square().sum())
    what = f"{len(inputs)} input{'s' * (len(inputs) > 1)}, the first {shapes(inputs[0])}"
    cases = []
    for index, (off, size) in enumerate(zip(noise, signal, strict=True)):
        if expected[index].is_floating_point():
            off, size = off**0.5, size**0.5
        relative = off / size if size else float(off > 0)
        cases.append(Case(what, INT8_FILE, f"output {index}", relative, off, rtol * size))
    worst = max(cases, key=lambda case: math.inf if math.isnan(case.error) else case.error)
    if not worst.error <= rtol:
        raise VerificationError(
            f"int8 changes {worst.output} by {worst.error:.1%} of its size on {what}; allowed are {rtol:.0%}: give "
            "typical inputs to choose scales by (--calibrate, or better examples in the checkpoint), allow more "
            "(--rtol), or export float32"
        )
    return cases


def _run(
    form: str,
    run: Callable[[Sequence[torch.Tensor]], list[torch.Tensor]],
    trial: Trial,
    expected: Sequence[torch.Tensor],
) -> list[torch.Tensor]:
    try:
        outputs = run(trial.tensors)
    except Exception as error:  # whatever a backend raises for inputs that it cannot take
        raise VerificationError(f"the {form} fails on {trial.label}: {runtime_problem(error)}") from error
    if len(outputs) != len(expected):
        raise VerificationError(f"the {form} has {len(outputs)} outputs, the module {len(expected)}")
    return outputs


def _judged(case: Case, trial: Trial, rounding: float, rtol: float) -> Case:
    """A case beyond the tolerance: on inputs that nobody gave, as much as the model's own rounding may be."""
    if trial.kind != EXAMPLE and case.error <= TIMES_ITS_OWN * rounding:
        return replace(case, allowed=max(case.allowed, case.difference))
    own = ""
    if rounding > max(rtol / 4, case.error / 100):
        own = (
            f"; the module's own rounding is {rounding:.2e} here, so the network itself loses these digits: "
            "allow more with rtol (--rtol)"
        )
    raise VerificationError(
        f"the {case.form} differs from the module on {case.inputs}: {case.output} by {case.difference:.3g} "
        f"({case.error:.2e} of its largest value), allowed are {case.allowed:.3g}{own}"
    )


def session(path: Path, threads: int = 0, settings: Mapping[str, str] | None = None) -> Session:
    """A file in ONNX Runtime. Raises VerificationError if it cannot be loaded."""
    try:
        return Session(path, threads=threads, settings=settings)
    except RuntimeFailure as error:
        if what := what_instead_of_onnx(path):
            raise VerificationError(f"{path} is {what}") from error
        raise VerificationError(f"ONNX Runtime cannot load {path}: {runtime_problem(error)}") from error


def onnx_runner(
    path: Path,
    model: ExportableModel,
    seconds: Callable[[], float] = lambda: LONGEST_RUN,
    mapping: Mapping[str, str] = MappingProxyType({}),
) -> Any:
    """A function from tensors in the order of the model's inputs to the file's outputs; a run may take `seconds`."""
    loaded = session(path)
    wanted, own = [entry.name for entry in loaded.inputs], model.input_names
    unknown = [name for name in mapping if name not in own]
    if unknown:
        raise VerificationError(f"the module has no input {unknown[0]!r} to map; it takes {', '.join(own)}")
    names = [mapping.get(name, name) for name in own]
    missing = [name for name in wanted if name not in names]
    if missing:
        left = [name for name, given in zip(own, names, strict=True) if given not in wanted]
        raise VerificationError(
            f"{path} wants an input {missing[0]!r}; the module takes {', '.join(own)}; name those that are the same "
            "(mapping={module: file})",
            advice=advised_names(left, missing),
        )

    def run(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        named = dict(zip(names, tensors, strict=True))
        feeds = {name: named[name].numpy() for name in wanted}
        return [torch.from_numpy(array) for array in loaded.run(feeds, seconds=seconds())]

    return run


def advised_names(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """Options that name inputs which may be the same, in their order: a guess that is shown, not acted on."""
    if len(first) != len(second):
        return []
    return [f"--map {shlex.quote(f'{a}={b}')}" for a, b in zip(first, second, strict=True)]


def runtime_problem(error: Exception) -> str:
    """ONNX Runtime's message without its error codes, paths and C++ signatures."""
    text = re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", "", one_line(error, 2000))
    text = re.sub(r"Load model from .*? failed:", "", text)
    node = re.search(r"while running (\w+) node\. Name:'([^']*)'", text)
    text = text.rpartition("Status Message: ")[2]
    text = _SIGNATURE.sub("", text).rpartition("was false. ")[2]
    return one_line(f"{node[1]} node {node[2]!r}: {text}" if node else text, 240)


def _compare(
    label: str, form: str, output: str, got: torch.Tensor, want: torch.Tensor, scale: float, allowed: float
) -> Case:
    if got.shape != want.shape:
        raise VerificationError(
            f"the {form} gives shape {list(got.shape)} for {output} on {label}, not {list(want.shape)}"
        )
    if not want.is_floating_point():
        difference = float((got != want).sum())
        return Case(label, form, output, difference / max(want.numel(), 1), difference, 0.0)
    left, right = got.double().numpy(), want.double().numpy()
    equal = left == right  # infinities of the same sign among them
    unknown = np.isnan(right)  # the module has no value there that the other could miss
    with np.errstate(invalid="ignore"):
        distance = np.where(equal | unknown, 0.0, np.abs(left - right))
    difference = float(np.nan_to_num(distance, nan=np.inf).max(initial=0.0))
    return Case(label, form, output, difference / scale if scale else difference, difference, allowed)


def _scale(output: torch.Tensor) -> float:
    """The largest finite value of an output."""
    if not output.is_floating_point():
        return 1.0
    finite = output[output.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0
