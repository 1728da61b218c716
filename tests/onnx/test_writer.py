import logging
import re

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny_models
import torch
from torch import nn
from torch.export import Dim

from normfuse.checkpoint import parse_input
from normfuse.onnx import WriteError, export, summarize, write
from normfuse.onnx.workarounds.torch_onnx_refusals import translatable


@pytest.fixture(scope="module")
def program():
    model = tiny_models.trained(tiny_models.Perceptron(width=64))
    return torch.export.export(model, (torch.ones(3, 64),), dynamic_shapes={"x": {0: Dim("batch")}})


def run(path, **inputs):
    return onnxruntime.InferenceSession(str(path)).run(None, inputs)[0]


def test_names_of_inputs_outputs_and_dynamic_dimensions(program, tmp_path):
    (path,) = write(program, tmp_path / "m.onnx", inputs=[parse_input("x:float32[batch,64]")])
    graph = onnx.load(path).graph
    assert [i.name for i in graph.input] == ["x"] and [o.name for o in graph.output] == ["output"]
    for value in (graph.input[0], graph.output[0]):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    for value in graph.value_info:
        assert not any(dim.dim_param.startswith("s") for dim in value.type.tensor_type.shape.dim)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_outputs_of_a_dictionary_keep_their_keys(tmp_path, dtype):
    class Several(nn.Module):
        def forward(self, x):
            return {"x": x + 1, "nested": [x * 2, x * 3], "relu": x.relu().exp()}  # a value inside is called relu, too

    write(torch.export.export(Several(), (torch.ones(2),)), tmp_path / "m.onnx", dtype=dtype)
    outputs = onnx.load(tmp_path / "m.onnx").graph.output
    assert [output.name for output in outputs] == ["x_out", "nested_0", "nested_1", "relu"]
    got = onnxruntime.InferenceSession(tmp_path / "m.onnx").run(None, {"x": np.ones(2, np.float32)})
    np.testing.assert_allclose([value[0] for value in got], [2, 2, 3, np.e], rtol=1e-3)


def test_no_unused_initializers_no_warnings_no_traces_of_the_machine(program, tmp_path, capfd, caplog, recwarn):
    """What a process of its own prints is tested with the command."""
    (path,) = write(program, tmp_path / "m.onnx")
    onnxruntime.InferenceSession(path)
    assert capfd.readouterr() == ("", "") and not recwarn.list
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    graph = onnx.load(path).graph
    used = {name for node in graph.node for name in node.input}
    assert {tensor.name for tensor in graph.initializer} <= used
    assert b"tiny_models.py" not in path.read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_weights_beyond_the_limit_of_one_file_go_beside_it(program, tmp_path, dtype):
    x = torch.randn(2, 64)
    expected = program.module()(x).detach().numpy()
    inside = write(program, tmp_path / "one.onnx", dtype=dtype)
    apart = write(program, tmp_path / "two.onnx", dtype=dtype, one_file_limit=1000)
    assert [p.name for p in inside] == ["one.onnx"]
    assert apart[0].name == "two.onnx" and re.fullmatch(r"two\.onnx\.[0-9a-f]{8}\.data", apart[1].name)
    assert sorted(tmp_path.iterdir()) == [*inside, *apart]
    assert apart[0].stat().st_size < 4000 < apart[1].stat().st_size
    assert summarize(apart[0]).bytes == sum(p.stat().st_size for p in apart)
    np.testing.assert_allclose(run(apart[0], x=x.numpy()), expected, rtol=0, atol=2e-2 * abs(expected).max())
    np.testing.assert_array_equal(run(apart[0], x=x.numpy()), run(inside[0], x=x.numpy()))


def test_float16_keeps_float32_at_the_border_and_halves_the_weights(program, tmp_path):
    (half,) = write(program, tmp_path / "half.onnx", dtype="float16")
    graph = onnx.load(half).graph
    for value in (*graph.input, *graph.output):
        assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    matrices = [tensor for tensor in graph.initializer if len(tensor.dims) == 2]
    assert matrices and all(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in matrices)
    assert summarize(half).dtype == "float16"


def test_weights_beyond_float16_are_named(tmp_path):
    model = tiny_models.trained(tiny_models.Perceptron())
    model.inner.bias.data[0], model.head.bias.data[1] = -70_000.0, 70_000.0
    program = torch.export.export(model, (torch.ones(3, 4),))
    write(program, tmp_path / "m.onnx")
    with pytest.raises(WriteError, match=r"2 weight.*inner\.bias.*7e\+04.*head\.bias.*7e\+04.*export float32"):
        write(program, tmp_path / "m.onnx", dtype="float16")


def test_an_operation_without_translation_is_named_in_one_line_after_one_try(tmp_path, monkeypatch):
    class Special(nn.Module):
        def forward(self, x):
            return torch.special.bessel_j0(x)

    tried, real = [], torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", lambda *a, **k: tried.append(k["opset_version"]) or real(*a, **k))
    for way in (
        lambda: write(torch.export.export(Special(), (torch.ones(3),)), tmp_path / "m.onnx"),
        lambda: export(Special(), tmp_path / "m.onnx", example_inputs=torch.ones(3), target="cpu"),
    ):
        with pytest.raises(WriteError, match=r"^opset 23: ONNX has no translation of \w+\.bessel_j0") as caught:
            way()
        assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
    assert tried == [23, 23, 23]  # the second way with passes and without


def test_an_unknown_dtype_is_refused(program, tmp_path):
    with pytest.raises(WriteError, match="'int8' is not one of float32, float16"):
        write(program, tmp_path / "m.onnx", dtype="int8")


class AddedBias(nn.Module):
    """BEiT, T5: the mask is computed from parameters."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.linspace(-1, 1, 17 * 17 * 2).view(17, 17, 2))

    def forward(self, x):
        heads = x.unflatten(-1, (2, 16)).transpose(1, 2)
        mask = self.bias.permute(2, 0, 1).contiguous().unsqueeze(0)
        mixed = nn.functional.scaled_dot_product_attention(heads, heads, heads, mask)
        return mixed.transpose(1, 2).reshape(x.shape[0], 17, 32)


def test_reshapes_of_attention_with_a_bias(tmp_path):
    """torch.onnx makes views of them that do not fit the strides it finds later."""
    x = torch.randn(3, 17, 32, generator=torch.Generator().manual_seed(0))
    program = torch.export.export(AddedBias().eval(), (x,), dynamic_shapes=({0: Dim("batch")},))
    before = str(program)
    (path,) = write(program, tmp_path / "m.onnx")
    assert str(program) == before
    expected = program.module()(x).detach().numpy()
    np.testing.assert_allclose(run(path, x=x.numpy()), expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("opset", [20, 23])
def test_attention_without_heads(tmp_path, axes, opset):
    class Attends(nn.Module):
        def forward(self, x, *masks):
            return [nn.functional.scaled_dot_product_attention(x, 2 * x, x + 1, mask) for mask in (None, *masks)]

    place = (0,) * (3 - axes)
    given = torch.randn(2, 4, 8)[place], torch.randn(4, 4), torch.randn(2, 4, 4)[place]
    program = torch.export.export(Attends(), given)
    before = str(program)
    write(program, tmp_path / "m.onnx", opset=opset)
    assert str(program) == before
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    feeds = dict(zip((i.name for i in session.get_inputs()), (x.numpy() for x in given), strict=True))
    for got, want in zip(session.run(None, feeds), Attends()(*given), strict=True):
        torch.testing.assert_close(torch.from_numpy(got), want)


def test_an_input_that_is_called_as_a_builtin_keeps_its_name(tmp_path):
    class Flat(nn.Module):
        def forward(self, input):
            return input.reshape(-1) * 2

    program = torch.export.export(Flat(), (torch.ones(2, 3),))
    (path,) = write(program, tmp_path / "m.onnx")
    assert [entry.name for entry in onnx.load(path).graph.input] == ["input"]
    with translatable(program):
        names = [node.name for node in program.graph.nodes if node.op == "placeholder"]
        assert tuple(names) == program.graph_signature.user_inputs
