"""The entry point, and which commands there are."""

from __future__ import annotations

import io
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import normfuse
from normfuse import signals

from .bench import bench
from .fold import fold
from .models import export, inspect, verify
from .plot import plot
from .running import command

_RENAMED = {"--no-shape": "--disable-pass"}


class _Group(TyperGroup):
    """Remembers the arguments as they were typed, for errors that advise."""

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> Any:
        typed = list(args)  # parsing uses the list up
        context = super().make_context(info_name, args, *rest, **extra)
        context.obj = typed
        return context


class _Command(TyperCommand):
    """Takes options under their old names as well, with a warning; help shows the new names only."""

    def parse_args(self, context: Any, args: list[str]) -> list[str]:
        renamed = []
        for argument in args:
            name, equals, value = argument.partition("=")
            if name in _RENAMED:
                typer.echo(f"{name} is now {_RENAMED[name]}", err=True)
                argument = _RENAMED[name] + equals + value
            renamed.append(argument)
        return super().parse_args(context, renamed)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train with fast norms, deploy with none: fold Unified, Power and Batch Norm away and export ONNX.",
)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"normfuse {normfuse.__version__}")
        raise typer.Exit


for function in (export, fold, inspect, verify, bench, plot):
    app.command(cls=_Command)(command(function))


def main() -> None:
    """Entry point of the command ``normfuse``."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without Unicode shows a mark instead of ending the run
    signals.end_with_clean_up()
    try:
        app(prog_name="normfuse")
    finally:
        if signals.exit_status() is not None:
            sys.exit(signals.exit_status())
