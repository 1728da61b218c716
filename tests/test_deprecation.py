"""Old public names: they give what the new ones give, and warn once."""

from __future__ import annotations

import importlib
import warnings

import pytest
from typer.testing import CliRunner

from normfuse import checkpoint, onnx
from normfuse.cli.app import app
from normfuse.deprecation import deprecated_arguments, deprecated_attribute, deprecated_names

NAMES = [
    ("normfuse", "Checkpoint", "ExportableModel"),
    ("normfuse.checkpoint", "Checkpoint", "ExportableModel"),
    ("normfuse.onnx", "FoldedCheckpoint", "FoldedModel"),
    ("normfuse.onnx", "Proof", "VerificationReport"),
    ("normfuse.onnx", "fold_checkpoint", "fold_model"),
]


@pytest.mark.parametrize(("module", "old", "new"), NAMES)
def test_an_old_name_is_the_new_one(module, old, new):
    home = importlib.import_module(module)
    home.__dict__.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"{module}.{old} is now {module}.{new}"):
        assert getattr(home, old) is getattr(home, new)
    assert old not in home.__all__ and new in home.__all__


def test_an_old_option_is_taken_and_not_shown(tmp_path):
    done = CliRunner().invoke(app, ["export", "m.pt", "--out", "m.onnx", "--no-shape", "gemm"])
    assert "--no-shape is now --disable-pass" in done.stderr and "no graph pass 'gemm'" in done.stderr
    shown = CliRunner().invoke(app, ["export", "--help"]).output
    assert "--disable-pass" in shown and "--no-shape" not in shown


@pytest.mark.parametrize("function", [onnx.export, onnx.fold_model, onnx.fold_file])
def test_an_old_argument_is_taken(function, tmp_path):
    given = {"path": tmp_path / "m.onnx"} if function is not onnx.fold_model else {}
    warned = pytest.warns(DeprecationWarning, match="'no_shape' is now 'disable_passes'")
    with warned, pytest.raises(onnx.ExportError, match="no graph pass 'gemm'"):
        function("m.onnx", **given, no_shape=["gemm"])


def test_a_name_that_never_was_is_refused():
    get = deprecated_names(__name__, {"old": "new"})
    with pytest.raises(AttributeError, match="has no attribute 'other'"):
        get("other")


def test_a_script_is_warned_once(monkeypatch):
    monkeypatch.delitem(vars(checkpoint), "Checkpoint", raising=False)
    with warnings.catch_warnings(record=True, action="always") as caught:
        for _ in range(3):
            checkpoint.Checkpoint  # noqa: B018
    assert [w.category for w in caught] == [DeprecationWarning]


def test_an_old_attribute_gives_the_new_one():
    class Result:
        new = 3
        old = deprecated_attribute("old", "new")

    with pytest.warns(DeprecationWarning, match=r"Result\.old is now \.new"):
        assert Result().old == 3


def test_an_old_argument_goes_on_under_its_new_name():
    @deprecated_arguments(old="new")
    def twice(new: int = 1) -> int:
        return 2 * new

    with pytest.warns(DeprecationWarning, match=r"twice\(\): argument 'old' is now 'new'"):
        assert twice(old=2) == 4
    assert twice(new=3) == 6 and twice() == 2
    with pytest.raises(TypeError, match="pass only that one"):
        twice(old=1, new=2)
