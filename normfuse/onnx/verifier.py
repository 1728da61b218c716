"""The proof: the original module, the folded program and the ONNX file give the same outputs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from normfuse.checkpoint import Checkpoint
from normfuse.checkpoint import inputs as specs
from normfuse.checkpoint.archive import one_line
from normfuse.errors import NormfuseError
from normfuse.onnx.graph import summarize

# Largest difference allowed, relative to the output's largest value. float32: a few hundred roundings of 6e-8
# in a
# row; float16 rounds at 5e-4, and its sums in ONNX Runtime are as long.
RTOL = {"float32": 1e-4, "float16": 2e-2}
_DRAWS = 8  # a random input for which the module itself gives NaN proves nothing and is drawn again


class VerificationError(NormfuseError):
    """Two forms of the model differ, or one of them cannot be run. One line: which, for which shapes, by how
    much."""


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
class Proof:
    """All comparisons that were made; every one passed."""

    cases: list[Case]

    def worst(self, form: str) -> float:
        """The largest relative error of a form: ``folded program`` or ``ONNX file``; 0 if it was not
        compared."""
        return max((case.error for case in self.cases if case.form == form), default=0.0)

    @property
    def shapes(self) -> list[str]:
        """The inputs that were tried, in order."""
        return list(dict.fromkeys(case.inputs for case in self.cases))

    def to_dict(self) -> dict[str, Any]:
        return {"cases": [asdict(case) for case in self.cases]}


def verify(
    checkpoint: Checkpoint,
    path: str | os.PathLike[str] | None,
    *,
    program: torch.export.ExportedProgram | None = None,
    rtol: float | None = None,
    atol: float = 0.0,
    rounds: int = 4,
    seed: int = 0,
) -> Proof:
    """Runs the original module, optionally the folded program, and the ONNX file in ONNX Runtime (CPU) on the
    example inputs and on ``rounds`` random inputs whose dynamic dimensions take random sizes, 1 among them.

    Args:
        checkpoint: the original module with its inputs.
        path: the ONNX file; None compares the program only.
        program: the folded program; None compares the file only.
        rtol: allowed difference relative to the largest value of the output (per output, over all its
            numbers); None is 1e-4, or 2e-2 for a float16 file.
        atol: allowed difference on top.
        rounds: random inputs.
        seed: of the random inputs.

    Raises:
        VerificationError: for the first difference beyond ``atol + rtol · largest value``, for outputs that
            are not finite, and for a file that ONNX Runtime cannot load or run.
    """
    if rtol is None:
        rtol = RTOL["float32" if path is None else summarize(path).dtype]
    forms: dict[str, Any] = {}
    if program is not None:
        forms["folded program"] = _program_runner(program)
    if path is not None:
        forms["ONNX file"] = _onnx_runner(Path(path), checkpoint)
    cases: list[Case] = []
    for label, tensors, expected in _inputs(checkpoint, rounds, seed):
        for form, run in forms.items():
            try:
                outputs = run(tensors)
            except Exception as error:  # whatever a backend raises for inputs that it cannot take
                raise VerificationError(f"the {form} fails on {label}: {runtime_problem(error)}") from error
            if len(outputs) != len(expected):
                raise VerificationError(f"the {form} has {len(outputs)} outputs, the module {len(expected)}")
            for index, (got, want) in enumerate(zip(outputs, expected, strict=True)):
                case = _compare(label, form, f"output {index}", got, want, rtol, atol)
                if not case.passed:
                    raise VerificationError(
                        f"the {form} differs from the module on {label}: {case.output} by "
                        f"{case.difference:.3g} "
                        f"({case.error:.2e} of its largest value), allowed are {case.allowed:.3g}"
                        f"{_own_rounding(checkpoint, tensors, expected, index, rtol)}"
                    )
                cases.append(case)
    return Proof(cases)


def session(path: Path, threads: int = 0, settings: Mapping[str, str] | None = None) -> onnxruntime.InferenceSession:
    """A CPU session that keeps errors to its exceptions. Raises VerificationError if the file cannot be
    loaded."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors come as exceptions too: one line there, not several on the terminal
    options.intra_op_num_threads = threads
    for key, value in (settings or {}).items():
        options.add_session_config_entry(key, value)
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # a dozen exception types of ONNX Runtime, without a common base
        raise VerificationError(f"ONNX Runtime cannot load {path}: {runtime_problem(error)}") from error


def _inputs(
    checkpoint: Checkpoint, rounds: int, seed: int
) -> Iterator[tuple[str, tuple[torch.Tensor, ...], list[torch.Tensor]]]:
    examples = checkpoint.example_inputs
    expected = _eager(checkpoint, examples)
    if _has_nan(expected):
        raise VerificationError("the module itself gives NaN on its example inputs; no export of it can be verified")
    yield f"the example inputs {_shapes(examples)}", examples, expected
    generator = torch.Generator().manual_seed(seed)
    dims = specs.dimensions(checkpoint.inputs)
    sizes_now = specs.consistent_sizes(checkpoint.inputs, examples)
    for number in range(rounds):
        for _ in range(_DRAWS):
            sizes = {name: _size(dim, sizes_now[name], number, generator) for name, dim in dims.items()}
            tensors = tuple(
                specs.redraw(spec, example, sizes, generator)
                for spec, example in zip(checkpoint.inputs, examples, strict=True)
            )
            expected = _eager(checkpoint, tensors)
            if not _has_nan(expected):
                yield f"random inputs {_shapes(tensors)}", tensors, expected
                break


def _size(dim: specs.Dimension, example: int, number: int, generator: torch.Generator) -> int:
    """First the smallest size, which breaks what was specialised; then anything up to twice the example's."""
    if number == 0:
        return specs.clamp(min(1, dim.minimum), dim)
    return specs.clamp(int(torch.randint(1, 2 * example + 2, (), generator=generator)), dim)


def _eager(checkpoint: Checkpoint, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    try:
        return checkpoint.run(tensors)
    except Exception as error:  # a program is free to fail in its own way
        raise VerificationError(f"the module itself fails on inputs {_shapes(tensors)}: {one_line(error)}") from error


def _own_rounding(
    checkpoint: Checkpoint, tensors: Sequence[torch.Tensor], outputs: list[torch.Tensor], index: int, rtol: float
) -> str:
    """How far the module's own output is from its float64 result, if that explains a difference beyond
    ``rtol``."""
    if not outputs[index].is_floating_point():
        return ""
    wide = checkpoint.program.module()
    for part in wide.modules():  # whose tensors are the program's own, and stay as they are
        for own in (part._parameters, part._buffers):
            own.update({name: _double(tensor) for name, tensor in own.items()})
    try:
        with torch.inference_mode():
            exact = wide(*map(_double, tensors))[index]
    except RuntimeError:
        return ""  # a module that casts to float32 inside has no float64 result, and the difference stands unexplained
    own = float((exact - outputs[index]).abs().max() / exact.abs().max())
    if not own > rtol / 4:
        return ""
    return (
        f"; the module's own rounding is {own:.2e} here (against float64), so the network itself loses these "
        "digits: "
        "allow more with rtol (--rtol)"
    )


def _double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _program_runner(program: torch.export.ExportedProgram) -> Any:
    module = program.module(check_guards=False)  # whose sizes have become dimensions and notes

    def run(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        with torch.inference_mode():
            return [output.detach() for output in module(*tensors)]  # a weight that is returned asks for gradients

    return run


def _onnx_runner(path: Path, checkpoint: Checkpoint) -> Any:
    loaded = session(path)
    wanted = [entry.name for entry in loaded.get_inputs()]
    missing = [name for name in wanted if name not in checkpoint.input_names]
    if missing:
        raise VerificationError(
            f"{path} wants an input {missing[0]!r}; the module takes {', '.join(checkpoint.input_names)}"
        )

    def run(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        named = dict(zip(checkpoint.input_names, tensors, strict=True))
        return [torch.from_numpy(array) for array in loaded.run(None, {name: named[name].numpy() for name in wanted})]

    return run


def runtime_problem(error: Exception) -> str:
    """ONNX Runtime's message without its error codes, source paths and C++ signatures."""
    text = re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", "", one_line(error, 2000))
    node = re.search(r"while running (\w+) node\. Name:'([^']*)'", text)
    text = text.rpartition("Status Message: ")[2]
    text = re.sub(r"^/\S+:\d+ .*?\) (?=\S)(?!const\b)", "", text).rpartition("was false. ")[2]
    return one_line(f"{node[1]} node {node[2]!r}: {text}" if node else text, 240)


def _compare(
    label: str, form: str, output: str, got: torch.Tensor, want: torch.Tensor, rtol: float, atol: float
) -> Case:
    if got.shape != want.shape:
        raise VerificationError(
            f"the {form} gives shape {list(got.shape)} for {output} on {label}, not {list(want.shape)}"
        )
    if not want.is_floating_point():
        difference = float((got != want).sum())
        return Case(label, form, output, difference, difference, 0.0)
    left, right = got.double().numpy(), want.double().numpy()
    equal = left == right  # infinities of the same sign among them
    finite = np.isfinite(right)
    scale = float(np.abs(right[finite]).max(initial=0.0))
    with np.errstate(invalid="ignore"):
        distance = np.where(equal, 0.0, np.abs(left - right))
    difference = float(np.nan_to_num(distance, nan=np.inf).max(initial=0.0))
    return Case(label, form, output, difference / scale if scale else difference, difference, atol + rtol * scale)


def _has_nan(outputs: Sequence[torch.Tensor]) -> bool:
    return any(bool(output.isnan().any()) for output in outputs)


def _shapes(tensors: Sequence[torch.Tensor]) -> str:
    return ", ".join(str(list(tensor.shape)).replace(" ", "") for tensor in tensors)
