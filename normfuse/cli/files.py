"""Files that commands read and write."""

from __future__ import annotations

import json
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


def write_report(path: Path | None, result: ExportResult, **source: Path) -> dict[str, Any]:
    """Everything that is known of an export, also written as JSON if a path is given."""
    read = {name: str(file) for name, file in source.items()}
    data = {**read, "versions": {"normfuse": normfuse.__version__}, **result.to_dict()}
    if path is not None:
        _write_json(path, finite(data))
    return data


def _write_json(path: Path, data: dict[str, Any]) -> None:
    with Output(path) as output:
        output.staged.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n")
        output.publish()
