"""The examples as their users run them, with settings so small that nothing is learned."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import normfuse
from normfuse.onnx import summarize

EXAMPLES = Path(__file__).parent.parent / "examples"
STATIC = ("unified", "power", "batch")
PLACEMENTS = ("pre", "post", "peri")


def run(*command: object) -> str:
    """Standard output of a command, which must succeed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=600, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_nothing_left(file: Path) -> None:
    graph = summarize(file)
    assert graph.norms == []
    assert graph.affines == []


@pytest.fixture(scope="module")
def scripts():
    """The example scripts as modules: one process for many settings, since importing takes most of the time."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        import train_lm_stdlib
        import train_vit_digits

        yield train_vit_digits, train_lm_stdlib
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("norm", STATIC)
def test_vision_transformer_exports_without_norms(scripts, tmp_path, norm, placement):
    vit, _ = scripts
    data = vit.digits()
    few = vit.Digits(data.train_images[:96], data.train_labels[:96], data.test_images, data.test_labels)
    vit.run(norm, placement, epochs=2, seed=0, data=few).save(tmp_path / "vit.pt", data.test_images[:4])
    result = normfuse.onnx.export(normfuse.load(tmp_path / "vit.pt"), tmp_path / "vit.onnx")
    assert result.report.remaining == []
    assert len(result.report.norms) == {"pre": 9, "post": 8, "peri": 17}[placement]
    assert_nothing_left(tmp_path / "vit.onnx")


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_language_model_exports_without_norms(scripts, tmp_path, placement):
    _, lm = scripts
    training, validation = lm.corpus()
    model, kwargs = lm.fit("unified", placement, steps=2, seed=0, training=training)
    lm.save(model, kwargs, validation, tmp_path / "lm.pt")
    result = normfuse.onnx.export(normfuse.load(tmp_path / "lm.pt"), tmp_path / "lm.onnx")
    assert result.report.remaining == []
    assert_nothing_left(tmp_path / "lm.onnx")


def test_layer_norm_stays(scripts, tmp_path):
    vit, _ = scripts
    data = vit.digits()
    few = vit.Digits(data.train_images[:64], data.train_labels[:64], data.test_images, data.test_labels)
    vit.run("layer", "pre", epochs=1, seed=0, data=few).save(tmp_path / "vit.pt", data.test_images[:4])
    normfuse.onnx.export(normfuse.load(tmp_path / "vit.pt"), tmp_path / "vit.onnx")
    assert len(summarize(tmp_path / "vit.onnx").norms) == 9


def test_same_seed_same_training(scripts):
    vit, _ = scripts
    data = vit.digits()
    few = vit.Digits(data.train_images[:64], data.train_labels[:64], data.test_images, data.test_labels)
    first, second, other = (vit.run("unified", "pre", epochs=1, seed=seed, data=few) for seed in (0, 0, 1))
    weights = [result.model.head.weight for result in (first, second, other)]
    assert weights[0].equal(weights[1])
    assert not weights[0].equal(weights[2])


def test_trainings_hold_out_what_they_test_on(scripts):
    vit, lm = scripts
    data = vit.digits()
    seen = {image.numpy().tobytes() for image in data.train_images}
    assert not any(image.numpy().tobytes() in seen for image in data.test_images)
    training, validation = (bytes(text.tolist()) for text in lm.corpus())
    assert validation[: 2**12] not in training


def test_vit_script_then_command(tmp_path):
    out = tmp_path / "vit.pt"
    printed = run(
        EXAMPLES / "train_vit_digits.py", "--norm", "unified", "--placement", "post", "--epochs", 1, "--out", out
    )
    assert f"normfuse export {out} --out {tmp_path / 'vit.onnx'}" in printed
    run("-m", "normfuse", "export", out, "--out", tmp_path / "vit.onnx")
    assert_nothing_left(tmp_path / "vit.onnx")


def test_language_model_script(tmp_path):
    out = tmp_path / "lm.pt"
    printed = run(EXAMPLES / "train_lm_stdlib.py", "--steps", 2, "--out", out)
    assert "8 of 8 norms folded" in printed
    assert "written by ONNX Runtime:" in printed
    assert_nothing_left(tmp_path / "lm.onnx")


def test_demo(tmp_path):
    printed = run(EXAMPLES / "demo.py", "--epochs", 1, "--rounds", 5, "--out", tmp_path)
    assert "360 of 360 equal" in printed
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["accuracy_pytorch"] == summary["accuracy_onnx_runtime"]
    assert summary["norms"] == 9
    assert summary["norms_left"] == 0
    assert set(summary["accuracies"]) == {"unified", "power", "batch", "layer"}
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_scripts_refuse_trainings_of_no_length(tmp_path):
    for script, option in (("train_vit_digits.py", "--epochs"), ("train_lm_stdlib.py", "--steps")):
        done = subprocess.run(
            [sys.executable, EXAMPLES / script, option, "0", "--out", tmp_path / "x.pt"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        assert f"{option} 0 is not allowed; give at least 1" in done.stderr
        assert list(tmp_path.iterdir()) == []
