"""The C++ tests of the emulator and of all kernels, plain and under the sanitizers, planted bugs included."""

import os

import pytest


@pytest.mark.parametrize("sanitizer", ["", "address", "thread"])
def test_ctest(build_emulator, run_ctest, sanitizer):
    if sanitizer and not os.environ.get("NORMFUSE_SANITIZE"):
        pytest.skip("builds all kernels once more: `make sanitize` runs it")
    run_ctest(build_emulator(sanitizer))
