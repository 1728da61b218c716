"""The C++ tests of emulator and kernels under the sanitizers, planted bugs included. Plain: `make cpp-test`."""

import os

import pytest


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_ctest(build_emulator, run_ctest, sanitizer):
    if not os.environ.get("NORMFUSE_SANITIZE"):
        pytest.skip("builds all kernels once more: `make sanitize` runs it")
    run_ctest(build_emulator(sanitizer))
