"""What ONNX Runtime's own optimisations leave of a model."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import onnx
from onnx import ModelProto, TensorProto

from normfuse.onnx.graph import GraphError

from .onnx_file import OnnxFile, tensors_of
from .trial import plain_session

# What `plain_session` does, in a process that may crash.
_APART = """
import sys
import onnxruntime
source, folder, optimised = sys.argv[1:]
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
options.optimized_model_filepath = optimised
options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
onnxruntime.InferenceSession(open(source, "rb").read(), options, providers=["CPUExecutionProvider"])
"""


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
        # ONNX Runtime 1.32 crashes on some float16 models with recurrent layers, and their edited forms.
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
    command = [sys.executable, "-c", _APART, str(source), weights, str(path)]
    return subprocess.run(command, capture_output=True, check=False).returncode < 0
