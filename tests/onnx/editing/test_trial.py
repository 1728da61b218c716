"""Inputs that a file takes are found from what its operations say."""

import numpy as np
import onnx
import pytest
from onnx_text import draw, model

from normfuse.onnx.editing.fold_file import find_trials
from normfuse.onnx.editing.onnx_file import OnnxFile

CASES = {
    "channels that a convolution asks for": ("float[n, c, h, w] x", "y = Conv (x, k)", {"k": draw(4, 3, 3, 3)}, {1: 3}),
    "channels behind other operations": (
        "float[n, h, w, c] x", "a = Mul (x, two) t = Transpose <perm: ints = [0, 3, 1, 2]> (a) y = Conv (t, k)",
        {"k": draw(4, 3, 3, 3), "two": np.float32(2)}, {3: 3},
    ),
    "a picture without a shape": ("float[] x", "y = Conv (x, k)", {"k": draw(4, 3, 3, 3)}, {1: 3}),
    "the width of a product": ("float[n, s, w] x", "y = MatMul (x, k)", {"k": draw(6, 2)}, {2: 6}),
    "the width of a recurrent cell": (
        "float[s, n, w] x", "y, h = GRU <hidden_size: int = 2> (x, k, r)", {"k": draw(1, 6, 5), "r": draw(1, 6, 2)},
        {2: 5},
    ),
    "channels behind pooling": (
        "float[n, c, h, w] x", "a = MaxPool <kernel_shape: ints = [2, 2]> (x) y = Conv (a, k)",
        {"k": draw(4, 3, 3, 3)}, {1: 3},
    ),
    "channels that a head asks for": (
        "float[n, c, h, w] x", "a = GlobalAveragePool (x) f = Flatten (a) y = Gemm (f, k)", {"k": draw(3, 4)}, {1: 3}
    ),
    "the width of a norm": (
        "float[n, s, w] x", "y = LayerNormalization (x, gain)", {"gain": draw(6)}, {2: 6}
    ),
    "positions that are added": ("float[n, s, w] x", "y = Add (x, k)", {"k": draw(1, 9, 6)}, {1: 9, 2: 6}),
    "the width of the first position": (
        "float[n, s, w] x", "a = Gather <axis: int = 1> (x, zero) y = MatMul (a, k)",
        {"zero": np.array(0), "k": draw(6, 2)}, {2: 6},
    ),
    "the width of a weight that is turned": (
        "float[n, s, w] x", "t = Transpose (k) y = MatMul (x, t)", {"k": draw(2, 6)}, {2: 6}
    ),
    "the width of a weight on the left": ("float[w, s] x", "y = Gemm (k, x)", {"k": draw(2, 6)}, {0: 6}),
    "the width of an einsum": (
        "float[n, s, w] x", 'y = Einsum <equation: string = "nsw,wv->nsv"> (x, k)', {"k": draw(6, 2)}, {2: 6}
    ),
    "a picture without a shape behind a pool": (
        "float[] x", "a = MaxPool <kernel_shape: ints = [2, 2]> (x) y = Conv (a, k)", {"k": draw(4, 3, 3, 3)}, {1: 3}
    ),
    "rows without a shape, by a norm": (
        "float[] x", "y = BatchNormalization (x, k, k, k, k)", {"k": np.ones(6, np.float32)}, {1: 6}
    ),
    "a picture without a shape, by axes": (
        "float[] x", "m = ReduceMean <axes: ints = [2, 3], keepdims: int = 0> (x) y = MatMul (m, k)", {"k": draw(6, 2)},
        {1: 6}
    ),
    "a sequence without a shape, by a split": (
        "float[] x", "a, b = Split <axis: int = 2> (x, parts) y = Mul (a, b)", {"parts": np.array([3, 3])}, {2: 6}
    ),
    "one entry without a shape, by Squeeze": (
        "float[] x", "s = Squeeze (x, axis) y = Gemm (s, k)", {"axis": np.array([2]), "k": draw(6, 2)}, {2: 1, 1: 6}
    ),
    "what strides leave of a picture": (
        "float[n, 1, h, w] x",
        "a = MaxPool <kernel_shape: ints = [16, 16], strides: ints = [16, 16]> (x) r = Resize (a, , big) "
        "y = Add (x, r)",
        {"big": np.array([1, 1, 16, 16], np.float32)}, {2: 16},
    ),
}  # fmt: skip


def trials(proto, tmp_path):
    onnx.save(proto, tmp_path / "in.onnx")
    return find_trials(OnnxFile(tmp_path / "in.onnx"))[1]


@pytest.mark.parametrize("case", CASES)
def test_sizes(tmp_path, case):
    inputs, body, constants, wanted = CASES[case]
    found = trials(model(inputs, "float y", body, 17, **constants), tmp_path)
    multiples = case.startswith("what strides")
    for trial in found:
        shape = trial.feeds["x"].shape
        assert all(shape[axis] == size or (multiples and not shape[axis] % size) for axis, size in wanted.items())
    if "without" not in case:
        assert len({trial.feeds["x"].shape for trial in found}) > 1


def test_dimensions_that_belong_together_without_a_name(tmp_path):
    found = trials(model("float[?, ?, 4] x, float[?, ?, 4] z", "float y", "y = Add (x, z)", 17), tmp_path)
    assert len(found) > 1 and all(trial.feeds["x"].shape == trial.feeds["z"].shape for trial in found)


def test_states_have_their_batch_on_the_second_axis(tmp_path):
    body = "y, h = GRU <hidden_size: int = 2> (t, k, r, , , state) "
    body = "t = Transpose <perm: ints = [1, 0, 2]> (x) " + body
    constants = {"k": draw(1, 6, 5), "r": draw(1, 6, 2)}
    found = trials(model("float[?, ?, 5] x, float[1, ?, 2] state", "float y", body, 17, **constants), tmp_path)
    assert all(trial.feeds["state"].shape[1] == trial.feeds["x"].shape[0] for trial in found)


def test_integers_that_look_into_a_table_and_numbers_that_are_compared_with(tmp_path):
    body = "e = Gather (table, tokens) r = Equal (rate, right) c = Cast <to: int = 1> (r) d = Div (e, c) y = Sum (d)"
    constants = {"table": draw(3, 4), "right": np.int64(16000)}
    (first, *_) = trials(model("int64[n, s] tokens, int64 rate", "float y", body, 17, **constants), tmp_path)
    assert first.feeds["rate"] == 16000 and first.feeds["tokens"].max() == 2


def test_a_few_numbers_may_be_the_size_of_a_result(tmp_path):
    """As of the picture that Segment Anything's masks are for."""
    body = (
        "s = Shape (x) front = Slice (s, zero, two) n = Cast <to: int = 7> (size) full = Concat <axis: int = 0> "
        '(front, n) y = Resize <mode: string = "linear"> (x, , , full)'
    )
    constants = {"zero": np.array([0]), "two": np.array([2])}
    found = trials(model("float[n, 3, 8, 8] x, float[2] size", "float y", body, 17, **constants), tmp_path)
    assert len(found) > 1 and all(trial.feeds["size"].min() >= 8 for trial in found)


def test_a_size_of_zero_is_one(tmp_path):
    """As of the keys of earlier tokens in a file for the first one: ONNX Runtime takes no other."""
    proto = model("float[n, 4] x, float[n, 1] past", "float y", "y = Concat <axis: int = 1> (past, x)", 17)
    proto.graph.input[1].type.tensor_type.shape.dim[1].dim_value = 0
    assert {trial.feeds["past"].shape[1] for trial in trials(proto, tmp_path)} == {0}
