"""The C++ tests of the emulator and of all kernels, plain and under the sanitizers, planted bugs included."""

import pytest


@pytest.mark.parametrize("sanitizer", ["", "address", "thread"])
def test_ctest(build_emulator, run_ctest, sanitizer):
    run_ctest(build_emulator(sanitizer))
