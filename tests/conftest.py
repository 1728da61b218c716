import importlib

import pytest
import torch

from normfuse import _native


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


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
        monkeypatch.setattr(module, "_forward", getattr(module, f"{name}_forward_reference"))
        monkeypatch.setattr(module, "_backward", getattr(module, f"{name}_backward_reference"))
    return request.param
