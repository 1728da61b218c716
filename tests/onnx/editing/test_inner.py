"""Outputs that say little, because they are nearly 0 or 1, are compared together with what they are made from."""

import numpy as np
import onnx
import pytest
from onnx_files import folded, kinds
from onnx_text import draw, model

from normfuse.onnx.editing.comparing import Comparison
from normfuse.onnx.editing.fold_file import find_trials
from normfuse.onnx.editing.onnx_file import OnnxFile
from normfuse.onnx.verifier import VerificationError

BODY = "l = MatMul (x, w) m = Mul (l, gain) a = Add (m, low) s = Sigmoid (a) y = Reshape (s, order)"


@pytest.fixture
def saturated():
    """Every output is about 1e-9."""
    constants = {"w": draw(4, 6), "gain": draw(6), "low": np.full(6, -20, np.float32), "order": np.array([0, 3, 2])}
    return model("float[batch, 4] x", "float y", BODY, **constants)


def test_what_a_sigmoid_reads_is_compared(tmp_path, saturated):
    result, after = folded(saturated, tmp_path)
    assert kinds(after) == ["Gemm", "Sigmoid", "Reshape"]
    cases = result.verification.cases
    assert {case.output for case in cases} == {"y", "a (inside)"} and all(case.error < 1e-6 for case in cases)


def test_a_difference_that_the_outputs_hide_is_found(tmp_path, saturated):
    onnx.save(saturated, tmp_path / "in.onnx")
    file = OnnxFile(tmp_path / "in.onnx")
    _, trials = find_trials(file)
    comparison = Comparison(file, trials, dtype="float32", quantised=False, rtol=None, atol=0.0)
    wrong = onnx.numpy_helper.from_array(np.full(6, -18, np.float32), "low")
    saturated.graph.initializer[2].CopyFrom(wrong)
    onnx.save(saturated, tmp_path / "wrong.onnx")
    assert len(comparison.compare(tmp_path / "wrong.onnx")) == len(trials)  # outputs alone do not show it
    with pytest.raises(VerificationError, match=r"'a \(inside\)' by 2"):
        comparison.compare(tmp_path / "wrong.onnx", [("a", "a")])


def test_what_is_random_inside_is_not_compared(tmp_path):
    body = "n = RandomNormalLike (x) p = MatMul (n, w) m = Mul (p, gain) y = Softmax (m) z = MatMul (x, w)"
    proto = model("float[batch, 4] x", "float z, float y", body, w=draw(4, 6), gain=draw(6))
    result, after = folded(proto, tmp_path)
    assert "Mul" not in kinds(after) and {case.output for case in result.verification.cases} == {"z"}
