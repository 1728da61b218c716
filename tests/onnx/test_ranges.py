"""Values inside a float16 file: what folding makes of them is seen before the file is written."""

import importlib
import json

import pytest
import tiny_models
import torch
from torch import nn

from normfuse.onnx import ExportError, export
from normfuse.onnx.ranges import LARGEST, SCALE_RANGES

steps = importlib.import_module("normfuse.onnx.steps")
TOKENS = torch.arange(12).reshape(2, 6) % 11


def loud_encoder(loudness: float, gain: float = 1 / 30) -> nn.Module:
    """A post-norm encoder (width 64) whose first norm has a small gain, and a branch behind it a large output.

    The stream stays at 1/gain times the model's values from there on, until a power of two brings the class's largest
    scales and smallest to the same distance from one.
    """
    torch.manual_seed(0)
    model = tiny_models.Encoder(width=64, depth=2, norm="unified", placement="post").eval()
    with torch.no_grad():
        model.blocks[0].norms[0].weight.fill_(gain)
        model.blocks[1].mlp[0].bias.fill_(10.0)  # every feature is about 10: each weight fits, only their sum does not
        model.blocks[1].mlp[2].weight[5] = loudness / (10.0 * 128)
    return model


def arguments() -> dict:
    return {"example_inputs": TOKENS, "opset": 20, "rtol": 0.5}


def test_values_that_folding_lifts_out_of_float16_are_seen_and_the_range_of_scales_narrowed(tmp_path):
    result = export(loud_encoder(12_000.0), tmp_path / "m.onnx", dtype="float16", **arguments())
    assert result.growth.largest <= LARGEST["float16"] and not result.growth.beyond
    assert 11_000 <= result.growth.original < 14_000
    (note,) = result.notes
    assert "blocks.1" in note and "float16" in note
    assert "blocks.0.norms.0" in [record.name for record in result.report.remaining]
    assert json.loads(json.dumps(result.to_dict()))["growth"]["at"] == result.growth.at


def test_without_a_range_that_helps_the_export_is_refused_with_names(tmp_path, monkeypatch):
    monkeypatch.setitem(SCALE_RANGES, "float16", SCALE_RANGES["float16"][:1])
    with pytest.raises(ExportError, match=r"65504; after folding, .*blocks\.1.*in the model.*export float32"):
        export(loud_encoder(12_000.0), tmp_path / "m.onnx", dtype="float16", **arguments())
    assert not list(tmp_path.iterdir())


def test_a_quiet_encoder_keeps_the_wide_range_and_shows_its_growth(tmp_path):
    result = export(loud_encoder(100.0), tmp_path / "m.onnx", dtype="float16", **arguments())
    assert not result.notes and not result.report.remaining
    assert result.growth.largest > 2 * result.growth.original >= 200


def test_what_is_beyond_float16_in_the_model_itself_is_said_and_not_blamed_on_folding(tmp_path):
    class Saturating(tiny_models.Perceptron):
        def forward(self, x):
            return super().forward(x) + torch.tanh(x * 300 * 300).sum(-1, keepdim=True)

    model = tiny_models.trained(Saturating())
    result = export(model, tmp_path / "m.onnx", example_inputs=torch.ones(3, 4), dtype="float16", rtol=0.1, opset=20)
    assert not result.report.remaining
    assert any("the model itself goes beyond 65504 at mul (9e+04)" in note for note in result.notes)
    assert result.growth.already and not result.growth.beyond and result.growth.largest < 1000


def test_travelling_biases_stay_where_they_would_leave_the_type(tmp_path, monkeypatch):
    """The carried form is looked at like the plain one."""
    real = steps.growth
    monkeypatch.setattr(steps, "growth", lambda *given: real(*given[:3], 150.0))
    model = loud_encoder(100.0)
    monkeypatch.setattr(steps, "carry_biases", lambda program, plain, *_, **__: (steps.fold(program), "carried"))
    result = export(model, tmp_path / "m.onnx", dtype="float16", target="cpu", **arguments())
    assert any("stay in their branches: travelling, values leave float16" in note for note in result.notes)
