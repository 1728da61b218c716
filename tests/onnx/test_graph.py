import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from normfuse.onnx import GraphError, summarize

GAIN, WEIGHT, SCALAR = np.ones(4, np.float32), np.ones((4, 4), np.float32), np.float32(2)


def saved(path, nodes, **constants):
    arrays = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node(op, inputs.split(), [output], name=output) for op, inputs, output in nodes],
        "g",
        [value("x", TensorProto.FLOAT, [2, 4])],
        [value(nodes[-1][2], TensorProto.FLOAT, None)],
        arrays,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), path)
    return path


@pytest.mark.parametrize(
    ("nodes", "affines"),
    [
        ([("Mul", "x gain", "y")], ["y"]),
        ([("Sub", "gain x", "y")], ["y"]),
        ([("Add", "x gain", "y")], ["y"]),
        ([("Mul", "x scalar", "y")], []),
        ([("Mul", "x x", "y")], []),
        ([("Add", "x weight", "y")], []),
        ([("MatMul", "x weight", "p"), ("Add", "p gain", "y")], []),
        ([("MatMul", "x weight", "p"), ("Transpose", "p", "t"), ("Add", "t gain", "y")], []),
        ([("MatMul", "x weight", "p"), ("Mul", "p gain", "y")], ["y"]),
        ([("MatMul", "x x", "p"), ("Add", "p gain", "y")], ["y"]),
    ],
)
def test_per_channel_arithmetic(tmp_path, nodes, affines):
    summary = summarize(saved(tmp_path / "m.onnx", nodes, gain=GAIN, weight=WEIGHT, scalar=SCALAR))
    assert summary.affines == affines and summary.norms == []
    assert summary.node_count == len(nodes) and summary.opset == 20 and summary.dtype == "float32"


@pytest.mark.parametrize(
    "nodes",
    [
        [("LayerNormalization", "x gain", "n")],
        [("Mul", "x x", "s"), ("ReduceMean", "s", "m"), ("Add", "m scalar", "e"), ("Sqrt", "e", "n")],
        [("Mul", "x x", "s"), ("ReduceMean", "s", "m"), ("Sqrt", "m", "n")],
    ],
)
def test_norms_as_nodes_and_spelled_out(tmp_path, nodes):
    assert summarize(saved(tmp_path / "m.onnx", nodes, gain=GAIN, scalar=SCALAR)).norms == ["n"]


def test_a_square_root_of_something_else_is_no_norm(tmp_path):
    nodes = [("ReduceSum", "x", "m"), ("Add", "m scalar", "e"), ("Sqrt", "e", "n")]
    assert summarize(saved(tmp_path / "m.onnx", nodes, scalar=SCALAR)).norms == []


def test_what_is_no_onnx_file_is_refused(tmp_path):
    for name, data in (("text", b"hello"), ("empty", b"")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(GraphError, match="not an ONNX file"):
            summarize(tmp_path / name)
    with pytest.raises(GraphError, match="cannot read"):
        summarize(tmp_path / "absent")
