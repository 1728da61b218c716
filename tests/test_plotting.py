"""The command ``normfuse plot``; the picture itself is tested with the monitor."""

import json

import pytest
from typer.testing import CliRunner

from normfuse import cli

FIELDS = ("step", "batch", "running", "ratio", "ratio_low", "ratio_high", "skips", "gradient", "finite")


@pytest.fixture
def stored(tmp_path):
    path = tmp_path / "stats.json"
    layers = {"blocks.0.norm": {field: [1, 2, 3] for field in FIELDS}}
    path.write_text(json.dumps({"format": "normfuse-statistics", "version": 1, "every": 1, "layers": layers}))
    return path


@pytest.mark.parametrize(("ending", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_plot_writes_the_picture(stored, tmp_path, ending, start):
    pytest.importorskip("matplotlib", reason="the picture is drawn by matplotlib")
    out = tmp_path / f"picture.{ending}"
    done = CliRunner().invoke(cli.app, ["plot", str(stored), "--out", str(out)])
    assert done.exit_code == 0 and "wrote" in done.output, done.output
    assert out.read_bytes().startswith(start)


@pytest.mark.parametrize(
    ("source", "out", "message"),
    [
        ("absent.json", "a.png", "absent.json cannot be read: No such file"),
        ("stats.json", "a.txt", "ends in '.txt'; give one of .png, .svg, .pdf"),
        ("stats.json", "nowhere/a.png", "nowhere/a.png: there is no folder"),
    ],
)
def test_plot_refuses_in_one_line(stored, tmp_path, source, out, message):
    pytest.importorskip("matplotlib", reason="the picture is drawn by matplotlib")
    done = CliRunner().invoke(cli.app, ["plot", str(tmp_path / source), "--out", str(tmp_path / out)])
    assert done.exit_code == 1
    assert done.stderr.startswith("normfuse: error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr and "unexpected" not in done.stderr


def test_a_missing_matplotlib_is_said(stored, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    done = CliRunner().invoke(cli.app, ["plot", str(stored), "--out", str(tmp_path / "a.png")])
    assert done.exit_code == 1 and "drawing needs matplotlib: pip install matplotlib" in done.stderr
