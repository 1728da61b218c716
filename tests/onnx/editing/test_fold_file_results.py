"""What fold_file writes and says where little or nothing folds: copies, refusals, the command."""

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_files import assert_equal, folded, images, kinds, plain, read
from onnx_text import draw, model
from typer.testing import CliRunner

from normfuse.cli import app
from normfuse.onnx import ExportError, GraphError, VerificationError, bench, fold_file
from normfuse.onnx.editing import observing
from normfuse.onnx.runtime import RuntimeFailure


def test_results_that_are_random_are_not_compared(tmp_path):
    _, after = folded(images("r = Relu (n) y = Conv (r, k2) z = RandomNormalLike (n)"), tmp_path)
    assert "BatchNormalization" not in kinds(after)
    proto = images("z = RandomNormalLike (n) y = Add (n, z)")
    result, after = folded(proto, tmp_path)
    assert after == proto and any("random from run to run" in note for note in result.notes)


def test_a_difference_costs_the_folding_not_the_file(tmp_path):
    result, after = folded(images(), tmp_path, rtol=0.0)
    assert "BatchNormalization" in kinds(after)
    assert any("left as it was: after folding it differs" in note for note in result.notes)
    assert result.report.norms[0].status == "kept"


def test_a_copy_takes_the_weights_beside_the_file_along(tmp_path):
    proto = model("float[batch, 4] x", "float y", "s = Softmax (x) y = MatMul (s, w)", w=draw(4, 2))
    onnx.save(proto, tmp_path / "in.onnx", save_as_external_data=True, location="in.weights", size_threshold=0)
    (tmp_path / "there").mkdir()
    fold_file(tmp_path / "in.onnx", tmp_path / "there" / "out.onnx")
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["in.weights", "out.onnx"]
    x = draw(2, 4)
    assert np.array_equal(
        *(plain(path, {"x": x})[0] for path in (tmp_path / "in.onnx", tmp_path / "there" / "out.onnx"))
    )
    fold_file(tmp_path / "in.onnx", tmp_path / "there" / "out.onnx")  # in place of the first copy
    assert len(list((tmp_path / "there").iterdir())) == 2


def test_a_copy_leaves_what_bears_the_name_of_its_weights(tmp_path):
    proto = model("float[batch, 4] x", "float y", "s = Softmax (x) y = MatMul (s, w)", w=draw(4, 2))
    onnx.save(proto, tmp_path / "in.onnx", save_as_external_data=True, location="in.weights", size_threshold=0)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "in.weights").write_bytes(b"another's")
    result = fold_file(tmp_path / "in.onnx", tmp_path / "there" / "out.onnx")
    assert any("its weights in a file of another name" in note for note in result.notes)
    assert (tmp_path / "there" / "in.weights").read_bytes() == b"another's"
    assert_equal(tmp_path, {"x": draw(2, 4)}, result="there/out.onnx")


def test_weights_in_a_folder_of_their_own_can_be_copied(tmp_path):
    proto = model("float[batch, 4] x", "float y", "s = Softmax (x) y = MatMul (s, w)", w=draw(4, 2))
    (tmp_path / "weights").mkdir()
    onnx.save(proto, tmp_path / "in.onnx", save_as_external_data=True, location="weights/w", size_threshold=0)
    (tmp_path / "there").mkdir()
    fold_file(tmp_path / "in.onnx", tmp_path / "there" / "out.onnx")
    assert_equal(tmp_path, {"x": draw(2, 4)}, result="there/out.onnx")


REFUSED = {
    "a size that nothing takes": (
        "float[batch, 5, 8, 8] x",
        "y = Conv (x, k)",
        r"does not run at any size.* give numbers for N \(--input 'x:float32\[N,5,8,8\]', inputs=\)",
    ),
    "what ONNX Runtime says with the places in its sources": (
        "float[1, 3, 8, 8] x",
        's = Constant <value = float[4] {1, 2, 2, 2}> () y = Resize <mode: string = "linear"> (x, , s)',
        "Exception during initialization: 'Linear' mode only supports",
    ),
    "an operation nobody knows": (
        "float[2, 2] x",
        "y = com.microsoft.Unheard (x)",
        "ONNX Runtime cannot load it.*Unheard",
    ),
    "an input that is no tensor": ("map(int64, float) x", "y = ai.onnx.ml.DictVectorizer (x)", "is not a tensor"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_one_line_and_leave_no_file(tmp_path, case):
    inputs, body, why = REFUSED[case]
    if "map" in inputs:
        value = helper.make_value_info(
            "x", helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(1, None))
        )
        node = helper.make_node("CastMap", ["x"], ["y"], domain="ai.onnx.ml")
        out = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
        proto = helper.make_model(helper.make_graph([node], "g", [value], [out]), opset_imports=opsets, ir_version=8)
    else:
        proto = model(inputs, "float y", body, 17, **({"k": draw(4, 3, 3, 3)} if "(x, k)" in body else {}))
    onnx.save(proto, tmp_path / "in.onnx")
    with pytest.raises(GraphError, match=why) as caught:
        fold_file(tmp_path / "in.onnx", tmp_path / "out.onnx")
    assert "\n" not in str(caught.value) and [path.name for path in tmp_path.iterdir()] == ["in.onnx"]


def test_options_are_checked_first(tmp_path):
    for options, why in (
        ({"target": "tpu"}, "target 'tpu'"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"max_scale_range": 0.5}, "below 1"),
    ):
        with pytest.raises(ExportError, match=why):
            fold_file("absent.onnx", tmp_path / "out.onnx", **options)
    onnx.save(images(), tmp_path / "in.onnx")
    with pytest.raises(GraphError, match="there is no input 'z'; the file takes x"):
        fold_file(tmp_path / "in.onnx", tmp_path / "out.onnx", inputs=["z:float32[1]"])
    with pytest.raises(ExportError, match="this command reads it too"):
        fold_file(tmp_path / "in.onnx", tmp_path / "in.onnx")


def test_the_command_line(tmp_path):
    onnx.save(images(), tmp_path / "in.onnx")
    command = [
        "fold",
        str(tmp_path / "in.onnx"),
        "--out",
        str(tmp_path / "out.onnx"),
        "--report",
        str(tmp_path / "r.json"),
    ]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "1 of 1 norms folded" in done.output and "4 → 3" in done.output
    assert json.loads((tmp_path / "r.json").read_text())["source"].endswith("in.onnx")
    (tmp_path / "in.onnx").write_bytes(b"\xff" * 99)
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1 and done.stderr.count("\n") == 1 and "is not an ONNX file" in done.stderr


NO_ONNX = {
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4665a51b\nsize 10\n": "a pointer of Git LFS.*git lfs pull",
    b"<!DOCTYPE html><html>Not found</html>": "a web page, not an ONNX file: download the file itself",
    b"\x1f\x8b\x08\x00": "a gzip archive: unpack it first",
    b"\x1c\x00\x00\x00ORTM": "in ONNX Runtime's own format",
    b"PK\x03\x04": "a checkpoint or another archive.*normfuse export reads checkpoints",
}


@pytest.mark.parametrize("start", NO_ONNX, ids=lambda start: str(start[:8]))
def test_what_is_no_onnx_file_is_called_by_its_name(tmp_path, start):
    path = tmp_path / "in.onnx"
    path.write_bytes(start)
    with pytest.raises(GraphError, match=f"in.onnx is {NO_ONNX[start]}"):
        fold_file(path, tmp_path / "out.onnx")
    with pytest.raises(VerificationError, match=f"in.onnx is {NO_ONNX[start]}"):
        bench([path], rounds=4)


WITH_INTEGERS = {
    "quantised as it comes": (
        "q, s, z = DynamicQuantizeLinear (x) i = MatMulInteger (q, eight, z) f = Cast <to: int = 1> (i) p = Mul (f, s) "
        "m = Mul (p, gain) y = Tanh (m)"
    ),
    "quantised before": (
        "q = QuantizeLinear (x, step) d = DequantizeLinear (q, step) w = DequantizeLinear (eight, step) "
        "p = MatMul (d, w) m = Mul (p, gain) y = Celu (m)"
    ),
}


@pytest.mark.parametrize("case", WITH_INTEGERS)
def test_what_has_no_float16_stays_in_float32(tmp_path, case):
    constants = {"eight": np.ones((4, 4), np.int8), "step": np.float32(0.1), "gain": draw(4)}
    if "before" not in case:
        del constants["step"]
    proto = model("float[batch, 4] x", "float y", WITH_INTEGERS[case], 17, **constants)
    result, _ = folded(proto, tmp_path, dtype="float16")
    assert result.dtype == "float16"
    assert_equal(tmp_path, {"x": draw(3, 4)}, rtol=2e-2)


# What happens to the norm `n` between two convolutions, and the reason in its row.
LEFT_ALONE = {
    "in front of a padded convolution": (
        "n = BatchNormalization (x, gain, shift, mean, variance) y = Conv <pads: ints = [1, 1, 1, 1]> (n, k)",
        "nothing would be gained: its shift meets Conv in y",
    ),
    "its numbers are not finite": (
        "c = Conv (x, k) n = BatchNormalization (c, gain, shift, mean, negative) y = Conv (n, k2)", "not finite"
    ),
    "its gain is quantised": (
        "g = DequantizeLinear (eights, step) n = BatchNormalization (x, g, shift, mean, variance) y = Conv (n, k)",
        "are quantised",
    ),
    "at an output": (
        "n = BatchNormalization (x, gain, shift, mean, variance) y = Relu (n)",
        "its input is fixed by the model's input, its result by the model's output 'y'",
    ),
    "behind a cast": (
        "i = Cast <to: int = 7> (x) f = Cast <to: int = 1> (i) n = BatchNormalization (f, gain, shift, mean, variance) "
        "y = Sigmoid (n)",
        "its input is fixed by Cast in f, its result by Sigmoid in y",
    ),
    "behind one of two results": (
        "v, i = TopK (x, count) n = BatchNormalization (v, gain, shift, mean, variance) y = Sigmoid (n)",
        "its input is fixed by TopK in v, its result by Sigmoid in y",
    ),
    "inside an If": (
        "c = ReduceSum <keepdims: int = 0> (x) b = Cast <to: int = 9> (c) y = If (b) <then_branch = t () => (float n) "
        "{ n = BatchNormalization (x, gain, shift, mean, variance) }, else_branch = e () => (float z) "
        "{ z = Identity (x) }>",
        "inside If 'y'",
    ),
    "random results": (
        "c = Conv (x, k) n = BatchNormalization (c, gain, shift, mean, variance) r = RandomNormalLike (n) "
        "y = Mul (n, r)",
        "differ from run to run",
    ),
}  # fmt: skip
LEFT = {name: draw(4) for name in ("gain", "shift", "mean")}
LEFT |= {"variance": np.ones(4, np.float32), "negative": np.full(4, -1, np.float32)}
LEFT |= {"k": draw(4, 4, 3, 3), "k2": draw(2, 4, 1, 1), "count": np.array([2])}
LEFT |= {"eights": np.array([3, -5, 7, 9], np.int8), "step": np.float32(0.1)}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_a_norm_that_is_left_alone_has_a_row_that_says_why(tmp_path, case):
    body, why = LEFT_ALONE[case]
    proto = model("float[batch, 4, 6, 6] x", "float y", body, 17, **read(body, LEFT))
    result, _ = folded(proto, tmp_path)
    (row,) = (row for row in result.report.norms if row.kind == "BatchNormalization")
    assert (row.name, row.status) == ("n", "kept") and why in row.reason


def test_norms_that_measure_each_batch_and_those_in_functions_have_rows(tmp_path):
    proto = images("r = Relu (n) y = own.Norm (r, gain, shift, mean, variance)", extra=["own"])
    operators = [helper.make_opsetid("", 15)]  # which keeps it from being written out
    numbers = ["gain", "shift", "mean", "variance"]
    norm = helper.make_node("BatchNormalization", ["x", *numbers], ["inner"])
    proto.functions.append(helper.make_function("own", "Norm", ["x", *numbers], ["inner"], [norm], operators))
    measures = proto.graph.node[1]
    measures.attribute.append(helper.make_attribute("training_mode", 1))
    measures.output.extend(["new_mean", "new_variance"])
    result, _ = folded(proto, tmp_path)
    (inside,), (dynamic,) = result.report.norms, result.report.dynamic
    assert inside.name == "inner" and "function 'Norm', which is for another operator set" in inside.reason
    assert (dynamic.name, dynamic.core) == ("n", "BatchNorm") and "each batch" in dynamic.reasons["statistics"]


def test_one_norm_that_cannot_fold_costs_itself_only(tmp_path):
    proto = images(
        "r = Relu (n) d = Conv (r, square) b = BatchNormalization (d, gain, shift, mean, negative) y = Relu (b)",
        square=draw(4, 4, 1, 1), negative=LEFT["negative"],
    )  # fmt: skip
    result, after = folded(proto, tmp_path)
    assert kinds(after) == ["Conv", "Relu", "Conv", "BatchNormalization", "Relu"]
    assert [row.status for row in result.report.norms] == ["folded", "kept"]


def test_a_file_whose_inner_values_onnx_runtime_cannot_show_is_copied(tmp_path, monkeypatch):
    """It fails on float16 files with an If whose branches read what a Shape reads as well."""

    def fail(*_):
        raise RuntimeFailure("Missing Input: v3")

    monkeypatch.setattr(observing, "run_session", fail)
    proto = images()
    result, after = folded(proto, tmp_path)
    assert after == proto and any("Missing Input" in note for note in result.notes)
    assert "Missing Input" in result.report.norms[0].reason


def test_values_that_are_infinite_in_one_order_of_sums_only_are_no_excuse(tmp_path):
    """Divided by a variance that its eps cancels: what ONNX Runtime's own optimisations make of it proves nothing."""
    proto = images()
    tensor = next(t for t in proto.graph.initializer if t.name == "variance")
    tensor.CopyFrom(numpy_helper.from_array(np.array([-1e-5, 1, 1, 1], np.float32), "variance"))
    _, after = folded(proto, tmp_path)
    assert kinds(after) == kinds(proto)


def test_a_norm_of_which_a_mul_is_left_is_partly_folded(tmp_path):
    """Its scale would be that of the model's input as well, its shift goes on to the bias."""
    body = "t = Tanh (x) n = BatchNormalization (t, gain, shift, mean, variance) s = Add (n, x) y = Conv (s, k2)"
    result, after = folded(model("float[batch, 4, 6, 6] x", "float y", body, 17, **read(body, LEFT)), tmp_path)
    assert kinds(after) == ["Tanh", "Mul", "Add", "Conv"]
    assert [(row.name, row.status) for row in result.report.norms] == [("n", "partly folded")]
    assert_equal(tmp_path, {"x": draw(2, 4, 6, 6)})
