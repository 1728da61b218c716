import json
import os
from pathlib import Path

import pytest
import tiny_models
import torch
from checkpoints import PERCEPTRON, content_of, perceptron, refusal, save_perceptron
from safetensors.torch import save_file
from torch import nn
from torch.export import Dim

from normfuse.checkpoint import CheckpointError, Dimension, inputs, load, parse_input, save

# Round trips


def test_round_trip_of_weights_inputs_and_dynamic_dimensions(tmp_path):
    model = tiny_models.trained(tiny_models.Encoder(depth=2, placement="post"))
    tokens, pad_mask = torch.randint(11, (2, 6)), torch.arange(6).expand(2, 6) > 3
    batch, seq = Dim("batch"), Dim("seq", min=2, max=16)
    shapes = {"tokens": {0: batch, 1: seq}, "pad_mask": {0: batch, 1: seq}}
    save(model, tmp_path / "m.pt", example_inputs=(tokens, pad_mask), dynamic_shapes=shapes,
         kwargs={"depth": 2, "placement": "post"})  # fmt: skip
    loaded = load(tmp_path / "m.pt")
    assert loaded.input_names == ("tokens", "pad_mask")
    assert loaded.inputs[0].dims == (Dimension("batch"), Dimension("seq", 2, 16))
    assert all(torch.equal(a, b) for a, b in zip(loaded.example_inputs, (tokens, pad_mask), strict=True))
    assert torch.equal(loaded.expected_outputs[0], model(tokens, pad_mask))
    torch.testing.assert_close(loaded.run(loaded.example_inputs)[0], model(tokens, pad_mask))


def test_the_file_is_data_and_appears_whole(tmp_path):
    save_perceptron(tmp_path / "m.pt")
    assert os.listdir(tmp_path) == ["m.pt"]
    metadata = json.loads(content_of(tmp_path / "m.pt")["metadata"])
    assert metadata["factory"] == PERCEPTRON
    assert metadata["inputs"][0]["dims"] == [{"name": "batch", "minimum": 1, "maximum": None}, 4]
    assert metadata["written_with"]["torch"] == torch.__version__


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_module_of_another_dtype_is_traced_in_float32_and_its_own_outputs_are_recorded(tmp_path, dtype):
    model = save_perceptron(tmp_path / "m.pt", perceptron().to(dtype), example_inputs=torch.ones(2, 4, dtype=dtype))
    loaded = load(tmp_path / "m.pt")
    for name, tensor in loaded.program.state_dict.items():
        assert torch.equal(tensor, model.state_dict()[name].float())
    assert torch.equal(loaded.expected_outputs[0], model(torch.ones(2, 4, dtype=dtype)))
    assert loaded.expected_outputs[0].dtype == dtype and loaded.inputs[0].dtype == torch.float32
    assert f"traced in float32; the model has {str(dtype).removeprefix('torch.')}" in loaded.notes


def test_a_buffer_outside_the_state_dict_keeps_its_dtype(tmp_path, monkeypatch):
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.linspace(0, 1, 4), persistent=False)
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return self.inner(x * self.table)

    monkeypatch.setattr(tiny_models, "Turned", Turned, raising=False)
    model = Turned().to(torch.bfloat16)
    save(
        model,
        tmp_path / "m.pt",
        example_inputs=torch.ones(2, 4, dtype=torch.bfloat16),
        factory="tiny_models:Turned",
    )
    assert torch.equal(load(tmp_path / "m.pt").program.constants["table"], model.table.float())


def test_shared_weights_are_stored_once_and_views_without_their_surroundings(tmp_path):
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    model[0].weight = nn.Parameter(torch.zeros(1000, 64)[:64])
    model[1].weight = model[0].weight
    save(model, tmp_path / "m.pt", example_inputs={"input": torch.ones(1, 64)})
    assert (tmp_path / "m.pt").stat().st_size < 2 * 64 * 64 * 4
    state = content_of(tmp_path / "m.pt")["state_dict"]
    assert state["0.weight"].data_ptr() == state["1.weight"].data_ptr()


def test_keyword_inputs_that_skip_an_argument(tmp_path):
    class Optional(nn.Module):
        def forward(self, x, gain=None, shift=None):
            return x + shift

    save(Optional(), tmp_path / "m.pt", example_inputs={"x": torch.ones(2), "shift": torch.ones(2)})
    loaded = load(tmp_path / "m.pt", model=Optional)
    assert loaded.input_names == ("x", "shift")


def test_a_compiled_model_is_saved_as_the_model_itself(tmp_path):
    save_perceptron(tmp_path / "m.pt", torch.compile(perceptron()))
    assert "inner.weight" in content_of(tmp_path / "m.pt")["state_dict"]


# What is given when loading


def test_model_and_its_arguments_go_over_the_recorded_ones(tmp_path):
    model = perceptron()
    save(model, tmp_path / "m.pt", example_inputs=torch.ones(2, 4))
    assert "does not say how to build" in refusal(tmp_path / "m.pt")
    assert load(tmp_path / "m.pt", model=PERCEPTRON).program.state_dict["inner.weight"].shape == (4, 4)
    assert load(tmp_path / "m.pt", model=tiny_models.Perceptron, model_args={"classes": 3}) is not None
    assert "'clases'" in refusal(tmp_path / "m.pt", model=PERCEPTRON, model_args={"clases": 5})
    assert "head.weight" in refusal(tmp_path / "m.pt", model=PERCEPTRON, model_args={"classes": 5})


def test_a_model_from_the_working_directory_is_found_only_when_a_person_names_it(tmp_path, monkeypatch):
    (tmp_path / "own_model_of_mine.py").write_text("from torch import nn\nclass Net(nn.Linear):\n    pass\n")
    monkeypatch.chdir(tmp_path)
    net = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match="will need the model to be named"):
        save(net, "m.pt", example_inputs=torch.ones(1, 2), factory="own_model_of_mine:Net",
             kwargs={"in_features": 2, "out_features": 2})  # fmt: skip
    assert "cannot be imported here" in refusal(Path("m.pt"))
    assert torch.equal(load("m.pt", model="own_model_of_mine:Net").program.state_dict["weight"], net.weight)


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
