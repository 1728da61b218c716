"""Files that commands read and write."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import normfuse
from normfuse.errors import NormfuseError
from normfuse.files import Output

from .options import finite

if TYPE_CHECKING:
    from normfuse.onnx import ExportResult


def check_readable(path: Path) -> None:
    """NormfuseError for a file that is not there, in one line and before anything is loaded."""
    try:
        path.stat()
    except OSError as error:
        raise NormfuseError(f"cannot read {path}: {error.strerror or error}") from error


def described(result: ExportResult, **source: Path) -> dict[str, Any]:
    """Everything that is known of an export."""
    read = {name: str(file) for name, file in source.items()}
    return {**read, "versions": {"normfuse": normfuse.__version__}, **result.to_dict()}


@contextmanager
def reported(path: Path | None, **source: Path) -> Iterator[Callable[[ExportResult], None]]:
    """Makes results ready as JSON before the ONNX file they are of appears.

    What cannot be reported is not written. In the end the report gets its name.
    """
    if path is None:
        yield lambda result: None
        return
    with Output(path) as output:

        def stage(result: ExportResult) -> None:
            text = json.dumps(finite(described(result, **source)), indent=2, allow_nan=False)
            try:
                output.staged.write_text(text + "\n")
            except OSError as error:
                raise NormfuseError(f"cannot write {path}: {error.strerror or error}") from error

        yield stage
        output.publish()
