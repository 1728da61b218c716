import json
import os
import subprocess
import sys

import pytest
import torch

from normfuse import _native

KEYS = {"available", "reason", "path", "autograd", "emulator"}
KEYS |= {"torch", "cuda", "architectures", "compiler", "python_abi", "interface"}


def facts_in_a_new_process(**environment):
    code = "import json; from normfuse import _native; print(json.dumps(_native.build_info()))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_build_info():
    info = _native.build_info()
    assert set(info) == KEYS
    assert info["available"] is _native.available
    assert bool(info["reason"]) is not _native.available
    json.dumps(info)


def test_build_info_of_a_build():
    if not _native.available:
        pytest.skip(f"no native library: {_native.unavailable_reason}")
    info = _native.build_info()
    assert info["torch"][0].isdigit() and "abi3" in info["python_abi"] and info["path"].endswith("_C.abi3.so")
    assert (info["cuda"] is None) == (info["architectures"] == [])


def test_can_be_switched_off():
    info = facts_in_a_new_process(NORMFUSE_DISABLE_NATIVE="1")
    assert not info["available"] and "NORMFUSE_DISABLE_NATIVE" in info["reason"]
    assert not info["autograd"]


def test_autograd_in_another_torch_or_python(monkeypatch, tmp_path):
    """It is bound to the torch that it was built with: another must not even try to load it."""
    if _native.autograd is None:
        pytest.skip("autograd was built for another torch or Python")
    facts = tmp_path / "_build_info.json"
    monkeypatch.setattr(_native, "_FACTS", facts)
    facts.write_text(json.dumps({"torch": "2.11.0"}))
    assert _native._load_autograd() is None
    facts.write_text(json.dumps({"torch": torch.__version__}))
    assert _native._load_autograd() is _native.autograd
    monkeypatch.setattr(_native, "__package__", "normfuse.nn")  # where there is none
    assert _native._load_autograd() is None


def test_says_when_nothing_was_built(monkeypatch, tmp_path):
    monkeypatch.setattr(_native, "_LIBRARY", tmp_path / "_C.abi3.so")
    monkeypatch.setattr(_native, "_FACTS", tmp_path / "_build_info.json")
    assert "pip install --no-build-isolation" in _native._load()
    assert _native.build_info()["torch"] is None


def test_says_when_the_library_does_not_load(monkeypatch, tmp_path):
    (tmp_path / "_C.abi3.so").write_bytes(b"no library")
    facts = tmp_path / "_build_info.json"
    monkeypatch.setattr(_native, "_LIBRARY", tmp_path / "_C.abi3.so")
    monkeypatch.setattr(_native, "_FACTS", facts)
    for interface in ({}, {"interface": _native.INTERFACE - 1}):
        facts.write_text(json.dumps(interface))
        assert "built from other sources than these" in _native._load()
    facts.write_text(json.dumps({"interface": _native.INTERFACE}))
    assert "does not load" in _native._load()
