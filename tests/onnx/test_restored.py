"""GELU in arithmetic becomes one operation, products take their bias, and what only looks like them stays."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx_text import draw, model, run

from normfuse.onnx.importer import module_of
from normfuse.onnx.restored import restore

NUMBERS = {"half": 0.5, "one": 1.0, "root": 2**0.5, "part": 0.5**0.5, "three": 3.0, "c": 0.044715, "tanh": 0.7978846}
ERF = "d = Div (x, root) e = Erf (d) a = Add (e, one) "
TANH = "p = Pow (x, three) q = Mul (p, c) s = Add (x, q) t = Mul (s, tanh) e = Tanh (t) a = Add (one, e) "
RESTORED = {
    "product, half": ERF + "m = Mul (x, a) y = Mul (m, half)",
    "half, product": "d = Mul (part, x) e = Erf (d) a = Add (one, e) m = Mul (half, a) y = Mul (m, x)",
    "half of the input": "d = Div (x, root) h = Mul (half, x) e = Erf (d) a = Add (e, one) y = Mul (h, a)",
    "tanh": TANH + "h = Mul (x, half) y = Mul (a, h)",
    "tanh, product": TANH + "m = Mul (half, a) y = Mul (x, m)",
    "tanh, cube": TANH.replace("p = Pow (x, three)", "w2 = Mul (x, x) p = Mul (x, w2)")
    + "m = Mul (x, a) y = Mul (m, half)",
    "bias": "m = MatMul (x, w) y = Add (m, b)",
    "bias of a GELU": "m = MatMul (x, w) y = com.microsoft.BiasGelu (m, b)",
    "bias of a fast GELU": "m = MatMul (x, w) y = com.microsoft.FastGelu (m, b)",
    "bias of a norm": "m = MatMul (x, w) y = com.microsoft.SkipLayerNormalization (x, m, g, g, b)",
    "bias in front": "m = MatMul (x, w) y = Add (b, m)",
}
STAYING = {
    "another half": ERF + "m = Mul (x, a) y = Mul (m, part)",
    "another root": "d = Div (x, half) e = Erf (d) a = Add (e, one) m = Mul (x, a) y = Mul (m, half)",
    "another one": "d = Div (x, root) e = Erf (d) a = Add (e, half) m = Mul (x, a) y = Mul (m, half)",
    "another factor": ERF + "m = Mul (b, a) y = Mul (m, half)",
    "no half": ERF + "y = Mul (x, a)",
    "read elsewhere": ERF + "m = Mul (x, a) h = Mul (m, half) y = Add (h, e)",
    "another power": TANH.replace("three", "one") + "m = Mul (half, a) y = Mul (x, m)",
    "a bias for rows": "m = MatMul (x, w) y = Add (m, rows)",
    "a product read twice": "m = MatMul (x, w) a = Add (m, b) y = Mul (a, m)",
    "a product of inputs": "t = Transpose <perm: ints = [0, 2, 1]> (x) m = MatMul (x, t) y = Add (m, b3)",
}


def restored(body):
    numbers = {name: np.float32(value) for name, value in NUMBERS.items()}
    weights = {"w": draw(4, 4), "b": draw(4), "rows": draw(3, 1), "b3": draw(3), "g": draw(4)}
    proto = model("float[2, 3, 4] x", "float y", body, **numbers, **weights)
    found = ir.from_proto(proto)
    count = restore(found)
    x = draw(2, 3, 4)
    difference = module_of(found)(torch.from_numpy(x)).numpy() - run(proto, {"x": x})[0]
    assert np.abs(difference).max() <= 1e-5
    return count, [node.op_type for node in found.graph]


@pytest.mark.parametrize("case", RESTORED)
def test_spelled_out(case):
    count, kinds = restored(RESTORED[case])
    assert count == 1 and kinds[0] == ("Linear" if "bias" in case else "Gelu")
    assert kinds[1:] == [kind for kind in ("BiasGelu", "FastGelu", "SkipLayerNormalization") if kind in RESTORED[case]]


@pytest.mark.parametrize("case", STAYING)
def test_what_means_something_else_stays(case):
    count, kinds = restored(STAYING[case])
    assert count == 0 and not {"Linear", "Gelu"} & set(kinds)
