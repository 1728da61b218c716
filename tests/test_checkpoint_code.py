"""Files that would run code are refused, and nothing in them runs without trust."""

import pickle
from collections import OrderedDict

import pytest
import torch
from checkpoints import PERCEPTRON, Canary, content_of, perceptron, refusal, write_format_1
from torch import nn

from normfuse.checkpoint import load


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
    write_format_1(tmp_path / "m.pt")
    content = content_of(tmp_path / "m.pt")
    content["state_dict"] = OrderedDict(content["state_dict"], extra=Canary(tmp_path / "canary"))
    torch.save(content, tmp_path / "m.pt")
    assert "system" in refusal(tmp_path / "m.pt")
    assert not (tmp_path / "canary").exists()


def test_pickled_modules_are_read_only_when_trusted(tmp_path):
    torch.save(perceptron(), tmp_path / "module.pt")
    assert "can run code" in refusal(tmp_path / "module.pt") and "--trust" in refusal(tmp_path / "module.pt")
    assert load(tmp_path / "module.pt", trust=True, inputs=["x:float32[batch,4]"]).outputs == ("output",)


def test_a_class_that_a_file_of_format_1_names_is_built_only_when_trusted(tmp_path):
    model = write_format_1(tmp_path / "m.pt")
    assert "can run code" in refusal(tmp_path / "m.pt") and "--trust" in refusal(tmp_path / "m.pt")
    for loaded in (load(tmp_path / "m.pt", trust=True), load(tmp_path / "m.pt", model=PERCEPTRON)):
        assert torch.equal(loaded.expected_outputs[0], model(torch.ones(2, 4)))


@pytest.mark.parametrize("kwargs", [{"width": 2**20}, {"depth": 10**9}])
def test_recorded_arguments_build_nothing_that_is_larger_than_the_file(tmp_path, kwargs):
    write_format_1(tmp_path / "m.pt", kwargs=kwargs)
    assert "than the file" in refusal(tmp_path / "m.pt", model=_stack)


def _stack(width: int = 4, depth: int = 1) -> nn.Module:
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))


def test_recorded_arguments_are_compared_with_the_weights_before_anything_is_allocated(tmp_path):
    write_format_1(tmp_path / "m.pt", kwargs={"width": 1000})
    built = []

    def factory(width):
        built.append(torch.empty(0).device.type)
        return nn.Linear(width, width)

    assert "does not fit Linear" in refusal(tmp_path / "m.pt", model=factory)
    assert built == ["meta"]


@pytest.mark.parametrize(
    "text", ["/tmp/model", "hf_hub:somebody/model", "http://a.b/c", "..", "here", ["a/b"], {"x": "a:b"}]
)
def test_recorded_texts_that_can_name_a_file_or_an_address_are_not_passed_on(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    write_format_1(tmp_path / "m.pt", kwargs={"name": text})

    def factory(name):
        assert name == "gelu"
        return perceptron()

    assert "--model-arg name=value" in refusal(tmp_path / "m.pt", model=factory)
    assert load(tmp_path / "m.pt", model=factory, model_args={"name": "gelu"}).outputs == ("output",)
    write_format_1(tmp_path / "m.pt", kwargs={"name": "gelu"})
    assert load(tmp_path / "m.pt", model=factory).outputs == ("output",)


def test_torchscript_is_refused_with_the_way_out(tmp_path):
    torch.jit.save(torch.jit.trace(perceptron(), torch.ones(2, 4)), tmp_path / "m.pt")
    for trust in (False, True):
        assert "torch.jit.load(path).state_dict()" in refusal(tmp_path / "m.pt", trust=trust)
