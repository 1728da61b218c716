"""An ONNX file goes in, the same file without its norms comes out: what folds, and what stays as it was."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_files import NORM, assert_equal, folded, images, kinds, plain, read, weights
from onnx_text import draw, model

from normfuse.onnx import fold_file

# What folds


def test_a_norm_behind_a_convolution_goes_into_it(tmp_path):
    result, after = folded(images(), tmp_path)
    assert kinds(after) == ["Conv", "Relu", "Conv"]
    (record,) = result.report.norms
    assert (record.kind, record.status) == ("BatchNormalization", "folded")
    assert "k_bias" in record.absorbed_by  # a factor that is positive everywhere may go on to k2
    assert (result.report.nodes_before, result.report.nodes_after) == (4, 3)
    assert [tensor.name for tensor in after.graph.initializer] == ["k", "k2", "k_bias"]
    assert result.verification.cases and all(case.passed for case in result.verification.cases)
    assert "gone: BatchNormalization ×1" in result.notes
    for batch in (1, 5):
        assert_equal(tmp_path, {"x": draw(batch, 3, 8, 8)})


PRODUCTS = {
    "a Gemm": ("f = Flatten (x) l = Gemm (f, w, b) m = Mul (l, gain) y = Add (m, shift)", ["Flatten", "Gemm"]),
    "a transposed Gemm without bias": (
        "f = Flatten (x) l = Gemm <transB: int = 1> (f, wt) m = Mul (l, gain) y = Add (m, shift)", ["Flatten", "Gemm"]
    ),
    "a MatMul and the Add of its bias": (
        "l = MatMul (x, w) a = Add (l, b) m = Mul (a, gain) y = Add (m, shift)", ["MatMul", "Add"]
    ),
    "a MatMul that gets a bias": ("l = MatMul (x, w) m = Mul (l, gain) y = Add (m, shift)", ["Gemm"]),
    "in front of a product": (
        "m = Mul (x, narrow) a = Add (m, narrow) l = MatMul (a, w) y = Relu (l)", ["Gemm", "Relu"]
    ),
    "a table": (
        "i = Cast <to: int = 7> (x) g = Gather (table, i) m = Mul (g, gain) y = MatMul (m, square)",
        ["Cast", "Gather", "MatMul"],
    ),
    "a transposed convolution": (
        "u = Unsqueeze (x, axis) t = ConvTranspose (u, kt) y = Mul (t, column)", ["Unsqueeze", "ConvTranspose"]
    ),
    "through movements": (
        "l = MatMul (x, w) t = Transpose <perm: ints = [1, 0]> (l) m = Mul (t, column) "
        "a, z = Split <axis: int = 0> (m, halves) y = Concat <axis: int = 0> (z, a)",
        ["MatMul", "Transpose", "Split", "Concat"],
    ),
    "a difference and a quotient": ("l = MatMul (x, w) s = Sub (l, shift) y = Div (s, gain)", ["Gemm"]),
}  # fmt: skip


@pytest.mark.parametrize("case", PRODUCTS)
def test_maps_per_channel_go_into(tmp_path, case):
    body, left = PRODUCTS[case]
    constants = {
        "w": draw(3, 4), "wt": draw(4, 3), "b": draw(4), "gain": draw(4) + 3, "shift": draw(4), "narrow": draw(3) + 2,
        "table": draw(7, 4), "square": draw(4, 4), "kt": draw(3, 4, 2), "column": draw(4, 1), "axis": np.array([2]),
        "halves": np.array([2, 2]),
    }  # fmt: skip
    used = {
        name: value
        for name, value in constants.items()
        if f" {name})" in body or f"({name}," in body or f", {name}," in body
    }
    _, after = folded(model("float[batch, 3] x", "float y", body, 17, **used), tmp_path)
    assert kinds(after) == left
    assert_equal(tmp_path, {"x": np.abs(draw(5, 3))})


@pytest.mark.parametrize("opset", [7, 8, 9, 11, 12, 13, 15, 18, 21])
def test_operator_sets(tmp_path, opset):
    result, after = folded(images(opset=opset, ir=4), tmp_path)
    assert result.opset == opset == after.opset_import[0].version and "BatchNormalization" not in kinds(after)
    assert_equal(tmp_path, {"x": draw(2, 3, 8, 8)})


def test_a_weight_that_two_read_is_stored_twice_unless_forbidden(tmp_path):
    body = "l = MatMul (x, w) m = Mul (l, gain) s = Softmax (m) r = MatMul (s, w) y = Softmax (r)"
    proto = model("float[batch, 4] x", "float y", body, w=draw(4, 4), gain=draw(4) + 3)
    _, after = folded(proto, tmp_path)
    assert kinds(after) == ["MatMul", "Softmax", "MatMul", "Softmax"]
    assert [tensor.name for tensor in after.graph.initializer] == ["w", "w_folded"]
    assert_equal(tmp_path, {"x": draw(3, 4)})
    result, after = folded(proto, tmp_path, copy_shared=False)
    assert after == proto and result.report.norms[0].status == "kept"


@pytest.mark.parametrize("places", ["counted through", "by axis"])
def test_sparse_constants_are_constants(tmp_path, places):
    numbers = weights() | {"mean": np.zeros(4, np.float32)}
    numbers["k2"][0, 1:] = 0
    body = f"{NORM} r = Relu (n) y = Conv (r, k2)"
    proto = model("float[batch, 3, 8, 8] x", "float y", body, 17, **numbers)
    for tensor in [tensor for tensor in proto.graph.initializer if tensor.name in ("mean", "k2")]:
        proto.graph.initializer.remove(tensor)
        array = numpy_helper.to_array(tensor)
        where = np.flatnonzero(array) if places == "counted through" else np.argwhere(array)
        values = numpy_helper.from_array(array[array != 0], tensor.name)
        stored = helper.make_sparse_tensor(values, numpy_helper.from_array(where, "places"), array.shape)
        if tensor.name == "k2":
            proto.graph.node.insert(0, helper.make_node("Constant", [], ["k2"], sparse_value=stored))
        else:
            proto.graph.sparse_initializer.append(stored)
    _, after = folded(proto, tmp_path)
    assert [kind for kind in kinds(after) if kind != "Constant"] == ["Conv", "Relu", "Conv"]
    assert not after.graph.sparse_initializer
    assert_equal(tmp_path, {"x": draw(2, 3, 8, 8)})


# What stays as it was


@pytest.mark.parametrize("name", ["X", "onnx::Conv_0", "input.1", "in/put:0", "class", "self", "a b"])
def test_any_name(tmp_path, name):
    proto = images()
    proto.graph.input[0].name = proto.graph.node[0].input[0] = name
    proto.graph.output[0].name = proto.graph.node[-1].output[0] = name + ".out"
    _, after = folded(proto, tmp_path)
    assert after.graph.input[0] == proto.graph.input[0] and after.graph.output[0] == proto.graph.output[0]
    assert "BatchNormalization" not in kinds(after)
    assert_equal(tmp_path, {name: draw(2, 3, 8, 8)})


def test_what_describes_a_model(tmp_path):
    proto = images()
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch size"
    proto.producer_name, proto.producer_version, proto.domain, proto.model_version = "tool", "7", "org.example", 5
    proto.doc_string, proto.graph.doc_string, proto.graph.node[0].doc_string = "model", "graph", "node"
    proto.metadata_props.add(key="names", value="{0: 'cat'}")
    _, after = folded(proto, tmp_path)
    for field in (
        "ir_version",
        "producer_name",
        "producer_version",
        "domain",
        "model_version",
        "doc_string",
        "metadata_props",
        "opset_import",
    ):
        assert getattr(after, field) == getattr(proto, field)
    assert after.metadata_props == proto.metadata_props
    assert after.graph.doc_string == "graph" and after.graph.node[0].doc_string == "node"
    assert after.graph.input == proto.graph.input and after.graph.output == proto.graph.output


def test_a_result_keeps_its_name_when_the_norm_that_wrote_it_goes(tmp_path):
    proto = images("r = Relu (n) y = Identity (r)")
    del proto.graph.node[2:]
    proto.graph.output[0].name = "n"
    proto.graph.value_info.append(helper.make_tensor_value_info("c", TensorProto.FLOAT, None))
    _, after = folded(proto, tmp_path)
    assert kinds(after) == ["Conv"] and after.graph.node[0].output == ["n"] and not after.graph.value_info
    assert_equal(tmp_path, {"x": draw(2, 3, 8, 8)})


def test_a_result_may_be_listed_twice(tmp_path):
    proto = images("r = Relu (n) y = Identity (r)")
    del proto.graph.node[2:]
    proto.graph.output[0].name = "n"
    proto.graph.output.append(proto.graph.output[0])
    _, after = folded(proto, tmp_path)
    assert kinds(after) == ["Conv"] and after.graph.output == proto.graph.output
    assert_equal(tmp_path, {"x": draw(2, 3, 8, 8)})


def test_dimensions_without_a_name_or_a_size(tmp_path):
    for number, change in enumerate(("", -1, None)):
        proto = images()
        for dim in proto.graph.input[0].type.tensor_type.shape.dim[::2]:
            dim.Clear()
            if change:
                dim.dim_value = change
        if change is None:
            proto.graph.input[0].type.tensor_type.ClearField("shape")
        (tmp_path / str(number)).mkdir()
        _, after = folded(proto, tmp_path / str(number))
        assert kinds(after) == ["Conv", "Relu", "Conv"] and after.graph.input == proto.graph.input


def test_a_product_stays_one_of_any_number_of_axes(tmp_path):
    """Where neither the file nor what reads its input shows that there are two."""
    body = "l = MatMul (x, w) m = Mul (l, gain) a = Add (m, shift) y = Tanh (a)"
    _, after = folded(model("float[] x", "float y", body, w=draw(3, 4), gain=draw(4), shift=draw(4)), tmp_path)
    proto = onnx.load(tmp_path / "in.onnx")
    assert kinds(after) == ["MatMul", "Add", "Tanh"] and not proto.graph.input[0].type.tensor_type.HasField("shape")
    for shape in [(2, 3), (2, 5, 3)]:
        assert_equal(tmp_path, {"x": draw(*shape)})


def test_float16_stays_float16(tmp_path):
    body = NORM + "r = Relu (n) y = Conv (r, k2)"
    proto = model("float16[batch, 3, 8, 8] x", "float16 y", body, 17, **weights(np.float16))
    result, after = folded(proto, tmp_path)
    assert kinds(after) == ["Conv", "Relu", "Conv"] and result.dtype == "float16"
    assert {tensor.data_type for tensor in after.graph.initializer} == {TensorProto.FLOAT16}
    assert_equal(tmp_path, {"x": draw(2, 3, 8, 8).astype(np.float16)}, rtol=2e-2)


def test_bfloat16_and_double(tmp_path):
    body = "l = MatMul (x, w) m = Mul (l, gain) y = MatMul (m, v)"
    arrays = {"w": draw(3, 4), "gain": draw(4) + 3, "v": draw(4, 2)}
    proto = model("double[batch, 3] x", "double y", body, **{name: a.astype(np.float64) for name, a in arrays.items()})
    _, after = folded(proto, tmp_path)
    assert kinds(after) == ["MatMul", "MatMul"]
    assert_equal(tmp_path, {"x": draw(2, 3).astype(np.float64)}, rtol=1e-14)


def test_initialisers_listed_as_inputs(tmp_path):
    """Up to IR 3 they have to be listed; from then on it means that a caller may set them."""
    proto = images(opset=9, ir=3)
    for tensor in proto.graph.initializer:
        proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    _, after = folded(proto, tmp_path)
    assert kinds(after) == ["Conv", "Relu", "Conv"]
    listed = {value.name for value in after.graph.input}
    assert listed == {"x", *(tensor.name for tensor in after.graph.initializer)}
    assert_equal(tmp_path, {"x": draw(2, 3, 8, 8)})


@pytest.fixture
def listing():
    """A file that lists all its weights among its inputs; callers may set them."""
    proto = images("r = Relu (n) z = Mul (r, volume) y = Conv (z, k2)", volume=np.float32(3))
    for tensor in proto.graph.initializer:
        proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return proto


def test_weights_that_are_all_listed_as_inputs_are_constants_and_leave_the_inputs(tmp_path, listing):
    result, after = folded(listing, tmp_path)
    assert kinds(after) == ["Conv", "Relu", "Conv"] and [value.name for value in after.graph.input] == ["x"]
    assert any("no longer listed among the inputs" in note for note in result.notes)
    assert_equal(tmp_path, {"x": draw(2, 3, 8, 8)})
    result, after = folded(listing, tmp_path, fold_defaults=False)
    assert after == listing and any("callers may set them" in note for note in result.notes)


def test_a_weight_that_is_listed_alone_is_offered_and_left_alone(tmp_path, listing):
    del listing.graph.input[1:-1]
    result, after = folded(listing, tmp_path)
    assert kinds(after) == ["Conv", "Relu", "Mul", "Conv"]
    assert [value.name for value in after.graph.input] == ["x", "volume"]
    assert any("left alone, because callers may set them" in note for note in result.notes)
    assert_equal(tmp_path, {"x": draw(2, 3, 8, 8), "volume": np.array(0.5, np.float32)})
    _, after = folded(listing, tmp_path, fold_defaults=True)
    assert kinds(after) == ["Conv", "Relu", "Conv"] and [value.name for value in after.graph.input] == ["x"]


def test_constants_that_a_file_computes_are_read(tmp_path):
    """As torch writes a bias before its own optimisation; what computed them goes with the last that reads them."""
    body = (
        "s = Shape <start: int = 0, end: int = 1> (k) z = Constant <value_int: int = 0> () a = CastLike (z, x) "
        "b = Expand (a, s) t = Identity (gain) c = Conv <pads: ints = [1, 1, 1, 1]> (x, k, b) "
        "n = BatchNormalization (c, t, shift, mean, variance) r = Relu (n) y = Conv (r, k2)"
    )
    _, after = folded(model("float[batch, 3, 8, 8] x", "float y", body, 17, **weights()), tmp_path)
    assert kinds(after) == ["Conv", "Relu", "Conv"]
    assert_equal(tmp_path, {"x": draw(2, 3, 8, 8)})


def test_links_into_the_folder_of_the_real_file(tmp_path):
    """As the cache of the Hugging Face hub has them."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir(), snapshot.mkdir()
    onnx.save(images(), blobs / "1f", save_as_external_data=True, location="model.onnx_data", size_threshold=0)
    (blobs / "model.onnx_data").rename(blobs / "2e")
    for name, blob in {"model.onnx": "1f", "model.onnx_data": "2e"}.items():
        (snapshot / name).symlink_to(blobs / blob)
    fold_file(snapshot / "model.onnx", tmp_path / "out.onnx")
    assert kinds(onnx.load(tmp_path / "out.onnx")) == ["Conv", "Relu", "Conv"]
    x = {"x": draw(2, 3, 8, 8)}
    before, after = (plain(path, x)[0] for path in (snapshot / "model.onnx", tmp_path / "out.onnx"))
    assert np.abs(before - after).max() <= 1e-5 * np.abs(before).max()


def test_quantised_weights_are_no_constants(tmp_path):
    body = "d = DequantizeLinear (q, scale) l = MatMul (x, d) m = Mul (l, gain) y = MatMul (m, w)"
    constants = {"q": np.ones((3, 4), np.int8), "scale": np.float32(0.1), "gain": draw(4) + 3, "w": draw(4, 2)}
    _, after = folded(model("float[batch, 3] x", "float y", body, 17, **constants), tmp_path)
    assert kinds(after) == ["DequantizeLinear", "MatMul", "MatMul"]
    assert numpy_helper.to_array(after.graph.initializer[0]).dtype == np.int8
    assert_equal(tmp_path, {"x": draw(2, 3)})


@pytest.mark.parametrize("where", ["raw", "float_data", "beside", "a Constant"])
def test_weights_wherever_they_are(tmp_path, where):
    proto = images()
    if where == "float_data":
        for tensor in proto.graph.initializer:
            array = numpy_helper.to_array(tensor)
            tensor.CopyFrom(helper.make_tensor(tensor.name, TensorProto.FLOAT, array.shape, array.ravel()))
    if where == "a Constant":
        held = [helper.make_node("Constant", [], [t.name], value=t) for t in proto.graph.initializer]
        nodes = [*held, *proto.graph.node]
        del proto.graph.node[:], proto.graph.initializer[:]
        proto.graph.node.extend(nodes)
    if where == "beside":
        onnx.save(proto, tmp_path / "in.onnx", save_as_external_data=True, location="in.weights", size_threshold=0)
        fold_file(tmp_path / "in.onnx", tmp_path / "out.onnx")
        after = onnx.load(tmp_path / "out.onnx")
    else:
        _, after = folded(proto, tmp_path)
    assert [kind for kind in kinds(after) if kind != "Constant"] == ["Conv", "Relu", "Conv"]
    assert_equal(tmp_path, {"x": draw(2, 3, 8, 8)})


UNKNOWN = {
    "If": (
        "yes = Constant <value = bool {1}> () r = If (yes) <then_branch = t () => (float[a, b, c, d] p) "
        "{ p = Relu (n) }, else_branch = e () => (float[a, b, c, d] q) { q = Neg (n) }> y = Conv (r, k2)",
        ["Constant", "If", "Conv"],
    ),
    "quantised": (
        "q, s, z = DynamicQuantizeLinear (n) r = DequantizeLinear (q, s, z) y = Conv (r, k2)",
        ["DynamicQuantizeLinear", "DequantizeLinear", "Conv"],
    ),
    "recurrent": (
        "p = GlobalAveragePool (n) f = Flatten (p) u = Unsqueeze (f, first) "
        "y, h = RNN <hidden_size: int = 2> (u, w, v)",
        ["GlobalAveragePool", "Flatten", "Unsqueeze", "RNN"],
    ),
    "of ONNX Runtime": ("g = com.microsoft.QuickGelu (n) y = Conv (g, k2)", ["QuickGelu", "Conv"]),
    "with a shape from data": (
        "a = ReduceMax <keepdims: int = 0> (n) b = Clip (a, zero, zero) s = Cast <to: int = 7> (b) "
        "u = Unsqueeze (s, first) h = Shape (n) o = Concat <axis: int = 0> (u, h) r = Reshape (n, h) "
        "y = Conv (r, k2)",
        ["ReduceMax", "Clip", "Cast", "Unsqueeze", "Shape", "Concat", "Reshape", "Conv"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_is_unknown_passes_through_and_the_rest_folds(tmp_path, case):
    tail, left = UNKNOWN[case]
    constants = {"w": draw(1, 2, 4), "v": draw(1, 2, 2), "first": np.array([0]), "zero": np.float32(0)}
    _, after = folded(images(tail, **read(tail, constants)), tmp_path)
    assert kinds(after) == ["Conv", *left]
    assert_equal(tmp_path, {"x": draw(2, 3, 8, 8)})


# Options and refusals


def test_inputs_can_be_bounded(tmp_path):
    body = "t = Clip (tokens, low, high) e = Gather (table, t) s = Mul (e, gain) y = MatMul (s, w)"
    constants = {"table": draw(7, 4), "gain": draw(4), "w": draw(4, 2), "low": np.int64(0), "high": np.int64(6)}
    proto = model("int64[batch, seq] tokens", "float[batch, seq, 2] y", body, **constants)
    result, after = folded(proto, tmp_path, inputs=["tokens:int64[batch,seq<=4]<7"])
    assert kinds(after) == ["Clip", "Gather", "MatMul"]
    assert all(int(shapes.rpartition(",")[2].strip("]")) <= 4 for shapes in result.verification.shapes)


def test_float16_on_request(tmp_path):
    _, after = folded(images(), tmp_path, dtype="float16")
    assert (
        "BatchNormalization" not in kinds(after)
        and after.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT
    )
    assert {tensor.data_type for tensor in after.graph.initializer} == {TensorProto.FLOAT16}
    assert_equal(tmp_path, {"x": draw(2, 3, 8, 8)}, rtol=2e-2)


def test_graph_passes_are_for_transformers_of_new_operator_sets(tmp_path):
    result, _ = folded(images(), tmp_path, target="cpu-single")
    assert any("no graph passes for cpu-single" in note for note in result.notes)
    body = (
        "p = MatMul (x, up) b = Add (p, bias) g = Gelu (b) q = MatMul (g, down) c = Add (q, last) s = Add (x, c) "
        "y = Mul (s, gain)"
    )
    constants = {"up": draw(4, 6), "bias": draw(6), "down": draw(6, 4), "last": draw(4), "gain": draw(4)}
    proto = model("float[batch, seq, 4] x", "float[batch, seq, 4] y", body, 23, **constants)
    result, after = folded(proto, tmp_path, target="cpu-single")
    assert result.passes["gemm2d"] == 2 and "Gemm" in kinds(after)
    assert_equal(tmp_path, {"x": draw(2, 5, 4)})
