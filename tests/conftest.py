import importlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from normfuse import _native

_TESTS = Path(__file__).parent
# Files and folders of tests, and how their tests are marked.
_MARKS = {
    "ecosystem": ("ecosystem", "zoo"),
    "gpu": ("cuda",),
    "slow": (
        *("kernels", "property", "onnx", "checkpoint", "convert", "zoo", "ecosystem"),
        *("test_archive_mutations.py", "test_distribution.py", "test_examples.py", "test_inference_benchmark.py"),
        *("test_pt2_reader.py", "test_pt2_refusals.py", "nn/test_norm_programs.py", "nn/test_sync.py"),
        *("folding/test_cancel.py", "folding/test_centring.py", "folding/test_every_operand.py"),
        *("folding/test_placements.py", "folding/test_scales.py", "folding/test_travelling.py"),
    ),
}


def pytest_collection_modifyitems(items):
    for item in items:
        if not item.path.is_relative_to(_TESTS):
            continue
        file = item.path.relative_to(_TESTS)
        for mark, places in _MARKS.items():
            if file.parts[0] in places or str(file) in places:
                item.add_marker(mark)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """Models this small only wait for each other in several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["reference", "kernel"])
def implementation(request, monkeypatch):
    """Runs a test on the PyTorch references with autograd in Python, and on the compiled kernels with it in C++."""
    if request.param == "kernel":
        if not _native.available:
            pytest.skip(f"no kernels: {_native.unavailable_reason}")
        return request.param
    monkeypatch.setattr(_native, "autograd", None)
    for name in ("unified_norm", "power_norm", "row_norm", "dynamic_activation"):
        module = importlib.import_module(f"normfuse.ops.{name}")
        forward, backward = (getattr(module, f"{name}_{way}_reference") for way in ("forward", "backward"))
        if hasattr(module, "_NORM"):
            monkeypatch.setattr(module, "_NORM", replace(module._NORM, forward=forward, backward=backward))
        else:
            monkeypatch.setattr(module, "_forward", forward)
            monkeypatch.setattr(module, "_backward", backward)
    return request.param
