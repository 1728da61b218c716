"""An ONNX file that comes from elsewhere: read, folded, and edited where folding decided something."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx import TensorProto
from onnx_ir.passes.common import ShapeInferencePass

from normfuse.checkpoint import InputSpec, parse_input
from normfuse.deprecation import deprecated_arguments
from normfuse.errors import one_line, some_of
from normfuse.files import Output
from normfuse.folding import FoldError, FoldReport
from normfuse.onnx import graph_passes
from normfuse.onnx.exporter import ExportResult
from normfuse.onnx.graph import GraphError, summarize
from normfuse.onnx.protos import tensors_of
from normfuse.onnx.publish import publish
from normfuse.onnx.ranges import SCALE_RANGES
from normfuse.onnx.runtime import RuntimeEnded, RuntimeFailure, failure
from normfuse.onnx.verifier import Case, VerificationError, VerificationReport, runtime_problem
from normfuse.onnx.writer import WriteError, as_float16, refuse_overflow, save_model
from normfuse.options import ExportError, check_dtype, check_scale_range, passes_for

from . import saving
from .choosing import choose
from .comparing import Comparison
from .edits import Edited, EditError
from .observing import evaluate_constants, observe, observe_inputs, value_types
from .onnx_file import OnnxFile
from .rows import NOTHING_GAINED, all_kept, with_all_norms
from .trial import GUESSES, Search, Trial, describe_inputs

_PASSES_SINCE = 23  # the operator set with Attention as one operation


@deprecated_arguments(no_shape="disable_passes")
def fold_file(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    inputs: Sequence[str | InputSpec] | None = None,
    dtype: str = "float32",
    rtol: float | None = None,
    atol: float = 0.0,
    copy_shared: bool = True,
    keep_dynamic_norms: bool = False,
    max_scale_range: float | None = None,
    fold_defaults: bool | None = None,
    target: str = "portable",
    disable_passes: Collection[str] = (),
    progress: Callable[[str], None] = lambda stage: None,
    before_publish: Callable[[ExportResult], None] = lambda result: None,
) -> ExportResult:
    """Fold the norms of an ONNX file. All else in the file stays the same.

    BatchNormalization and Mul, Add, Sub and Div with a constant go into the weights around them. Names, types,
    dimensions, operator sets, properties, functions without norms and the order of operations stay. Operations that
    folding does not know (If, Loop, quantised parts, operations of other domains) stay, and so do the values that they
    read. If nothing folds, or nothing would be gained, the result is a copy, and its ``notes`` say so. Original and
    result are compared in ONNX Runtime, both without optimisations, on inputs generated from the file's types and
    sizes.

    Args:
        source: the file to read, of any operator set from 7 on, with weights in it or beside it.
        path: the file to write; weights lie beside it if they did before.
        inputs: bounds for the generated inputs, if the file does not contain them:
            ``"tokens:int64[batch,seq<=512]<30000"``.
        dtype: ``float32`` leaves types as they are; ``float16`` converts weights and operations of a float32 file,
            while inputs and outputs stay float32.
        rtol: allowed difference, relative to the largest value of an output. None is 1e-4 for float32, 2e-2 for
            float16 and for quantised files, and never less than four times the difference that ONNX Runtime's own
            optimisations make.
        atol: allowed absolute difference on top of that.
        copy_shared: whether a weight that several operations read may be stored more than once.
        keep_dynamic_norms: whether LayerNormalization keeps its gain, shift and mean where it would lose them.
        max_scale_range: the largest ratio between the scales of one channel in different places; None is the
            largest that is safe for the file's type.
        fold_defaults: whether initialisers that are listed among the inputs (of files of IR version 4 or newer, where
            callers may set them) are taken as constants. None: where every weight is listed, as exporters long did
            by habit. Those whose values were used leave the inputs, so that setting one is an error from then on.
        target: what to run graph passes for, as in :func:`normfuse.onnx.export`. They are for transformers of operator
            set 23; files of older sets are left as they are, and ``notes`` say so.
        disable_passes: graph passes to leave out.
        progress: called with the name of each stage when it begins.
        before_publish: called with the result just before the file is renamed to ``path``. If it raises an exception,
            nothing is written.

    Returns:
        What was done. Its ``verification`` compares the new file with the old one; a copy has no comparison.

    Raises:
        GraphError: it is not an ONNX file, contradicts itself, or runs at no size that was tried.
        ExportError: an option is wrong, or the result cannot be written there.
        WriteError, VerificationError: float16 cannot hold a weight, or changes the results too much.

    Example:
        >>> import normfuse
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
        >>> _ = torch.onnx.export(model, (torch.randn(1, 3, 8, 8),), "model.onnx", dynamo=True, verbose=False)
        >>> result = normfuse.onnx.fold_file("model.onnx", "folded.onnx")
        >>> result.path.name, bool(result.graph.norms)
        ('folded.onnx', False)
    """
    source = Path(source)
    check_dtype(dtype)
    check_scale_range(max_scale_range)
    passes = passes_for(target, disable_passes)
    progress(f"read {source}")
    given = [parse_input(spec) if isinstance(spec, str) else spec for spec in inputs or ()]
    file = OnnxFile(source, fold_defaults)
    with Output(path, reads=[source, *file.beside()], error=ExportError) as output:
        progress("generate inputs")
        types, trials = find_trials(file, given)
        own = file_dtype(file)
        job = _Job(file, types, trials, output.staged, dtype if dtype == "float16" else own, rtol, atol, progress)
        options = {
            "copy_shared": copy_shared,
            "carry_biases": "carry_biases" in passes and file.version >= _PASSES_SINCE,
        }
        result = job.fold(options, keep_dynamic_norms, math.inf if max_scale_range is None else max_scale_range)
        if dtype == "float16" and own != "float16":
            result = job.convert(result)
        if passes:
            result = job.run_passes(result, passes, target)
        beside, copied = None, []
        if not result.changed:
            beside = saving.copy(file, output.staged, output.target.parent)
            apart = ", with its weights in a file of another name" if beside is None else ""
            copied = [f"nothing folds: {output.path} is a copy of {source}{apart}"]
        graph = summarize(output.staged)
        told = ExportResult(
            path=output.path,
            opset=file.version,
            rejected={},
            dtype=job.dtype,
            report=replace(result.report, nodes_before=len(file.nodes), nodes_after=graph.node_count),
            verification=VerificationReport(result.cases),
            graph=graph,
            target=target,
            passes=result.passes,
            notes=[*job.notes, *result.notes, *copied],
        )
        before_publish(told)
        publish(output, beside)
    return told


def find_trials(file: OnnxFile, given: Sequence[InputSpec] = ()) -> tuple[dict[str, int], list[Trial]]:
    """Types of what a file computes, and inputs of several sizes that it takes.

    Raises:
        GraphError: there are none; one line.
    """
    try:
        types, refused = value_types(file), None
        for guess in GUESSES:
            inputs = describe_inputs(file, given, guess)
            file.rank_guessed = any(entry.hints.guessed and entry.dims is None for entry in inputs)
            search = Search(file, inputs)
            try:
                first = search.first()
                return types, [first, *search.others(first)]
            except GraphError as error:
                refused = refused or error
            if not file.rank_guessed:
                break
        assert refused is not None
        raise refused
    except GraphError as error:
        raise GraphError(f"{file.path}: {error}") from error
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, MemoryError) as error:
        # What a graph that contradicts itself can lead to before ONNX Runtime has seen it.
        raise GraphError(f"{file.path}: damaged, {type(error).__name__}: {one_line(error)}") from error


@dataclass(frozen=True)
class _Result:
    """Where a job stands: what lies in the staging folder, if anything, and the comparisons that it passed."""

    report: FoldReport
    changed: bool = False
    cases: list[Case] = field(default_factory=list)
    passes: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def noting(self, note: str) -> _Result:
        """The same with one more note."""
        return replace(self, notes=(*self.notes, note))


class _Job:
    """One file on its way."""

    def __init__(
        self,
        file: OnnxFile,
        types: Mapping[str, int],
        trials: Sequence[Trial],
        staged: Path,
        dtype: str,
        rtol: float | None,
        atol: float,
        progress: Callable[[str], None],
    ) -> None:
        self._file, self._types, self._trials, self._staged, self._progress = file, types, trials, staged, progress
        self.dtype = dtype
        #: The narrowest type that values are rounded to anywhere.
        self._narrowest = "float16" if TensorProto.FLOAT16 in types.values() else dtype
        quantised = _is_quantised(file)
        self._comparison = Comparison(file, trials, dtype=self._narrowest, quantised=quantised, rtol=rtol, atol=atol)
        self.notes = tuple(self._known_before())

    def _known_before(self) -> Iterator[str]:
        if self._file.settable:
            yield (
                "left alone, because callers may set them (they are listed among the inputs; --fold-defaults, "
                f"fold_defaults=True, takes them as constants): {some_of(self._file.settable)}"
            )
        if self._comparison.random:
            yield f"random from run to run, hence not compared: {some_of(self._comparison.random)}"

    def fold(self, options: Mapping[str, Any], keep_dynamic_norms: bool, at_most: float) -> _Result:
        """The best way to fold that agrees with the original."""
        if len(self._comparison.random) == len(self._comparison.names):
            return self._as_it_was(None, "its results differ from run to run, so nothing can be compared")
        file, trials = self._file, self._trials
        self._progress("run it to find the shapes inside")
        shapes = observe_inputs(file, trials)
        try:
            observed = observe(file, self._types, trials)
            evaluate_constants(file, observed, trials[0])
        except RuntimeFailure as error:  # which runs the file itself: such as casts it adds around float16 operations
            why = f"ONNX Runtime cannot show the shapes inside: {runtime_problem(error)}"
            return self._as_it_was(None, why).noting(f"left as it was: {why}")
        refused: list[str] = []
        first: FoldReport | None = None
        for bound in dict.fromkeys(min(bound, at_most) for bound in SCALE_RANGES[self._narrowest]):
            try:
                choices, seen = choose(
                    file, observed, shapes, self._staged.parent, keep_dynamic_norms=keep_dynamic_norms,
                    options={**options, "max_scale_range": bound}, progress=self._progress,
                )  # fmt: skip
            except Exception as error:  # a graph that folding cannot take costs the folding, not the file
                known = isinstance(error, FoldError | EditError | GraphError)
                refused.append(one_line(error) if known else f"{type(error).__name__}: {one_line(error)}")
                continue
            first = first or seen
            for choice in choices:
                self._progress("compare with the original in ONNX Runtime")
                saving.save(file, choice.edited, self._staged)
                try:
                    cases = self._comparison.compare(self._staged, choice.edited.inner)
                except (VerificationError, GraphError, RuntimeFailure) as error:
                    refused.append(one_line(error))
                    continue
                return _Result(choice.report, True, cases, notes=_changes(file, choice.edited))
            if not choices:
                break
        if refused:
            return self._as_it_was(first, refused[0]).noting(f"left as it was: {refused[0]}")
        result = self._as_it_was(first, NOTHING_GAINED)
        if first is None or all(record.status == "kept" for record in first.norms):
            return result
        return result.noting("left as it was: fewer operations would be left neither in it nor in what is run of it")

    def _as_it_was(self, report: FoldReport | None, why: str) -> _Result:
        """What becomes of a file that stays: no norm of it is gone."""
        report = report or with_all_norms(FoldReport(), self._file, {}, {}, why)
        return _Result(replace(report, norms=[all_kept(record, why) for record in report.norms]))

    def convert(self, result: _Result) -> _Result:
        """Weights and operations in float16."""
        self._progress("convert to float16")
        if not result.changed:
            saving.save(self._file, Edited(self._file.proto), self._staged)
        refuse_overflow(ir.load(self._staged))
        try:
            save_model(as_float16(self._staged), self._staged)
        except Exception as error:  # of the converter, on a graph that it cannot take
            raise WriteError(f"{self._file.path} cannot be converted to float16: {one_line(error)}") from error
        if isinstance(failure(self._staged), RuntimeEnded):
            raise WriteError(f"{self._file.path}: ONNX Runtime crashes when it optimises the float16 file")
        return replace(result, changed=True, cases=self._comparison.compare(self._staged))

    def run_passes(self, result: _Result, names: Sequence[str], target: str) -> _Result:
        """The graph after passes for a target; as it was if that is not for it, or fails."""
        if self._file.version < _PASSES_SINCE:
            return result.noting(
                f"no graph passes for {target}: they are for transformers of operator set {_PASSES_SINCE}"
            )
        self._progress("run graph passes")
        aside = self._staged.with_name("passes.onnx")
        try:
            model = ir.external_data.load_to_model(ir.load(self._staged if result.changed else self._file.path))
            ShapeInferencePass()(model)  # what the passes go by
            applied = graph_passes.run_passes(model, names)
            if not any(applied.values()):
                return replace(result, passes=applied)
            save_model(model, aside)
            cases = self._comparison.compare(aside)
        except Exception as error:  # a graph that a pass cannot take must cost the passes only
            return result.noting(f"graph passes were given up: {one_line(error)}")
        save_model(ir.external_data.load_to_model(ir.load(aside)), self._staged)
        return replace(result, changed=True, cases=cases, passes=applied)


def _changes(file: OnnxFile, edited: Edited) -> tuple[str, ...]:
    """What an edited file has become, in words."""
    notes = [_difference(file, edited)]
    if file.written_out:
        notes.append(f"functions written out, because norms are inside: {some_of(file.written_out)}")
    if edited.unlisted:
        notes.append(
            f"no longer listed among the inputs, because their values were used: {some_of(edited.unlisted)} "
            "(--keep-defaults, fold_defaults=False, leaves them alone)"
        )
    return tuple(notes)


def _difference(file: OnnxFile, edited: Edited) -> str:
    """Which operations went and came, in words."""
    before, after = (
        Counter(node.op_type for node in model.graph.node if node.op_type != "Constant")
        for model in (file.proto, edited.proto)
    )
    gone, new = ((a - b) for a, b in ((before, after), (after, before)))
    texts = [", ".join(f"{kind} ×{count}" for kind, count in counts.items()) for counts in (gone, new)]
    return f"gone: {texts[0]}" + (f"; new: {texts[1]}" if texts[1] else "")


def file_dtype(file: OnnxFile) -> str:
    """The narrowest floating-point type of a file's weights and inputs."""
    kinds = {tensor.data_type for tensor in tensors_of(file.proto)}
    kinds |= {value.type.tensor_type.elem_type for value in file.inputs}
    return "float16" if TensorProto.FLOAT16 in kinds else "float32"


def _is_quantised(file: OnnxFile) -> bool:
    kinds = {node.op_type for node in file.nodes}
    return any("quantize" in kind.lower() or "Integer" in kind or kind.startswith("QLinear") for kind in kinds)
