"""How a command runs: its options from groups, checked first, one line for what fails."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, get_type_hints

import typer

from normfuse import signals
from normfuse.errors import NormfuseError, one_line


def command(function: Callable[..., None]) -> Callable[..., None]:
    """The function as typer takes it.

    A parameter that is a group of options (a dataclass of :mod:`normfuse.cli.options`) becomes an option for each of
    its fields, with the field's default. Every group is checked before the function runs.
    """
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind)}
    parameters = [inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    for name, parameter in inspect.signature(function).parameters.items():
        if name in groups:
            parameters += _options(groups[name])
        else:
            parameters.append(parameter.replace(annotation=hints[name]))

    @functools.wraps(function)
    def run(context: typer.Context, **given: Any) -> None:
        with _one_line_errors(context.find_root().obj):
            own = {name: given[name] for name in hints if name in given}
            for name, kind in groups.items():
                own[name] = kind(**{field.name: given[field.name] for field in dataclasses.fields(kind)})
            for name in groups:
                own[name].check()
            function(**own)

    signature = inspect.Signature([p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters])
    setattr(run, "__signature__", signature)  # noqa: B010, what typer reads
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _options(group: type) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    kind = inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter(
            field.name,
            kind,
            annotation=hints[field.name],
            default=_default(field),
        )
        for field in dataclasses.fields(group)
    ]


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default


@contextmanager
def _one_line_errors(typed: list[str]) -> Iterator[None]:
    """Ends the command with one line on stderr and exit status 1, whatever happens.

    Where options get past the error, the line ends with the command as it was typed and them.
    """
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if os.environ.get("NORMFUSE_TRACEBACK"):
            raise
        status = signals.exit_status()
        if status is not None:  # what a library made of the signal's exception; its line is out
            raise typer.Exit(status) from error
        message = one_line(error, 1500)
        if isinstance(error, NormfuseError):
            message += f"; run: normfuse {shlex.join(typed)} {' '.join(error.advice)}" if error.advice else ""
        elif isinstance(error, OSError) and error.strerror and error.filename is None:
            message = f"writing fails: {error.strerror}"  # of standard output, most often
        else:
            message = f"unexpected {type(error).__name__}: {message} (NORMFUSE_TRACEBACK=1 shows where)"
        print(f"normfuse: error: {message}", file=sys.stderr)
        raise typer.Exit(1) from error
