import os
from pathlib import Path

import pytest
import tiny_models
import torch
from checkpoints import PERCEPTRON, own_record, perceptron, refusal, save_perceptron, write_format_1
from safetensors.torch import save_file
from torch import nn
from torch.export import Dim

from normfuse.checkpoint import CheckpointError, Derived, Dimension, inputs, load, parse_input, save

# Round trips


def test_round_trip_of_weights_inputs_and_dynamic_dimensions(tmp_path):
    model = tiny_models.trained(tiny_models.Encoder(depth=2, placement="post"))
    tokens, pad_mask = torch.randint(11, (2, 6)), torch.arange(6).expand(2, 6) > 3
    batch, seq = Dim("batch"), Dim("seq", min=2, max=16)
    shapes = {"tokens": {0: batch, 1: seq}, "pad_mask": {0: batch, 1: seq}}
    save(model, tmp_path / "m.pt", example_inputs=(tokens, pad_mask), dynamic_shapes=shapes)
    loaded = load(tmp_path / "m.pt")
    assert loaded.input_names == ("tokens", "pad_mask")
    assert loaded.inputs[0].dims == (Dimension("batch"), Dimension("seq", 2, 16))
    assert all(torch.equal(a, b) for a, b in zip(loaded.example_inputs, (tokens, pad_mask), strict=True))
    assert torch.equal(loaded.expected_outputs[0], model(tokens, pad_mask))
    torch.testing.assert_close(loaded.run(loaded.example_inputs)[0], model(tokens, pad_mask))


def test_the_file_is_data_and_appears_whole(tmp_path):
    save_perceptron(tmp_path / "m.pt")
    assert os.listdir(tmp_path) == ["m.pt"]
    record = own_record(tmp_path / "m.pt")
    assert record["inputs"] == [
        {"name": "x", "dtype": "float32", "dims": [{"name": "batch", "minimum": 1, "maximum": None}, 4]}
    ]
    assert record["outputs"] == ["output"]
    assert record["written_with"]["torch"] == torch.__version__


def test_other_tools_open_the_file_and_find_nothing_of_this_machine_in_it(tmp_path):
    model = save_perceptron(tmp_path / "m.pt")
    program = torch.export.load(tmp_path / "m.pt")
    assert torch.equal(program.module()(torch.ones(3, 4))[0], model(torch.ones(3, 4)))
    data = (tmp_path / "m.pt").read_bytes()
    assert b".py" not in data and b"site-packages" not in data and str(Path.cwd()).encode() not in data
    assert b"tiny_models.Perceptron" in data  # names of classes stay, for the report


def test_classes_that_nobody_could_import_are_saved(tmp_path):
    class Local(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
            self.scale = torch.rand(3)  # neither parameter nor buffer

        def forward(self, x):
            return {"y": self.inner(x) * self.scale}

    model = Local().eval()
    model.inner[1].eps = 0.5  # changed after construction
    model.inner[0].register_forward_hook(lambda module, args, out: out * 2)
    nn.utils.parametrizations.weight_norm(model.inner[2])
    x = torch.randn(3, 4)
    save(model, tmp_path / "m.pt", example_inputs=x, dynamic_shapes=({0: "batch"},))
    loaded = load(tmp_path / "m.pt")
    assert loaded.outputs == ("y",)
    for rows in (1, 5):
        x = torch.randn(rows, 4)
        torch.testing.assert_close(loaded.run([x])[0], model(x)["y"])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_networks_are_saved(tmp_path, kind):
    model, x = kind(4, 5, 2, dropout=0.5).eval(), torch.randn(7, 2, 4)
    save(model, tmp_path / "m.pt", example_inputs=x)
    torch.testing.assert_close(load(tmp_path / "m.pt").run([x])[0], model(x)[0])


def test_sizes_that_follow_from_others_come_back(tmp_path):
    class Cached(nn.Module):
        def forward(self, new, past, mask):
            return torch.cat([past, new], 1) * mask

    past = Dim("past", max=64)
    examples = (torch.ones(2, 1), torch.ones(2, 5), torch.ones(2, 6))
    shapes = ({0: "batch"}, {0: "batch", 1: past}, {0: "batch", 1: past + 1})
    save(Cached(), tmp_path / "m.pt", example_inputs=examples, dynamic_shapes=shapes)
    batch, past = Dimension("batch"), Dimension("past", 1, 64)
    loaded = load(tmp_path / "m.pt")
    assert [spec.dims for spec in loaded.inputs] == [(batch, 1), (batch, past), (batch, Derived(((past, 1),), 1))]
    assert loaded.run([torch.ones(3, 1), torch.ones(3, 2), torch.ones(3, 3)])[0].shape == (3, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_module_of_another_dtype_is_traced_in_float32_and_its_own_outputs_are_recorded(tmp_path, dtype):
    model = save_perceptron(tmp_path / "m.pt", perceptron().to(dtype), example_inputs=torch.ones(2, 4, dtype=dtype))
    loaded = load(tmp_path / "m.pt")
    for name, tensor in loaded.program.state_dict.items():
        assert torch.equal(tensor, model.state_dict()[name].float())
    assert torch.equal(loaded.expected_outputs[0], model(torch.ones(2, 4, dtype=dtype)))
    assert loaded.expected_outputs[0].dtype == dtype and loaded.inputs[0].dtype == torch.float32
    assert f"traced in float32; the model has {str(dtype).removeprefix('torch.')}" in loaded.notes


def test_a_cast_to_a_fixed_dtype_is_named(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, x):
            return self.linear(x.bfloat16())

    with pytest.raises(
        CheckpointError, match=r"is traced in float32, where Net fails.*x\.to\(self\.weight\.dtype\)"
    ) as caught:
        save(Net().bfloat16(), tmp_path / "m.pt", example_inputs=torch.randn(3, 4))
    assert "\n" not in str(caught.value) and not any(tmp_path.iterdir())


def test_shared_weights_are_stored_once_and_views_without_their_surroundings(tmp_path):
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    model[0].weight = nn.Parameter(torch.zeros(1000, 64)[:64])
    model[1].weight = model[0].weight
    save(model, tmp_path / "m.pt", example_inputs={"input": torch.ones(1, 64)})
    assert (tmp_path / "m.pt").stat().st_size < 2 * 64 * 64 * 4
    state = load(tmp_path / "m.pt").program.state_dict
    assert state["0.weight"].data_ptr() == state["1.weight"].data_ptr()


def test_keyword_inputs_that_skip_an_argument(tmp_path):
    class Optional(nn.Module):
        def forward(self, x, gain=None, shift=None):
            return x + shift

    save(Optional(), tmp_path / "m.pt", example_inputs={"x": torch.ones(2), "shift": torch.ones(2)})
    loaded = load(tmp_path / "m.pt")
    assert loaded.input_names == ("x", "shift")


def test_a_compiled_model_is_saved_as_the_model_itself(tmp_path):
    save_perceptron(tmp_path / "m.pt", torch.compile(perceptron()))
    assert "inner.weight" in load(tmp_path / "m.pt").program.state_dict


# What is given when loading


def test_model_and_its_arguments_go_over_those_of_format_1(tmp_path):
    write_format_1(tmp_path / "m.pt", factory=None)
    assert "does not say how to build" in refusal(tmp_path / "m.pt")
    assert load(tmp_path / "m.pt", model=PERCEPTRON).program.state_dict["inner.weight"].shape == (4, 4)
    assert load(tmp_path / "m.pt", model=tiny_models.Perceptron, model_args={"classes": 3}) is not None
    assert "'clases'" in refusal(tmp_path / "m.pt", model=PERCEPTRON, model_args={"clases": 5})
    assert "head.weight" in refusal(tmp_path / "m.pt", model=PERCEPTRON, model_args={"classes": 5})


def test_a_model_from_the_working_directory_is_found_only_when_a_person_names_it(tmp_path, monkeypatch):
    (tmp_path / "own_model_of_mine.py").write_text("from torch import nn\nclass Net(nn.Linear):\n    pass\n")
    monkeypatch.chdir(tmp_path)
    net = nn.Linear(4, 2)
    write_format_1(Path("m.pt"), net, "own_model_of_mine:Net", {"in_features": 4, "out_features": 2})
    assert "cannot be imported here" in refusal(Path("m.pt"), trust=True)
    loaded = load("m.pt", model="own_model_of_mine:Net", inputs=["input:float32[batch,4]"])
    assert torch.equal(loaded.program.state_dict["weight"], net.weight)


def test_a_module_to_load_into_gets_the_weights_of_a_program(tmp_path):
    model, empty = save_perceptron(tmp_path / "m.pt"), tiny_models.Perceptron()
    assert "own program" in load(tmp_path / "m.pt", model=empty).notes[0]
    for name, value in model.state_dict().items():
        assert torch.equal(empty.state_dict()[name], value)
    with pytest.raises(CheckpointError, match="does not fit Linear"):
        load(tmp_path / "m.pt", model=nn.Linear(3, 3))


def test_a_model_that_a_file_does_not_need_is_said_not_to_be_used(tmp_path):
    save_perceptron(tmp_path / "m.pt")
    assert load(tmp_path / "m.pt", model="no_such_package:Net").notes == (
        "not used, since the file holds its program: model",
    )


def test_a_program_from_elsewhere_is_a_checkpoint_without_trust(tmp_path):
    model = perceptron()
    program = torch.export.export(model, (torch.ones(3, 4),), dynamic_shapes={"x": {0: Dim("batch", max=64)}})
    torch.export.save(program, tmp_path / "m.pt2")
    loaded = load(tmp_path / "m.pt2")
    assert loaded.input_names == ("x",) and loaded.inputs[0].dims[0].maximum == 64 and loaded.outputs == ("output",)
    assert torch.equal(loaded.example_inputs[0], torch.ones(3, 4))
    torch.testing.assert_close(loaded.run([torch.ones(5, 4)])[0], model(torch.ones(5, 4)))
    assert load(tmp_path / "m.pt2", inputs=["x:float32[rows<=9,4]"]).inputs[0].dims == (Dimension("rows", 1, 9), 4)
    assert "takes x" in refusal(tmp_path / "m.pt2", inputs=["y:float32[batch,4]"])
    assert "not x:float32[batch,5]" in refusal(tmp_path / "m.pt2", inputs=["x:float32[batch,5]"])
    torch.export.save(torch.export.export(model.double(), (torch.ones(3, 4).double(),)), tmp_path / "m.pt2")
    assert load(tmp_path / "m.pt2").inputs[0].dtype == torch.float32


@pytest.mark.parametrize("kind", ["state_dict", "safetensors", "legacy"])
def test_bare_weights_need_a_model_and_inputs(tmp_path, kind):
    model = perceptron()
    path = tmp_path / ("m.safetensors" if kind == "safetensors" else "m.pt")
    if kind == "safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=kind == "state_dict")
    assert "--model" in refusal(path)
    assert "--input" in refusal(path, model=PERCEPTRON)
    assert "forward takes x" in refusal(path, model=PERCEPTRON, inputs=["tokens:int64[2]"])
    loaded = load(path, model=PERCEPTRON, inputs=["x:float32[batch,4]"])
    assert loaded.example_inputs[0].shape == (3, 4)
    torch.testing.assert_close(loaded.run(loaded.example_inputs)[0], model(*loaded.example_inputs))


def test_given_inputs_replace_recorded_ones_and_use_their_examples_if_they_fit(tmp_path):
    save_perceptron(tmp_path / "m.pt")
    assert torch.equal(load(tmp_path / "m.pt", inputs=["x:float32[rows,4]"]).example_inputs[0], torch.ones(2, 4))
    assert load(tmp_path / "m.pt", inputs=["x:float32[7,4]"]).example_inputs[0].shape == (7, 4)


def test_a_training_state_without_weights_is_named_for_what_it_is(tmp_path):
    torch.save({"epoch": 3, "best": [0.5]}, tmp_path / "m.pt")
    assert "it holds epoch, best" in refusal(tmp_path / "m.pt", model=PERCEPTRON)


@pytest.mark.parametrize(
    ("text", "shape", "high"),
    [
        ("tokens:int64[batch,seq]", (3, 8), 2),
        ("tokens : int64 [ batch , 2<=seq<=5 ] < 1000", (3, 5), 1000),
        ("image:float16[1,3,height,height]", (1, 3, 3, 3), None),
        ("scalar:bool[]", (), None),
    ],
)
def test_input_specs(text, shape, high):
    spec = parse_input(text)
    assert spec.high == high
    made = inputs.make_up(spec, inputs.first_sizes([spec]), torch.Generator().manual_seed(0))
    assert made.shape == shape and made.dtype == spec.dtype
    assert high is None or ((made >= 0) & (made < high)).all()
    assert parse_input(str(spec)) == spec


@pytest.mark.parametrize(
    "text",
    [
        "tokens",
        "tokens:int64",
        "x:float31[2]",
        "x:float32[a b]",
        "x:float32[-1]",
        "x:float32[2]<5",
        "x:int8[2]<0",
    ],
)
def test_bad_input_specs_are_refused(text):
    with pytest.raises(CheckpointError, match="input") as caught:
        parse_input(text)
    assert repr(text) in str(caught.value)


def test_a_dimension_without_any_size_is_refused():
    with pytest.raises(CheckpointError, match="can have no size"):
        inputs.first_sizes([parse_input("x:float32[n<=4]"), parse_input("y:float32[8<=n]")])


def test_redrawn_inputs_stay_admissible():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.tensor([[3, 9, 4], [7, 7, 3]])
    left_padded = torch.tensor([[True, True, True, False], [False, False, False, False]])
    spec = parse_input("tokens:int64[batch,seq]")
    mask_spec = parse_input("mask:bool[batch,seq]")
    for batch, seq in ((1, 2), (5, 9), (3, 1)):
        sizes = {"batch": batch, "seq": seq}
        drawn = inputs.redraw(inputs.InputSpec("tokens", torch.int64, spec.dims), tokens, sizes, generator)
        assert drawn.shape == (batch, seq) and set(drawn.unique().tolist()) <= set(tokens.unique().tolist())
        assert not inputs.redraw(mask_spec, left_padded, sizes, generator).all(-1).any()
        floats = inputs.redraw(parse_input("x:float32[batch,seq]"), torch.full((2, 3), 2.0), sizes, generator)
        assert (floats == 2).all()
