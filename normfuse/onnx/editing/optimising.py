"""What ONNX Runtime's own optimisations leave of a model."""

from __future__ import annotations

import math
from pathlib import Path

import onnx
from onnx import ModelProto, NodeProto

from normfuse.onnx.protos import attribute, for_runtime
from normfuse.onnx.runtime import RuntimeEnded, RuntimeFailure, Session

from .onnx_file import OnnxFile

_INSERTED = ("InsertedPrecisionFreeCast_", "InsertedCast_")


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
        The number, where a convolution with a sum and an activation in it is three: what folding leaves may be fused
        elsewhere. Casts around operations that the CPU has not in float16 do not count: such files are for others. That
        of all operations where ONNX Runtime cannot say, infinity where it crashes.
    """
    path = folder / "optimised.onnx"
    try:
        data, weights = for_runtime(model, file.path)
        Session(data, folder=weights, optimised=str(path), threads=1)
        optimised = onnx.load(path, load_external_data=False)
        inserted = sum(node.op_type == "Cast" and node.name.startswith(_INSERTED) for node in optimised.graph.node)
        return operations(optimised) - inserted + sum(map(_fused, optimised.graph.node))
    except RuntimeEnded:
        return math.inf
    except (RuntimeFailure, ValueError, OSError):  # beyond 2 GiB neither side can be written in one piece
        return operations(model)
    finally:
        for left in folder.glob("optimised.onnx*"):
            left.unlink()


def _fused(node: NodeProto) -> int:
    """How many more operations a convolution does."""
    if not node.domain or not node.op_type.endswith("Conv"):
        return 0
    summed = len(node.input) > 3 and bool(node.input[3])
    return summed + bool(attribute(node, "activation"))
