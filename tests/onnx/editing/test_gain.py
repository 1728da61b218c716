"""A file is edited only where something is gained: fewer operations, in it and in what ONNX Runtime runs of it."""

import numpy as np
import onnx
import pytest
from onnx_files import NORM, ONE, assert_equal, folded, images, kinds, read, weights
from onnx_text import draw, model

from normfuse.onnx.editing.onnx_file import OnnxFile
from normfuse.onnx.editing.optimising import optimised_operations

NUMBERS = "gain, shift, shift, variance)"


def test_a_file_without_norms_is_copied(tmp_path):
    proto = model("float[batch, 4] x", "float y", "s = Softmax (x) y = MatMul (s, w)", w=draw(4, 2))
    result, _ = folded(proto, tmp_path)
    assert (tmp_path / "in.onnx").read_bytes() == (tmp_path / "out.onnx").read_bytes()
    assert any(note.startswith("nothing folds") for note in result.notes) and not result.verification.cases


def test_what_nothing_reads_prevents_no_folding(tmp_path):
    """As in files that were cut off at an inner value."""
    body = f"l = MatMul (x, w) n = BatchNormalization (l, {NUMBERS} a = Tanh (l) d = BatchNormalization (a, {NUMBERS}"
    constants = {"w": draw(4, 4), "gain": 3 * ONE, "shift": ONE, "variance": ONE}
    body += " k = Mul (n, shift) p = MatMul (k, w) r = Add (p, shift) y = Sigmoid (k)"
    result, after = folded(model("float[batch, 4] x", "float y", body, **constants), tmp_path)
    assert kinds(after) == ["Gemm", "Tanh", "BatchNormalization", "MatMul", "Add", "Sigmoid"]
    assert_equal(tmp_path, {"x": draw(2, 4)})
    assert [row.status for row in result.report.norms] == ["folded", "kept", "folded"]
    assert result.report.norms[1].reason == "nothing reads its result"


SPELLED_OUT = (
    "u = ReduceMean <axes: ints = [-1]> (x) d = Sub (x, u) p = Pow (d, two) v = ReduceMean <axes: ints = [-1]> (p) "
    "e = Add (v, eps) r = Sqrt (e) c = Div (d, r) a = Mul (c, gain) b = Add (a, shift) m = MatMul (b, up) "
    "f = Add (m, bias) q = Div (f, root) t = Erf (q) o = Add (t, one) k = Mul (f, o) g = Mul (k, half) "
    "n = MatMul (g, down) s = Add (x, n) z = Mul (s, gain) y = MatMul (z, head)"
)


def test_what_onnx_runtime_fuses_is_left_for_it(tmp_path):
    """A LayerNorm and a GELU in arithmetic: without their factors they would be run operation by operation."""
    numbers = {"two": 2.0, "eps": 1e-5, "root": 2**0.5, "one": 1.0, "half": 0.5}
    constants = {"gain": draw(4), "shift": draw(4), "up": draw(4, 6), "bias": draw(6), "down": draw(6, 4)}
    constants |= {name: np.float32(value) for name, value in numbers.items()} | {"head": draw(4, 3)}
    proto = model("float[batch, seq, 4] x", "float[batch, seq, 3] y", SPELLED_OUT, 13, **constants)
    _, after = folded(proto, tmp_path)
    left = kinds(proto)
    left.remove("Mul")
    assert sorted(kinds(after)) == sorted(left)  # the Mul in front of the head, and nothing else
    assert_equal(tmp_path, {"x": draw(2, 5, 4)})


def test_the_factor_of_an_attention_folds_where_that_of_a_gelu_stays(tmp_path):
    body = (
        "q = MatMul (x, wq) k = MatMul (x, wk) t = Transpose <perm: ints = [0, 2, 1]> (k) s = MatMul (q, t) "
        "d = Div (s, root) p = Softmax (d) v = MatMul (p, x) m = MatMul (v, up) e = Div (m, root) f = Erf (e) "
        "o = Add (f, one) c = Mul (m, o) g = Mul (c, half) y = MatMul (g, down)"
    )
    numbers = {"root": np.float32(2**0.5), "one": np.float32(1), "half": np.float32(0.5)}
    constants = {"wq": draw(4, 4), "wk": draw(4, 4), "up": draw(4, 6), "down": draw(6, 4)}
    proto = model("float[batch, seq, 4] x", "float[batch, seq, 4] y", body, 13, **numbers, **constants)
    _, after = folded(proto, tmp_path)
    assert kinds(after).count("Div") == 1 and len(kinds(after)) == len(kinds(proto)) - 1
    assert_equal(tmp_path, {"x": draw(2, 5, 4)})


def test_the_bound_of_a_relu_takes_a_shift_that_nothing_else_takes(tmp_path):
    body = "t = Tanh (x) a = Mul (t, gain) b = Add (a, shift) r = Relu (b) y = MatMul (r, head)"
    constants = {"gain": np.abs(draw(4)) + 0.5, "shift": draw(4), "head": draw(4, 3)}
    _, after = folded(model("float[batch, 4] x", "float[batch, 3] y", body, **constants), tmp_path)
    assert kinds(after) == ["Tanh", "Max", "Gemm"]
    assert_equal(tmp_path, {"x": draw(2, 4)})


def test_a_square_takes_a_shift_that_nothing_else_takes(tmp_path):
    body = "t = Tanh (x) a = Mul (t, gain) b = Add (a, shift) r = Relu (b) s = Mul (r, r) y = MatMul (s, head)"
    constants = {"gain": np.abs(draw(4)) + 0.5, "shift": draw(4), "head": draw(4, 3)}
    _, after = folded(model("float[batch, 4] x", "float[batch, 3] y", body, **constants), tmp_path)
    assert kinds(after) == ["Tanh", "Max", "Sub", "Mul", "MatMul"]
    assert_equal(tmp_path, {"x": draw(2, 4)})


@pytest.mark.parametrize("reading", ["Transpose <perm: ints = [0, 2, 1]> (l)", "Reshape (l, order)"])
def test_a_norm_becomes_the_bias_of_a_product(tmp_path, reading):
    """Which is an operation too, but a smaller one."""
    back = reading.replace("(l", "(n").replace("order", "size")
    body = f"l = MatMul (x, w) size = Shape (l) t = {reading} n = BatchNormalization (t, {NUMBERS} y = {back}"
    constants = {"w": draw(3, 4), "gain": 3 * ONE, "shift": ONE, "variance": ONE, "order": np.array([-1, 4])}
    if "order" not in body:
        del constants["order"]
    result, after = folded(model("float[batch, seq, 3] x", "float y", body, 17, **constants), tmp_path)
    assert sorted(kinds(after)) == sorted(["MatMul", "Add", "Shape", *2 * [reading.partition(" ")[0]]])
    assert [row.status for row in result.report.norms] == ["folded"]
    assert_equal(tmp_path, {"x": draw(2, 5, 3)})


@pytest.mark.parametrize(
    "norm", ["s = Sub (x, mean) m = Mul (s, gain) n = Add (m, shift)", "m = Mul (x, gain) n = Add (m, shift)"]
)
def test_a_shift_in_front_of_several_products_stays_one_add(tmp_path, norm):
    """Not one behind each of them."""
    body = f"{norm} q = MatMul (n, w) k = MatMul (n, w2) t = Tanh (q) y = Mul (t, k)"
    constants = {"gain": draw(4) + 3, "shift": draw(4), "mean": draw(4), "w": draw(4, 4), "w2": draw(4, 4)}
    proto = model("float[batch, seq, 4] x", "float y", body, 17, **read(body, constants))
    _, after = folded(proto, tmp_path)
    assert kinds(after) == ["Add", "MatMul", "MatMul", "Tanh", "Mul"]
    assert_equal(tmp_path, {"x": draw(2, 5, 4)})


SHARED = {
    "with the summands behind the products": (
        "z = Relu (x) m = Mul (z, gain) n = Add (m, shift) q = MatMul (n, w) d = Mul (q, gain) e = Add (d, mean) "
        "k = MatMul (n, w2) h = Mul (k, gain) i = Add (h, mean) t = Tanh (e) y = Mul (t, i)"
    ),
    "with the other shifts of a stream": (
        "a = MatMul (x, w) b = Mul (a, gain) c = Add (b, shift) d = MatMul (x, w2) e = Mul (d, mean) f = Add (e, gain) "
        "g = MatMul (x, w) h = Mul (g, shift) i = Add (h, mean) r = Sum (c, f, i) q = MatMul (r, w) k = MatMul (r, w2) "
        "t = Tanh (q) y = Mul (t, k)"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SHARED)
def test_a_shift_that_shares_an_add_behind_products_goes_there(tmp_path, case):
    constants = {"gain": np.abs(draw(4)) + 1, "shift": draw(4), "mean": draw(4), "w": draw(4, 4), "w2": draw(4, 4)}
    body = SHARED[case]
    _, after = folded(model("float[batch, seq, 4] x", "float y", body, 17, **read(body, constants)), tmp_path)
    assert kinds(after).count("Add") == 2
    assert_equal(tmp_path, {"x": draw(2, 5, 4)})


@pytest.mark.parametrize("reading", ["MatMul (f, w)", 'Einsum <equation: string = "bpc,co->bpo"> (f, w)'])
def test_a_norm_goes_into_a_convolution_rather_than_into_an_add_behind_a_product(tmp_path, reading):
    body = f"t = Transpose <perm: ints = [0, 2, 3, 1]> (n) f = Reshape (t, order) y = {reading}"
    constants = {"order": np.array([0, -1, 4]), "w": draw(4, 3)}
    result, after = folded(images(body, **constants), tmp_path)
    assert kinds(after) == ["Conv", "Transpose", "Reshape", reading.partition(" ")[0]]
    assert [row.status for row in result.report.norms] == ["folded"]
    assert_equal(tmp_path, {"x": draw(2, 3, 8, 8)})


@pytest.mark.parametrize("dtype", ["float", "float16"])
def test_casts_that_onnx_runtime_needs_for_float16_do_not_count(tmp_path, dtype):
    """Otherwise a file would keep a norm because casts are put elsewhere without it."""
    weight = draw(3, 3).astype({"float": np.float32}.get(dtype, dtype))
    proto = model(f"{dtype}[batch, 3] x", f"{dtype} y", "m = MatMul (x, w) r = Tanh (m) y = MatMul (r, w)", w=weight)
    onnx.save(proto, tmp_path / "in.onnx")
    assert optimised_operations(proto, OnnxFile(tmp_path / "in.onnx"), tmp_path) == 3


def test_gains_of_layer_norms_take_what_stands_behind_them(tmp_path):
    body = (
        "n = LayerNormalization (x, gain, shift) a = Mul (n, scale) b = Add (a, shift) p = MatMul (b, up) g = Gelu (p) "
        "y = MatMul (g, down)"
    )
    constants = {"gain": draw(4), "shift": draw(4), "scale": draw(4), "up": draw(4, 6), "down": draw(6, 4)}
    _, after = folded(model("float[batch, seq, 4] x", "float[batch, seq, 4] y", body, **constants), tmp_path)
    assert kinds(after) == ["LayerNormalization", "MatMul", "Gelu", "MatMul"]
    assert_equal(tmp_path, {"x": draw(2, 5, 4)})


def test_layer_norms_become_rms_norms_where_the_operator_set_has_them(tmp_path):
    body = (
        "e = Gather (table, tokens) n = LayerNormalization (e, gain, shift) p = MatMul (n, up) f = Add (p, bias) "
        "g = Gelu (f) q = MatMul (g, down) s = Add (e, q) m = LayerNormalization (s, gain, shift) h = MatMul (m, head) "
        "y = Add (h, last)"
    )
    constants = {"table": draw(9, 4), "gain": draw(4), "shift": draw(4), "up": draw(4, 6), "bias": draw(6)}
    constants |= {"down": draw(6, 4), "head": draw(4, 3), "last": draw(3)}
    for opset, kind in ((23, "RMSNormalization"), (20, "LayerNormalization")):
        proto = model("int64[batch, seq] tokens", "float[batch, seq, 3] y", body, opset, **constants)
        _, after = folded(proto, tmp_path)
        assert kinds(after).count(kind) == 2 and len(kinds(after)) <= len(kinds(proto))
        assert_equal(tmp_path, {"tokens": np.array([[0, 8, 3]])})
        _, after = folded(proto, tmp_path, keep_dynamic_norms=True)
        assert kinds(after).count("LayerNormalization") == 2


def test_a_norm_that_has_to_stay_stays_one_operation(tmp_path):
    """In front of a padded convolution only its scale could go, and would leave an Add: nothing is gained."""
    body = NORM + (
        "r = Relu (n) m = BatchNormalization (x, narrow, narrow, narrow, narrow) "
        "z = Conv <pads: ints = [1, 1, 1, 1]> (m, k) y = Add (r, z)"
    )
    proto = model("float[batch, 3, 8, 8] x", "float y", body, 17, **weights(), narrow=np.abs(draw(3)) + 1)
    del proto.graph.initializer[-2]
    _, after = folded(proto, tmp_path)
    assert kinds(after) == ["Conv", "Relu", "BatchNormalization", "Conv", "Add"]
    assert after.graph.node[2] == proto.graph.node[3]
    assert_equal(tmp_path, {"x": draw(2, 3, 8, 8)})


def test_a_norm_between_other_scales_goes_on_with_other_numbers(tmp_path):
    """The two operands of a sum have one scale: what is left between them is one operation, and its shift moves on."""
    body = (
        "a = MatMul (x, w) b = Mul (a, gain) c = BatchNormalization (b, gain, shift, shift, variance) d = Add (b, c) "
        "e = Mul (d, gain) y = MatMul (e, v)"
    )
    constants = {"w": draw(3, 4), "gain": draw(4) + 3, "shift": draw(4), "variance": ONE, "v": draw(4, 2)}
    _, after = folded(model("float[batch, 3] x", "float y", body, 17, **constants), tmp_path)
    assert kinds(after) == ["MatMul", "Mul", "Add", "Gemm"] and after.graph.node[-1].output == ["y"]
    assert_equal(tmp_path, {"x": draw(5, 3)})
    body = body.replace("e = Mul (d, gain) y = MatMul (e, v)", "r = Relu (d) e = Mul (r, gain) y = Tanh (e)")
    constants["gain"] = np.abs(constants["gain"])
    del constants["v"]
    _, after = folded(model("float[batch, 3] x", "float y", body, 17, **constants), tmp_path)
    assert kinds(after) == ["MatMul", "BatchNormalization", "Add", "Relu", "Tanh"]
    assert_equal(tmp_path, {"x": draw(5, 3)})


# Of 16 channels, because ONNX Runtime blocks no fewer; what is left of the norms, and how many operations at most.
BLOCKS = {
    "a Max would end the blocks that a Relu keeps": (
        f"e = Relu (c) d = Mul (e, c) n = BatchNormalization (d, {NUMBERS} r = Relu (n) f = Conv (r, square) "
        f"g = BatchNormalization (f, {NUMBERS} h = Relu (g) y = Conv (h, square)",
        1, 8,
    ),
    "a norm of its own beside two convolutions": (
        f"e = Relu (c) f = Conv (e, square) g = BatchNormalization (f, {NUMBERS} h = Conv (e, square) "
        f"i = BatchNormalization (h, {NUMBERS} j = BatchNormalization (e, {NUMBERS} k = Add (g, i) l = Add (k, j) "
        "m = Relu (l) y = Conv (m, square)",
        0, 8,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BLOCKS)
def test_norms_between_convolutions_that_onnx_runtime_computes_in_blocks(tmp_path, case):
    body, norms, operations = BLOCKS[case]
    constants = {"first": draw(16, 3, 3, 3), "square": draw(16, 16, 1, 1), "gain": np.abs(draw(16)) + 0.5}
    constants |= {"shift": draw(16), "variance": np.ones(16, np.float32)}
    proto = model("float[batch, 3, 8, 8] x", "float y", f"c = Conv (x, first) {body}", 17, **constants)
    _, after = folded(proto, tmp_path)
    assert kinds(after).count("BatchNormalization") <= norms and len(kinds(after)) <= operations
    assert_equal(tmp_path, {"x": draw(2, 3, 8, 8)})
