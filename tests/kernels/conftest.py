"""Builds the host emulator of the CUDA kernels and calls it with torch tensors."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pybind11
import pytest
import torch
from native import HAS_KERNELS
from steps import host

ROOT = Path(__file__).parents[2]


def _tool(name: str) -> str:
    beside_python = Path(sys.executable).parent / name
    found = str(beside_python) if beside_python.exists() else shutil.which(name)
    assert found, f"{name} is missing: pip install {name}"
    return found


def _run(*command: object) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="session")
def build_emulator():
    """Configures and builds one variant of the CMake project; nothing is rebuilt that did not change."""

    def build(sanitizer: str = "") -> Path:
        folder = ROOT / "build" / f"emulator{'-' if sanitizer else ''}{sanitizer}"
        _run(
            *(
                _tool("cmake"),
                "-S",
                ROOT,
                "-B",
                folder,
                "-G",
                "Ninja",
                f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}",
            ),
            *("-DNORMFUSE_CUDA=OFF", f"-DNORMFUSE_SANITIZE={sanitizer}"),
            *(f"-DNORMFUSE_PYTHON={'OFF' if sanitizer else 'ON'}", f"-DPython_EXECUTABLE={sys.executable}"),
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        )
        target = "all" if sanitizer else "normfuse_emulator"
        _run(_tool("cmake"), "--build", folder, "--parallel", os.cpu_count(), "--target", target)
        return folder

    return build


@pytest.fixture(scope="session")
def run_ctest():
    def run(folder: Path) -> None:
        _run(_tool("ctest"), "--test-dir", folder, "--output-on-failure", "--no-tests=error")

    return run


class Emulator:
    """The emulated operations, with the arguments, results and in-place states of ``torch.ops.normfuse``."""

    def __init__(self, module):
        self._module = module
        self.configure = module.configure

    def __call__(self, operation: str, *arguments):
        dtype = arguments[0].dtype
        results = getattr(self._module, operation)(*map(self._to_numpy, arguments))
        several = isinstance(results, tuple)
        return tuple(self._to_torch(r, dtype) for r in results) if several else self._to_torch(results, dtype)

    @staticmethod
    def _to_numpy(value):
        if not isinstance(value, torch.Tensor):
            return value
        return value.view(torch.uint16).numpy() if value.dtype == torch.bfloat16 else value.numpy()

    @staticmethod
    def _to_torch(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor.view(torch.bfloat16) if array.dtype == np.uint16 and dtype == torch.bfloat16 else tensor


@pytest.fixture(scope="session")
def _emulator_module(build_emulator):
    path = build_emulator() / f"normfuse_emulator{sysconfig.get_config_var('EXT_SUFFIX')}"
    spec = importlib.util.spec_from_file_location("normfuse_emulator", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def emulator(_emulator_module):
    _emulator_module.configure()
    return Emulator(_emulator_module)


# Orders in which a block's threads run, and workers that run blocks.
_SCHEDULES = [{}, {"order": "reverse"}, {"order": "random", "seed": 3}, {"order": "random", "seed": 4, "workers": 2}]


@pytest.fixture
def on_schedules(emulator):
    """``on_schedules(run)``: the named results of run(emulator), which have the same bits on every schedule."""

    def same_on(run):
        results = []
        for schedule in _SCHEDULES:
            emulator.configure(multiprocessors=3, **schedule)
            results.append(run(emulator))
        for other in results[1:]:
            assert all(torch.equal(value, other[name]) for name, value in results[0].items())
        return results[0]

    return same_on


@pytest.fixture
def on_threads():
    """``on_threads(counts, run)``: the named results of run(), which have the same bits on any number of threads."""

    def same_on(counts, run):
        results = []
        for count in counts:
            torch.set_num_threads(count)
            results.append(run())
        for other in results[1:]:
            assert all(torch.equal(value, other[name]) for name, value in results[0].items())
        return results[0]

    before = torch.get_num_threads()
    yield same_on
    torch.set_num_threads(before)


@pytest.fixture(params=["emulated", "host"])
def implementation(request):
    """The operations by the emulated CUDA kernels, and by those of the host."""
    if request.param == "emulated":
        return request.getfixturevalue("emulator")
    if not HAS_KERNELS:
        pytest.skip("no host kernels")
    return host
