"""Weights that are stored as integers: their scales take what stands behind the product, the integers stay."""

import ml_dtypes
import numpy as np
import pytest
from onnx import numpy_helper
from onnx_files import assert_equal, folded, kinds, read
from onnx_text import GENERATOR, draw, model

IMAGE, ROWS, FLAT = "float[batch, 3, 6, 6] x", "float[batch, seq, 8] x", "float[batch, 8] x"
TAIL = " m = Mul (p, gain) a = Add (m, shift) y = Tanh (a)"
CONV = "p = Conv (x, d) " + "n = BatchNormalization (p, gain, shift, mean, variance) y = Tanh (n)"
FEW_BITS = "com.microsoft.MatMulNBits <K: int = 8, N: int = 4, bits: int = 4, block_size: int = 16>"


def integers(*shape, dtype=np.int8):
    info = ml_dtypes.iinfo(dtype)
    return GENERATOR.integers(info.min, info.max, shape).astype(dtype)


CONSTANTS = {
    "k": integers(4, 3, 3, 3), "kt": integers(3, 4, 2, 2), "w": integers(8, 4), "wt": integers(4, 8),
    "w4": integers(8, 4, dtype=ml_dtypes.int4), "w8": integers(8, 4, dtype=np.uint8),
    "real": draw(4, 3, 3, 3), "none": np.zeros(4, np.int8),
    "packed": integers(4, 1, 8, dtype=np.uint8), "each": np.abs(draw(4)) + 0.1, "one": np.float32(0.01),
    "blocks": np.abs(draw(2, 4)) + 0.1, "middle": np.uint8(128), "few": np.abs(draw(4, 1)) + 0.1, "b": draw(4),
    "gain": draw(4), "shift": draw(4), "mean": draw(4), "variance": np.ones(4, np.float32), "rows": np.abs(draw(8)),
}  # fmt: skip
# What the input is, what restores the weight and uses it, and what is left.
TAKES = {
    "a convolution": (IMAGE, "d = DequantizeLinear <axis: int = 0> (k, each) " + CONV, "DequantizeLinear Conv Tanh"),
    "a convolution, one scale": (IMAGE, "d = DequantizeLinear (k, one) " + CONV, "DequantizeLinear Conv Tanh"),
    "a convolution that was trained with quantised weights": (
        IMAGE, "q = QuantizeLinear <axis: int = 0> (real, each, none) "
        "d = DequantizeLinear <axis: int = 0> (q, each, none) " + CONV,
        "QuantizeLinear DequantizeLinear Conv Tanh",
    ),
    "a transposed convolution": (
        IMAGE, "d = DequantizeLinear <axis: int = 1> (kt, each) " + CONV.replace("Conv", "ConvTranspose"),
        "DequantizeLinear ConvTranspose Tanh",
    ),
    "a product": (
        ROWS, "d = DequantizeLinear <axis: int = 1> (w, each) p = MatMul (x, d)" + TAIL,
        "DequantizeLinear MatMul Add Tanh",
    ),
    "a product that gets a bias": (
        FLAT, "d = DequantizeLinear (w8, one, middle) p = MatMul (x, d)" + TAIL, "DequantizeLinear Gemm Tanh"
    ),
    "a product with a scale for each block": (
        ROWS, "d = DequantizeLinear <axis: int = 0, block_size: int = 4> (w4, blocks) p = MatMul (x, d)" + TAIL,
        "DequantizeLinear MatMul Add Tanh",
    ),
    "a transposed weight": (
        ROWS, "d = DequantizeLinear <axis: int = 0> (wt, each) t = Transpose (d) p = MatMul (x, t)" + TAIL,
        "DequantizeLinear Transpose MatMul Add Tanh",
    ),
    "a Gemm": (
        FLAT,
        "d = DequantizeLinear <axis: int = 0> (wt, each) "
        "p = Gemm <transB: int = 1, alpha: float = 0.5, beta: float = 2.0> (x, d, b)" + TAIL,
        "DequantizeLinear Gemm Tanh",
    ),
    "a product of ONNX Runtime": (ROWS, f"p = {FEW_BITS} (x, packed, few)" + TAIL, "MatMulNBits Add Tanh"),
    "a product that quantises its input": (
        ROWS, "p = com.microsoft.DynamicQuantizeMatMul (x, w8, each, middle)" + TAIL, "DynamicQuantizeMatMul Tanh"
    ),
    "a product that quantises its input, one scale": (
        ROWS, "p = com.microsoft.DynamicQuantizeMatMul (x, w8, one, middle, b)" + TAIL, "DynamicQuantizeMatMul Tanh"
    ),
    "a product of integers that restores its result": (
        FLAT, "q, s, z = DynamicQuantizeLinear (x) "
        "p = com.microsoft.MatMulIntegerToFloat (q, w8, s, each, z, middle)" + TAIL,
        "DynamicQuantizeLinear MatMulIntegerToFloat Tanh",
    ),
    "a product of ONNX Runtime with a bias": (
        FLAT, f"p = {FEW_BITS} (x, packed, few, , , b)" + TAIL, "MatMulNBits Tanh"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TAKES)
def test_the_scales_of_a_quantised_weight_take_a_map(tmp_path, case):
    inputs, body, left = TAKES[case]
    proto = model(inputs, "float y", body, 21, **read(body, CONSTANTS))
    result, after = folded(proto, tmp_path)
    assert " ".join(kinds(after)) == left
    weights = {tensor.name: tensor for tensor in after.graph.initializer}
    for tensor in proto.graph.initializer:
        if tensor.name[0] in "kwpr":
            assert weights[tensor.name] == tensor
        elif (
            tensor.name in ("each", "blocks", "few", "one") and "trained" not in case
        ):  # called as they were, and another number for each
            assert numpy_helper.to_array(weights[tensor.name]).size == max(numpy_helper.to_array(tensor).size, 4)
            assert tensor.name in result.report.norms[0].absorbed_by
    assert_equal(tmp_path, {"x": draw(*{IMAGE: (2, 3, 6, 6), ROWS: (2, 3, 8), FLAT: (2, 8)}[inputs])})


STAYS = {
    "values that are quantised too": (
        "q = QuantizeLinear (x, one) e = DequantizeLinear (q, one) d = DequantizeLinear <axis: int = 1> (w, each) "
        "p = MatMul (e, d)" + TAIL
    ),
    "a scale for each channel that is read": "d = DequantizeLinear <axis: int = 0> (w, rows) p = MatMul (x, d)" + TAIL,
    "a weight that two read": (
        "d = DequantizeLinear <axis: int = 1> (w, each) q = MatMul (x, d) p = MatMul (x, d) m = Mul (p, gain) "
        "z = Add (m, q) y = Tanh (z)"
    ),
}


@pytest.mark.parametrize("case", STAYS)
def test_scales_that_cannot_take_a_factor_stay(tmp_path, case):
    proto = model(ROWS, "float y", STAYS[case], 21, **read(STAYS[case], CONSTANTS))
    _, after = folded(proto, tmp_path)
    assert after == proto


def test_scales_that_two_weights_share_are_stored_twice(tmp_path):
    body = (
        "d = DequantizeLinear <axis: int = 0> (k, each) c = Conv (x, d) m = Mul (c, column) r = Relu (m) "
        "e = DequantizeLinear <axis: int = 0> (k2, each) y = Conv (r, e)"
    )
    constants = CONSTANTS | {"k2": integers(4, 4, 1, 1), "column": draw(4, 1, 1)}
    _, after = folded(model(IMAGE, "float y", body, 21, **read(body, constants)), tmp_path)
    assert kinds(after) == ["DequantizeLinear", "Conv", "Relu", "DequantizeLinear", "Conv"]
    assert [tensor.name for tensor in after.graph.initializer] == ["k", "each", "k2", "each_folded"]
    assert_equal(tmp_path, {"x": draw(2, 3, 6, 6)})


def test_the_reason_for_a_norm_in_front_names_the_quantised_weight(tmp_path):
    body = "n = BatchNormalization (x, g, g, g, v) d = DequantizeLinear <axis: int = 0> (k, each) y = Conv (n, d)"
    constants = CONSTANTS | {"g": draw(3), "v": np.ones(3, np.float32)}
    result, _ = folded(model(IMAGE, "float y", body, 21, **read(body, constants)), tmp_path)
    assert "Conv with quantised weights in y" in result.report.norms[0].reason
