import gc
import importlib
import os
from dataclasses import replace
from pathlib import Path

# Threads that wait for work would take the cores from the other processes of a run. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# What is compiled here is small: a pool of processes that import torch costs more than it gives.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# Inductor compiles a program for every vector instruction set, to find out which ones work, before it compiles ours.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")

import pytest
import torch
from native import HAS_KERNELS, autograd_in_python

_TESTS = Path(__file__).parent
# Files and folders of tests, and how their tests are marked.
_MARKS = {
    "ecosystem": ("ecosystem", "zoo"),
    "gpu": ("cuda",),
    "slow": (
        *("kernels", "property", "onnx", "checkpoint", "convert", "optim", "zoo", "ecosystem"),
        *("test_archive_mutations.py", "test_checkpoint_refusals.py", "test_cli.py", "test_distribution.py"),
        *("test_examples.py", "test_decode_benchmark.py", "test_inference_benchmark.py", "test_optimizer_benchmark.py"),
        *("test_package.py", "test_quality_benchmark.py", "test_pt2_reader.py", "test_pt2_refusals.py"),
        *("ops/test_fallback.py", "ops/test_fuzz.py", "nn/test_monitoring.py", "nn/test_norm_programs.py"),
        *("nn/test_one_step.py", "nn/test_registry_lifecycle.py", "nn/test_sync.py"),
        *("folding/test_balance.py", "folding/test_cancel.py", "folding/test_centring.py"),
        *("folding/test_dynamic_norms.py", "folding/test_every_operand.py", "folding/test_graph_transformer.py"),
        *("folding/test_placements.py", "folding/test_regions.py", "folding/test_scales.py"),
        *("folding/test_tokenformer.py", "folding/test_travelling.py"),
    ),
}


def _marks(path):
    """The marks of a file or folder, which its tests have."""
    if not path.is_relative_to(_TESTS):
        return []
    place = path.relative_to(_TESTS)
    return [mark for mark, places in _MARKS.items() if {place.parts[0] if place.parts else "", str(place)} & {*places}]


def pytest_ignore_collect(collection_path, config):
    """Files are not even imported where ``-m "not … and not …"`` leaves all of their tests out."""
    first, *parts = config.option.markexpr.split("not ")
    left_out = {part.removesuffix(" and ") for part in parts}
    return True if not first and left_out & {*_marks(collection_path)} else None


def pytest_collection_modifyitems(items):
    for item in items:
        for mark in _marks(item.path):
            item.add_marker(mark)


def pytest_collection_finish():
    """Programs are full of cycles, and every collection walks over torch too: from here on fewer, and without torch."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


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
        if not HAS_KERNELS:
            pytest.skip("no kernels")
        yield request.param
        return
    for name in ("unified_norm", "power_norm", "row_norm", "dynamic_activation"):
        module = importlib.import_module(f"normfuse.ops.{name}")
        forward, backward = (getattr(module, f"{name}_{way}_reference") for way in ("forward", "backward"))
        if hasattr(module, "_NORM"):
            monkeypatch.setattr(module, "_NORM", replace(module._NORM, forward=forward, backward=backward))
        else:
            monkeypatch.setattr(module, "_forward", forward)
            monkeypatch.setattr(module, "_backward", backward)
    with autograd_in_python():
        yield request.param


@pytest.fixture
def mesh():
    """One process as a mesh of devices."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()
