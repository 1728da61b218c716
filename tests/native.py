"""The compiled library as tests want it: what needs it, and the same steps with their autograd in Python."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest

from normfuse import _native

HAS_KERNELS = _native.available
needs_kernels = pytest.mark.skipif(not HAS_KERNELS, reason=f"no kernels: {_native.unavailable_reason}")
needs_autograd = pytest.mark.skipif(_native.autograd is None, reason="autograd was built for another torch or Python")


@contextmanager
def autograd_in_python() -> Iterator[None]:
    """Steps that C++ would run go through the autograd functions in Python."""
    with patch.object(_native, "autograd", None):
        yield
