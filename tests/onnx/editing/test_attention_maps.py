"""Maps in front of and behind attention that is one operation."""

import numpy as np
import pytest
from onnx_files import assert_equal, folded, kinds, read
from onnx_text import draw, model

CONSTANTS = {
    **{name: draw(8, 8) for name in ("wq", "wk", "wv")}, "narrow": draw(8, 4), "gain": draw(8) + 3, "shift": draw(8),
    "twice": np.tile(draw(4) + 3, 2), "lower": np.tril(np.ones((5, 5), bool)), "heads": np.array([0, 0, 2, 4]),
    "back": np.array([0, 0, 8]), "one": np.array([1]),
}  # fmt: skip
PRODUCTS = "q = MatMul (x, wq) k = MatMul (x, wk) v = MatMul (x, wv) "
MAP = " m = Mul (a, gain) s = Add (m, shift) y = Tanh (s)"
TWO = "Attention <q_num_heads: int = 2, kv_num_heads: int = 2>"
APART = "".join(
    f"{n}r = Reshape ({n}, heads) {n}4 = Transpose <perm: ints = [0, 2, 1, 3]> ({n}r) " for n in "qkv"
)  # fmt: skip
# What there is in front of the map, and how many Mul and Add are left of it.
CASES = {
    "heads in the width": (f"{PRODUCTS} a = {TWO} (q, k, v)", MAP, (0, 1)),
    "heads apart": (
        f"{PRODUCTS}{APART} c = Attention (q4, k4, v4) t = Transpose <perm: ints = [0, 2, 1, 3]> (c) "
        "a = Reshape (t, back)", MAP, (0, 1)
    ),
    "a causal mask": (PRODUCTS + "a = " + TWO.replace(">", ", is_causal: int = 1>") + " (q, k, v)", MAP, (0, 1)),
    "a constant mask": (f"{PRODUCTS} a = {TWO} (q, k, v, lower)", MAP, (0, 1)),
    "a mask that may leave nothing": (
        f"{PRODUCTS} b = Add (v, gain) g = Greater (x, y0) z = Slice (g, y1, y2, y3) a = {TWO} (q, k, b, z)", MAP,
        (0, 2),
    ),
    "heads that share values": (
        "q = MatMul (x, wq) k = MatMul (x, narrow) v = MatMul (x, narrow) "
        "a = Attention <q_num_heads: int = 2, kv_num_heads: int = 1> (q, k, v)",
        " m = Mul (a, twice) y = Tanh (m)", (0, 0),
    ),
    "heads that share values, and a gain for each": (
        "q = MatMul (x, wq) k = MatMul (x, narrow) v = MatMul (x, narrow) "
        "a = Attention <q_num_heads: int = 2, kv_num_heads: int = 1> (q, k, v)",
        " m = Mul (a, gain) y = Tanh (m)", (1, 0),
    ),
    "ONNX Runtime's own": (
        f"{PRODUCTS} a = com.microsoft.MultiHeadAttention <num_heads: int = 2> (q, k, v)", MAP, (0, 1)
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_map_behind_attention_goes_into_the_values(tmp_path, case):
    front, behind, left = CASES[case]
    constants = CONSTANTS | {"y0": np.float32(0), "y1": np.array([0]), "y2": np.array([5]), "y3": np.array([2])}
    body = front + behind
    _, after = folded(model("float[2, 5, 8] x", "float y", body, 23, **read(body, constants)), tmp_path)
    assert (kinds(after).count("Mul"), kinds(after).count("Add")) == left
    assert_equal(tmp_path, {"x": draw(2, 5, 8)})
