"""Folding ONNX files from elsewhere."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx_text import draw, model, run
from typer.testing import CliRunner

from normfuse.cli import app
from normfuse.onnx import GraphError, VerificationError, fold_file
from normfuse.onnx.operations import OPERATIONS

ONE = np.ones(4, np.float32)


def images(tmp_path, name="in.onnx", batch="N"):
    """Convolution, BatchNormalization, Relu, a product and a per-channel Mul and Add, with names that Python lacks."""
    body = (
        "c = Conv (x, k) n = BatchNormalization (c, gain, shift, mean, variance) r = Relu (n) "
        "p = GlobalAveragePool (r) f = Flatten (p) l = Gemm <transB: int = 1> (f, w, b) "
        "m = Mul (l, gain) y = Add (m, shift)"
    )
    weights = {
        "k": draw(4, 3, 3, 3),
        "gain": draw(4),
        "shift": draw(4),
        "mean": draw(4),
        "variance": ONE,
        "w": draw(4, 4),
    }
    proto = model(f"float[{batch}, 3, 8, 8] x", f"float[{batch}, 4] y", body, **weights, b=draw(4))
    for node in proto.graph.node:
        for names in (node.input, node.output):
            names[:] = [{"x": "input.1", "y": "27"}.get(name, name) for name in names]
    proto.graph.input[0].name, proto.graph.output[0].name = "input.1", "27"
    onnx.save(proto, tmp_path / name)
    return tmp_path / name


def operations(path):
    return [node.op_type for node in onnx.load(path).graph.node]


def test_a_convolution_network_loses_its_norm_and_its_affine(tmp_path):
    result = fold_file(images(tmp_path), tmp_path / "out.onnx")
    assert not {"BatchNormalization", "Mul", "Add"} & set(operations(tmp_path / "out.onnx"))
    assert {record.kind: record.status for record in result.report.norms}["BatchNormalization"] == "folded"
    x = draw(3, 3, 8, 8)
    before, after = (run(str(tmp_path / name), {"input.1": x})[0] for name in ("in.onnx", "out.onnx"))
    assert np.abs(before - after).max() <= 1e-5 * np.abs(before).max()
    graph = onnx.load(tmp_path / "out.onnx").graph
    assert [graph.input[0].name, graph.output[0].name] == ["input.1", "27"]
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.onnx", "out.onnx"]


def test_weights_beside_the_file_are_read(tmp_path):
    proto = onnx.load(images(tmp_path))
    onnx.save(proto, tmp_path / "in.onnx", save_as_external_data=True, location="in.weights", size_threshold=0)
    fold_file(tmp_path / "in.onnx", tmp_path / "out.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.onnx", "in.weights", "out.onnx"]
    x = draw(3, 3, 8, 8)
    before, after = (run(str(tmp_path / name), {"input.1": x})[0] for name in ("in.onnx", "out.onnx"))
    assert np.abs(before - after).max() <= 1e-5 * np.abs(before).max()
    (tmp_path / "out.onnx").unlink()
    (tmp_path / "in.weights").unlink()
    with pytest.raises(GraphError, match=r"in\.weights"):
        fold_file(tmp_path / "in.onnx", tmp_path / "out.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["in.onnx"]


STREAM = (
    "n = LayerNormalization (x, gain, shift) a = Mul (n, scale) b = Add (a, shift) p = MatMul (b, up) g = Gelu (p) "
    "q = MatMul (g, down) s = Add (x, q) y = MatMul (s, head)"
)


def stream(tmp_path):
    weights = {
        "gain": draw(4),
        "shift": draw(4),
        "scale": draw(4),
        "up": draw(4, 6),
        "down": draw(6, 4),
        "head": draw(4, 3),
    }
    proto = model("float[batch, seq, 4] x", "float[batch, seq, 3] y", STREAM, **weights)
    onnx.save(proto, tmp_path / "in.onnx")
    return tmp_path / "in.onnx"


def test_gains_behind_a_layer_norm_go_into_the_next_weight(tmp_path):
    fold_file(stream(tmp_path), tmp_path / "out.onnx")
    found = operations(tmp_path / "out.onnx")
    assert found.count("LayerNormalization") == 1 and "Mul" not in found and found.count("Add") == 2
    x = draw(2, 5, 4)
    before, after = (run(str(tmp_path / name), {"x": x})[0] for name in ("in.onnx", "out.onnx"))
    assert np.abs(before - after).max() <= 1e-5 * np.abs(before).max()


def test_the_file_can_be_shaped_at_once(tmp_path):
    result = fold_file(stream(tmp_path), tmp_path / "out.onnx", target="cpu-single")
    assert result.shaping["gemm2d"] == 3 and operations(result.path).count("Gemm") == 1


def test_inputs_can_be_bounded(tmp_path):
    body = "e = Gather (table, tokens) s = Mul (e, gain) y = MatMul (s, w)"
    weights = {"table": draw(7, 4), "gain": draw(4), "w": draw(4, 2)}
    onnx.save(model("int64[batch, seq] tokens", "float[batch, seq, 2] y", body, **weights), tmp_path / "in.onnx")
    fold_file(tmp_path / "in.onnx", tmp_path / "out.onnx", inputs=["tokens:int64[batch,seq<=9]<7"])
    assert operations(tmp_path / "out.onnx") == ["Gather", "MatMul"]


def test_the_command_line(tmp_path):
    command = ["fold", str(images(tmp_path)), "--out", str(tmp_path / "out.onnx"), "--report", str(tmp_path / "r.json")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "verify the translation" in done.output and "2 of 2 norms folded" in done.output
    assert json.loads((tmp_path / "r.json").read_text())["source"].endswith("in.onnx")


SPELLED_OUT = (
    "u = ReduceMean <axes: ints = [-1]> (x) d = Sub (x, u) p = Pow (d, two) v = ReduceMean <axes: ints = [-1]> (p) "
    "e = Add (v, eps) r = Sqrt (e) c = Div (d, r) a = Mul (c, gain) b = Add (a, shift) m = MatMul (b, up) "
    "f = Add (m, bias) q = Div (f, root) t = Erf (q) o = Add (t, one) k = Mul (f, o) g = Mul (k, half) "
    "n = MatMul (g, down) s = Add (x, n) y = MatMul (s, head)"
)


def spelled_out(tmp_path, opset=13):
    numbers = {"two": 2.0, "eps": 1e-5, "root": 2**0.5, "one": 1.0, "half": 0.5}
    weights = {"gain": draw(4), "shift": draw(4), "up": draw(4, 6), "bias": draw(6), "down": draw(6, 4)}
    weights |= {name: np.float32(value) for name, value in numbers.items()} | {"head": draw(4, 3)}
    proto = model("float[batch, seq, 4] x", "float[batch, seq, 3] y", SPELLED_OUT, opset, **weights)
    onnx.save(proto, tmp_path / "in.onnx")
    return tmp_path / "in.onnx"


def test_a_layer_norm_and_a_gelu_in_arithmetic_are_what_they_mean(tmp_path):
    """As exporters wrote them before opset 17; the gain and the shift go into the product, whose bias was an Add."""
    result = fold_file(spelled_out(tmp_path), tmp_path / "out.onnx")
    (norm,) = result.report.dynamic
    assert (norm.core, norm.gain, norm.shift) == ("LayerNorm", "folded", "folded")
    assert operations(tmp_path / "out.onnx") == ["LayerNormalization", *"MatMul Add Gelu MatMul Add MatMul".split()]
    x = draw(2, 5, 4)
    before, after = (run(str(tmp_path / name), {"x": x})[0] for name in ("in.onnx", "out.onnx"))
    assert np.abs(before - after).max() <= 1e-5 * np.abs(before).max()


def saved_by_onnx_runtime(source, level):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.optimized_model_filepath = str(source.with_name("optimized.onnx"))
    onnxruntime.InferenceSession(str(source), options, ["CPUExecutionProvider"])
    source.unlink()
    return source.with_name("optimized.onnx")


def test_files_that_onnx_runtime_optimised_fold_too(tmp_path):
    source = saved_by_onnx_runtime(spelled_out(tmp_path, 17), "ORT_ENABLE_EXTENDED")
    assert {"LayerNormalization", "BiasGelu"} < set(operations(source))
    (norm,) = fold_file(source, tmp_path / "out.onnx").report.dynamic
    assert (norm.core, norm.gain, norm.shift) == ("LayerNorm", "folded", "folded")
    assert "BiasGelu" not in operations(tmp_path / "out.onnx")
    x = draw(2, 5, 4)
    before, after = (run(str(path), {"x": x})[0] for path in (source, tmp_path / "out.onnx"))
    assert np.abs(before - after).max() <= 1e-5 * np.abs(before).max()


def test_the_layout_of_a_processor_is_refused_with_advice(tmp_path):
    body = "c = Conv <pads: ints = [1, 1, 1, 1]> (x, k) y = Relu (c)"
    onnx.save(model("float[1, 16, 8, 8] x", "float[1, 16, 8, 8] y", body, k=draw(16, 16, 3, 3)), tmp_path / "in.onnx")
    source = saved_by_onnx_runtime(tmp_path / "in.onnx", "ORT_ENABLE_ALL")
    with pytest.raises(GraphError, match=r"com\.microsoft\.nchwc\.Conv.*ORT_ENABLE_EXTENDED"):
        fold_file(source, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_operations_that_a_file_defines_itself_are_read(tmp_path):
    text = (
        '<ir_version: 10, opset_import: ["" : 20, "own" : 1]> graph (float[batch, 4] x) => (float[batch, 3] y) '
        '{ g = own.Gated (x, gain) y = MatMul (g, w) } <opset_import: ["" : 20], domain: "own"> '
        "Gated (a, b) => (c) { c = Mul (a, b) }"
    )
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(a, n) for n, a in (("gain", draw(4)), ("w", draw(4, 3)))
    )
    onnx.save(proto, tmp_path / "in.onnx")
    fold_file(tmp_path / "in.onnx", tmp_path / "out.onnx")
    assert operations(tmp_path / "out.onnx") == ["MatMul"]


REFUSED = {
    "an unknown operation": ("y = Det (x)", 20, GraphError, "Det have no translation"),
    "an old operator set": ("y = Softmax (x)", 12, GraphError, "operator set 12 is older than 13"),
    "quantised weights": (
        "q, s, z = DynamicQuantizeLinear (x) y = MatMulInteger (q, q)", 20, GraphError, "fold first, then quantise"
    ),
    "a shape from data": (
        "c = Cast <to: int = 7> (x) f = Reshape (c, flat) y = Reshape (x, f)", 20, GraphError, "computed from data"
    ),
    "a result that is for training": (
        "n, m = LayerNormalization (x, two) y = Add (n, m)", 20, GraphError, "output 1 is used at LayerNormalization"
    ),
    "dilated averages": (
        "u = Unsqueeze (x, flat) y = AveragePool <kernel_shape: ints = [1], dilations: ints = [2]> (u)", 20,
        GraphError, "average pooling with dilations",
    ),
    "averages beyond one side": (
        "u = Unsqueeze (x, flat) "
        "y = AveragePool <kernel_shape: ints = [2], ceil_mode: int = 1, pads: ints = [0, 1]> (u)", 20, GraphError,
        "ceil_mode and padding that differs",
    ),
    "padding that wraps": ('y = Pad <mode: string = "wrap"> (x, four)', 20, GraphError, "padding with mode 'wrap'"),
    "padding of batches": (
        'y = Pad <mode: string = "edge"> (x, four)', 20, GraphError, "in front of the third axis"
    ),
    "a transposed convolution to a shape": (
        "u = Unsqueeze (x, flat) y = ConvTranspose <output_shape: ints = [2]> (u, u)", 20, GraphError, "output_shape"
    ),
    "another way to resize": (
        "u = Unsqueeze (x, flat) v = Unsqueeze (u, flat) "
        'y = Resize <mode: string = "linear", antialias: int = 1> (v, , , four)', 20, GraphError, "form of Resize",
    ),
    "a sum that goes backwards": (
        "a = Constant <value_int: int = 1> () y = CumSum <reverse: int = 1> (x, a)", 20, GraphError, "goes backwards"
    ),
    "the last of several": (
        "a = ArgMax <select_last_index: int = 1> (x) y = Cast <to: int = 1> (a)", 20, GraphError, "the last of several"
    ),
    "a mask of lengths": (
        "u = Unsqueeze (x, flat) "
        "y = com.microsoft.MultiHeadAttention <num_heads: int = 1> (u, u, u, , lengths)", 20, GraphError,
        "mask other than",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_trouble_and_leave_no_file(tmp_path, case):
    body, opset, kind, why = REFUSED[case]
    constants = {
        "flat": [-1 if "Reshape" in body else 1],
        "two": ONE[:2],
        "four": [2, 2, 2, 2] if "Resize" in body else [1, 1, 1, 1],
        "lengths": np.array([1, 1], np.int32),
    }
    used = {name: value for name, value in constants.items() if f"{name})" in body or f"{name}," in body}
    proto = model("float[2, 2] x", "float y", body, opset, **used)
    onnx.save(proto, tmp_path / "in.onnx")
    with pytest.raises((kind, GraphError), match=why):
        fold_file(tmp_path / "in.onnx", tmp_path / "out.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["in.onnx"]


def test_a_wrong_translation_is_found_out(tmp_path, monkeypatch):
    monkeypatch.setitem(OPERATIONS, "Relu", lambda node, x: x)
    with pytest.raises(VerificationError, match="differs"):
        fold_file(images(tmp_path), tmp_path / "out.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["in.onnx"]
