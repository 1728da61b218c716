import numpy as np
import pytest
from graphs import model, operations, run, same, unchanged

from normfuse.onnx.graph_passes import attention3d, blockwise_attention

HEADS, SIZE = 2, 4
MERGE = "t = Transpose <perm: ints = [0, 2, 1, 3]> (a) y = Reshape (t, merge)"
SPLIT = "{0}r = Reshape ({0}, split) {0}4 = Transpose <perm: ints = [0, 2, 1, 3]> ({0}r)"
SEPARATE = " ".join(SPLIT.format(name) for name in "qkv")
ATTEND = "a = Attention <is_causal: int = {}> (q4, k4, v4)"
QKV = "float[2, 5, 8] q, float[2, 5, 8] k, float[2, 5, 8] v"
SHAPES = {"split": np.array([2, 5, HEADS, SIZE]), "merge": np.array([2, 5, 8])}
INDICES = {f"i{n}": np.array(n) for n in range(4)} | {f"n{n}": np.array([n]) for n in range(4)}
PACKED = {"split": np.array([2, 5, 3, HEADS, SIZE]), "merge": SHAPES["merge"], **INDICES}
FOLD = "r = Reshape (x, split) p = Transpose <perm: ints = [2, 0, 3, 1, 4]> (r) "


def drawn(*names, width=8):
    generator = np.random.default_rng(0)
    return {name: generator.standard_normal((2, 5, width)).astype(np.float32) for name in names}


@pytest.mark.parametrize("causal", [0, 1])
def test_separate_queries_keys_and_values(causal):
    graph = model(QKV, "float[2, 5, 8] y", f"{SEPARATE} {ATTEND.format(causal)} {MERGE}", **SHAPES)
    assert same(graph, attention3d, **drawn("q", "k", "v"))
    assert operations(graph) == ["Attention"]
    assert graph.graph.node(0).attributes["q_num_heads"].as_int() == HEADS


CUTS = {
    "slice and squeeze": FOLD + "".join(
        f"s{i} = Slice (p, n{i}, n{i + 1}, n0) {n}4 = Squeeze (s{i}, n0) " for i, n in enumerate("qkv")
    ),
    "gather": FOLD + "".join(f"{n}4 = Gather (p, i{i}) " for i, n in enumerate("qkv")),
    "unbind before the permutation": "r = Reshape (x, split) "
    "s0, s1, s2 = Split <axis: int = 2, num_outputs: int = 3> (r) "
    + "".join(
        f"u{i} = Squeeze (s{i}, n2) {n}4 = Transpose <perm: ints = [0, 2, 1, 3]> (u{i}) " for i, n in enumerate("qkv")
    ),
    "chunks": "q, k, v = Split <axis: int = -1, num_outputs: int = 3> (x) " + SEPARATE,
}  # fmt: skip


@pytest.mark.parametrize("cut", CUTS)
def test_one_tensor_of_queries_keys_and_values(cut):
    shapes = PACKED if cut != "chunks" else SHAPES
    graph = model("float[2, 5, 24] x", "float[2, 5, 8] y", f"{CUTS[cut]} {ATTEND.format(0)} {MERGE}", **shapes)
    assert same(graph, attention3d, **drawn("x", width=24))
    assert operations(graph) == ["Split", "Attention"]


def test_order_of_the_thirds_is_kept():
    body = FOLD + "".join(f"{n}4 = Gather (p, i{i}) " for i, n in enumerate("vqk")) + ATTEND.format(0) + MERGE
    graph = model("float[2, 5, 24] x", "float[2, 5, 8] y", body, **PACKED)
    assert same(graph, attention3d, **drawn("x", width=24))
    split, attention = graph.graph
    assert [value.index() for value in attention.inputs] == [1, 2, 0] and attention.inputs[0].producer() is split


def test_fewer_heads_of_keys_than_of_queries():
    shapes = {"split": np.array([2, 5, 4, 2]), "merge": SHAPES["merge"], "few": np.array([2, 5, 2, 2])}
    body = " ".join(SPLIT.format(name) for name in "qkv")
    for name in "kv":
        body = body.replace(f"({name}, split)", f"({name}, few)")
    graph = model(
        "float[2, 5, 8] q, float[2, 5, 4] k, float[2, 5, 4] v",
        "float[2, 5, 8] y",
        f"{body} {ATTEND.format(0)} {MERGE}",
        **shapes,
    )
    assert same(graph, attention3d, **drawn("q"), **drawn("k", "v", width=4))
    assert operations(graph) == ["Attention"]
    assert graph.graph.node(0).attributes["kv_num_heads"].as_int() == 2


def test_a_mask_stays_and_asks_the_flat_tensor_for_its_length():
    body = (
        f"{SEPARATE} l = Shape <start: int = 2, end: int = 3> (q4) to = Concat <axis: int = 0> (one, one, l, n5) "
        f"mask = Expand (m, to) a = Attention (q4, k4, v4, mask) {MERGE}"
    )
    constants = {"one": np.array([1]), "n5": np.array([5]), **SHAPES}
    graph = model(QKV + ", bool[1, 1, 1, 5] m", "float[2, 5, 8] y", body, **constants)
    mask = np.array([True, True, False, True, False]).reshape(1, 1, 1, 5)
    assert same(graph, attention3d, **drawn("q", "k", "v"), m=mask)
    assert operations(graph) == ["Shape", "Concat", "Expand", "Attention"]


REFUSED = {
    "something between head split and attention": (
        QKV, f"{SEPARATE} w = Neg (q4) a = Attention (w, k4, v4) {MERGE}", SHAPES
    ),
    "another use of the heads of the result": (
        QKV, f"{SEPARATE} {ATTEND.format(0)} {MERGE} z = Relu (a)", SHAPES
    ),
    "heads split the other way around": (
        QKV,
        f"{SEPARATE} {ATTEND.format(0)} {MERGE}".replace("k4 = Transpose <perm: ints = [0, 2, 1, 3]>", "k4 = Identity"),
        {"split": np.array([2, 5, 5, 8]), "merge": np.array([2, 5, 40])},
    ),
    "queries, keys and values side by side within each head": (
        "float[2, 5, 24] x",
        "r = Reshape (x, split) p = Transpose <perm: ints = [3, 0, 2, 1, 4]> (r) "
        + "".join(f"{n}4 = Gather (p, i{i}) " for i, n in enumerate("qkv")) + ATTEND.format(0) + MERGE,
        {**PACKED, "split": np.array([2, 5, HEADS, 3, SIZE])},
    ),
    "a result that is put together in another order": (
        QKV,
        f"{SEPARATE} {ATTEND.format(0)} {MERGE}".replace("t = Transpose <perm: ints = [0, 2, 1, 3]>", "t = Identity"),
        SHAPES,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_anything_else_stays(case):
    inputs, body, constants = REFUSED[case]
    if case.startswith("heads split"):
        inputs = inputs.replace("8]", "40]")
    outputs = "float[2, 5, N] y" + (", float[2, 2, 5, 4] z" if "z =" in body else "")
    graph = model(inputs, outputs, body, **constants)
    assert unchanged(graph, attention3d)


def test_operator_sets_without_attention_stay():
    graph = model("float[2, 5, 8] q", "float[2, 5, 8] y", "y = Relu (q)", opset=20)
    assert unchanged(graph, attention3d)


def test_dynamic_batch_and_length():
    body = f"b = Shape <start: int = 0, end: int = 2> (q) split = Concat <axis: int = 0> (b, hd) {SEPARATE}"
    body += f" {ATTEND.format(0)} merge = Concat <axis: int = 0> (b, c) {MERGE}"
    inputs = ", ".join(f"float[B, S, 8] {name}" for name in "qkv")
    graph = model(inputs, "float[B, S, 8] y", body, hd=np.array([HEADS, SIZE]), c=np.array([8]))
    assert attention3d(graph) == 1 and operations(graph) == ["Attention"]
    assert run(graph, **drawn("q", "k", "v"))[0].shape == (2, 5, 8)


JOINED = "y = Attention <q_num_heads: int = 2, kv_num_heads: int = {0}{1}> (q, k, v{2})"


@pytest.mark.parametrize("more", ["", ", scale: float = 0.3", ", is_causal: int = 0, softcap: float = 0.0"])
def test_attention_in_blocks(more):
    graph = model(QKV, "float[2, 5, 8] y", JOINED.format(2, more, ""))
    assert same(graph, blockwise_attention, **drawn("q", "k", "v"))
    assert operations(graph) == ["MultiHeadAttention"]


@pytest.mark.parametrize(
    ("kv_heads", "more", "mask"),
    [
        (2, ", is_causal: int = 1", ""),
        (2, ", softcap: float = 2.0", ""),
        (2, "", ", mask"),
        (1, "", ""),
    ],
)
def test_attention_that_blocks_do_not_suit_stays(kv_heads, more, mask):
    inputs = f"float[2, 5, 8] q, float[2, 5, {4 * kv_heads}] k, float[2, 5, {4 * kv_heads}] v"
    masks = {"mask": np.zeros((5, 5), np.float32)} if mask else {}
    graph = model(inputs, "float[2, 5, 8] y", JOINED.format(kv_heads, more, mask), **masks)
    assert unchanged(graph, blockwise_attention)


def test_heads_that_were_split_outside_stay():
    graph = model("float[2, 2, 5, 4] q", "float[2, 2, 5, 4] y", "y = Attention (q, q, q)")
    assert unchanged(graph, blockwise_attention)
