"""The spine: a model goes in, a verified ONNX file without its norms comes out, or nothing does."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normfuse.checkpoint import Checkpoint
from normfuse.checkpoint import inputs as specs
from normfuse.checkpoint.archive import one_line
from normfuse.fold import FoldReport, fold
from normfuse.onnx.graph import GraphSummary, summarize
from normfuse.onnx.verifier import RTOL, Proof, VerificationError, verify
from normfuse.onnx.writer import DTYPES, OPSETS, WriteError, quiet, write


class ExportError(ValueError):
    """The model cannot be exported; the message is one line. No file was written."""


@dataclass(frozen=True)
class ExportResult:
    """What :func:`export` did.

    Attributes:
        path: the ONNX file; weights beyond 2 GB are in ``<path>.data``.
        opset: the operator set that was chosen or asked for.
        rejected: newer opsets that were tried, and why they failed.
        dtype: of the weights in the file.
        report: what became of each norm.
        proof: every comparison made.
        graph: what is in the file.
    """

    path: Path
    opset: int
    rejected: dict[int, str]
    dtype: str
    report: FoldReport
    proof: Proof
    graph: GraphSummary

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data: everything, unabridged."""
        return {
            "path": str(self.path),
            "opset": self.opset,
            "rejected_opsets": {str(opset): why for opset, why in self.rejected.items()},
            "dtype": self.dtype,
            "fold": self.report.to_dict(),
            "verification": self.proof.to_dict(),
            "graph": self.graph.to_dict(),
        }


def export(
    model: nn.Module | Checkpoint,
    path: str | os.PathLike[str],
    *,
    example_inputs: Sequence[torch.Tensor] | torch.Tensor | Mapping[str, torch.Tensor] | None = None,
    dynamic_shapes: Mapping[str, Any] | Sequence[Any] | None = None,
    opset: int | None = None,
    dtype: str = "float32",
    rtol: float | None = None,
    atol: float = 0.0,
    copy_shared: bool = True,
    progress: Callable[[str], None] = lambda stage: None,
) -> ExportResult:
    """Folds the norms of a model away, writes ONNX, and proves in ONNX Runtime that the outputs are the same.

    Args:
        model: a checkpoint of :func:`normfuse.load`, or a module (then with ``example_inputs``), which is not
            changed.
        path: the file to write. It appears, together with ``<path>.data`` for more than 2 GB, only after
            verification.
        example_inputs, dynamic_shapes: for a module, as in :func:`normfuse.save`.
        opset: None picks the newest of 23, 20 and 18 that the verification passes with.
        dtype: of the weights in the file, ``float32`` or ``float16`` (inputs and outputs stay float32).
        rtol, atol: allowed difference, see :func:`normfuse.onnx.verify`; rtol defaults to 1e-4 for float32,
        2e-2 for
            float16.
        copy_shared: whether a weight that is used in several places may be copied to fold a norm into one of
            them.
        progress: called with the name of each stage when it begins.

    Raises:
        ExportError, FoldError, VerificationError, WriteError: in one line; nothing is written then.
    """
    if dtype not in DTYPES:
        raise ExportError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if opset is not None and not min(OPSETS) <= opset <= max(OPSETS):
        raise ExportError(f"opset {opset} is outside {min(OPSETS)} to {max(OPSETS)}, what torch translates to")
    path = Path(path)
    if not isinstance(model, Checkpoint):
        if example_inputs is None:
            raise ExportError("a module needs example_inputs to be exported")
        model = Checkpoint.from_model(model, example_inputs, dynamic_shapes)
    check_target(path)
    # Beside the target, hence on the same disk: moving the finished files is a rename.
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        checkpoint, folded, report = fold_checkpoint(model, copy_shared=copy_shared, progress=progress)
        progress("verify the folded program")
        folded_proof = verify(
            checkpoint, None, program=folded, rtol=RTOL["float32"] if rtol is None else rtol, atol=atol
        )
        rejected: dict[int, str] = {}
        for candidate in OPSETS if opset is None else (opset,):
            try:
                progress(f"write ONNX, opset {candidate}")
                staged = staging / path.name
                files = write(folded, staged, opset=candidate, dtype=dtype, inputs=checkpoint.inputs)
                progress(f"verify in ONNX Runtime, opset {candidate}")
                proof = verify(checkpoint, staged, rtol=RTOL[dtype] if rtol is None else rtol, atol=atol)
            except (WriteError, VerificationError) as error:
                if opset is not None:
                    raise
                rejected[candidate] = str(error).replace(str(staging) + os.sep, "")
                continue
            graph = summarize(staged)
            _move(files, path)
            return ExportResult(
                path, candidate, rejected, dtype, report, Proof(folded_proof.cases + proof.cases), graph
            )
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    raise VerificationError("no opset passes: " + "; ".join(f"{number}: {why}" for number, why in rejected.items()))


def fold_checkpoint(
    checkpoint: Checkpoint, *, copy_shared: bool = True, progress: Callable[[str], None] = lambda stage: None
) -> tuple[Checkpoint, torch.export.ExportedProgram, FoldReport]:
    """Traces a checkpoint's module with torch.export and folds the program.

    Returns the checkpoint in float32 (itself if it was), the folded program and the report. Raises
    ExportError if the module cannot be traced, FoldError if it cannot be folded.
    """
    checkpoint = in_float32(checkpoint)
    progress("trace with torch.export")
    program = trace(checkpoint)
    progress("fold the norms")
    folded, report = fold(program, copy_shared=copy_shared)
    return checkpoint, folded, report


def trace(checkpoint: Checkpoint) -> torch.export.ExportedProgram:
    """torch.export on the example inputs, with the dynamic dimensions kept. Raises ExportError in one
    line."""
    if checkpoint.program is not None:
        return checkpoint.program
    dims = specs.dimensions(checkpoint.inputs)
    # torch.export takes a size of 0 or 1 for a constant: such examples are repeated for tracing.
    sizes = {
        name: size if size > 1 else specs.clamp(3, dims[name])
        for name, size in specs.consistent_sizes(checkpoint.inputs, checkpoint.example_inputs).items()
    }
    tensors = [
        specs.resize(example, spec.shape(sizes))
        for spec, example in zip(checkpoint.inputs, checkpoint.example_inputs, strict=True)
    ]
    args, kwargs = checkpoint.arguments(tensors)
    try:
        with quiet(), torch.no_grad():
            return torch.export.export(checkpoint.module, args, kwargs, dynamic_shapes=checkpoint.dynamic_shapes)
    except Exception as error:  # torch.export has no common base for what it raises
        name = type(checkpoint.module).__name__
        raise ExportError(f"torch.export cannot trace {name}: {_tracing_problem(error)}") from error


def _tracing_problem(error: Exception) -> str:
    text = str(error)
    if "Constraints violated" in text:
        reasons = [line.strip(" -") for line in text.splitlines() if line.lstrip().startswith("- ")]
        fixes = text.partition("Suggested fixes:")[2].strip().split("\n\n")[0]
        return one_line(
            f"a dynamic dimension cannot take every size: {' '.join(reasons)[:200]} Suggested: {fixes}; "
            "bound it "
            "(--input \"x:int64[batch,seq<=512]\", Dim('seq', max=512)) or make it fixed"
        )
    return f"{type(error).__name__}: {one_line(text.split('The error above occurred')[0], 300)}"


def in_float32(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with module and inputs in float32; itself if they are. The original is left as it is."""
    tensors = [*checkpoint.module.parameters(), *checkpoint.module.buffers(), *checkpoint.example_inputs]
    others = {t.dtype for t in tensors if t.is_floating_point()} - {torch.float32}
    if not others or checkpoint.program is not None:
        return checkpoint
    return replace(
        checkpoint,
        module=copy.deepcopy(checkpoint.module).float(),
        inputs=tuple(
            replace(spec, dtype=torch.float32) if spec.dtype.is_floating_point else spec for spec in checkpoint.inputs
        ),
        example_inputs=tuple(t.float() if t.is_floating_point() else t for t in checkpoint.example_inputs),
    )


def check_target(path: Path) -> None:
    """ExportError if a file cannot be written there, known before any work is done."""
    if path.is_dir():
        raise ExportError(f"cannot write {path}: it is a folder")
    if not path.parent.is_dir():
        raise ExportError(f"cannot write {path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise ExportError(f"cannot write {path}: the folder {path.parent} is read-only")


def _move(files: Sequence[Path], path: Path) -> None:
    """Weights first: the ONNX file that names them appears last."""
    for file in reversed(files):
        os.replace(file, path.with_name(file.name))
