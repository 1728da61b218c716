"""The examples as their users run them, with settings so small that nothing is learned."""

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import train_lm_stdlib as lm
import train_vit_digits as vit
from normfuse_examples import LanguageModel, VisionTransformer
from normfuse_examples.blocks import NORMS, PLACEMENTS, Block, make_norm
from normfuse_examples.training import train
from typer.testing import CliRunner

import normfuse
import normfuse.onnx
from normfuse.cli import app
from normfuse.onnx import summarize

EXAMPLES = Path(__file__).parent.parent / "examples"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(monkeypatch, capfd):
    """Runs a script in this process, in which torch is there already; its exit status, and what it printed."""

    def script(name: str, *arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        try:
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code
        printed = capfd.readouterr()
        return status, printed.out if status == 0 else printed.err

    return script


def assert_nothing_left(file: Path) -> None:
    graph = summarize(file)
    assert graph.norms == []
    assert graph.affines == []


def trained(model: torch.nn.Module, make_input) -> torch.nn.Module:
    """The model after a few steps, so that statistics, gains and shifts are no longer those of the start."""
    train(model, lambda step: model(make_input()).square().mean(), 3, learning_rate=1e-2, title="test")
    return model.eval()


@pytest.fixture
def export(tmp_path):
    """Saves a model, loads it and exports it; the result."""

    def run_all(model, example, dynamic):
        normfuse.save(model, tmp_path / "model.pt", example_inputs=example, dynamic_shapes=dynamic)
        return normfuse.onnx.export(normfuse.load(tmp_path / "model.pt"), tmp_path / "model.onnx")

    return run_all


@pytest.mark.parametrize(
    ("norm", "placement"), [("unified", "pre"), ("power", "post"), ("batch", "peri"), ("layer", "pre")]
)
def test_vision_transformer_exports_without_static_norms(export, norm, placement):
    transformer = VisionTransformer(dim=16, depth=1, norm=norm, placement=placement, warmup_iters=1)
    model = trained(transformer, lambda: torch.randn(5, 1, 8, 8))
    result = export(model, torch.randn(3, 1, 8, 8), {"images": {0: "batch"}})
    count = {"pre": 3, "post": 2, "peri": 5}[placement]
    assert result.report.remaining == []
    assert len(result.report.norms) == (0 if norm == "layer" else count)
    assert len(result.graph.norms) == (count if norm == "layer" else 0)
    assert result.graph.affines == []


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_language_model_exports_without_norms(export, placement):
    transformer = LanguageModel(context=24, dim=16, depth=1, placement=placement, warmup_iters=1)
    model = trained(transformer, lambda: torch.randint(256, (5, 24)))
    dynamic = {"tokens": {0: "batch", 1: torch.export.Dim("sequence", max=24)}}
    result = export(model, torch.randint(256, (2, 9)), dynamic)
    assert result.report.remaining == []
    assert result.graph.norms == []
    assert result.graph.affines == []


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_placements_are_what_they_say(norm, placement):
    torch.manual_seed(0)
    block = Block(8, 2, norm=norm, placement=placement, dropout=0.0, warmup_iters=1).eval()
    x = torch.randn(2, 5, 8)
    n, attention, mlp = block.norms, block.attention, block.mlp
    if placement == "pre":
        middle = x + attention(n[0](x))
        expected = middle + mlp(n[1](middle))
    elif placement == "post":
        middle = n[0](x + attention(x))
        expected = n[1](middle + mlp(middle))
    else:
        middle = x + n[1](attention(n[0](x)))
        expected = middle + n[3](mlp(n[2](middle)))
    assert block(x).equal(expected)


@pytest.mark.parametrize("option", ["norm", "placement"])
def test_unknown_choices_are_refused(option):
    with pytest.raises(ValueError, match=f"{option}='none' is not allowed; give one of "):
        VisionTransformer(**{option: "none"})


def test_batch_norm_is_over_all_positions():
    x = 3 * torch.randn(4, 6, 5) + 2
    y = make_norm("batch", 5, 1)(x).flatten(0, 1)
    torch.testing.assert_close(y.mean(0), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.var(0, correction=0), torch.ones(5), atol=1e-4, rtol=0)


@pytest.mark.parametrize("causal", [True, False])
def test_only_causal_attention_hides_what_comes_later(causal):
    torch.manual_seed(0)
    block = Block(8, 2, norm="unified", placement="pre", dropout=0.0, warmup_iters=1, causal=causal).eval()
    x = torch.randn(1, 6, 8)
    later = x.clone()
    later[:, 4:] += 1
    assert torch.allclose(block(x)[:, :4], block(later)[:, :4], atol=1e-6) is causal


@pytest.fixture
def few():
    """All pictures that are held out, and ten batches of the others."""
    data = vit.digits()
    return replace(data, train_images=data.train_images[:320], train_labels=data.train_labels[:320])


def test_same_seed_same_training(few):
    first, second, other = (vit.run("unified", "pre", epochs=1, seed=seed, data=few) for seed in (0, 0, 1))
    weights = [result.model.head.weight for result in (first, second, other)]
    assert weights[0].equal(weights[1])
    assert not weights[0].equal(weights[2])


def test_trainings_hold_out_what_they_test_on():
    data = vit.digits()
    seen = {image.numpy().tobytes() for image in data.train_images}
    assert not any(image.numpy().tobytes() in seen for image in data.test_images)
    training, validation = (bytes(text.tolist()) for text in lm.corpus())
    assert validation[: 2**12] not in training


def test_vit_script_then_command(run, tmp_path):
    out, file = tmp_path / "vit.pt", tmp_path / "vit.onnx"
    status, printed = run(
        "train_vit_digits.py", "--norm", "tapered", "--placement", "post", "--epochs", 1, "--out", out
    )
    assert status == 0 and f"normfuse export {out} --out {file}" in printed, printed
    done = CliRunner().invoke(app, ["export", str(out), "--out", str(file)])
    assert done.exit_code == 0, done.stderr
    assert_nothing_left(file)


def test_language_model_script(run, tmp_path):
    status, printed = run("train_lm_stdlib.py", "--steps", 5, "--out", tmp_path / "lm.pt")
    assert status == 0 and "8 of 8 norms folded" in printed and "written by ONNX Runtime:" in printed, printed
    assert_nothing_left(tmp_path / "lm.onnx")


def test_demo(run, few, tmp_path, monkeypatch):
    monkeypatch.setattr(vit, "digits", lambda: few)
    status, printed = run("demo.py", "--epochs", 1, "--seeds", 1, "--rounds", 5, "--out", tmp_path)
    assert status == 0 and "360 of 360 equal" in printed, printed
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["accuracy_pytorch"] == summary["accuracy_onnx_runtime"]
    assert summary["norms"] == 9
    assert summary["norms_left"] == 0
    assert {norm: len(runs) for norm, runs in summary["accuracies"].items()} == dict.fromkeys(
        ("tapered", "unified", "power", "batch", "layer"), 1
    )
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_scripts_refuse_trainings_of_no_length(run, tmp_path):
    for script, option in (("train_vit_digits.py", "--epochs"), ("train_lm_stdlib.py", "--steps")):
        status, printed = run(script, option, 0, "--out", tmp_path / "x.pt")
        assert status == 2 and f"{option} 0 is not allowed; give at least 1" in printed
        assert list(tmp_path.iterdir()) == []
