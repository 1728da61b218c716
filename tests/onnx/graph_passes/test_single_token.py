"""Heads of one token become reshapes, and nothing else does."""

import numpy as np
import pytest
from graphs import model, operations, run, same, unchanged

from normfuse.onnx.graph_passes import attention3d, single_token

HEADS, SIZE, PAST = 2, 4, 3
NAMES = "qkv"
INDICES = {f"i{n}": np.array(n) for n in range(4)} | {f"n{n}": np.array([n]) for n in range(4)}
FOLD = "r = Reshape (x, split) p = Transpose <perm: ints = [2, 0, 3, 1, 4]> (r) "
CUTS = {
    "slice and squeeze": FOLD
    + "".join(f"s{i} = Slice (p, n{i}, n{i + 1}, n0) {n}4 = Squeeze (s{i}, n0) " for i, n in enumerate(NAMES)),
    "gather": FOLD + "".join(f"{n}4 = Gather (p, i{i}) " for i, n in enumerate(NAMES)),
    "unbind before the permutation": "r = Reshape (x, split) "
    "s0, s1, s2 = Split <axis: int = 2, num_outputs: int = 3> (r) "
    + "".join(
        f"u{i} = Squeeze (s{i}, n2) {n}4 = Transpose <perm: ints = [0, 2, 1, 3]> (u{i}) " for i, n in enumerate(NAMES)
    ),
    "three tensors": "q, k, v = Split <axis: int = -1, num_outputs: int = 3> (x) "
    + "".join(f"{n}r = Reshape ({n}, apart) {n}4 = Transpose <perm: ints = [0, 2, 1, 3]> ({n}r) " for n in NAMES),
}
STEP = (
    "keys = Concat <axis: int = 2> (past, k4) values = Concat <axis: int = 2> (past, v4) "
    "a = Attention (q4, keys, values) t = Transpose <perm: ints = [0, 2, 1, 3]> (a) y = Reshape (t, merge)"
)


def step(cut: str, batch: int | str = 2, tokens: int = 1, opset: int = 23):
    """Attention of ``tokens`` tokens, the heads cut from one tensor, to a cache and to themselves."""
    sizes = {
        "split": [0, tokens, 3, HEADS, SIZE],
        "apart": [0, tokens, HEADS, SIZE],
        "merge": [0, tokens, HEADS * SIZE],
    }
    shapes = {name: np.array(size) for name, size in sizes.items() if f", {name})" in CUTS[cut] + STEP}
    if batch != "B":  # as torch writes what it knows
        shapes = {name: np.array([batch, *array[1:]]) for name, array in shapes.items()}
    used = {name: array for name, array in INDICES.items() if f"{name})" in CUTS[cut] or f"{name}," in CUTS[cut]}
    return model(
        f"float[{batch}, {tokens}, 24] x, float[{batch}, {HEADS}, {PAST}, {SIZE}] past",
        f"float[{batch}, {tokens}, 8] y, float[{batch}, {HEADS}, {tokens}, {SIZE}] k4",
        CUTS[cut] + STEP,
        opset=opset,
        **shapes,
        **used,
    )


def drawn(batch=2, tokens=1):
    generator = np.random.default_rng(0)
    shapes = {"x": (batch, tokens, 24), "past": (batch, HEADS, PAST, SIZE)}
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("cut", CUTS)
def test_a_step_of_decoding_moves_nothing(cut):
    graph = step(cut)
    assert attention3d(graph) == 0  # a cache stands between heads and attention
    assert same(graph, single_token, **drawn())
    found = operations(graph)
    assert sorted(found) == sorted(["Split", *["Reshape"] * 4, *["Concat"] * 2, "Attention"])
    assert single_token(graph) == 0


@pytest.mark.parametrize("cut", CUTS)
def test_several_tokens_stay(cut):
    assert unchanged(step(cut, tokens=2), single_token)


def test_the_batch_may_have_any_size():
    graph = step("three tensors", batch="B")
    before = run(graph, **drawn(5))
    assert single_token(graph) == 4
    for got, expected in zip(run(graph, **drawn(5)), before, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-6)


def test_an_older_operator_set_stays():
    body = "r = Reshape (q, apart) y = Transpose <perm: ints = [0, 2, 1, 3]> (r)"
    shapes = {"apart": np.array([2, 1, HEADS, SIZE])}
    old, new = (model("float[2, 1, 8] q", "float[2, 2, 1, 4] y", body, opset=opset, **shapes) for opset in (17, 18))
    assert unchanged(old, single_token) and single_token(new) == 1
    assert [value.name for value in new.graph.outputs] == ["y"]


def test_heads_that_are_not_those_of_the_last_axis_stay():
    body = "r = Reshape (q, apart) y = Transpose <perm: ints = [0, 2, 1, 3]> (r)"
    graph = model("float[2, 8, 1] q", "float[2, 2, 1, 4] y", body, apart=np.array([2, 1, HEADS, SIZE]))
    assert unchanged(graph, single_token)
