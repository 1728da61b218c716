"""Commands that read a model: export, inspect, verify."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from normfuse.options import INT8_FILE, check_for_auto, check_for_int8, passes_for

from .files import check_readable, described, reported
from .options import Choosing, Loading, ModelFolding, ModelWriting, OtherNames, Printing, Tolerance, pairs

if TYPE_CHECKING:
    from rich.console import Console

CheckpointArgument = Annotated[
    Path, typer.Argument(help="From normfuse.save, weights (.pt, .safetensors), or a folder of transformers.")
]


def export(
    checkpoint: CheckpointArgument,
    writing: ModelWriting,
    loading: Loading,
    folding: ModelFolding,
    choosing: Choosing,
    tolerance: Tolerance,
    printing: Printing,
) -> None:
    """Fold the norms away, write ONNX, and verify it in ONNX Runtime before the file appears."""
    choice = choosing.options()
    check_for_auto(folding.target, choice["sizes"], choosing.threads)
    check_for_int8(folding.dtype, choosing.calibrate)
    check_readable(checkpoint)
    read = [] if choosing.calibrate is None else [choosing.calibrate]
    for path in read:
        check_readable(path)
    writing.check_targets(checkpoint, *loading.files(), *read)
    with printing.stages() as stages, reported(writing.report, checkpoint=checkpoint) as report:
        stages(f"load {checkpoint}")
        from normfuse.console import print_result
        from normfuse.onnx import export as run

        loaded = loading.load(checkpoint)
        options = asdict(folding) | choice | asdict(tolerance)
        result = run(loaded, writing.out, opset=writing.opset, progress=stages, before_publish=report, **options)
    printing.result(described(result, checkpoint=checkpoint), lambda console: print_result(console, result))


def inspect(checkpoint: CheckpointArgument, loading: Loading, folding: ModelFolding, printing: Printing) -> None:
    """Print which norms fold into which weights; writes nothing."""
    passes_for(folding.target, folding.disable_passes)
    check_readable(checkpoint)
    with printing.stages() as stages:
        stages(f"load {checkpoint}")
        from normfuse.onnx import fold_model

        result = fold_model(loading.load(checkpoint), progress=stages, **asdict(folding))
    inputs = [str(spec) for spec in result.model.inputs]

    def show(console: Console) -> None:
        from rich.markup import escape

        from normfuse.console import print_notes, print_report

        console.print(f"inputs: {escape(', '.join(inputs))}", highlight=False)
        print_report(console, result.report)
        print_notes(console, result.notes)

    data = {"checkpoint": str(checkpoint), "inputs": inputs, "fold": result.report.to_dict(), "notes": result.notes}
    printing.result(data, show, asked_for=True)


def verify(
    checkpoint: Annotated[Path, typer.Argument(help="The checkpoint that the file was exported from.")],
    onnx: Annotated[Path, typer.Argument(help="The ONNX file.")],
    loading: Loading,
    tolerance: Tolerance,
    printing: Printing,
    mapping: OtherNames = [],  # noqa: B006 (typer reads the default, nothing changes it)
    rounds: Annotated[int, typer.Option(min=0, help="Number of random inputs besides the saved example.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the random inputs.")] = 0,
) -> None:
    """Compare an ONNX file with the model it came from, in ONNX Runtime."""
    names = dict(pairs(mapping, "--map"))
    check_readable(checkpoint)
    check_readable(onnx)
    with printing.stages() as stages:
        stages(f"load {checkpoint}")
        from normfuse.onnx import summarize
        from normfuse.onnx import verify as run
        from normfuse.onnx.verifier import RTOL

        graph = summarize(onnx)
        loaded = loading.load(checkpoint)
        allowed = RTOL[graph.dtype] if tolerance.rtol is None else tolerance.rtol
        stages(f"run {onnx} in ONNX Runtime")
        verification = run(loaded, onnx, rtol=allowed, atol=tolerance.atol, rounds=rounds, seed=seed, mapping=names)
    worst = verification.worst(INT8_FILE if graph.dtype == "int8" else "ONNX file")

    def show(console: Console) -> None:
        from normfuse.console import make_table

        table = make_table(
            "inputs", "output", "difference", f"÷ {'size' if graph.dtype == 'int8' else 'largest value'}"
        )
        for case in verification.cases:
            table.add_row(case.inputs, case.output, f"{case.difference:.2e}", f"{case.error:.2e}")
        console.print(table)
        console.print(f"the same within {worst:.1e} (allowed {allowed:.0e})", highlight=False)

    data: dict[str, Any] = {"checkpoint": str(checkpoint), "onnx": str(onnx), "rtol": allowed, "atol": tolerance.atol}
    printing.result(data | {"worst": worst, **verification.to_dict()}, show)
