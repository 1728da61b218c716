"""The spine: a model goes in, a verified ONNX file without its norms comes out, or nothing does."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from normfuse.checkpoint import ExportableModel
from normfuse.checkpoint.archive import one_line, some_of
from normfuse.deprecation import deprecated_arguments, deprecated_attribute
from normfuse.files import Output
from normfuse.folding import FoldReport, fold
from normfuse.onnx import graph_passes
from normfuse.onnx.fastest import export_fastest
from normfuse.onnx.graph import GraphSummary, summarize
from normfuse.onnx.graph_passes.biases import carry_biases
from normfuse.onnx.publish import publish
from normfuse.onnx.quantize import balancing, quantized, typical_inputs
from normfuse.onnx.ranges import LARGEST, Growth, RangeError, fold_in_range, growth, largest_values
from normfuse.onnx.references import References
from normfuse.onnx.verifier import RTOL, VerificationError, VerificationReport, verify
from normfuse.onnx.writer import WriteError, write_staged
from normfuse.options import (
    AUTO,
    MODEL_DTYPES,
    OPSETS,
    ExportError,
    check_dtype,
    check_opset,
    check_scale_range,
    passes_for,
)
from normfuse.sources import huggingface


@dataclass(frozen=True)
class ExportResult:
    """What :func:`export` did.

    Attributes:
        path: the ONNX file; weights beyond 2 GB are in a file beside it, which it names.
        opset: the operator set that was chosen or asked for.
        rejected: newer opsets that were tried, and why they failed.
        dtype: of the weights in the file.
        report: what became of each norm.
        verification: every comparison made.
        graph: what is in the file.
        target: what the graph passes were chosen for.
        passes: how often each graph pass applied; empty if none was asked for, or the result failed verification.
        notes: decisions in words: bounds of dimensions that tracing found, arguments that became constants, why
            graph passes were given up.
        growth: how large values become inside, for float16; None for float32.
    """

    path: Path
    opset: int
    rejected: dict[int, str]
    dtype: str
    report: FoldReport
    verification: VerificationReport
    graph: GraphSummary
    target: str = "portable"
    passes: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    growth: Growth | None = None

    shaping = deprecated_attribute("shaping", "passes")
    proof = deprecated_attribute("proof", "verification")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data: everything, unabridged.

        Returns:
            A dictionary of everything above.
        """
        return {
            "path": str(self.path),
            "opset": self.opset,
            "rejected_opsets": {str(opset): why for opset, why in self.rejected.items()},
            "dtype": self.dtype,
            "fold": self.report.to_dict(),
            "verification": self.verification.to_dict(),
            "graph": self.graph.to_dict(),
            "target": self.target,
            "passes": self.passes,
            "notes": self.notes,
            "growth": self.growth and asdict(self.growth),
        }


@deprecated_arguments(no_shape="disable_passes")
def export(
    model: nn.Module | ExportableModel,
    path: str | os.PathLike[str],
    *,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    opset: int | None = None,
    dtype: str = "float32",
    rtol: float | None = None,
    atol: float = 0.0,
    copy_shared: bool = True,
    remove_dead: bool = False,
    keep_dynamic_norms: bool = False,
    cancel_norms: bool = False,
    max_scale_range: float | None = None,
    calibrate: str | os.PathLike[str] | Sequence[Sequence[torch.Tensor]] | None = None,
    target: str = "portable",
    disable_passes: Collection[str] = (),
    sizes: Mapping[str, int] | None = None,
    threads: int = 1,
    progress: Callable[[str], None] = lambda stage: None,
) -> ExportResult:
    """Folds the norms of a model away, writes ONNX, and verifies in ONNX Runtime that the outputs are the same.

    Args:
        model: what :func:`normfuse.load` gives, or a module (then with ``example_inputs``), which is not
            changed.
        path: the file to write. It appears, together with a file of its weights for more than 2 GB, only after
            verification. A symbolic link stays and is followed.
        example_inputs: for a module, as in :meth:`normfuse.ExportableModel.from_model`. A model of transformers
            needs none.
        dynamic_shapes: for a module, as in :meth:`normfuse.ExportableModel.from_model`.
        opset: None picks the newest of 23, 20 and 18 that the verification passes with.
        dtype: of the weights in the file, ``float32`` or ``float16`` (inputs and outputs stay float32), or ``int8``:
            scales are chosen for integers (``balance`` of :func:`normfuse.fold`), the file is verified in float32, and
            then ``onnxruntime.quantization`` makes its products int8.
        rtol: allowed difference, relative to the largest value of an output, see :func:`verify`; None: 1e-4 for
            float32, 2e-2 for float16. For int8 it is the root of the summed squares of the difference ÷ that of the
            output, None: 0.2.
        atol: allowed difference on top.
        copy_shared: whether a weight that is used in several places may be copied to fold a norm into one of
            them.
        remove_dead: whether channels that hold a constant leave the weights, see :func:`normfuse.fold`.
        keep_dynamic_norms: whether LayerNorm, RMSNorm and GroupNorm keep their gains and shifts, and LayerNorm its
            mean, see :func:`normfuse.fold`.
        cancel_norms: whether norms go whose division later norms undo, see :func:`normfuse.fold`.
        max_scale_range: the largest ratio between the scales of one channel in different places, at least 1; None is
            what `dtype` bears.
        calibrate: for ``int8``, typical inputs, each a sequence of tensors like the example inputs, or an .npz file
            with arrays of the inputs' names. Scales are chosen by them, and the steps of activations become constants
            (static quantisation). None: by the example inputs, and steps are measured in every run (dynamic).
        target: what to run graph passes for: ``portable`` (as torch writes it), ``cpu`` (ONNX Runtime on the CPU),
            ``cpu-single`` (there, one thread and at most about 2000 tokens at a time), ``cpu-long`` (there, from about
            4000 tokens at a time, or sequences of 1000) or ``cuda``; all but ``cpu-long`` use standard operations
            only. If the result fails verification, the graph is written as it is, and ``notes`` say so. ``auto``
            exports for each of these but ``cuda``, times the files on this machine and keeps the fastest: ``portable``
            unless another is faster in three of four rounds.
        sizes, threads: for ``auto``: what to time with, as in :func:`normfuse.onnx.bench`.
        disable_passes: graph passes to leave out, see :data:`normfuse.onnx.graph_passes.PASS_NAMES`.
        progress: called with the name of each stage when it begins.

    Returns:
        What was done: the file's operator set, what became of each norm, every comparison.

    Raises:
        CheckpointError, ExportError, FoldError, VerificationError, WriteError: in one line; nothing is written then.

    Example:
        >>> import normfuse
        >>> from normfuse.nn import UnifiedNorm
        >>> model = nn.Sequential(nn.Linear(4, 8), UnifiedNorm(8), nn.ReLU(), nn.Linear(8, 2))
        >>> x = torch.randn(3, 4)
        >>> result = normfuse.onnx.export(model, "model.onnx", example_inputs=x, dynamic_shapes=({0: "batch"},))
        >>> result.graph.norms, result.verification.worst("ONNX file") < 1e-4
        ([], True)
    """
    check_dtype(dtype, MODEL_DTYPES)
    check_scale_range(max_scale_range)
    check_opset(opset)
    if calibrate is not None and dtype != "int8":
        raise ExportError(f"calibrate is for dtype 'int8', not {dtype!r}; leave it out")
    passes = passes_for("portable" if target == AUTO else target, disable_passes)
    path = Path(path)
    known = isinstance(model, ExportableModel) or huggingface.is_model(model)
    if not known and example_inputs is None:
        raise ExportError("a module needs example_inputs to be exported")
    if target == AUTO:
        traced = _exportable(model, example_inputs, dynamic_shapes, progress)
        options = {
            "opset": opset, "dtype": dtype, "rtol": rtol, "atol": atol, "copy_shared": copy_shared,
            "remove_dead": remove_dead, "keep_dynamic_norms": keep_dynamic_norms, "cancel_norms": cancel_norms,
            "max_scale_range": max_scale_range, "calibrate": calibrate, "disable_passes": disable_passes,
        }  # fmt: skip
        return export_fastest(partial(export, traced, **options), path, sizes or {}, threads, progress)
    if sizes or threads != 1:
        raise ExportError(f"sizes and threads are what target 'auto' times with, not {target!r}; leave them out")
    reads = [model.source] if isinstance(model, ExportableModel) else []
    with Output(path, reads=reads, error=ExportError) as output:
        model = _exportable(model, example_inputs, dynamic_shapes, progress)
        notes = list(model.notes)
        stored = "float32" if dtype == "int8" else dtype  # what is verified before it is quantised
        exact = RTOL["float32"] if rtol is None or dtype == "int8" else rtol
        limits: dict[str, Any] = {"rtol": exact, "atol": atol, "references": References(model)}
        typical = typical_inputs(model, dtype, calibrate)
        options = {
            "copy_shared": copy_shared,
            "remove_dead": remove_dead,
            "keep_dynamic_norms": keep_dynamic_norms,
            "cancel_norms": cancel_norms,
            **balancing(typical),
        }
        at_most = math.inf if max_scale_range is None else max_scale_range
        forms = _forms(model, stored, at_most, passes, limits, options, progress, notes)
        rejected: dict[int, str] = {}
        limits["rtol"] = RTOL[stored] if rtol is None or dtype == "int8" else rtol
        for candidate, form in itertools.product(OPSETS if opset is None else (opset,), forms):
            what = f"opset {candidate}" + (f", passes for {target}" if form.passes else "")
            applied: dict[str, int] = {}
            try:
                progress(f"write ONNX, {what}")
                shape = partial(_run_passes, form.passes, applied) if form.passes else None
                write_staged(
                    form.program,
                    output.staged,
                    opset=candidate,
                    dtype=stored,
                    inputs=model.inputs,
                    outputs=model.outputs,
                    shape=shape,
                )
                progress(f"verify in ONNX Runtime, {what}")
                verification = verify(model, output.staged, **limits)
            except (WriteError, VerificationError) as error:
                why = str(error).replace(str(output.folder) + os.sep, "")
                if form.passes:
                    notes.append(f"{what}, was given up: {why}")
                elif opset is not None:
                    raise
                else:
                    rejected[candidate] = why
                continue
            graph = summarize(output.staged)
            if dtype == "int8":
                progress("quantise to int8")
                cases = quantized(model, output.staged, typical, static=calibrate is not None, rtol=rtol)
                verification = replace(verification, cases=verification.cases + cases)
                after = summarize(output.staged)
                graph = replace(graph, nodes=after.nodes, bytes=after.bytes, dtype="int8")
            publish(output)
            verification = VerificationReport(
                form.verification.cases + verification.cases,
                list(dict.fromkeys(form.verification.notes + verification.notes)),
            )
            notes += verification.notes
            return ExportResult(
                path, candidate, rejected, dtype, form.report, verification, graph, target, applied, notes, form.growth
            )
    raise VerificationError("no opset passes: " + "; ".join(f"{number}: {why}" for number, why in rejected.items()))


def _exportable(
    model: nn.Module | ExportableModel, example_inputs: Any, dynamic_shapes: Any, progress: Callable[[str], None]
) -> ExportableModel:
    if isinstance(model, ExportableModel):
        return model
    progress("trace with torch.export")
    if example_inputs is None:
        return huggingface.exportable(model)
    return ExportableModel.from_model(model, example_inputs, dynamic_shapes)


@dataclass(frozen=True)
class _Form:
    """A folded program that agrees with the module, and the graph passes to run on it."""

    program: torch.export.ExportedProgram
    report: FoldReport
    verification: VerificationReport
    passes: tuple[str, ...]
    growth: Growth | None


def _forms(
    model: ExportableModel,
    dtype: str,
    max_scale_range: float,
    passes: tuple[str, ...],
    limits: Mapping[str, Any],
    fold_options: Mapping[str, Any],
    progress: Callable[[str], None],
    notes: list[str],
) -> list[_Form]:
    """What to write, best first; the last one has no graph passes."""
    program, own = model.program, None
    if dtype in LARGEST:
        progress(f"run the example inputs to see whether values fit {dtype}")
        own = largest_values(program, model)
    progress("fold the norms")
    try:
        plain, scale_range, grown, note = fold_in_range(
            lambda bound: fold(program, max_scale_range=bound, verify=False, **fold_options),
            own,
            model,
            dtype,
            max_scale_range,
        )
    except RangeError as error:
        raise ExportError(str(error)) from error
    notes += [note] if note else []
    if grown and grown.already:
        notes.append(f"{dtype}: the model itself goes beyond {grown.limit:.0f} at {some_of(grown.already)}")
    progress("verify the folded program")
    form = _Form(*plain, verify(model, None, program=plain[0], **limits), (), grown)
    if not passes:
        return [form]
    best = replace(form, passes=passes)
    if "carry_biases" in passes:
        progress("let biases travel")
        carried, note = carry_biases(program, plain, model, max_scale_range=scale_range, **fold_options)
        try:
            if carried is not plain:
                grown = None if own is None else growth(carried[0], own, model, LARGEST[dtype])
                if grown and grown.beyond:
                    note = f"biases stay in their branches: travelling, values leave {dtype} at {some_of(grown.beyond)}"
                else:
                    verification = verify(model, None, program=carried[0], **limits)
                    best = _Form(*carried, verification, passes, grown)
        except VerificationError as error:
            note = f"biases stay in their branches: {error}"
        notes.append(note)
    return [best, form]


def _run_passes(names: tuple[str, ...], applied: dict[str, int], model: ir.Model) -> None:
    try:
        applied.update(graph_passes.run_passes(model, names))
    except Exception as error:  # a graph that a pass cannot take must cost the passes, not the export
        raise WriteError(f"a graph pass failed: {type(error).__name__}: {one_line(error)}") from error


@dataclass(frozen=True)
class FoldedModel:
    """What :func:`fold_model` gives.

    Attributes:
        model: what was folded.
        program: the folded program.
        report: what became of each norm.
        notes: decisions in words: those of the model, and on ranges and biases.
    """

    model: ExportableModel
    program: torch.export.ExportedProgram
    report: FoldReport
    notes: list[str]


@deprecated_arguments(no_shape="disable_passes")
def fold_model(
    model: ExportableModel,
    *,
    dtype: str = "float32",
    copy_shared: bool = True,
    remove_dead: bool = False,
    keep_dynamic_norms: bool = False,
    cancel_norms: bool = False,
    max_scale_range: float | None = None,
    target: str = "portable",
    disable_passes: Collection[str] = (),
    progress: Callable[[str], None] = lambda stage: None,
) -> FoldedModel:
    """Folds a loaded model as :func:`export` with the same arguments does, and writes nothing.

    Args:
        model: what :func:`normfuse.load` or :meth:`normfuse.ExportableModel.from_model` gives.
        dtype: see :func:`export`.
        copy_shared: see :func:`export`.
        remove_dead: see :func:`export`.
        keep_dynamic_norms: see :func:`export`.
        cancel_norms: see :func:`export`.
        max_scale_range: see :func:`export`.
        target: see :func:`export`.
        disable_passes: see :func:`export`.
        progress: see :func:`export`.

    Returns:
        The folded program and what became of each norm.

    Raises:
        ExportError: an argument has a value that is not allowed.
        FoldError: the model cannot be folded.
        VerificationError: the folded program differs from the model's.

    Example:
        >>> import normfuse
        >>> from normfuse.nn import UnifiedNorm
        >>> model = nn.Sequential(nn.Linear(4, 8), UnifiedNorm(8), nn.ReLU(), nn.Linear(8, 2))
        >>> folded = normfuse.onnx.fold_model(normfuse.ExportableModel.from_model(model, torch.randn(3, 4)))
        >>> folded.report.norms[0].status
        'folded'
    """
    check_dtype(dtype, MODEL_DTYPES)
    check_scale_range(max_scale_range)
    passes = passes_for(target, disable_passes)
    notes = list(model.notes)
    limits = {"rtol": RTOL["float32"], "atol": 0.0, "references": References(model)}
    options = {
        "copy_shared": copy_shared,
        "remove_dead": remove_dead,
        "keep_dynamic_norms": keep_dynamic_norms,
        "cancel_norms": cancel_norms,
        **balancing(typical_inputs(model, dtype, None)),
    }
    at_most = math.inf if max_scale_range is None else max_scale_range
    stored = "float32" if dtype == "int8" else dtype
    form = _forms(model, stored, at_most, passes, limits, options, progress, notes)[0]
    return FoldedModel(model, form.program, form.report, notes)
