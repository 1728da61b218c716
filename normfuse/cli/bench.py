"""The command that times ONNX files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .files import check_readable
from .options import OtherNames, Printing, UsageError, pairs, sizes_of

if TYPE_CHECKING:
    from rich.console import Console


def bench(
    onnx: Annotated[list[Path], typer.Argument(help="One ONNX file, or two to compare.")],
    printing: Printing,
    sizes: Annotated[
        list[str],
        typer.Option(
            "--size",
            metavar="NAME=N",
            help="A dynamic dimension [1 for batches, 224 for pictures, others 128, or what the file takes]; "
            "repeatable.",
        ),
    ] = [],  # noqa: B006 (typer reads the default, nothing changes it)
    mapping: OtherNames = [],  # noqa: B006
    rounds: Annotated[int, typer.Option(min=4, help="Timed rounds; each runs every file once.")] = 50,
    threads: Annotated[int, typer.Option(min=1, help="Threads of ONNX Runtime.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the random inputs.")] = 0,
) -> None:
    """Time one or two ONNX files in ONNX Runtime (CPU); with two, also print second ÷ first."""
    if len(onnx) > 2:
        raise UsageError(f"{len(onnx)} files given; one or two can be timed")
    wanted = sizes_of(sizes)
    names = dict(pairs(mapping, "--map"))
    for path in onnx:
        check_readable(path)
    with printing.stages() as stages:
        stages("time in ONNX Runtime")
        from normfuse.onnx import bench as run

        timing = run(onnx, sizes=wanted, mapping=names, rounds=rounds, threads=threads, seed=seed)

    def show(console: Console) -> None:
        from rich.markup import escape

        from normfuse.console import make_table, print_notes

        table = make_table("file", "median ms", "quartiles")
        for index, path in enumerate(timing.paths):
            low, middle, high = timing.quartiles(index)
            table.add_row(escape(path), f"{middle:.3f}", f"{low:.3f} to {high:.3f}")
        console.print(table)
        shapes = ", ".join(f"{name} {shape}" for name, shape in timing.shapes.items())
        console.print(f"{rounds} rounds, {threads} thread(s), inputs {escape(shapes)}", highlight=False)
        print_notes(console, timing.notes)
        if len(onnx) == 2:
            middle, low, high = timing.ratio()
            console.print(
                f"second ÷ first: {middle:.3f} (half of the rounds between {low:.3f} and {high:.3f})", highlight=False
            )

    printing.result(timing.to_dict(), show, asked_for=True)
