"""What ``import normfuse`` offers, and what it leaves alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

import normfuse


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_every_public_name_is_there() -> None:
    assert all(hasattr(normfuse, name) for name in normfuse.__all__)
    assert callable(normfuse.fold) and callable(normfuse.load)


def test_onnx_is_imported_when_it_is_used_and_training_does_not() -> None:
    onnx = "any(m.split('.')[0].startswith('onnx') for m in sys.modules)"
    code = f"import sys, normfuse.nn; print({onnx}); print(normfuse.onnx.export.__name__, {onnx})"
    assert python(code).splitlines() == ["False", "export True"]


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="'unknown'"):
        _ = normfuse.unknown
