"""What ONNX Runtime's own optimisations leave of a model."""

from __future__ import annotations

import math
from pathlib import Path

import onnx
from onnx import ModelProto, TensorProto

from normfuse.onnx.graph import GraphError
from normfuse.onnx.workarounds.ort_float16 import crashes

from .onnx_file import OnnxFile, tensors_of
from .trial import plain_session


def operations(model: ModelProto) -> int:
    """The operations of the main graph, constants left out."""
    return sum(node.op_type != "Constant" for node in model.graph.node)


def optimised_operations(model: ModelProto, file: OnnxFile, folder: Path) -> float:
    """How many operations are left of a model once ONNX Runtime has optimised it.

    Args:
        model: the file, or the file after edits.
        file: beside which the model's weights lie.
        folder: for files that are written on the way.

    Returns:
        The number; that of all operations where ONNX Runtime cannot say, infinity where it crashes.
    """
    path, weights = folder / "optimised.onnx", str(file.path.parent.resolve())
    try:
        # ONNX Runtime crashes on some float16 models, which may come as they are.
        if not any(tensor.data_type == TensorProto.FLOAT16 for tensor in tensors_of(model)):
            plain_session(model.SerializeToString(), weights, optimised=str(path))
        elif _crashes(model.SerializeToString(), weights, path):
            return math.inf
        return operations(onnx.load(path, load_external_data=False))
    except (GraphError, ValueError, OSError):  # beyond 2 GiB neither side can be written in one piece
        return operations(model)
    finally:
        for left in folder.glob("optimised.onnx*"):
            left.unlink()


def _crashes(model: bytes, weights: str, path: Path) -> bool:
    """Let another process optimise a model; whether it ends with a signal."""
    source = path.with_name("optimised.onnx.source")
    source.write_bytes(model)
    return crashes(source, weights=weights, optimised=str(path))
