"""The command that draws."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Printing


def plot(
    statistics: Annotated[Path, typer.Argument(help="File saved by normfuse.nn.monitor(model) during training.")],
    printing: Printing,
    out: Annotated[Path, typer.Option("--out", "-o", help="The picture: .png, .svg or .pdf.")] = Path("statistics.png"),
) -> None:
    """Draw the statistics of norms over a training: batch and running statistics, gradients, skipped steps."""
    from rich.markup import escape

    from normfuse.plotting import plot_statistics

    plot_statistics(statistics, out)
    data = {"statistics": str(statistics), "picture": str(out)}
    printing.result(data, lambda console: console.print(f"wrote {escape(str(out))}", highlight=False))
