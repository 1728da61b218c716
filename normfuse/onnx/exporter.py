"""A model goes in, a verified ONNX file without its norms comes out, or nothing does: the steps in :mod:`.steps`."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normfuse.checkpoint import ExportableModel
from normfuse.deprecation import deprecated_arguments, deprecated_attribute
from normfuse.files import Output
from normfuse.folding import FoldReport
from normfuse.onnx.fastest import TIMED, check_sizes, fastest
from normfuse.onnx.graph import GraphSummary
from normfuse.onnx.publish import publish
from normfuse.onnx.quantize import typical_inputs
from normfuse.onnx.ranges import Growth
from normfuse.onnx.references import References
from normfuse.onnx.steps import Folded, Plan, Progress, Written, fold_norms, plan, quantised, traced, write_verified
from normfuse.onnx.verifier import VerificationReport
from normfuse.onnx.writer import Translator
from normfuse.options import AUTO, MODEL_TARGETS, ExportError, check_for_auto, check_target_name
from normfuse.sources import huggingface


@dataclass(frozen=True)
class ExportResult:
    """The result of :func:`export`.

    Attributes:
        path: the ONNX file; weights beyond 2 GB are in a file beside it, which it names.
        opset: the operator set that was chosen or asked for.
        rejected: newer opsets that were tried, and why they failed.
        dtype: of the weights in the file.
        report: what became of each norm.
        verification: every comparison made.
        graph: the operations, norms and size of the file.
        target: the target of the graph passes.
        passes: how often each graph pass applied; empty if none was asked for, or the result failed verification.
        notes: decisions in words: bounds of dimensions that tracing found, arguments that became constants, why graph
            passes were skipped.
        growth: the largest inner values, for float16; None for other types.
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
        """Everything as JSON-ready data.

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
    model: nn.Module | torch.export.ExportedProgram | ExportableModel,
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
    before_publish: Callable[[ExportResult], None] = lambda result: None,
) -> ExportResult:
    """Fold the norms of a model, write ONNX, and verify in ONNX Runtime that the outputs are the same.

    Args:
        model: what :func:`normfuse.load` gives, a program of ``torch.export``, or a module (then with
            ``example_inputs``), which is not changed.
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
        atol: allowed absolute difference on top of that.
        copy_shared: whether a weight that is used in several places may be copied, to fold a norm into one of them.
        remove_dead: whether channels that hold a constant leave the weights, see :func:`normfuse.fold`.
        keep_dynamic_norms: whether LayerNorm, RMSNorm and GroupNorm keep their gains and shifts, and LayerNorm its
            mean, see :func:`normfuse.fold`.
        cancel_norms: whether to drop norms whose division later norms make superfluous, see :func:`normfuse.fold`.
        max_scale_range: the largest ratio between the scales of one channel in different places, at least 1; None is
            the largest that is safe for `dtype`.
        calibrate: for ``int8``: typical inputs, each a sequence of tensors like the example inputs, or an .npz file
            with one array per input name. They choose the scales, and the step sizes of activations become constants
            (static quantisation). None: the example inputs choose the scales, and step sizes are measured in every run
            (dynamic quantisation).
        target: the runtime to optimise the graph for: ``portable`` (no graph passes), ``cpu`` (ONNX Runtime on the
            CPU), ``cpu-single`` (there, one thread and at most about 2000 tokens at a time), ``cpu-long`` (there, from
            about 4000 tokens at a time, or sequences of 1000) or ``cuda``; all but ``cpu-long`` use standard operations
            only. If the result fails verification, the graph is written as it is, and ``notes`` say so. ``auto``
            exports for each of these but ``cuda``, times the files on this machine and keeps the fastest: ``portable``
            unless another is faster in three of four rounds.
        disable_passes: graph passes to leave out, see :data:`normfuse.onnx.graph_passes.PASS_NAMES`.
        sizes: for ``auto``: sizes of dynamic dimensions that the files are timed with, by name, as in
            :func:`bench`.
        threads: for ``auto``: threads that the files are timed with.
        progress: called with the name of each stage when it begins.
        before_publish: called with the result just before the file is renamed to ``path``. If it raises an exception,
            nothing is written.

    Returns:
        The operator set, the result for each norm, and every comparison.

    Raises:
        CheckpointError, ExportError, FoldError, VerificationError, WriteError: the model cannot be loaded or exported,
            or the file differs; the message is one line, and nothing is written.

    Example:
        >>> import normfuse
        >>> from normfuse.nn import UnifiedNorm
        >>> model = nn.Sequential(nn.Linear(4, 8), UnifiedNorm(8), nn.ReLU(), nn.Linear(8, 2))
        >>> x = torch.randn(3, 4)
        >>> result = normfuse.onnx.export(model, "model.onnx", example_inputs=x, dynamic_shapes=({0: "batch"},))
        >>> result.graph.norms, result.verification.worst("ONNX file") < 1e-4
        ([], True)
    """
    options: dict[str, Any] = {
        "opset": opset, "dtype": dtype, "rtol": rtol, "atol": atol, "copy_shared": copy_shared,
        "remove_dead": remove_dead, "keep_dynamic_norms": keep_dynamic_norms, "cancel_norms": cancel_norms,
        "max_scale_range": max_scale_range, "calibrate": calibrate, "disable_passes": disable_passes,
    }  # fmt: skip
    check_target_name(target, MODEL_TARGETS)
    check_for_auto(target, sizes, threads)
    targets = TIMED if target == AUTO else (target,)
    plans = {name: plan(target=name, **options) for name in targets}
    if isinstance(model, str | os.PathLike):
        raise ExportError(f"model is the path {str(model)!r}; give what normfuse.load makes of it")
    is_traced = isinstance(model, ExportableModel | torch.export.ExportedProgram)
    if is_traced and not (example_inputs is None and dynamic_shapes is None):
        raise ExportError(
            "example_inputs and dynamic_shapes are for modules; what is traced has its own: leave them out"
        )
    if not is_traced and not huggingface.is_model(model) and example_inputs is None:
        raise ExportError("a module needs example_inputs: a tuple of the arguments of its forward")
    sources = (model.source if isinstance(model, ExportableModel) else None, calibrate)
    reads = [source for source in sources if isinstance(source, str | os.PathLike)]
    with Output(path, reads=reads, error=ExportError) as output:
        program = traced(model, example_inputs, dynamic_shapes, progress)
        check_sizes(sizes or {}, program.inputs)
        typical, references = typical_inputs(program, dtype, calibrate), References(program)

        # One target's plan differs from another's in its graph passes only.
        carry = any("carry_biases" in each.passes for each in plans.values())
        folded = fold_norms(references, plans[targets[0]], typical, carry, progress)
        translator = Translator(program.inputs, program.outputs)

        def staged(name: str, file: Path, progress: Progress) -> ExportResult:
            written = write_verified(references, folded, translator, plans[name], file, progress)
            written = quantised(program, written, plans[name], typical, calibrate is not None, file, progress)
            return _result(program, folded, written, plans[name], file)

        if target == AUTO:
            result = fastest(staged, output, sizes or {}, threads, progress)
        else:
            result = staged(target, output.staged, progress)
        result = replace(result, path=Path(path))
        before_publish(result)
        publish(output)
    return result


def _result(model: ExportableModel, folded: Folded, written: Written, asked: Plan, path: Path) -> ExportResult:
    return ExportResult(
        path=path,
        opset=written.opset,
        rejected=written.rejected,
        dtype=asked.dtype,
        report=written.candidate.report,
        verification=written.verification,
        graph=written.graph,
        target=asked.target,
        passes=written.applied,
        notes=[*model.notes, *folded.notes_for(asked.passes), *written.notes, *written.verification.notes],
        growth=written.candidate.growth,
    )


@dataclass(frozen=True)
class FoldedModel:
    """The result of :func:`fold_model`.

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
    """Fold a loaded model as :func:`export` with the same arguments does, without writing a file.

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
    asked = plan(
        dtype=dtype,
        max_scale_range=max_scale_range,
        target=target,
        disable_passes=disable_passes,
        copy_shared=copy_shared,
        remove_dead=remove_dead,
        keep_dynamic_norms=keep_dynamic_norms,
        cancel_norms=cancel_norms,
    )
    references = References(model)
    carry = "carry_biases" in asked.passes
    folded = fold_norms(references, asked, typical_inputs(model, dtype, None), carry, progress)
    best, _ = folded.candidates(asked.passes)[0]
    return FoldedModel(model, best.program, best.report, [*model.notes, *folded.notes_for(asked.passes)])
