"""An ONNX file and the weights beside it: named apart for every write, put in place and taken away as one."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from normfuse.files import Output


def data_name(path: Path) -> str:
    """A name for the weights beside an ONNX file that no other write gives: nobody reads one file with another's."""
    return f"{path.name}.{secrets.token_hex(4)}.data"


def external_files(path: Path) -> list[Path]:
    """The files that hold weights of an ONNX file; none for a file of another kind."""
    return list(dict.fromkeys(path.parent / str(tensor.location) for tensor in _external(path)))


def data_beside(path: Path) -> list[str]:
    """Names of the files in the same folder that hold weights of an ONNX file and nothing else.

    Such a file begins with a weight. What has a header of its own, such as a safetensors file that an ONNX file
    points into, belongs to somebody else.
    """
    names = [os.path.normpath(str(tensor.location)) for tensor in _external(path) if not tensor.offset]
    return [name for name in dict.fromkeys(names) if os.path.basename(name) == name]


def _external(path: Path) -> list[ir.ExternalTensor]:
    if not path.is_file() or path.stat().st_size >= 2**31:  # no protobuf message is larger
        return []
    try:
        model = ir.load(path)
    except Exception:  # whatever a parser makes of a file that is not an ONNX file
        return []
    tensors = [value.const_value for graph in model.graphs() for value in graph.initializers.values()]
    return [tensor for tensor in tensors if isinstance(tensor, ir.ExternalTensor)]


def publish(output: Output, beside: Sequence[str] | None = None) -> None:
    """Put a staged ONNX file in place with its weights; what the file that it replaces named goes afterwards.

    Args:
        output: where it is staged.
        beside: names of the staged files with its weights; None for all that it names.
    """

    def replaced() -> list[str]:
        names = data_beside(output.target)
        if output.target.exists():
            names.append(f"{output.target.name}.data")  # as most tools call it, even if the old file is damaged
        return names

    output.publish(data_beside(output.staged) if beside is None else beside, replaced)
