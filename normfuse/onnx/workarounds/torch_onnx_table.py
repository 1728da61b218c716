"""In every export torch.onnx reads its source for a table of translations, which takes longer than a small model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.onnx._internal.exporter import _registration

_registry: Any = getattr(_registration, "ONNXRegistry", None)
_make: Any = getattr(_registry, "from_torchlib", None)  # private: another torch may not have it
# Also by the number of known operations: a table has translations of those only, such as of an imported torchvision.
_made = cache(lambda operations, *arguments, **options: _make(*arguments, **options))


@contextmanager
def kept_table() -> Iterator[None]:
    """Meanwhile torch.onnx takes copies of the table that was made first for the same operator set and operations."""
    if _make is None:
        yield
        return
    _registry.from_torchlib = staticmethod(_copied)
    try:
        yield
    finally:
        _registry.from_torchlib = _make  # an export in another thread makes its own


def _copied(*arguments: Any, **options: Any) -> Any:
    """A table of its own: an export adds translations to it."""
    table = copy.copy(_made(len(torch._C._dispatch_get_all_op_names()), *arguments, **options))
    table.functions = {target: [*entries] for target, entries in table.functions.items()}
    return table
