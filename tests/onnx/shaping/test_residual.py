import numpy as np
import pytest
from graphs import model, operations, same, unchanged

from normfuse.onnx.shaping import residual_gemm

GENERATOR = np.random.default_rng(0)
W = GENERATOR.standard_normal((6, 4)).astype(np.float32)
B = GENERATOR.standard_normal(4).astype(np.float32)
INPUTS = "float[N, 6] a, float[N, 4] r"
FEEDS = {
    "a": GENERATOR.standard_normal((5, 6)).astype(np.float32),
    "r": GENERATOR.standard_normal((5, 4)).astype(np.float32),
}


@pytest.mark.parametrize("product", ["MatMul (a, w)", "Gemm (a, w)", "Gemm <alpha: float = 2.0> (a, w)"])
@pytest.mark.parametrize("operands", ["r, p", "p, r"])
def test_the_sum_becomes_part_of_the_product(product, operands):
    graph = model(INPUTS, "float[N, 4] y", f"p = {product} y = Add ({operands})", w=W)
    assert same(graph, residual_gemm, **FEEDS)
    assert operations(graph) == ["Gemm"] and graph.graph.outputs[0].name == "y"


def test_transposed_weights_stay_transposed():
    graph = model(INPUTS, "float[N, 4] y", "p = Gemm <transB: int = 1> (a, w) y = Add (r, p)", w=W.T.copy())
    assert same(graph, residual_gemm, **FEEDS)
    assert operations(graph) == ["Gemm"]


def test_a_chain_of_branches():
    body = "p = MatMul (a, w) s = Add (r, p) q = MatMul (a, w) y = Add (s, q)"
    graph = model(INPUTS, "float[N, 4] y", body, w=W)
    assert same(graph, residual_gemm, **FEEDS)
    assert operations(graph) == ["Gemm", "Gemm"]


STAYS = {
    "a product with a bias": "p = Gemm (a, w, b) y = Add (r, p)",
    "a product that is read twice": "p = MatMul (a, w) s = Add (r, p) y = Mul (s, p)",
    "a sum with a vector": "p = MatMul (a, w) y = Add (b, p)",
    "a product added to itself": "p = MatMul (a, w) y = Add (p, p)",
    "a difference": "p = MatMul (a, w) y = Sub (r, p)",
}


@pytest.mark.parametrize("case", STAYS)
def test_other_sums_stay(case):
    body = STAYS[case]
    graph = model(INPUTS, "float[N, 4] y", body, w=W, **({"b": B} if "b" in body.split("(")[1] + body[-6:] else {}))
    assert unchanged(graph, residual_gemm)


def test_tensors_stay():
    graph = model("float[2, 5, 6] a, float[2, 5, 4] r", "float[2, 5, 4] y", "p = MatMul (a, w) y = Add (r, p)", w=W)
    assert unchanged(graph, residual_gemm)


def test_whole_numbers_stay():
    graph = model(
        "int32[5, 6] a, int32[5, 4] r", "int32[5, 4] y", "p = MatMul (a, w) y = Add (r, p)", w=np.ones((6, 4), np.int32)
    )
    assert unchanged(graph, residual_gemm)
