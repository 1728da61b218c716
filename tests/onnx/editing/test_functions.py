"""Functions that a file defines itself: those with norms are written out, others stay."""

import pytest
from onnx import helper
from onnx_files import assert_equal, folded, images, kinds
from onnx_text import draw

from normfuse.onnx import GraphError


@pytest.mark.parametrize("domain", ["own", ""])
def test_functions_of_the_file_stay_even_where_they_shadow_an_operator(tmp_path, domain):
    kind = "Twice" if domain else "Relu"
    proto = images("r = Relu (n) y = Conv (r, k2)", extra=[domain] if domain else [])
    proto.graph.node[2].op_type, proto.graph.node[2].domain = kind, domain
    body = [helper.make_node("Neg", ["a"], ["z"])]
    proto.functions.append(helper.make_function(domain, kind, ["a"], ["z"], body, [helper.make_opsetid("", 17)]))
    _, after = folded(proto, tmp_path)
    assert kinds(after) == ["Conv", kind, "Conv"] and after.functions == proto.functions
    assert_equal(tmp_path, {"x": draw(2, 3, 8, 8)})


def in_functions():
    """A norm in a function that another one calls, beside one without a norm."""
    numbers, operators = ["gain", "shift", "mean", "variance"], [helper.make_opsetid("", 17)]
    proto = images("y = own.Twice (n)", extra=["own"])
    del proto.graph.node[:2]
    proto.graph.node.insert(0, helper.make_node("Block", ["x", "k", *numbers], ["n"], domain="own"))
    bodies = {
        "Norm": (["a"], [helper.make_node("BatchNormalization", ["a", *numbers], ["z"])]),
        "Block": (["a", "k"], [
            helper.make_node("Conv", ["a", "k"], ["c"]), helper.make_node("Norm", ["c", *numbers], ["z"], domain="own")
        ]),
        "Twice": (["a"], [helper.make_node("Add", ["a", "a"], ["z"])]),
    }  # fmt: skip
    for name, (given, nodes) in bodies.items():
        given = given if name == "Twice" else [*given, *numbers]
        domains = [*operators, helper.make_opsetid("own", 1)]
        proto.functions.append(helper.make_function("own", name, given, ["z"], nodes, domains))
    return proto


def test_functions_with_norms_are_written_out(tmp_path):
    result, after = folded(in_functions(), tmp_path)
    assert kinds(after) == ["Conv", "Add"] and not after.functions
    assert "functions written out, because norms are inside: Norm, Block, Twice" in result.notes
    assert_equal(tmp_path, {"x": draw(2, 3, 8, 8)})


def test_functions_that_call_each_other_are_refused_in_one_line(tmp_path):
    proto = in_functions()
    proto.functions[0].node.append(helper.make_node("Block", ["z"] * 6, ["again"], domain="own"))
    with pytest.raises(GraphError, match="cannot load it") as refused:
        folded(proto, tmp_path)
    assert "\n" not in str(refused.value)
