"""What was built, whether it is used, and what is said where it is not."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from native import needs_autograd, needs_kernels

import normfuse

PACKAGE = Path(normfuse.__file__).parent
KEYS = {"available", "reason", "path", "autograd", "emulator"}
KEYS |= {"torch", "cuda", "architectures", "compiler", "python_abi", "interface"}


def info_in(folder, package="normfuse", library=None, **facts):
    """What the loader says in a package with this library, or the one that is in use, and these facts."""
    shutil.copy(PACKAGE / "_native.py", folder)
    if library is not None:
        (folder / "_C.abi3.so").write_bytes(library)
    elif facts:
        (folder / "_C.abi3.so").symlink_to(normfuse.build_info()["path"])
    if facts:
        (folder / "_build_info.json").write_text(json.dumps(facts))
    spec = importlib.util.spec_from_file_location(f"{package}._native", folder / "_native.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build_info()


def test_build_info():
    info = normfuse.build_info()
    assert set(info) == KEYS
    assert bool(info["reason"]) is not info["available"]
    json.dumps(info)


@needs_kernels
def test_build_info_of_a_build():
    info = normfuse.build_info()
    assert info["torch"][0].isdigit() and "abi3" in info["python_abi"] and info["path"].endswith("_C.abi3.so")
    assert (info["cuda"] is None) == (info["architectures"] == [])


def test_can_be_switched_off():
    code = "import json, normfuse; print(json.dumps(normfuse.build_info()))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"NORMFUSE_DISABLE_NATIVE": "1"},
        check=True,
        capture_output=True,
        text=True,
    )
    info = json.loads(done.stdout.splitlines()[-1])
    assert not info["available"] and "NORMFUSE_DISABLE_NATIVE" in info["reason"]
    assert not info["autograd"]


@needs_autograd
@pytest.mark.parametrize(
    ("built_with", "package", "loads"),
    [
        ("0.0", "normfuse", False),
        (torch.__version__, "normfuse", True),
        (torch.__version__, "normfuse.nn", False),  # where there is none
    ],
)
def test_autograd_in_another_torch_or_python(tmp_path, built_with, package, loads):
    """It is bound to the torch that it was built with: another must not even try to load it."""
    info = info_in(tmp_path, package, torch=built_with, interface=normfuse.build_info()["interface"])
    assert info["available"] and info["autograd"] is loads


def test_says_when_nothing_was_built(tmp_path):
    info = info_in(tmp_path)
    assert "pip install --no-build-isolation" in info["reason"] and info["torch"] is None


@needs_kernels
@pytest.mark.parametrize(
    ("older", "reason"), [(None, "built from other sources"), (1, "built from other sources"), (0, "does not load")]
)
def test_says_when_the_library_does_not_load(tmp_path, older, reason):
    facts = {"torch": "0.0"} if older is None else {"interface": normfuse.build_info()["interface"] - older}
    info = info_in(tmp_path, library=b"no library", **facts)
    assert reason in info["reason"] and not info["available"]
