"""Models that timm and torchvision build by name."""

import pytest
import torch

import normfuse
from normfuse.checkpoint import CheckpointError
from normfuse.sources import libraries

MISSING = "not installed: pip install --no-deps -r requirements/ecosystem.txt"


def test_timm_models_know_their_pictures(tmp_path):
    timm = pytest.importorskip("timm", reason=MISSING)
    model = timm.create_model("test_vit", num_classes=3)
    torch.save({"state_dict": {f"module.{n}": t for n, t in model.state_dict().items()}, "epoch": 1}, tmp_path / "m.pt")
    loaded = normfuse.load(tmp_path / "m.pt", model="timm:test_vit", model_args={"num_classes": 3})
    assert [str(spec) for spec in loaded.inputs] == ["x:float32[batch,3,160,160]"]
    with torch.no_grad():
        torch.testing.assert_close(loaded.expected_outputs[0], model.eval()(loaded.example_inputs[0]))
    assert loaded.notes


@pytest.mark.parametrize(
    ("name", "arguments", "shape"),
    [
        ("vit_tiny_patch16_224", {"img_size": 64, "depth": 1}, "3,64,64"),
        ("vit_tiny_patch16_224", {"img_size": (32, 64), "depth": 1, "in_chans": 1}, "1,32,64"),
        ("test_resnet", {}, "3,160,160"),
    ],
)
def test_arguments_change_pictures(name, arguments, shape):
    pytest.importorskip("timm", reason=MISSING)
    _, (spec,) = libraries.build(f"timm:{name}", arguments)
    assert str(spec) == f"x:float32[batch,{shape}]"


def test_torchvision_models_know_their_pictures():
    pytest.importorskip("torchvision", reason=MISSING)
    module, (spec,) = libraries.build("torchvision:squeezenet1_1", {"num_classes": 3})
    assert str(spec) == "x:float32[batch,3,224,224]" and module(torch.ones(1, 3, 224, 224)).shape == (1, 3)


def test_unknown_names_are_refused_with_known_ones(monkeypatch):
    pytest.importorskip("timm", reason=MISSING)
    with pytest.raises(CheckpointError, match=r"timm has no model 'vit_tiny_patch16'; there are .*vit_"):
        libraries.build("timm:vit_tiny_patch16", {})
    with pytest.raises(CheckpointError, match=r"torchvision has no model 'resnet19'; there are .*resnet18"):
        libraries.build("torchvision:resnet19", {})
    with pytest.raises(CheckpointError, match=r"building timm:test_vit.* failed"):
        libraries.build("timm:test_vit", {"nonsense": 1})
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(CheckpointError, match=r"needs timm, which cannot be imported .*: pip install timm"):
        libraries.build("timm:test_vit", {})
