"""ONNX files side by side in ONNX Runtime: what they execute, how large they are, how fast, how exact."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.quantization import quantize_dynamic
from onnxruntime.transformers.optimizer import optimize_model

import normfuse.onnx
from normfuse.onnx.graph import NORMS

Feeds = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class File:
    """An ONNX file, and which of ONNX Runtime's optimisations stay off when it is loaded."""

    path: Path
    disabled: tuple[str, ...] = field(default=())

    def session(self, threads: int = 1, optimized: str | None = None) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if optimized is not None:
            options.optimized_model_filepath = optimized
        return onnxruntime.InferenceSession(
            str(self.path), options, ["CPUExecutionProvider"], disabled_optimizers=list(self.disabled)
        )

    def executed(self) -> list[str]:
        """The operations that ONNX Runtime executes after its own optimisations."""
        with tempfile.TemporaryDirectory() as folder:
            self.session(optimized=f"{folder}/optimized.onnx")
            graph = onnx.load(f"{folder}/optimized.onnx", load_external_data=False).graph
            return [node.op_type for node in graph.node]

    def quantized(self) -> File:
        """Beside it, the file with dynamically quantised products of int8, weights per output channel."""
        target = self.path.with_suffix(".int8.onnx")
        proto = onnx.load(self.path)
        proto.graph.ClearField("value_info")  # the quantizer infers shapes anew, and trips over torch's names
        types = {"DefaultTensorType": onnx.TensorProto.FLOAT}  # behind operations that shape inference lacks
        with _quiet():
            quantize_dynamic(proto, target, op_types_to_quantize=["MatMul"], per_channel=True, extra_options=types)
        return File(target, self.disabled)

    def describe(self) -> dict[str, object]:
        """Executed nodes, those among them that are dynamic norms, and megabytes."""
        executed = self.executed()
        return {
            "executed_nodes": len(executed),
            "dynamic_norms": sum(kind in NORMS or kind == "EmbedLayerNormalization" for kind in executed),
            "megabytes": self.path.stat().st_size / 1e6,
        }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def original_files(program: torch.export.ExportedProgram, folder: Path, heads: int, width: int) -> dict[str, File]:
    """A BERT with LayerNorm in the forms in which ONNX Runtime may be fastest.

    As torch writes it for two operator sets, with and without a fusion that is slow on some processors, and through
    the optimiser for transformers that comes with ONNX Runtime.
    """
    newest, older, optimized = (folder / f"original-{name}.onnx" for name in ("23", "20", "optimized"))
    normfuse.onnx.write(program, newest, opset=23)
    normfuse.onnx.write(program, older, opset=20)
    with _quiet():
        optimize_model(str(older), "bert", num_heads=heads, hidden_size=width).save_model_to_file(str(optimized))
    return {
        "opset 23": File(newest),
        "opset 23, no SkipLayerNorm": File(newest, ("SkipLayerNormFusion",)),
        "opset 20": File(older),
        "opset 20, no SkipLayerNorm": File(older, ("SkipLayerNormFusion",)),
        "onnxruntime.transformers": File(optimized),
    }


def milliseconds(files: Mapping[str, File], feeds: Feeds, rounds: int, threads: int = 1) -> dict[str, list[float]]:
    """Each file once per round, in rotated order, so that a busy moment of the machine meets all alike."""
    sessions = {name: file.session(threads) for name, file in files.items()}
    times: dict[str, list[float]] = {name: [] for name in files}
    names = list(files)
    for number in range(-max(3, rounds // 10), rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            start = time.perf_counter()
            sessions[name].run(None, feeds)
            if number >= 0:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times
