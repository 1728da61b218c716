"""What nvcc made of the kernels: no spills in any, and 16-byte accesses in every kernel that moves a matrix."""

import re
import shutil
import subprocess
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

import pytest

import normfuse

# kernel: matrices it reads and writes per row
COLUMN_KERNELS = {
    "unified_sums": (1, 0),
    "unified_apply": (1, 1),
    "unified_gradient_sums": (2, 0),
    "unified_gradient_apply": (2, 1),
    "power_sums": (1, 1),
    "power_apply": (1, 1),
    "power_gradient": (2, 1),
}
# The same of kernels with the curve of a dynamic activation as their first argument.
CURVE_KERNELS = {"dynamic_activation_apply": (1, 1), "dynamic_activation_gradient": (2, 1)}
CURVES = ("(normfuse::Curve)0", "(normfuse::Curve)1")
# The same of kernels that keep rows on chip, whatever the size of their teams.
ROW_KERNELS = {
    "row_norm_rows": (2, 2),
    "row_norm_gradient": (3, 1),
    "power_grouped_sums": (1, 1),
    "power_grouped_gradient": (2, 1),
}
# The same of kernels over statistics groups, in both layouts, without a mask.
STAT_GROUP_KERNELS = {
    "stat_group_moments": (1, 0),
    "stat_group_affine": (1, 1),
    "stat_group_gradient_sums": (2, 0),
    "stat_group_gradient": (2, 1),
}
PACKS = {"float": 4, "__half": 8, "__nv_bfloat16": 8}  # of 16 bytes; doubles go one by one
ROWS_IN_FLIGHT = 4
TEAMS = (1, 4, 16)  # warps
CURVE_CASES = [(kernel, curve, element) for kernel in CURVE_KERNELS for curve in CURVES for element in PACKS]
COLUMN_CASES = [(kernel, element) for kernel in COLUMN_KERNELS for element in PACKS]
STAT_GROUP_CASES = [(kernel, element) for kernel in STAT_GROUP_KERNELS for element in PACKS]
ROW_CASES = [(kernel, element) for kernel in ROW_KERNELS for element in PACKS]


def _cuobjdump() -> str:
    package = find_spec("nvidia")
    for folder in package.submodule_search_locations if package else ():
        for path in Path(folder).glob("*/bin/cuobjdump"):
            return str(path)
    found = shutil.which("cuobjdump")
    assert found, "cuobjdump is missing: pip install nvidia-cuda-cuobjdump"
    return found


def _dump(option: str, lines: str) -> dict[tuple[str, str], str]:
    """cuobjdump's lines with ``lines``, an extended regular expression, for each architecture and function."""
    # What goes by is megabytes of instructions: Python gets only the lines that are read.
    library = normfuse.build_info()["path"]
    command = f"'{_cuobjdump()}' {option} '{library}' | grep -E '^arch|Function|{lines}' | c++filt"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], check=True, capture_output=True, text=True)
    functions = defaultdict(str)
    architecture = name = ""
    for line in done.stdout.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            architecture, name = match[1], ""
        elif match := re.match(r"\s*Function\s*:?\s*.*::(\w+<.*?>)\(", line):
            name = match[1]
        functions[architecture, name] += line + "\n"
    return functions


@pytest.fixture(scope="module", autouse=True)
def compiled_for_sm_90():
    if not (shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()):
        pytest.skip("NO NVCC: the device code of the kernels is not checked here")
    architectures = [a.removesuffix("+PTX") for a in normfuse.build_info()["architectures"] or ()]
    assert "90" in architectures, "there is an nvcc, but the library has no sm_90 code: build with NORMFUSE_CUDA=1"


@pytest.fixture(scope="module")
def assembly(compiled_for_sm_90):
    return {name: code for (_, name), code in _dump("-sass -arch sm_90", "G[.]E[^ ]*[.]128").items()}


def test_no_spills(compiled_for_sm_90):
    """A register that is spilled shows as stack: none in any kernel, for any architecture.

    Except where a mask parts two regions: the compiler then indexes the two means of a group, which takes a few bytes
    of stack at registers to spare.
    """
    usage = {key: text for key, text in _dump("--dump-resource-usage", "REG:").items() if "REG:" in text and key[1]}
    names = {name for _, name in usage}
    for element, pack in [*PACKS.items(), *((element, 1) for element in [*PACKS, "double"])]:
        assert {f"{kernel}<{element}, {pack}>" for kernel in COLUMN_KERNELS} <= names
        assert {f"{kernel}<{element}, {pack}, {team}>" for kernel in ROW_KERNELS for team in TEAMS} <= names
        assert {f"{kernel}<{curve}, {element}, {pack}>" for kernel in CURVE_KERNELS for curve in CURVES} <= names
    for key, text in usage.items():
        registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text).groups())
        indexed = key[1].startswith("stat_group_gradient_sums<") and "Mask)2" in key[1] and registers <= 160
        assert local == 0 and stack <= (64 if indexed else 0), f"{key}: {text}"


def _accesses(code: str) -> tuple[int, int]:
    return len(re.findall(r"LDG\.E[.\w]*\.128", code)), len(re.findall(r"STG\.E[.\w]*\.128", code))


@pytest.mark.parametrize(("kernel", "element"), COLUMN_CASES)
def test_sixteen_byte_accesses(assembly, kernel, element):
    loads, stores = _accesses(assembly[f"{kernel}<{element}, {PACKS[element]}>"])
    reads, writes = COLUMN_KERNELS[kernel]
    assert loads >= reads * ROWS_IN_FLIGHT and stores >= writes * ROWS_IN_FLIGHT


@pytest.mark.parametrize(("kernel", "curve", "element"), CURVE_CASES)
def test_sixteen_byte_accesses_of_curves(assembly, kernel, curve, element):
    loads, stores = _accesses(assembly[f"{kernel}<{curve}, {element}, {PACKS[element]}>"])
    reads, writes = CURVE_KERNELS[kernel]
    assert loads >= reads * ROWS_IN_FLIGHT and stores >= writes * ROWS_IN_FLIGHT


@pytest.mark.parametrize("team", TEAMS)
@pytest.mark.parametrize(("kernel", "element"), ROW_CASES)
def test_sixteen_byte_accesses_of_rows(assembly, kernel, element, team):
    loads, stores = _accesses(assembly[f"{kernel}<{element}, {PACKS[element]}, {team}>"])
    reads, writes = ROW_KERNELS[kernel]
    packs = 16 // PACKS[element]
    assert loads >= reads * packs and stores >= writes * packs


@pytest.mark.parametrize(("kernel", "element"), STAT_GROUP_CASES)
def test_sixteen_byte_accesses_of_stat_groups(assembly, kernel, element):
    pack, (reads, writes) = PACKS[element], STAT_GROUP_KERNELS[kernel]
    packs = ROWS_IN_FLIGHT if pack == 4 else ROWS_IN_FLIGHT // reads  # wide packs leave registers for fewer
    for planes in ("false", "true"):
        loads, stores = _accesses(assembly[f"{kernel}<{element}, {pack}, {planes}, (normfuse::cuda::Mask)0>"])
        assert loads >= reads * packs and stores >= writes * packs
