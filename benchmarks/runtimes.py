"""The runtimes that run ONNX files side by side; each session has ``run(None, feeds)`` and ``get_inputs()``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import peak_memory

RUNTIMES = ("onnxruntime", "openvino")


class _Input(NamedTuple):
    name: str


class OpenVinoSession:
    """A file in OpenVINO on the CPU: one stream, and float32 where the processor could do with less."""

    def __init__(self, path: Path, threads: int) -> None:
        import openvino

        core = openvino.Core()
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
        }
        compiled = core.compile_model(core.read_model(str(path)), "CPU", settings)
        self._request = compiled.create_infer_request()
        self._inputs = [_Input(port.get_any_name()) for port in compiled.inputs]
        self._outputs = list(compiled.outputs)

    def get_inputs(self) -> list[_Input]:
        return self._inputs

    def run(self, names: None, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        results = self._request.infer(feeds, share_inputs=True, share_outputs=True)
        return [results[port] for port in self._outputs]


def version(runtime: str) -> str:
    if runtime == "onnxruntime":
        return onnxruntime.__version__
    import openvino

    return openvino.__version__


def open_file(path: Path, threads: int, runtime: str = "onnxruntime", disabled: tuple[str, ...] = ()) -> Any:
    """A session; ``disabled`` are optimisers of ONNX Runtime, which no other runtime has."""
    if runtime == "onnxruntime":
        return peak_memory.session(path, threads, disabled)
    return OpenVinoSession(path, threads)
