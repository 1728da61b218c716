"""What an operation returns, found without computing it, and bounds on finding it.

Operations run on torch's fake tensors, which have shapes and no memory. Even so a few numbers in a file can make that
last for ever: a difference of order 10¹², a split into 10¹² parts. Hence everything is counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from normfuse.checkpoint.errors import CheckpointError
from normfuse.checkpoint.pt2 import recurrent
from normfuse.errors import one_line

_MOST_CALLS = 5000  # of operations inside of one
_MOST_PARTS = 4096  # that an operation may split a tensor into
_VALUE_BYTES = 1 << 29
_CONSTANT_BYTES = 1 << 29
_TIMES_FILE = 64
_TIMES_FILE_CONSTANT = 16


class ShapeRunner:
    """Runs operations on fake tensors, within bounds.

    Args:
        file_size: one value may have 64 times as many bytes, and 512 MB, at the sizes of the example; all that is
            computed from constants, which folding does, 16 times as many, and 512 MB.
    """

    def __init__(self, file_size: int) -> None:
        self._mode = FakeTensorMode(allow_fallback_kernels=False)
        self._largest = _VALUE_BYTES + _TIMES_FILE * file_size
        self._constants_left = _CONSTANT_BYTES + _TIMES_FILE_CONSTANT * file_size

    def tensor(self, dtype: torch.dtype, sizes: Sequence[int], strides: Sequence[int]) -> torch.Tensor:
        """A fake tensor on the CPU."""
        with self._mode:
            return torch.empty_strided(sizes, strides, dtype=dtype)

    def run(self, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], constant: bool) -> Any:
        """What ``function`` returns for fake tensors; ``constant`` says whether nothing depends on inputs.

        CheckpointError if it cannot be called so, if its result depends on values, or if a bound is passed.
        """
        try:
            with torch.no_grad(), self._mode, _Counting():
                if recurrent.is_recurrent(function):
                    result = recurrent.result(function, args, kwargs)
                else:
                    result = function(*args, **kwargs)
        except CheckpointError:
            raise
        except Exception as error:  # ATen and its shape functions have no common base for what they raise
            raise CheckpointError(f"{function} cannot be called so ({_reason(error)})") from error
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._account(function, value, constant)
        return result

    def _account(self, function: Any, value: torch.Tensor, constant: bool) -> None:
        count = math.prod(value.shape) * value.dtype.itemsize
        if count > self._largest:
            raise CheckpointError(f"the result of {function} would have {count} bytes; {self._largest} are allowed")
        if constant:
            self._constants_left -= count
            if self._constants_left < 0:
                raise CheckpointError(f"{function} and others make constants that are too large for this file")


class _Counting(TorchDispatchMode):
    """Ends an operation that calls too many others or would return too many tensors."""

    def __init__(self) -> None:
        super().__init__()
        self._calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._calls += 1
        if self._calls > _MOST_CALLS:
            raise CheckpointError(f"{func} is called more than {_MOST_CALLS} times by one operation")
        if any(str(returned.type) == "List[Tensor]" for returned in func._schema.returns):
            self._check_parts(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _check_parts(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Bounds the number of parts that an operation makes.

        Every part has a place along some axis, so that a tensor of few parts has a short one, or few are asked for.
        Those that are asked for by number are counted by it.
        """
        given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        tensor = given.get("self")
        if not isinstance(tensor, torch.Tensor) or not tensor.dim():
            return  # made from a list, hence as many as are in the file
        length = tensor.shape[given.get("dim", 0)]
        if isinstance(given.get("split_size"), int):
            length = -(-length // max(given["split_size"], 1))
        if isinstance(given.get("chunks"), int):
            length = min(length, given["chunks"])
        if "sections" in given:
            length = given["sections"]
        if isinstance(given.get("split_sizes") or given.get("indices"), (list, tuple)):
            return
        if length > _MOST_PARTS:
            raise CheckpointError(f"{func} returns {length} tensors; {_MOST_PARTS} are allowed")


def _reason(error: Exception) -> str:
    text = one_line(error, 160)
    if "data-dependent" in text or type(error).__name__ in (
        "DynamicOutputShapeException",
        "DataDependentOutputException",
    ):
        return f"its result's size depends on values: {text}"
    return text
