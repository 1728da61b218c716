"""What nvcc made of the kernels for sm_90: no spills, and 16-byte accesses in every kernel that moves a matrix."""

import re
import shutil
import subprocess
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

import pytest

from normfuse import _native

# kernel: matrices it reads and writes per row
MATRIX_KERNELS = {
    "unified_sums": (1, 0),
    "unified_apply": (1, 1),
    "unified_gradient_sums": (2, 0),
    "unified_gradient_apply": (2, 1),
    "power_sums": (1, 1),
    "power_apply": (1, 1),
    "power_gradient": (2, 1),
}
PACKS = {"float": 4, "double": 2, "__half": 8, "__nv_bfloat16": 8}
ROWS_IN_FLIGHT = 4
KERNELS = [(kernel, element) for kernel in MATRIX_KERNELS for element in PACKS]


def _cuobjdump() -> str:
    package = find_spec("nvidia")
    for folder in package.submodule_search_locations if package else ():
        for path in Path(folder).glob("*/bin/cuobjdump"):
            return str(path)
    found = shutil.which("cuobjdump")
    assert found, "cuobjdump is missing: pip install nvidia-cuda-cuobjdump"
    return found


def _dump(*options: str) -> dict[str, str]:
    """cuobjdump's text for each function of the library."""
    path = _native.build_info()["path"]
    command = [_cuobjdump(), *options, "-arch", "sm_90", path]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    text = subprocess.run(["c++filt"], input=text, check=True, capture_output=True, text=True).stdout
    functions = defaultdict(str)
    name = ""
    for line in text.splitlines():
        match = re.match(r"\s*Function\s*:?\s*.*::(\w+<.*?>)\(", line)
        name = match[1] if match else name
        functions[name] += line + "\n"
    return functions


@pytest.fixture(scope="module", autouse=True)
def compiled_for_sm_90():
    if not (shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()):
        pytest.skip("NO NVCC: the device code of the kernels is not checked here")
    architectures = [a.removesuffix("+PTX") for a in _native.build_info()["architectures"] or ()]
    assert "90" in architectures, "there is an nvcc, but the library has no sm_90 code: build with NORMFUSE_CUDA=1"


@pytest.fixture(scope="module")
def resources(compiled_for_sm_90):
    return _dump("--dump-resource-usage")


@pytest.fixture(scope="module")
def assembly(compiled_for_sm_90):
    return _dump("-sass")


@pytest.mark.parametrize(("kernel", "element"), KERNELS)
def test_no_spills(resources, kernel, element):
    for pack in (1, PACKS[element]):
        usage = resources[f"{kernel}<{element}, {pack}>"]
        assert re.search(r"REG:\d+ STACK:0 .*LOCAL:0", usage), usage


@pytest.mark.parametrize(("kernel", "element"), KERNELS)
def test_sixteen_byte_accesses(assembly, kernel, element):
    code = assembly[f"{kernel}<{element}, {PACKS[element]}>"]
    reads, writes = MATRIX_KERNELS[kernel]
    assert len(re.findall(r"LDG\.E[.\w]*\.128", code)) >= reads * ROWS_IN_FLIGHT
    assert len(re.findall(r"STG\.E[.\w]*\.128", code)) >= writes * ROWS_IN_FLIGHT
