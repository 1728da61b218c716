"""ONNX files from elsewhere: every operation means in PyTorch what it means in ONNX Runtime, and norms fold."""

import json

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from typer.testing import CliRunner

from normfuse.cli import app
from normfuse.onnx import ExportError, GraphError, VerificationError, fold_file
from normfuse.onnx.importer import module_of
from normfuse.onnx.operations import OPERATIONS

GENERATOR = np.random.default_rng(0)


def draw(*shape):
    return GENERATOR.standard_normal(shape).astype(np.float32)


def model(inputs, outputs, body, opset=20, **weights):
    text = f'<ir_version: 10, opset_import: ["" : {opset}]> graph ({inputs}) => ({outputs}) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    if "[" not in outputs:  # of any shape
        proto.graph.output[0].type.tensor_type.ClearField("shape")
    else:
        onnx.checker.check_model(proto, full_check=True)
    return proto


def run(proto, feeds):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    data = proto if isinstance(proto, str) else proto.SerializeToString()
    return onnxruntime.InferenceSession(data, options, ["CPUExecutionProvider"]).run(None, feeds)


ONE = np.ones(4, np.float32)
BODIES = {
    **{kind: f"y = {kind} (x)" for kind in
       "Abs Erf Exp Neg Relu Sigmoid Tanh HardSwish Softplus Identity Gelu LeakyRelu Reciprocal Softmax".split()},
    "Sqrt": "a = Abs (x) y = Sqrt (a)",
    "Log": "a = Abs (x) b = Add (a, a) y = Log (b)",
    "Pow": "two = Constant <value_float: float = 2.0> () y = Pow (x, two)",
    "Clip": "low = Constant <value_float: float = -0.5> () y = Clip (x, low)",
    "Gelu tanh": 'y = Gelu <approximate: string = "tanh"> (x)',
    "LeakyRelu slope": "y = LeakyRelu <alpha: float = 0.3> (x)",
    "Softmax axis": "y = Softmax <axis: int = 1> (x)",
    **{kind: f"y = {kind} (x, w)" for kind in ("Add", "Sub", "Mul", "Div")},
    "Where Less": "c = Less (x, w) y = Where (c, x, w)",
    "Greater And Not": "a = Greater (x, w) n = Not (a) b = And (a, n) y = Where (b, x, w)",
    "Equal Or": "a = Greater (x, w) e = Equal (a, a) o = Or (a, e) y = Where (o, x, w)",
    "MatMul": "y = MatMul (x, m)",
    "Gemm": "r = Reshape (x, rows) y = Gemm (r, m, w)",
    "Gemm transposed": "r = Reshape (x, rows) "
                       "y = Gemm <transB: int = 1, alpha: float = 0.5, beta: float = 2.0> (r, m, w)",
    "Gemm transposed left": "r = Reshape (x, rows) t = Transpose (r) y = Gemm <transA: int = 1> (t, m)",
    "LayerNormalization": "y = LayerNormalization <epsilon: float = 0.01> (x, w, w)",
    "ReduceMean": "y = ReduceMean (x, axis)",
    "ReduceSum": "y = ReduceSum <keepdims: int = 0> (x, axis)",
    "ReduceMax": "y = ReduceMax (x)",
    "Transpose": "y = Transpose <perm: ints = [2, 0, 1]> (x)",
    "Flatten": "y = Flatten (x)",
    "Flatten 0": "y = Flatten <axis: int = 0> (x)",
    "Squeeze Unsqueeze": "u = Unsqueeze (x, axis) v = Neg (u) y = Squeeze (v, axis)",
    "Concat": "y = Concat <axis: int = 1> (x, x)",
    "Split": "a, b = Split <axis: int = 2, num_outputs: int = 2> (x) y = Mul (a, b)",
    "Split lengths": "a, b = Split <axis: int = 2> (x, lengths) y = Concat <axis: int = 2> (b, a)",
    "Slice": "y = Slice (x, axis, two, axis)",
    "Gather one": "i = Constant <value_int: int = 1> () y = Gather <axis: int = 1> (x, i)",
    "Gather some": "y = Gather <axis: int = 1> (x, some)",
    "Expand": "r = Unsqueeze (x, axis) y = Expand (r, wide)",
    "Expand a number": "n = Constant <value_float: float = 1.5> () e = Expand (n, wide3) y = Mul (e, x)",
    "Expand sizes": "e = Expand (wide3, axis) y = Expand (x, e)",
    "Expand integers": "e = Expand (three, two) c = CastLike (e, w) l = ReduceMax (c) y = Mul (x, l)",
    "Reshape zero": "y = Reshape (x, zeros)",
    "sizes at run time": "s = Shape (x) b = Slice (s, zero, two) l = Slice (s, two, three) d = Div (l, two) "
                         "p = Mul (b, b) q = Div (p, b) t = Concat <axis: int = 0> (q, d, two) y = Reshape (x, t)",
    "a size alone": "s = Shape <start: int = 0, end: int = 1> (x) z = Squeeze (s) u = Unsqueeze (z, zero) "
                    "r = Constant <value_ints: ints = [-1]> () t = Concat <axis: int = 0> (u, r) y = Reshape (x, t)",
    "shapes as older exporters expand": "n = ConstantOfShape <value: tensor = int64[1] {1}> (three) "
                         "m1 = Mul (n, minus) e = Equal (wide3, m1) t = Where (e, n, wide3) y = Expand (x, t)",
    "IsNaN": "n = IsNaN (x) y = Where (n, w, x)",
    "GreaterOrEqual LessOrEqual": "g = GreaterOrEqual (x, w) l = LessOrEqual (x, w) b = And (g, l) y = Where (b, w, x)",
    "Max": "y = Max (x, w, w)",
    "Min": "y = Min (x, w)",
    "HardSigmoid": "y = HardSigmoid (x)",
    "HardSigmoid of MobileNet": "y = HardSigmoid <alpha: float = 0.16666667, beta: float = 0.5> (x)",
    "Range": "a = Constant <value_int: int = 1> () b = Constant <value_int: int = 9> () "
             "c = Constant <value_int: int = 2> () r = Range (a, b, c) f = Cast <to: int = 1> (r) y = Mul (x, f)",
    "CastLike": "i = Cast <to: int = 7> (x) y = CastLike (i, w)",
    "CastLike of numbers": "a = Constant <value_float: float = 1.0> () s = Shape <start: int = 2> (x) z = Squeeze (s) "
                           "b = CastLike (a, z) r = Range (b, z, b) c = CastLike (r, x) "
                           "p = Concat <axis: int = 0> (c, q) y = Mul (x, p)",
    "GatherElements": "y = GatherElements <axis: int = 1> (x, elements)",
    "GatherND": "y = GatherND (x, some)",
    "sizes as data": "s = Shape (x) l = Max (s, two) c = Cast <to: int = 1> (l) q = Sqrt (c) r = ReduceSum (q) "
                     "n = Shape (s) m = Cast <to: int = 1> (n) p = Mul (r, m) y = Mul (x, p)",
    "Cast": "c = Cast <to: int = 11> (x) y = Cast <to: int = 1> (c)",
    "Dropout": "y = Dropout (x)",
}  # fmt: skip
CONSTANTS = {
    "w": draw(4), "m": draw(4, 4), "rows": [-1, 4], "axis": [1], "lengths": [1, 3], "two": [2], "three": [3],
    "zero": [0],
    "q": draw(1), "elements": [[[1, 0, 2, 2]]] * 2, "some": [[1, 0], [1, 2]],
    "wide": [2, 5, 3, 4], "zeros": [0, -1], "minus": [-1], "wide3": [2, 3, 4],
}  # fmt: skip


@pytest.mark.parametrize("case", BODIES)
def test_operations_mean_the_same(case):
    body = BODIES[case]
    used = {
        name: value for name, value in CONSTANTS.items() if f" {name}" in body.replace("(", "( ").replace("=", "= ")
    }
    used = {name: value for name, value in used.items() if f"{name} =" not in body}
    proto = model("float[2, 3, 4] x", "float y", body, **used)
    x = draw(2, 3, 4)
    (wanted,) = run(proto, {"x": x})
    got = module_of(ir.from_proto(proto))(torch.from_numpy(x)).numpy()
    assert got.shape == wanted.shape and np.abs(got - wanted).max() <= 1e-5


IMAGES = {
    "Conv": "y = Conv <pads: ints = [1, 1, 1, 1], strides: ints = [2, 2]> (x, k, b)",
    "Conv grouped": "y = Conv <group: int = 2, dilations: ints = [2, 2]> (x, g)",
    "MaxPool": "y = MaxPool <kernel_shape: ints = [3, 3], strides: ints = [2, 2], pads: ints = [1, 1, 1, 1]> (x)",
    "AveragePool": "y = AveragePool <kernel_shape: ints = [2, 2], strides: ints = [2, 2]> (x)",
    "AveragePool padded": "y = AveragePool <kernel_shape: ints = [3, 3], pads: ints = [1, 1, 1, 1]> (x)",
    "GlobalAveragePool": "y = GlobalAveragePool (x)",
    "BatchNormalization": "y = BatchNormalization <epsilon: float = 0.1> (x, b, b, b, v)",
}
KERNELS = {"k": draw(4, 4, 3, 3), "g": draw(4, 2, 3, 3), "b": draw(4), "v": ONE * 2}


@pytest.mark.parametrize("case", IMAGES)
def test_operations_on_images_mean_the_same(case):
    used = {name: array for name, array in KERNELS.items() if f" {name}" in IMAGES[case]}
    proto = model("float[2, 4, 8, 8] x", "float y", IMAGES[case], **used)
    x = draw(2, 4, 8, 8)
    (wanted,) = run(proto, {"x": x})
    got = module_of(ir.from_proto(proto))(torch.from_numpy(x)).numpy()
    assert got.shape == wanted.shape and np.abs(got - wanted).max() <= 1e-5


def test_attention_means_the_same():
    proto = model(
        "float[1, 2, 5, 4] q", "float[1, 2, 5, 4] y", "y = Attention <is_causal: int = 1> (q, q, q)", opset=23
    )
    q = draw(1, 2, 5, 4)
    got = module_of(ir.from_proto(proto))(torch.from_numpy(q)).numpy()
    assert np.abs(got - run(proto, {"q": q})[0]).max() <= 1e-5


def test_every_operation_is_tested():
    tested = " ".join([*BODIES.values(), *IMAGES.values(), "Attention"])
    assert [kind for kind in OPERATIONS if f"{kind} " not in f"{tested} "] == []


# Folding files


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
    result = fold_file(stream(tmp_path), tmp_path / "out.onnx", target="cpu")
    assert result.shaping["gemm2d"] == 3 and operations(result.path).count("Gemm") == 2


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


REFUSED = {
    "an unknown operation": ("y = Sin (x)", 20, GraphError, "Sin have no translation"),
    "an old operator set": ("y = Softmax (x)", 12, GraphError, "operator set 12 is older than 13"),
    "a shape from data": (
        "c = Cast <to: int = 7> (x) f = Reshape (c, flat) y = Reshape (x, f)", 20, ExportError, "computed from data"
    ),
    "padding on one side": (
        "u = Unsqueeze (x, flat) y = MaxPool <kernel_shape: ints = [2], pads: ints = [0, 1]> (u)", 20, ExportError,
        "differs between the two sides",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_trouble_and_leave_no_file(tmp_path, case):
    body, opset, kind, why = REFUSED[case]
    proto = model(
        "float[2, 2] x",
        "float y",
        body,
        opset,
        **({"flat": [-1 if "Reshape" in body else 1]} if "flat" in body else {}),
    )
    onnx.save(proto, tmp_path / "in.onnx")
    with pytest.raises((kind, VerificationError), match=why):
        fold_file(tmp_path / "in.onnx", tmp_path / "out.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["in.onnx"]


def test_a_wrong_translation_is_found_out(tmp_path, monkeypatch):
    monkeypatch.setitem(OPERATIONS, "Relu", lambda node, x: x)
    with pytest.raises(VerificationError, match="differs"):
        fold_file(images(tmp_path), tmp_path / "out.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["in.onnx"]
