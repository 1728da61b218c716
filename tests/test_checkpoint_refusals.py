"""What is no checkpoint, was damaged, or cannot be recorded: one line, and nothing is run or written."""

import json
import os
import pickle
import zipfile
from collections import OrderedDict

import pytest
import tiny_models
import torch
from checkpoints import PERCEPTRON, Canary, content_of, perceptron, refusal, rewrite, save_perceptron
from torch import nn
from torch.export import Dim

from normfuse.checkpoint import CheckpointError, Dimension, factory, load, loading, save

# Refusals: not data


@pytest.mark.parametrize("name", ["m.pt", "m.bin", "m.safetensors"])
@pytest.mark.parametrize("wrapped", ["zip", "legacy", "raw"])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path, name, wrapped):
    canary, path = tmp_path / "canary", tmp_path / name
    evil = {"weight": torch.ones(2), "x": Canary(canary)}
    if wrapped == "raw":
        path.write_bytes(pickle.dumps(evil))
    else:
        torch.save(evil, path, _use_new_zipfile_serialization=wrapped == "zip")
    message = refusal(path, model=PERCEPTRON, inputs=["x:float32[2,4]"])
    assert ("run code" in message) or name.endswith("safetensors")
    assert not canary.exists()


def test_code_hidden_in_a_checkpoint_of_ours_does_not_run(tmp_path):
    save_perceptron(tmp_path / "m.pt")
    content = content_of(tmp_path / "m.pt")
    content["state_dict"] = OrderedDict(content["state_dict"], extra=Canary(tmp_path / "canary"))
    torch.save(content, tmp_path / "m.pt")
    assert "system" in refusal(tmp_path / "m.pt")
    assert not (tmp_path / "canary").exists()


def test_pickled_modules_and_programs_are_read_only_when_trusted(tmp_path):
    model = perceptron()
    torch.save(model, tmp_path / "module.pt")
    program = torch.export.export(model, (torch.ones(3, 4),), dynamic_shapes={"x": {0: Dim("batch", max=64)}})
    torch.export.save(program, tmp_path / "program.pt2")
    for name in ("module.pt", "program.pt2"):
        assert "can run code" in refusal(tmp_path / name) and "--trust" in refusal(tmp_path / name)
    assert load(tmp_path / "module.pt", trust=True, inputs=["x:float32[batch,4]"]).outputs == ("output",)
    loaded = load(tmp_path / "program.pt2", trust=True)
    assert loaded.input_names == ("x",) and loaded.inputs[0].dims[0].maximum == 64
    torch.testing.assert_close(loaded.run([torch.ones(5, 4)])[0], model(torch.ones(5, 4)))
    assert "takes x" in refusal(tmp_path / "program.pt2", trust=True, inputs=["y:float32[batch,4]"])


def test_torchscript_is_refused_with_the_way_out(tmp_path):
    torch.jit.save(torch.jit.trace(perceptron(), torch.ones(2, 4)), tmp_path / "m.pt")
    for trust in (False, True):
        assert "torch.jit.load(path).state_dict()" in refusal(tmp_path / "m.pt", trust=trust)


# Refusals: not whole


def test_garbage_and_absence(tmp_path):
    assert "cannot read" in refusal(tmp_path / "absent.pt")
    assert "holds no weights" in refusal(tmp_path)
    for name, data in {
        "empty": b"",
        "noise": bytes(range(256)) * 9,
        "text": b"hello\n",
        "pk": b"PK\x03\x04" + b"\0" * 500,
    }.items():
        (tmp_path / name).write_bytes(data)
        refusal(tmp_path / name)
        (tmp_path / f"{name}.safetensors").write_bytes(data)
        refusal(tmp_path / f"{name}.safetensors", model=PERCEPTRON)
    with zipfile.ZipFile(tmp_path / "garbage.zip", "w") as file:
        file.writestr("archive/readme", os.urandom(1000))
    assert "holds no tensors" in refusal(tmp_path / "garbage.zip")
    with zipfile.ZipFile(tmp_path / "half.pt", "w") as file:
        file.writestr("archive/data.pkl", os.urandom(1000))
    refusal(tmp_path / "half.pt")
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(10**7))
    assert "damaged" in refusal(tmp_path / "bomb.pt")


def test_truncation_anywhere(tmp_path):
    save_perceptron(tmp_path / "m.pt")
    whole = (tmp_path / "m.pt").read_bytes()
    for length in [*range(1, len(whole), len(whole) // 40), len(whole) - 1]:
        (tmp_path / "cut.pt").write_bytes(whole[:length])
        refusal(tmp_path / "cut.pt")


def test_one_flipped_bit_anywhere_is_caught_or_without_effect(tmp_path, monkeypatch):
    # What would be traced is looked at instead: tracing thousands of times would take minutes.
    monkeypatch.setattr(loading, "capture", lambda module, call, specs, source, notes: (module, call, specs))
    model = save_perceptron(tmp_path / "m.pt")
    whole = (tmp_path / "m.pt").read_bytes()
    expected = model.state_dict()
    sites = {position: position % 8 for position in range(len(whole))}
    caught = 0
    for position, bit in sites.items():
        data = bytearray(whole)
        data[position] ^= 1 << bit
        (tmp_path / "bit.pt").write_bytes(data)
        try:
            module, call, specs = load(tmp_path / "bit.pt")
        except CheckpointError as error:
            assert "\n" not in str(error)
            caught += 1
            continue
        assert all(torch.equal(t, expected[n]) for n, t in module.state_dict().items()), position
        assert torch.equal(call.tensors[0], torch.ones(2, 4)), position
        assert specs[0].dims == (Dimension("batch"), 4), position
    # Padding and unused header fields are without effect; every byte that means something is not.
    assert caught > len(whole) // 4


def test_a_change_that_keeps_the_archive_valid_fails_the_digest(tmp_path):
    save_perceptron(tmp_path / "m.pt")
    original = content_of(tmp_path / "m.pt")

    def tampered(**changes):
        torch.save(original | changes, tmp_path / "t.pt")
        return refusal(tmp_path / "t.pt")

    state, examples = original["state_dict"], original["examples"]
    bumped = state | {"inner.weight": torch.nextafter(state["inner.weight"], torch.tensor(9.0))}
    renamed = {name.replace("inner", "innen"): tensor for name, tensor in state.items()}
    reshaped = state | {"inner.weight": state["inner.weight"].reshape(2, 8)}
    recast = state | {"inner.weight": state["inner.weight"].view(torch.int32)}
    for changed in (bumped, renamed, reshaped, recast):
        assert "checksum" in tampered(state_dict=changed)
    assert "checksum" in tampered(examples={"x": examples["x"] + 1})
    assert "checksum" in tampered(metadata=original["metadata"].replace("Perceptron", "Encoder"))
    assert "version" in tampered(version=2)
    assert "format" in tampered(format="other")
    assert "complete" in tampered(examples=None)


def test_a_tensor_that_claims_more_than_the_file_holds_is_refused(tmp_path):
    save_perceptron(tmp_path / "m.pt")
    content = content_of(tmp_path / "m.pt")
    content["state_dict"]["inner.weight"] = torch.zeros(1).expand(10**12)
    torch.save(content, tmp_path / "m.pt")
    assert "complete" in refusal(tmp_path / "m.pt")


# Refusals: does not fit


def test_missing_and_extra_tensors_are_named(tmp_path):
    save_perceptron(tmp_path / "m.pt")
    state = content_of(tmp_path / "m.pt")["state_dict"]
    rewrite(tmp_path / "m.pt", state_dict={n: t for n, t in state.items() if n != "norm.running_var"})
    assert "norm.running_var" in refusal(tmp_path / "m.pt")
    rewrite(tmp_path / "m.pt", state_dict=state | {"stray": torch.ones(1)})
    assert "unknown to the module (stray)" in refusal(tmp_path / "m.pt")
    rewrite(tmp_path / "m.pt", state_dict=state | {"inner.weight": torch.ones(5, 4)})
    assert "inner.weight" in refusal(tmp_path / "m.pt")


@pytest.mark.parametrize(
    ("name", "because"),
    [
        ("tiny_models:Missing", "does not exist"),
        ("no_such_package.models:Net", "cannot be imported"),
        ("tiny_models:not_a_module", "is not an nn.Module subclass"),
        ("tiny_models:NORMS", "is not an nn.Module subclass"),
        ("os:system", "no module class"),
        ("antigravity:Net", "no module class"),
        ("tiny_models", "not of the form"),
        ("tiny_models:__import__('os')", "not of the form"),
        ("../evil:Net", "not of the form"),
    ],
)
def test_recorded_factories_that_are_no_importable_module_class(tmp_path, name, because):
    save_perceptron(tmp_path / "m.pt")
    metadata = json.loads(content_of(tmp_path / "m.pt")["metadata"])
    rewrite(tmp_path / "m.pt", metadata=json.dumps(metadata | {"factory": name}))
    assert because in refusal(tmp_path / "m.pt")
    assert load(tmp_path / "m.pt", model=PERCEPTRON).input_names == ("x",)


@pytest.mark.parametrize(
    "change",
    [{"inputs": 3}, {"inputs": [{"name": "x"}]}, {"kwargs": []}, {"factory": 1}, {"extra_dtypes": None},
     {"inputs": [{"name": "x", "dtype": "load", "dims": []}]},
     {"inputs": [{"name": "x", "dtype": "float32", "dims": [{"name": "a b"}, 4]}]},
     {"inputs": [{"name": "y", "dtype": "float32", "dims": [2, 4]}]},
     {"inputs": [{"name": "x", "dtype": "float32", "dims": [3, 4]}]}],
)  # fmt: skip
def test_metadata_of_another_form_is_refused(tmp_path, change):
    save_perceptron(tmp_path / "m.pt")
    metadata = json.loads(content_of(tmp_path / "m.pt")["metadata"])
    rewrite(tmp_path / "m.pt", metadata=json.dumps(metadata | change))
    refusal(tmp_path / "m.pt")


def test_metadata_that_is_no_json_is_refused(tmp_path):
    save_perceptron(tmp_path / "m.pt")
    for text in ("{", "[" * 100_000, "[]"):
        rewrite(tmp_path / "m.pt", metadata=text)
        assert "metadata" in refusal(tmp_path / "m.pt")


@pytest.mark.parametrize(
    ("name", "value", "because"),
    [
        ("norm.running_var", float("nan"), "NaN"),
        ("norm.running_var", float("inf"), "infinity"),
        ("norm.running_var", -1e-9, "negative"),
        ("norm.ema_gz", float("inf"), "infinity"),
        ("inner.weight", float("nan"), "NaN"),
        ("head.bias", float("-inf"), "infinity"),
    ],
)
def test_numbers_no_training_leaves_behind(tmp_path, name, value, because):
    model = perceptron()
    model.state_dict()[name].view(-1)[1] = value
    save_perceptron(tmp_path / "m.pt", model)
    message = refusal(tmp_path / "m.pt")
    assert name in message and because in message


def test_statistics_of_every_norm_are_checked(tmp_path):
    for model, name in (
        (tiny_models.Perceptron(norm="power"), "norm.running_phi"),
        (nn.BatchNorm1d(4), "running_var"),
    ):
        model.state_dict()[name][0] = -1
        label = f"{type(model).__module__}:{type(model).__name__}"
        kwargs = {"norm": "power"} if "phi" in name else {"num_features": 4}
        save(model, tmp_path / "m.pt", example_inputs=torch.ones(2, 4), factory=label, kwargs=kwargs)
        assert f"{name} is negative" in refusal(tmp_path / "m.pt")


def test_a_mask_of_infinities_is_no_reason_to_refuse(tmp_path):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.full((2, 2), float("-inf")).triu(1))

        def forward(self, x):
            return x + self.mask

    save(Masked(), tmp_path / "m.pt", example_inputs=torch.ones(2, 2))
    assert load(tmp_path / "m.pt", model=Masked).input_names == ("x",)


# Refusals: saving


def test_what_cannot_be_recorded_is_refused_when_saving(tmp_path):
    path, x = tmp_path / "m.pt", torch.ones(2, 4)

    class Local(nn.Linear):
        pass

    cases = [
        ({"factory": Local}, "cannot be imported again"),
        ({"factory": "__main__:Net"}, "the script that runs"),
        ({"factory": dict}, "not an nn.Module subclass"),
        ({"factory": len}, "factory is a"),
        ({"kwargs": {"act": torch.relu}}, "JSON"),
        ({"kwargs": {"scale": float("nan")}}, "JSON"),
        ({"kwargs": {"sizes": {1: 2}}}, "JSON"),
        ({"example_inputs": ()}, "empty"),
        ({"example_inputs": (x, x)}, "forward names 1 arguments"),
        ({"example_inputs": {"x": x, "y": x}}, "forward takes x"),
        ({"example_inputs": ([x],)}, "only arguments that are tensors"),
        ({"example_inputs": {"x": None}}, "holds no tensor"),
        ({"example_inputs": x.to(torch.complex64)}, "complex64"),
        ({"dynamic_shapes": {"y": {0: "batch"}}}, "names 'y'"),
        ({"dynamic_shapes": [{0: "a"}, {0: "b"}]}, "2 entries"),
        ({"dynamic_shapes": {"x": {2: "batch"}}}, "axis 2"),
        ({"dynamic_shapes": {"x": {0: 1.5}}}, "give the dimension a name"),
        ({"dynamic_shapes": {"x": {0: "n", 1: "n"}}}, "is 2 elsewhere"),
        ({"dynamic_shapes": {"x": {0: "a b"}}}, "needs a word"),
    ]
    for options, because in cases:
        with pytest.raises(CheckpointError, match=because):
            save(perceptron(), path, **({"example_inputs": x} | options))
        assert not path.exists()
    with pytest.raises(CheckpointError, match="meta device"):
        save(perceptron().to("meta"), path, example_inputs=x)
    with pytest.raises(CheckpointError, match="cannot write"):
        save(perceptron(), tmp_path / "absent" / "m.pt", example_inputs=x)
    assert os.listdir(tmp_path) == []


def test_saving_again_replaces_the_file_only_when_it_succeeds(tmp_path, monkeypatch):
    save_perceptron(tmp_path / "m.pt")
    before = (tmp_path / "m.pt").read_bytes()

    def full_disk(*_):
        raise RuntimeError("PytorchStreamWriter failed writing file")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        with pytest.raises(CheckpointError, match="cannot write"):
            save_perceptron(tmp_path / "m.pt")
    assert (tmp_path / "m.pt").read_bytes() == before and os.listdir(tmp_path) == ["m.pt"]


def test_a_factory_that_does_not_take_the_arguments_is_said_at_once_but_the_weights_are_saved(tmp_path):
    with pytest.warns(UserWarning, match="will need the model to be named"):
        save_perceptron(tmp_path / "m.pt", kwargs={"wdth": 4})
    loaded = load(tmp_path / "m.pt", model=lambda wdth: tiny_models.Perceptron(wdth))
    assert loaded.program.state_dict["inner.weight"].shape == (4, 4)


def test_given_factories_that_cannot_build_a_module():
    for text, because in (
        ("tiny_models:Missing", "has no 'Missing'"),
        ("tiny_models:NORMS", "is a dict"),
        ("no_such_package:f", "cannot import no_such_package"),
        ("tiny_models.Perceptron", "not of the form"),
    ):
        with pytest.raises(CheckpointError, match=because):
            factory.given(text)
    with pytest.raises(CheckpointError, match="returned a dict"):
        factory.build(factory.given("tiny_models:not_a_module"), {}, "not_a_module")
