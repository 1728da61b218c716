import numpy as np
import pytest
from graphs import model, operations, run, same, unchanged

from normfuse.onnx.graph_passes import gemm2d

GENERATOR = np.random.default_rng(0)
WEIGHTS = {
    name: GENERATOR.standard_normal(shape).astype(np.float32)
    for name, shape in {"w1": (4, 6), "b1": 6, "w2": (6, 4), "b2": 4, "gain": 4, "matrix": (1, 1, 4)}.items()
}
LINEAR = "p{0}{3} = MatMul ({1}, w{0}) {2} = Add (p{0}{3}, b{0}) "


def branch_of(source, result, tag=""):
    """A feed-forward branch from a stream into it; a tag tells its values from another one's."""
    first, second = LINEAR.format(1, source, f"h{tag}", tag), LINEAR.format(2, f"g{tag}", f"d{tag}", tag)
    return f"{first} g{tag} = Gelu (h{tag}) {second} {result} = Add ({source}, d{tag}) "


MLP = branch_of("x", "y")


def weights(body):
    return {name: array for name, array in WEIGHTS.items() if name in body}


def graph(body, inputs="float[2, 3, 4] x", outputs="float[2, 3, 4] y", **more):
    return model(inputs, outputs, body, **weights(body), **more)


def x(*shape):
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def test_a_branch_becomes_two_products_between_two_reshapes():
    branch = graph(MLP)
    assert same(branch, gemm2d, x=x(2, 3, 4))
    assert operations(branch) == ["Reshape", "Gemm", "Gelu", "Gemm", "Add", "Reshape"]
    assert branch.graph.outputs[0].name == "y"


def test_it_says_how_many_products_there_were():
    assert gemm2d(graph(MLP)) == 2


def test_one_dynamic_dimension_needs_no_shape_at_run_time():
    branch = graph(MLP, "float[B, 3, 4] x", "float[B, 3, 4] y")
    assert same(branch, gemm2d, x=x(5, 3, 4))
    assert "Shape" not in operations(branch)


def test_two_dynamic_dimensions_are_read_once():
    body = MLP + " z = Neg (y) " + "pz = MatMul (z, w1) z1 = Add (pz, b1)"
    branch = graph(body, "float[B, S, 4] x", "float[B, S, 4] y, float[B, S, 6] z1")
    assert same(branch, gemm2d, x=x(5, 3, 4))
    assert operations(branch).count("Shape") == 1 and operations(branch).count("Concat") == 2
    assert [value.shape for value in run(branch, x=x(1, 7, 4))] == [(1, 7, 4), (1, 7, 6)]


def test_regions_share_matrices_and_shapes():
    """Softmax over positions parts two regions; the second one's shape is the first one's."""
    body = branch_of("x", "m") + "a = Softmax <axis: int = 1> (m) " + branch_of("a", "y", "2")
    branch = graph(body, "float[B, S, 4] x", "float[B, S, 4] y")
    assert same(branch, gemm2d, x=x(5, 3, 4))
    assert operations(branch).count("Shape") == operations(branch).count("Concat") == 1
    assert operations(branch).count("Gemm") == 4


def test_norms_over_channels_work_on_rows():
    body = "n = LayerNormalization <axis: int = 2> (x, gain, b2) " + MLP.replace("MatMul (x", "MatMul (n")
    branch = graph(body)
    assert same(branch, gemm2d, x=x(2, 3, 4))
    assert operations(branch) == ["Reshape", "LayerNormalization", "Gemm", "Gelu", "Gemm", "Add", "Reshape"]
    assert branch.graph.node(1).attributes["axis"].as_int() == -1


def test_channels_last_images():
    branch = graph(MLP, "float[2, 3, 5, 4] x", "float[2, 3, 5, 4] y")
    assert same(branch, gemm2d, x=x(2, 3, 5, 4))
    assert "Gemm" in operations(branch)


def test_reshapes_at_the_border_are_taken_over():
    """What is reshaped into the region, or out of it, is reshaped once."""
    body = "x = Reshape (t, rows) " + MLP.replace("y = Add (x, d)", "s = Add (x, d) y = Reshape (s, apart)")
    shapes = {"rows": np.array([2, 3, 4]), "apart": np.array([2, 3, 2, 2])}
    branch = graph(body, "float[2, 12] t", "float[2, 3, 2, 2] y", **shapes)
    assert same(branch, gemm2d, t=x(2, 12))
    assert operations(branch) == ["Reshape", "Gemm", "Gelu", "Gemm", "Add", "Reshape"]


def test_a_reshape_that_copies_sizes_keeps_its_tensor():
    body = MLP.replace("y = Add (x, d)", "s = Add (x, d) y = Reshape (s, apart)")
    branch = graph(body, outputs="float[2, 3, 2, 2] y", apart=np.array([0, 0, 2, 2]))
    assert same(branch, gemm2d, x=x(2, 3, 4))
    assert operations(branch)[-2:] == ["Reshape", "Reshape"]


def test_a_value_that_is_an_output_and_goes_on():
    branch = graph(MLP, outputs="float[2, 3, 6] h, float[2, 3, 4] y")
    assert same(branch, gemm2d, x=x(2, 3, 4))
    assert [value.name for value in branch.graph.outputs] == ["h", "y"]


def test_a_product_without_bias_stays_a_product():
    body = MLP.replace("d = Add (p2, b2)", "").replace("(x, d)", "(x, p2)")
    branch = graph(body)
    assert same(branch, gemm2d, x=x(2, 3, 4))
    assert operations(branch) == ["Reshape", "Gemm", "Gelu", "MatMul", "Add", "Reshape"]


STAYS = {
    "products that end at reshapes on both sides without an addition": ("y = MatMul (x, w1)", "float[2, 3, 6] y"),
    "matrices": (MLP, "float[3, 4] y"),
    "attention's products of two tensors": (
        "t = Transpose <perm: ints = [0, 2, 1]> (x) p = MatMul (x, t) y = Add (p, three)", "float[2, 3, 3] y"
    ),
    "more reshapes than additions": (
        LINEAR.format(1, "x", "h", "") + "y = Softmax <axis: int = 1> (h) z = Neg (p1)",
        "float[2, 3, 6] y, float[2, 3, 6] z",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", STAYS)
def test_what_gains_nothing_stays(case):
    body, outputs = STAYS[case]
    inputs = "float[3, 4] x" if case == "matrices" else "float[2, 3, 4] x"
    more = {"three": np.ones(3, np.float32)} if "three" in body else {}
    assert unchanged(graph(body, inputs, outputs, **more), gemm2d)


def test_tensors_that_broadcast_stay_outside():
    body = "x = Add (t, matrix) " + MLP
    branch = graph(body, "float[2, 3, 4] t")
    assert same(branch, gemm2d, t=x(2, 3, 4))
    assert operations(branch)[:2] == ["Add", "Reshape"]


def test_unknown_sizes_stay():
    body = "c = Compress <axis: int = 1> (t, keep) x = Identity (c) " + MLP
    branch = graph(body, "float[2, 9, 4] t, bool[9] keep", "float[2, S, 4] y")
    for node in branch.graph:
        for value in node.outputs:
            value.shape = value.shape if value.is_graph_output() else None
    assert unchanged(branch, gemm2d)
