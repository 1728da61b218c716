"""A small ONNX file with a norm, folded, and compared with what it was."""

import re

import numpy as np
import onnx
import onnxruntime
from onnx import helper
from onnx_text import draw, model

from normfuse.onnx import fold_file

ONE = np.ones(4, np.float32)
NORM = "c = Conv <pads: ints = [1, 1, 1, 1]> (x, k) n = BatchNormalization (c, gain, shift, mean, variance) "


def weights(dtype=np.float32):
    found = {
        "k": draw(4, 3, 3, 3),
        "gain": draw(4),
        "shift": draw(4),
        "mean": draw(4),
        "variance": ONE,
        "k2": draw(2, 4, 1, 1),
    }
    return {name: array.astype(dtype) for name, array in found.items()}


def images(tail="r = Relu (n) y = Conv (r, k2)", opset=17, inputs="float[batch, 3, 8, 8] x", ir=8, extra=(), **more):
    """A convolution with a BatchNormalization, and what follows."""
    proto = model(inputs, "float y", NORM + tail, opset, **weights(), **more)
    proto.ir_version = ir
    proto.opset_import.extend(helper.make_opsetid(domain, 1) for domain in extra)
    return proto


def folded(proto, tmp_path, **options):
    onnx.save(proto, tmp_path / "in.onnx")
    result = fold_file(tmp_path / "in.onnx", tmp_path / "out.onnx", **options)
    return result, onnx.load(tmp_path / "out.onnx")


def read(body, constants):
    """Those of the constants that a body reads."""
    return {name: value for name, value in constants.items() if re.search(rf"[(,] ?{name}[,)]", body)}


def kinds(proto):
    return [node.op_type for node in proto.graph.node]


def plain(path, feeds):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"]).run(None, feeds)


def assert_equal(tmp_path, feeds, rtol=1e-5, result="out.onnx"):
    for before, after in zip(*(plain(tmp_path / name, feeds) for name in ("in.onnx", result)), strict=True):
        assert before.dtype == after.dtype and before.shape == after.shape
        assert np.abs(before - after).max() <= rtol * np.abs(before).max()
