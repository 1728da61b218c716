"""float16 products behind transpositions, on which ONNX Runtime crashes as torch.onnx writes them."""

import numpy as np
import onnxruntime
import pytest
import torch
from onnx_files import assert_equal, folded, kinds
from onnx_text import draw, model
from torch import nn

from normfuse.onnx import export
from normfuse.onnx.runtime import RuntimeEnded, failure
from normfuse.onnx.workarounds.ort_float16 import lift_weights

HALF = {"w": draw(6, 5).astype(np.float16), "k": draw(2, 6).astype(np.float16)}
#: Body, shape of x, products that change. Operations of more than three axes turn the first one, too.
BODIES = {
    "t = Transpose <perm = [1, 0, 2]> (x) y = MatMul (t, w)": ("2, 3, 6", 1),
    "t = Transpose <perm = [1, 2, 0]> (x) y = MatMul (t, w)": ("6, 2, 3", 1),
    "s = Transpose <perm = [1, 2, 0]> (x) t = Transpose <perm = [0, 2, 1]> (s) y = MatMul (t, w)": ("2, 3, 6", 1),
    "t = Transpose <perm = [1, 2, 0, 3]> (x) y = MatMul (t, w)": ("2, 3, 4, 6", 1),
    "t = Transpose <perm = [1, 0, 2]> (x) y = MatMul (k, t)": ("6, 2, 3", 1),
    "t = Transpose <perm = [1, 0, 2]> (x) p = MatMul (t, w) q = MatMul (x, w) r = ReduceMax <keepdims = 0> (q) "
    "y = Add (p, r)": ("2, 3, 6", 1),
    "t = Transpose <perm = [0, 2, 1]> (x) y = MatMul (t, w)": ("2, 6, 3", 0),
    "y = MatMul (x, w)": ("2, 3, 6", 0),
}


def half(body, shape):
    used = {name: value for name, value in HALF.items() if f"{name})" in body or f"({name}," in body}
    return model(f"float16[{shape}] x", "float16 y", body, 17, **used)


@pytest.mark.parametrize(("body", "shape", "count"), [(body, *entry) for body, entry in BODIES.items()])
def test_weights_get_as_many_axes_and_stay_what_they_are(body, shape, count):
    proto = half(body, shape)
    x = draw(*map(int, shape.split(", "))).astype(np.float16)
    plain = onnxruntime.SessionOptions()
    plain.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    before = onnxruntime.InferenceSession(proto.SerializeToString(), plain).run(None, {"x": x})
    assert lift_weights(proto) == count
    after = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"x": x})  # lives
    np.testing.assert_allclose(before[0], after[0], rtol=1e-2, atol=1e-2)


def test_a_crash_is_seen_in_another_process(tmp_path):
    """Where ONNX Runtime has no fault any more, the workaround can go."""
    path = tmp_path / "half.onnx"
    path.write_bytes(half(next(iter(BODIES)), "2, 3, 6").SerializeToString())
    assert isinstance(failure(path), RuntimeEnded)


def test_a_sequence_first_module_comes_out_in_float16(tmp_path):
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 5)

        def forward(self, x):
            return self.head(torch.relu(self.inner(x)).transpose(0, 1))

    result = export(
        Turned().eval(), tmp_path / "m.onnx", example_inputs=torch.randn(2, 3, 6), dtype="float16", opset=18
    )
    assert result.graph.dtype == "float16"


def test_a_norm_between_transpositions_folds_in_float16(tmp_path):
    body = (
        "s = Transpose <perm = [1, 2, 0]> (x) n = BatchNormalization (s, gain, shift, mean, variance) "
        "t = Transpose <perm = [0, 2, 1]> (n) p = MatMul (t, w) y = Add (p, b)"
    )
    norm = {
        name: np.abs(draw(6)).astype(np.float16) + np.float16(0.5) for name in ("gain", "shift", "mean", "variance")
    }
    _, after = folded(model("float16[2, n, 6] x", "float16 y", body, 17, w=HALF["w"], b=HALF["w"][0], **norm), tmp_path)
    assert "BatchNormalization" not in kinds(after)
    assert_equal(tmp_path, {"x": draw(2, 3, 6).astype(np.float16)}, rtol=2e-2)
    onnxruntime.InferenceSession(str(tmp_path / "out.onnx"))  # lives
