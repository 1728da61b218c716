"""Operands that ONNX Runtime does not broadcast are expanded, and only those."""

import numpy as np
import onnx_ir as ir
import pytest
from onnx_text import draw, model, run

from normfuse.onnx.workarounds.ort_broadcasting import expand_rotary_caches

ROTATE = "a = Cos (angles) b = Sin (angles) y = RotaryEmbedding (x, a, b{positions})"


def rotation(angles, x="float[batch, 2, 3, 4] x", positions="", **weights):
    text = ROTATE.replace("{positions}", positions)
    return model(x, "float y", text, 23, angles=angles, **weights)


def test_rotations_get_a_row_for_each_element_of_the_batch():
    """ONNX Runtime refuses a cache with one row for all, which torch.onnx writes; expanded, it is what was meant."""
    angles, x = draw(1, 3, 2), draw(5, 2, 3, 4)
    proto = rotation(angles)
    with pytest.raises(Exception, match="cos_cache"):
        run(proto, {"x": x})
    changed = ir.from_proto(proto)
    assert expand_rotary_caches(changed) == 2
    first, second = np.split(x, 2, -1)
    wanted = np.concatenate(
        [first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)], -1
    )
    assert np.abs(run(ir.to_proto(changed), {"x": x})[0] - wanted).max() <= 1e-5


def test_one_cache_is_expanded_once():
    text = ROTATE.replace("{positions}", "").replace("y =", "z =") + " y = RotaryEmbedding (z, a, b)"
    changed = ir.from_proto(model("float[batch, 2, 3, 4] x", "float y", text, 23, angles=draw(1, 3, 2)))
    assert expand_rotary_caches(changed) == 2
    assert [node.op_type for node in changed.graph].count("Expand") == 2


def test_rotations_by_position_stay():
    changed = ir.from_proto(rotation(draw(9, 2), positions=", places", places=np.zeros((5, 3), np.int64)))
    assert expand_rotary_caches(changed) == 0


def test_caches_with_the_batch_stay():
    text = "y = RotaryEmbedding (x, a, a)"
    inputs = "float[batch, 2, 3, 4] x, float[batch, 3, 2] a"
    assert expand_rotary_caches(ir.from_proto(model(inputs, "float y", text, 23))) == 0
