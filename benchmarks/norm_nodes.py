"""Time one norm in ONNX Runtime, in the forms in which a file can hold it, with the addition in front of it.

python benchmarks/norm_nodes.py --rounds 300
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import onnx
import onnxruntime
from onnx import parser

FORMS = {
    "LayerNormalization": (
        20,
        "z = Add(x, x) y = LayerNormalization <axis: int = -1, epsilon: float = 1e-5> (z, w, w)",
    ),
    "RMSNormalization": (23, "z = Add(x, x) y = RMSNormalization <axis: int = -1, epsilon: float = 1e-5> (z, w)"),
    "spelled out": (
        18,
        "two = Constant <value = float {2.0}> () e = Constant <value = float {1e-5}> () "
        "axes = Constant <value_ints = [-1]> () z = Add(x, x) p = Pow(z, two) m = ReduceMean(p, axes) "
        "v = Add(m, e) r = Sqrt(v) d = Div(z, r) y = Mul(d, w)",
    ),
}


def session(form: str, width: int) -> onnxruntime.InferenceSession:
    opset, body = FORMS[form]
    head = f'<ir_version: 10, opset_import: ["": {opset}]> g (float[N, {width}] x) => (float[N, {width}] y)'
    model = parser.parse_model(f"{head} <float[{width}] w> {{ {body} }}")
    del model.graph.value_info[:]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(width, np.float32), "w"))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=300)
    options.add_argument("--rows", type=int, default=197)
    given = options.parse_args()
    for width in (192, 768):
        x = np.random.default_rng(0).normal(size=(given.rows, width)).astype(np.float32)
        sessions = {form: session(form, width) for form in FORMS}
        times: dict[str, list[float]] = {form: [] for form in FORMS}
        for _ in range(given.rounds):
            for form, runner in sessions.items():
                start = time.perf_counter()
                runner.run(None, {"x": x})
                times[form].append(time.perf_counter() - start)
        base = statistics.median(times["LayerNormalization"])
        for form, taken in times.items():
            middle = statistics.median(taken)
            print(f"{given.rows}x{width}  {form:20} {1e6 * middle:7.1f} us  {middle / base:.2f} of LayerNormalization")


if __name__ == "__main__":
    main()
