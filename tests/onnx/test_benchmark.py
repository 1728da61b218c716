import math

import onnx
import onnx.parser
import pytest
import tiny_models
import torch
from torch import nn

from normfuse.checkpoint import parse_input
from normfuse.onnx import BenchError, bench, write

AUTO = torch.export.Dim.AUTO


class Table(nn.Module):
    """x [batch, seq, width], seq up to 16."""

    def __init__(self, width):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(16, width))
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        return self.linear(x[..., :1] + self.table[: x.shape[1]])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    shapes = {"x": {0: torch.export.Dim("batch"), 1: torch.export.Dim("seq", max=16)}}
    for name, width in (("small", 8), ("large", 512)):
        program = torch.export.export(Table(width).eval(), (torch.ones(3, 6, 1),), dynamic_shapes=shapes)
        write(program, folder / f"{name}.onnx", inputs=[parse_input("x:float32[batch,seq,1]")])
    return folder / "small.onnx", folder / "large.onnx"


def test_two_files_are_timed_round_by_round(files):
    timing = bench(files, sizes={"seq": 16}, rounds=20)
    assert timing.shapes == {"x": [1, 16, 1]}
    assert [len(times) for times in timing.milliseconds] == [20, 20]
    middle, low, high = timing.ratio()
    assert low <= middle <= high
    assert middle > 2, "a network 64 times as wide is slower"


def test_a_file_against_itself_is_about_as_fast(files):
    middle, _, _ = bench([files[1], files[1]], sizes={"seq": 16}, rounds=40).ratio()
    assert 0.7 < middle < 1.4


def test_what_cannot_be_timed(files, tmp_path):
    with pytest.raises(BenchError, match="at least 4"):
        bench(files, rounds=3)
    with pytest.raises(BenchError, match="'length' names no dynamic dimension"):
        bench(files, sizes={"length": 3})
    with pytest.raises(BenchError, match="give other sizes") as caught:
        bench(files, sizes={"seq": 17}, rounds=4)
    assert "\n" not in str(caught.value)
    write(torch.export.export(tiny_models.Perceptron().eval(), (torch.ones(3, 4),)), tmp_path / "p.onnx")
    with pytest.raises(BenchError, match="takes other inputs"):
        bench([files[0], tmp_path / "p.onnx"], sizes={"seq": 16})


def model_file(path, text):
    onnx.save(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {text}'), path)
    return path


def test_dimensions_get_sensible_sizes(tmp_path):
    inputs = "float[batch_size, seq] a, float[N, num_channels, height, width] b, float[batch_size, past, 2] c"
    text = f"g ({inputs}) => (float[batch_size, seq] y) {{ y = Abs (a) }}"
    timing = bench([model_file(tmp_path / "m.onnx", text)], rounds=4)
    assert timing.shapes == {"a": [1, 128], "b": [1, 3, 224, 224], "c": [1, 128, 2]} and timing.notes == []


def test_dimensions_without_names_go_by_their_place(tmp_path):
    path = model_file(tmp_path / "m.onnx", "g (float[?, ?, ?, ?] x, float[?, ?] y) => (float[?, ?] z) { z = Abs (y) }")
    assert bench([path], rounds=4).shapes == {"x": [1, 3, 224, 224], "y": [1, 128]}
    assert bench([path], rounds=4, sizes={"y.1": 5}).shapes["y"] == [1, 5]


def test_channels_are_as_many_as_a_convolution_has(tmp_path):
    """Of unsigned numbers, as cameras give them."""
    text = """<ir_version: 8, opset_import: ["" : 17]> g (uint16[b, c, h, w] x) => (float y)
    { f = Cast <to: int = 1> (x) y = Conv (f, k) }"""
    proto = onnx.parser.parse_model(text)
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    proto.graph.initializer.append(onnx.helper.make_tensor("k", 1, [2, 9, 3, 3], [0.0] * 162))
    onnx.save(proto, tmp_path / "m.onnx")
    assert bench([tmp_path / "m.onnx"], rounds=4, sizes={"h": 8, "w": 8}).shapes == {"x": [1, 9, 8, 8]}


@pytest.mark.parametrize(
    ("body", "weight", "shape"),
    [
        ("y = Conv (x, k)", [2, 9, 3, 3], [1, 9, 8, 8]),
        ("y = MatMul (x, k)", [9, 2], [1, 9]),
        ("y = Gather (k, i) z = Abs (x)", [9, 2], [1, 5]),
    ],
)
def test_an_input_without_a_shape_has_the_axes_that_are_needed(tmp_path, body, weight, shape):
    inputs = "float x, int64[n] i" if "i)" in body else "float x"
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> g ({inputs}) => (float y) {{ {body} }}')
    for value in (proto.graph.input[0], proto.graph.output[0]):
        value.type.tensor_type.ClearField("shape")
    proto.graph.initializer.append(onnx.helper.make_tensor("k", 1, weight, [0.0] * math.prod(weight)))
    onnx.save(proto, tmp_path / "m.onnx")
    sizes = {"x.2": 8, "x.3": 8} if len(shape) == 4 else {"x.1": 5} if "i)" in body else {}
    assert bench([tmp_path / "m.onnx"], rounds=4, sizes=sizes).shapes["x"] == shape


def test_sums_of_dimensions_follow_their_terms(tmp_path):
    text = "g (float[batch, past] a, float[batch, past] b) => (float[batch, past] y) { y = Abs (a) }"
    path = model_file(tmp_path / "m.onnx", text)
    model = onnx.load(path)
    model.graph.input[1].type.tensor_type.shape.dim[1].dim_param = "past + 1"
    onnx.save(model, path)
    assert bench([path], rounds=4, sizes={"past": 6}).shapes == {"a": [1, 6], "b": [1, 7]}


def test_bounds_that_the_file_tells_are_respected(tmp_path):
    program = torch.export.export(Table(8).eval(), (torch.ones(3, 6, 1),), dynamic_shapes={"x": {0: AUTO, 1: AUTO}})
    write(program, tmp_path / "m.onnx", inputs=[parse_input("x:float32[batch,seq<=16,1]")])
    timing = bench([tmp_path / "m.onnx"], rounds=4)
    assert timing.shapes == {"x": [1, 16, 1]} and timing.notes == []


def test_bounds_that_only_running_shows_are_respected(files):
    timing = bench(files, rounds=4)
    assert timing.shapes == {"x": [1, 16, 1]}
    assert len(timing.notes) == 1 and timing.notes[0].startswith("seq is 16, not 128: ")


def test_inputs_with_other_names_are_mapped(tmp_path):
    first = model_file(
        tmp_path / "a.onnx", "g (float[batch, 4] x, int64[batch] n) => (float[batch, 4] y) { y = Abs (x) }"
    )
    second = model_file(tmp_path / "b.onnx", "g (float16[2, 4] z, int32[2] m) => (float16[2, 4] y) { y = Abs (z) }")
    with pytest.raises(BenchError, match="takes other inputs than") as caught:
        bench([first, second], rounds=4)
    assert caught.value.advice == ("--map x=z", "--map n=m")
    timing = bench([first, second], mapping={"x": "z", "n": "m"}, rounds=4)
    assert timing.shapes == {"x": [2, 4], "n": [2]}, "a size that one file fixes holds for both"
    with pytest.raises(BenchError, match="has no input 'q' to map"):
        bench([first, second], mapping={"q": "z"}, rounds=4)
    with pytest.raises(BenchError, match=r"'m' is a tensor.int32. of 1 axes, not a tensor.float. of 2"):
        bench([first, second], mapping={"x": "m", "n": "z"}, rounds=4)
