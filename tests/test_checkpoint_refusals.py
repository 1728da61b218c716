"""What is no checkpoint, was damaged, or cannot be recorded: one line, and nothing is run or written."""

import gzip
import io
import json
import os
import socket
import sys
import zipfile
from pathlib import Path

import archives
import numpy as np
import pytest
import tiny_models
import torch
from checkpoints import PERCEPTRON, content_of, perceptron, refusal, rewrite, save_perceptron, write_format_1
from torch import nn

from normfuse.checkpoint import CheckpointError, Dimension, factory, load, loading, save
from normfuse.checkpoint.numbers import check_tensors

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
    assert "nothing that torch.save wrote" in refusal(tmp_path / "garbage.zip")
    with zipfile.ZipFile(tmp_path / "half.pt", "w") as file:
        file.writestr("archive/data.pkl", os.urandom(1000))
    refusal(tmp_path / "half.pt")
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(10**7))
    assert "damaged" in refusal(tmp_path / "bomb.pt")


def test_truncation_anywhere(tmp_path):
    write_format_1(tmp_path / "m.pt")
    whole = (tmp_path / "m.pt").read_bytes()
    for length in [*range(1, len(whole), len(whole) // 40), len(whole) - 1]:
        (tmp_path / "cut.pt").write_bytes(whole[:length])
        refusal(tmp_path / "cut.pt")


@pytest.mark.parametrize("every", [17, pytest.param(1, marks=pytest.mark.slow)])
def test_one_flipped_bit_anywhere_is_caught_or_without_effect(tmp_path, monkeypatch, every):
    # What would be traced is looked at instead: tracing thousands of times would take minutes.
    monkeypatch.setattr(loading, "capture", lambda module, call, specs, source, notes: (module, call, specs))
    model = write_format_1(tmp_path / "m.pt")
    whole = (tmp_path / "m.pt").read_bytes()
    expected = model.state_dict()
    sites = {position: position % 8 for position in range(0, len(whole), every)}
    caught = 0
    for position, bit in sites.items():
        data = bytearray(whole)
        data[position] ^= 1 << bit
        with (tmp_path / "m.pt").open("r+b") as file:  # quicker than a file of its own
            file.write(data)
        try:
            module, call, specs = load(tmp_path / "m.pt", model=PERCEPTRON)
        except CheckpointError as error:
            assert "\n" not in str(error)
            caught += 1
            continue
        assert all(torch.equal(t, expected[n]) for n, t in module.state_dict().items()), position
        assert torch.equal(call.tensors[0], torch.ones(2, 4)), position
        assert specs[0].dims == (Dimension("batch"), 4), position
    # Padding and unused header fields are without effect; every byte that means something is not.
    assert caught > len(sites) // 4


def test_a_change_that_keeps_the_archive_valid_fails_the_digest(tmp_path):
    write_format_1(tmp_path / "m.pt")
    original = content_of(tmp_path / "m.pt")

    def tampered(**changes):
        torch.save(original | changes, tmp_path / "t.pt")
        return refusal(tmp_path / "t.pt", model=PERCEPTRON)

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
    write_format_1(tmp_path / "m.pt")
    content = content_of(tmp_path / "m.pt")
    content["state_dict"]["inner.weight"] = torch.zeros(1).expand(10**12)
    torch.save(content, tmp_path / "m.pt")
    assert "complete" in refusal(tmp_path / "m.pt", model=PERCEPTRON)


# Refusals: does not fit


def test_missing_and_extra_tensors_are_named(tmp_path):
    write_format_1(tmp_path / "m.pt")
    state = content_of(tmp_path / "m.pt")["state_dict"]
    rewrite(tmp_path / "m.pt", state_dict={n: t for n, t in state.items() if n != "norm.running_var"})
    assert "norm.running_var" in refusal(tmp_path / "m.pt", model=PERCEPTRON)
    rewrite(tmp_path / "m.pt", state_dict=state | {"stray": torch.ones(1)})
    assert "unknown to the module (stray)" in refusal(tmp_path / "m.pt", model=PERCEPTRON)
    rewrite(tmp_path / "m.pt", state_dict=state | {"inner.weight": torch.ones(5, 4)})
    assert "inner.weight" in refusal(tmp_path / "m.pt", model=PERCEPTRON)


@pytest.mark.parametrize(
    ("name", "because"),
    [
        ("tiny_models:Missing", "does not exist"),
        ("no_such_package.models:Net", "cannot be imported"),
        ("tiny_models:not_a_module", "is not an nn.Module subclass"),
        ("tiny_models:NORMS", "is not an nn.Module subclass"),
        ("os:system", "not a module class"),
        ("antigravity:Net", "not a module class"),
        ("tiny_models", "not of the form"),
        ("tiny_models:__import__('os')", "not of the form"),
        ("../evil:Net", "not of the form"),
    ],
)
def test_recorded_factories_that_are_no_importable_module_class(tmp_path, name, because):
    write_format_1(tmp_path / "m.pt")
    metadata = json.loads(content_of(tmp_path / "m.pt")["metadata"])
    rewrite(tmp_path / "m.pt", metadata=json.dumps(metadata | {"factory": name}))
    assert because in refusal(tmp_path / "m.pt", trust=True)
    assert "can run code" in refusal(tmp_path / "m.pt")
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
    write_format_1(tmp_path / "m.pt")
    metadata = json.loads(content_of(tmp_path / "m.pt")["metadata"])
    rewrite(tmp_path / "m.pt", metadata=json.dumps(metadata | change))
    refusal(tmp_path / "m.pt", model=PERCEPTRON)


def test_metadata_that_is_no_json_is_refused(tmp_path):
    write_format_1(tmp_path / "m.pt")
    for text in ("{", "[" * 100_000, "[]"):
        rewrite(tmp_path / "m.pt", metadata=text)
        assert "metadata" in refusal(tmp_path / "m.pt", model=PERCEPTRON)


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
    with pytest.raises(CheckpointError, match=because) as caught:
        save_perceptron(tmp_path / "m.pt", model)
    assert name in str(caught.value) and not (tmp_path / "m.pt").exists()
    write_format_1(tmp_path / "m.pt", model)
    message = refusal(tmp_path / "m.pt", model=PERCEPTRON)
    assert name in message and because in message
    torch.export.save(torch.export.export(model, (torch.ones(2, 4),)), tmp_path / "m.pt2")
    assert name in refusal(tmp_path / "m.pt2") and because in refusal(tmp_path / "m.pt2")


def test_statistics_of_every_norm_are_checked(tmp_path):
    for model, name in (
        (tiny_models.Perceptron(norm="power"), "norm.running_phi"),
        (nn.BatchNorm1d(4), "running_var"),
    ):
        model.state_dict()[name][0] = -1
        with pytest.raises(CheckpointError, match=f"{name} is negative"):
            save(model, tmp_path / "m.pt", example_inputs=torch.ones(2, 4))


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
    cases = [
        ({"factory": tiny_models.Perceptron}, "no factory= any more"),
        ({"kwargs": {"width": 4}}, "no kwargs= any more"),
        ({"example_inputs": ()}, "empty"),
        ({"example_inputs": (x, x)}, "forward names 1 arguments"),
        ({"example_inputs": {"x": x, "y": x}}, "forward takes x"),
        ({"example_inputs": {"x": None}}, "holds no tensor"),
        ({"example_inputs": x.to(torch.complex64)}, "complex64"),
        ({"example_inputs": torch.ones(2, 5)}, "fails on the example inputs"),
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
        patch.setattr(torch.export, "save", full_disk)
        with pytest.raises(CheckpointError, match="failed writing"):
            save_perceptron(tmp_path / "m.pt")
    assert (tmp_path / "m.pt").read_bytes() == before and os.listdir(tmp_path) == ["m.pt"]


def test_exits_of_a_model_that_the_user_names_are_errors(tmp_path, monkeypatch):
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    torch.save(perceptron().state_dict(), tmp_path / "m.pt")
    assert "SystemExit" in refusal(tmp_path / "m.pt", model="leaves:Net", inputs=["x:float32[2,4]"])

    def build():
        raise SystemExit(0)

    assert "SystemExit" in refusal(tmp_path / "m.pt", model=build, inputs=["x:float32[2,4]"])


def arrays() -> bytes:
    file = io.BytesIO()
    np.savez(file, **{"block.0.weight": np.ones(2)})
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "name", "what"),
    [
        (gzip.compress(b"x" * 100, mtime=0), "m.pt", "gzip"),
        (b"hello, world\n", "m.pt", "a text"),
        ("Größe".encode() * 20000, "m.pt", "a text"),
        (b'{"a": 1}', "m.pt", "a JSON text"),
        (b'{"weight_map": {}}', "model.json", "an index of several safetensors files"),
        (b"<!DOCTYPE html><html></html>", "m.pt", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "m.pt", "a pointer of Git LFS"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "m.onnx", "a pointer of Git LFS"),
        (b"\x08\x0a\x12\x07pytorch\x1a\x052.13.0", "m.pt", "an ONNX file"),
        (b"\x08\x0a\x12\x07pytorch\x1a\x052.13.0", "m.onnx", "an ONNX file"),
        (b"GGUF\x03\x00\x00\x00", "m.gguf", "a GGUF file"),
        (b"\x89HDF\r\n\x1a\n", "m.h5", "an HDF5 file"),
        (b"\x93NUMPY\x01\x00", "m.npy", "an array or archive of NumPy"),
        (arrays(), "m.npz", "an array or archive of NumPy"),
        (b"\x00" * 257 + b"ustar" + b"\x00" * 250, "m.tar", "a tar archive"),
        (bytes(range(256)), "m.pt", "not a checkpoint"),
    ],
)
def test_other_files_are_called_what_they_are(tmp_path, data, name, what):
    (tmp_path / name).write_bytes(data)
    for trust in (False, True):
        assert what in refusal(tmp_path / name, trust=trust)


@pytest.mark.parametrize(
    ("change", "because"),
    [
        ({"version": 3}, "reads versions 1 and 2"),
        ({"format": "other"}, "format version"),
        ({"outputs": []}, "is not of the form"),
        ({"outputs": ["a", "b"]}, "is not of the form"),
        ({"outputs": ["a\x1b[2J"]}, "is not of the form"),
        ({"inputs": []}, "is not of the form"),
        ({"inputs": [{"name": "x", "dtype": "load", "dims": []}]}, "is not of the form"),
        ({"inputs": [{"name": "x", "dtype": "float32", "dims": [2, 4]}]}, "its program takes"),
        ({"inputs": [{"name": "x", "dtype": "float32", "dims": [{"name": "n", "minimum": 1, "maximum": None}]}]},
         "its program takes"),
        ({"inputs": [{"name": "x", "dtype": "float32", "dims": [{"name": "a b", "minimum": 1, "maximum": None}, 4]}]},
         "needs a word"),
        ({"examples": {"inputs": [{"dtype": "float32", "shape": [2, 5]}], "outputs": []}}, "bytes"),
        ({"examples": {"inputs": [{"dtype": "float32", "shape": [-2, -4]}], "outputs": []}}, "negative"),
        ({"examples": {"inputs": [{"dtype": "float32", "shape": [2, 4]}],
                       "outputs": [{"dtype": "float32", "shape": [3, 2]}]}}, "is recorded where"),
        ({"notes": 3}, "is not of the form"),
        ({"records": {}}, "not those that it lists"),
    ],
)  # fmt: skip
def test_a_record_of_ours_of_another_form_is_refused(tmp_path, change, because):
    save_perceptron(tmp_path / "m.pt")
    contents = archives.unpack((tmp_path / "m.pt").read_bytes())
    record = json.loads(contents[archives.OWN]) | change
    contents[archives.OWN] = json.dumps(record).encode()
    (tmp_path / "m.pt").write_bytes(archives.pack(contents, fit=False))
    assert because in refusal(tmp_path / "m.pt")


def test_every_record_of_ours_has_its_digest(tmp_path):
    save_perceptron(tmp_path / "m.pt")
    contents = archives.unpack((tmp_path / "m.pt").read_bytes())
    for name, data in contents.items():
        if name.startswith((".data", "byteorder", "extra", "archive")) or not data:
            continue
        changed = contents | {name: data[:-1] + bytes([data[-1] ^ 1])}
        (tmp_path / "m.pt").write_bytes(archives.pack(changed, fit=False))
        assert refusal(tmp_path / "m.pt"), name
    (tmp_path / "m.pt").write_bytes(archives.pack(contents | {"data/more": b"x"}, fit=False))
    assert "not those that it lists" in refusal(tmp_path / "m.pt")


def test_only_plain_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")  # nobody writes to it: whoever opens it waits for ever
    assert "a pipe" in refusal(tmp_path / "pipe.pt")
    os.mkfifo(tmp_path / "model.safetensors.index.json")
    assert "a pipe" in refusal(tmp_path / "model.safetensors.index.json")
    assert "a device" in refusal(Path("/dev/zero"))
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s"))
        assert "a socket" in refusal(tmp_path / "s")
    (tmp_path / "link.pt").symlink_to(tmp_path / "pipe.pt")
    assert "a pipe" in refusal(tmp_path / "link.pt")
    assert "cannot read" in refusal(Path("a\0b"))


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


def test_a_module_may_be_named_in_the_place_of_what_builds_one(tmp_path, monkeypatch):
    (tmp_path / "a_script.py").write_text("from torch import nn\n\nmodel = nn.Linear(4, 2)\n")
    torch.save({"weight": torch.ones(2, 4), "bias": torch.zeros(2)}, tmp_path / "m.pt")
    monkeypatch.chdir(tmp_path)
    given = {"model": "a_script:model", "inputs": ["input:float32[batch,4]"]}
    assert load(tmp_path / "m.pt", **given).outputs == ("output",)
    assert "model is a Linear already" in refusal(tmp_path / "m.pt", **given, model_args={"bias": False})


def test_numbers_of_a_module_made_in_inference_mode_are_looked_at():
    with torch.inference_mode():
        weight = nn.Parameter(torch.ones(2))
        broken = nn.Parameter(torch.tensor([1.0, float("inf")]))
    check_tensors({"weight": weight}, "model")
    with pytest.raises(CheckpointError, match="weight holds infinity"):
        check_tensors({"weight": broken}, "model")


def test_a_file_may_be_named_in_the_place_of_a_module(tmp_path):
    folder = tmp_path / "my code"
    folder.mkdir()
    (folder / "json.py").write_text(  # also one that is called as a module of Python's
        "import dataclasses\nfrom torch import nn\nfrom width_of_it import WIDTH\n\n\n"
        "@dataclasses.dataclass\nclass Options:\n    width: 'int' = WIDTH\n\n\n"
        "def Net():\n    return nn.Linear(Options().width, 2)\n"
    )
    (folder / "width_of_it.py").write_text("WIDTH = 4\n")
    torch.save({"weight": torch.ones(2, 4), "bias": torch.zeros(2)}, tmp_path / "m.pt")
    inputs = ["input:float32[batch,4]"]
    assert load(tmp_path / "m.pt", model=f"{folder}/json.py:Net", inputs=inputs).outputs == ("output",)
    assert json.loads("[1]") == [1] and str(folder) not in sys.path
    assert "there is no file" in refusal(tmp_path / "m.pt", model=f"{folder}/no.py:Net", inputs=inputs)
    assert "has no 'Other'" in refusal(tmp_path / "m.pt", model=f"{folder}/json.py:Other", inputs=inputs)
    (folder / "broken.py").write_text("1 / 0\n")
    assert "ZeroDivisionError" in refusal(tmp_path / "m.pt", model=f"{folder}/broken.py:Net", inputs=inputs)
    assert "broken" not in sys.modules


def test_classes_of_a_trusted_file_are_searched_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "of_this_folder.py").write_text("from torch import nn\n\n\nclass Net(nn.Linear):\n    pass\n")
    monkeypatch.chdir(tmp_path)
    with factory.on_path(str(tmp_path)):
        net = factory.given("of_this_folder:Net")(4, 2)
        torch.save(net, "m.pt")
    del sys.modules["of_this_folder"]
    assert load("m.pt", trust=True, inputs=["input:float32[batch,4]"]).outputs == ("output",)


@pytest.mark.parametrize(
    ("first", "advice"),
    [
        (nn.Linear(4, 2), "float32[batch,4]"),
        (nn.Conv2d(3, 2, 3), "float32[batch,3,32,32]"),
        (nn.Embedding(9, 2), "int64[batch,seq]<9"),
        (nn.LayerNorm(8), "float32[batch,8]"),
    ],
)
def test_the_input_that_is_proposed_fits_the_first_weight(tmp_path, first, advice):
    model = nn.Sequential(first, nn.ReLU())
    torch.save(model.state_dict(), tmp_path / "m.pt")
    with pytest.raises(CheckpointError) as refused:
        load(tmp_path / "m.pt", model=model)
    assert refused.value.advice == (f'--input "input:{advice}"',)
