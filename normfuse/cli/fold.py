"""The command that reads an ONNX file and writes another."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .files import check_readable, described, reported
from .options import FileFolding, Inputs, Printing, Tolerance, Writing


def fold(
    source: Annotated[Path, typer.Argument(help="An ONNX file from elsewhere, of operator set 7 or newer.")],
    writing: Writing,
    inputs: Inputs,
    folding: FileFolding,
    tolerance: Tolerance,
    printing: Printing,
) -> None:
    """Fold BatchNorms and per-channel Mul and Add of an ONNX file, and verify the result. All else stays."""
    check_readable(source)
    with printing.stages() as stages, reported(writing.report, source=source) as report:
        from normfuse.console import print_result
        from normfuse.onnx import fold_file
        from normfuse.onnx.publish import external_files

        writing.check_targets(source, *external_files(source))
        options = asdict(folding) | asdict(tolerance)
        result = fold_file(
            source, writing.out, inputs=inputs.specs(), progress=stages, before_publish=report, **options
        )
    printing.result(described(result, source=source), lambda console: print_result(console, result))
