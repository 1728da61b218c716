"""The steps of an export: trace, fold, write, quantise. Each returns a frozen result; none changes another's."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from normfuse.checkpoint import ExportableModel, from_program
from normfuse.checkpoint.archive import some_of
from normfuse.folding import FoldReport, fold
from normfuse.onnx.graph import GraphSummary, summarize
from normfuse.onnx.graph_passes.biases import carry_biases
from normfuse.onnx.quantize import balancing, quantized
from normfuse.onnx.ranges import LARGEST, Growth, RangeError, fold_in_range, growth, largest_values
from normfuse.onnx.references import References, VerificationError
from normfuse.onnx.verifier import RTOL, VerificationReport, compare_forms
from normfuse.onnx.writer import Translator, UnwritableError, WriteError, write_staged
from normfuse.options import (
    MODEL_DTYPES,
    OPSETS,
    ExportError,
    check_dtype,
    check_for_int8,
    check_opset,
    check_scale_range,
    passes_for,
)
from normfuse.sources import huggingface

Progress = Callable[[str], None]
Calibration = str | os.PathLike[str] | Sequence[Sequence[torch.Tensor]]
Inputs = list[tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Tolerance:
    """What a form may differ by, see :func:`normfuse.onnx.verify`."""

    rtol: float
    atol: float


@dataclass(frozen=True)
class Plan:
    """What an export is asked for, checked.

    Attributes:
        dtype: of the file that is published.
        stored: of the file that is written and verified first.
        opset: that was asked for; None for the newest that passes.
        target: what graph passes are chosen for.
        passes: names of the graph passes to run.
        max_scale_range: the largest ratio of scales that was asked for.
        folding: further arguments of :func:`normfuse.fold`.
        program: what the folded program may differ by.
        file: what the file may differ by.
        int8_rtol: what int8 may change; None for the default.
    """

    dtype: str
    stored: str
    opset: int | None
    target: str
    passes: tuple[str, ...]
    max_scale_range: float
    folding: Mapping[str, Any]
    program: Tolerance
    file: Tolerance
    int8_rtol: float | None


def plan(
    *,
    dtype: str,
    opset: int | None = None,
    rtol: float | None = None,
    atol: float = 0.0,
    max_scale_range: float | None,
    target: str,
    disable_passes: Collection[str],
    calibrate: Calibration | None = None,
    **folding: Any,
) -> Plan:
    """Check what is asked for.

    Raises:
        ExportError: an argument has a value that is not allowed.
    """
    check_dtype(dtype, MODEL_DTYPES)
    check_scale_range(max_scale_range)
    check_opset(opset)
    check_for_int8(dtype, calibrate)
    passes = passes_for(target, disable_passes)
    stored = "float32" if dtype == "int8" else dtype
    exact = None if dtype == "int8" else rtol
    return Plan(
        dtype=dtype,
        stored=stored,
        opset=opset,
        target=target,
        passes=passes,
        max_scale_range=math.inf if max_scale_range is None else max_scale_range,
        folding=folding,
        program=Tolerance(RTOL["float32"] if exact is None else exact, atol),
        file=Tolerance(RTOL[stored] if exact is None else exact, atol),
        int8_rtol=rtol,
    )


def traced(
    model: nn.Module | ExportedProgram | ExportableModel, example_inputs: Any, dynamic_shapes: Any, progress: Progress
) -> ExportableModel:
    """The program of a module; a model that is traced already is returned as it is."""
    if isinstance(model, ExportableModel):
        return model
    progress("trace with torch.export")
    if isinstance(model, ExportedProgram):
        return from_program(model)
    if example_inputs is None:
        return huggingface.exportable(model)
    return ExportableModel.from_model(model, example_inputs, dynamic_shapes)


@dataclass(frozen=True)
class Candidate:
    """A folded program that agrees with the model."""

    program: torch.export.ExportedProgram
    report: FoldReport
    verification: VerificationReport
    growth: Growth | None


@dataclass(frozen=True)
class Folded:
    """What folding gave, for every target.

    Attributes:
        plain: the folded program.
        carried: the one whose biases travel; the plain one where they stay.
        notes: what was decided, in words.
        travelling: whether biases travel, in words; empty if nobody asked.
    """

    plain: Candidate
    carried: Candidate
    notes: tuple[str, ...]
    travelling: str

    def candidates(self, passes: tuple[str, ...]) -> list[tuple[Candidate, tuple[str, ...]]]:
        """What to write, best first, each with the graph passes to run on it; the last one has none."""
        if not passes:
            return [(self.plain, ())]
        return [(self.carried if "carry_biases" in passes else self.plain, passes), (self.plain, ())]

    def notes_for(self, passes: tuple[str, ...]) -> list[str]:
        """The notes for a file with these graph passes."""
        return [*self.notes, *([self.travelling] if "carry_biases" in passes else [])]


def fold_norms(references: References, asked: Plan, typical: Inputs, carry: bool, progress: Progress) -> Folded:
    """Fold the model's program, and verify what comes of it.

    Args:
        references: inputs to compare on, with the model's outputs.
        asked: the plan of the export; its target does not matter.
        typical: inputs that choose the scales for int8.
        carry: whether to try biases that travel.
        progress: called with the name of each stage.

    Raises:
        FoldError, ExportError, VerificationError: the program cannot be folded, values leave the type of the file, or
            the folded program computes something else.
    """
    model, own, notes = references.model, None, []
    folding = {**asked.folding, **balancing(typical)}
    if asked.stored in LARGEST:
        progress(f"run the example inputs to see whether values fit {asked.stored}")
        own = largest_values(model.program, model)
    progress("fold the norms")
    try:
        (program, report), scale_range, grown, note = fold_in_range(
            lambda bound: fold(model.program, max_scale_range=bound, verify=False, **folding),
            own,
            model,
            asked.stored,
            asked.max_scale_range,
        )
    except RangeError as error:
        raise ExportError(str(error)) from error
    if note:
        notes.append(note)
    if grown and grown.already:
        notes.append(f"{asked.stored}: the model itself goes beyond {grown.limit:.0f} at {some_of(grown.already)}")
    progress("verify the folded program")
    plain = Candidate(program, report, _verified(references, program, asked), grown)
    if not carry:
        return Folded(plain, plain, tuple(notes), "")
    progress("move biases along residual streams")
    folding["max_scale_range"] = scale_range
    carried, note = _with_carried_biases(references, plain, own, asked, folding)
    return Folded(plain, carried, tuple(notes), note)


def _verified(references: References, program: torch.export.ExportedProgram, asked: Plan) -> VerificationReport:
    return compare_forms(references, None, program, rtol=asked.program.rtol, atol=asked.program.atol)


def _with_carried_biases(
    references: References,
    plain: Candidate,
    own: dict[str, tuple[str, float]] | None,
    asked: Plan,
    folding: Mapping[str, Any],
) -> tuple[Candidate, str]:
    """The candidate with travelling biases if it is as good, else the plain one; and why, in one line."""
    model = references.model
    (program, report), note = carry_biases(model.program, (plain.program, plain.report), references, **folding)
    if program is plain.program:
        return plain, note
    grown = None if own is None else growth(program, own, model, LARGEST[asked.stored])
    if grown and grown.beyond:
        beyond = some_of(grown.beyond)
        return plain, f"biases stay in their branches: travelling, values leave {asked.stored} at {beyond}"
    try:
        verification = _verified(references, program, asked)
    except VerificationError as error:
        return plain, f"biases stay in their branches: {error}"
    return Candidate(program, report, verification, grown), note


@dataclass(frozen=True)
class Written:
    """A file that agrees with the model, where nobody looks yet.

    Attributes:
        candidate: what was written.
        opset: the operator set.
        applied: how often each graph pass applied.
        verification: every comparison, of the folded program and of the file.
        graph: the operations, norms and size of the file.
        rejected: newer operator sets that were tried, and why they failed.
        notes: what was given up, in words.
    """

    candidate: Candidate
    opset: int
    applied: dict[str, int]
    verification: VerificationReport
    graph: GraphSummary
    rejected: dict[int, str]
    notes: tuple[str, ...]


def write_verified(
    references: References, folded: Folded, translator: Translator, asked: Plan, path: Path, progress: Progress
) -> Written:
    """Write the first candidate that passes, in the newest operator set in which one does.

    Args:
        references: inputs to compare on, with the model's outputs.
        folded: what to write.
        translator: of the model's programs.
        asked: the plan of the export.
        path: where to write, in a folder that nobody looks into.
        progress: called with the name of each stage.

    Raises:
        WriteError, VerificationError: none passes.
    """
    rejected: dict[int, str] = {}
    notes: list[str] = []
    for opset in OPSETS if asked.opset is None else (asked.opset,):
        for candidate, passes in folded.candidates(asked.passes):
            what = f"opset {opset}" + (f", passes for {asked.target}" if passes else "")
            try:
                progress(f"write ONNX, {what}")
                applied = write_staged(
                    candidate.program, path, translator, opset=opset, dtype=asked.stored, passes=passes
                )
                progress(f"verify in ONNX Runtime, {what}")
                graph = summarize(path)
                half = graph.dtype == "float16"
                verification = compare_forms(references, path, half=half, rtol=asked.file.rtol, atol=asked.file.atol)
            except (WriteError, VerificationError) as error:
                why = str(error).replace(str(path.parent) + os.sep, "")
                if passes:
                    notes.append(f"{what}, was given up: {why}")
                elif asked.opset is not None or isinstance(error, UnwritableError):
                    raise
                else:
                    rejected[opset] = why
                continue
            whole = _together(candidate.verification, verification)
            return Written(candidate, opset, applied, whole, graph, rejected, tuple(notes))
    raise VerificationError("no opset passes: " + "; ".join(f"{number}: {why}" for number, why in rejected.items()))


def _together(first: VerificationReport, second: VerificationReport) -> VerificationReport:
    return VerificationReport(first.cases + second.cases, list(dict.fromkeys(first.notes + second.notes)))


def quantised(
    model: ExportableModel,
    written: Written,
    asked: Plan,
    typical: Inputs,
    static: bool,
    path: Path,
    progress: Progress,
) -> Written:
    """Make the products of the written file int8, and bound what that changes; other types are returned as they are.

    Raises:
        WriteError, VerificationError: the file cannot be quantised, or int8 changes too much.
    """
    if asked.dtype != "int8":
        return written
    progress("quantise to int8")
    cases = quantized(model, path, typical, static=static, rtol=asked.int8_rtol)
    after = summarize(path)
    return replace(
        written,
        verification=replace(written.verification, cases=written.verification.cases + cases),
        graph=replace(written.graph, nodes=after.nodes, bytes=after.bytes, dtype="int8"),
    )
