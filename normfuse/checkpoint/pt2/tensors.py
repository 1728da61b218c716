"""Weights and constants of an archive: raw bytes, and where in them each tensor lies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._export.serde import schema

from normfuse.checkpoint.errors import CheckpointError
from normfuse.checkpoint.pt2.schema import build
from normfuse.checkpoint.strict_json import parse_json
from normfuse.errors import one_line

DTYPES: dict[int, torch.dtype] = {
    schema.ScalarType.BYTE: torch.uint8,
    schema.ScalarType.CHAR: torch.int8,
    schema.ScalarType.SHORT: torch.int16,
    schema.ScalarType.INT: torch.int32,
    schema.ScalarType.LONG: torch.int64,
    schema.ScalarType.HALF: torch.float16,
    schema.ScalarType.FLOAT: torch.float32,
    schema.ScalarType.DOUBLE: torch.float64,
    schema.ScalarType.COMPLEXFLOAT: torch.complex64,
    schema.ScalarType.COMPLEXDOUBLE: torch.complex128,
    schema.ScalarType.BOOL: torch.bool,
    schema.ScalarType.BFLOAT16: torch.bfloat16,
}
_CONFIG_BYTES = 1 << 26
_AT_LEAST = 1 << 26  # tensors may show that many bytes however small the file is
_TIMES_FILE = 32
_RANK = 32


class TensorReader:
    """Reads the tensors that the ``*_config.json`` records of an archive describe.

    Args:
        read: the bytes of a record, with an upper bound on their number.
        storage: the bytes of a record as an uint8 tensor.
        file_size: of the archive: all tensors together may show 32 times as many bytes, and 64 MB, since names may
            share bytes and strides of zero repeat them.
        source: the file's name, for messages.
    """

    def __init__(
        self,
        read: Callable[[str, int], bytes],
        storage: Callable[[str], torch.Tensor],
        file_size: int,
        source: str,
    ) -> None:
        self._read, self._storage, self._source = read, storage, source
        self._shown, self._allowed = 0, _AT_LEAST + _TIMES_FILE * file_size
        self._storages: dict[str, torch.Tensor] = {}

    def group(self, config: str, folder: str, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors by name that one configuration describes; names that share a record share their memory.

        CheckpointError for pickled ones, for those that do not fit their record, and for too many.
        """
        what = f"{self._source}: {config}"
        payload = build(schema.PayloadConfig, parse_json(self._read(config, _CONFIG_BYTES), what), what)
        return {name: self._tensor(name, meta, folder, prefix) for name, meta in payload.config.items()}

    def _tensor(self, name: str, meta: schema.PayloadMeta, folder: str, prefix: str) -> torch.Tensor:
        what = f"{self._source}: tensor {one_line(name, 80)!r}"
        number = meta.path_name.removeprefix(prefix)
        if meta.use_pickle or meta.tensor_meta is None:
            raise CheckpointError(
                f"{what} is a pickled object: reading it can run code, so it was not read; give --trust (trust=True) "
                "if you know who made it",
                advice=["--trust"],
            )
        if number == meta.path_name or not (number.isascii() and number.isdecimal()):
            raise CheckpointError(
                f"{what} is in a record called {one_line(meta.path_name, 60)!r}, which is not a valid name"
            )
        dtype, sizes, strides, offset = plain_meta(meta.tensor_meta, what)
        record = folder + meta.path_name
        if record not in self._storages:
            self._storages[record] = self._storage(record)
        storage = self._storages[record]
        check_extent(storage.numel(), dtype, sizes, strides, offset, what)
        count = 1
        for size in sizes:
            count *= size
        self._shown += count * dtype.itemsize
        if self._shown > self._allowed:
            raise CheckpointError(f"{what}: the file shows its bytes more than {_TIMES_FILE} times over")
        check_booleans(storage, dtype, what)
        whole = storage[: storage.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
        tensor = whole.as_strided(sizes, strides, offset)
        return torch.nn.Parameter(tensor, requires_grad=False) if meta.is_param else tensor


def plain_meta(meta: schema.TensorMeta, what: str) -> tuple[torch.dtype, list[int], list[int], int]:
    """Dtype, sizes, strides and offset of a stored tensor.

    CheckpointError if it is not dense or they make no sense.
    """
    if meta.dtype not in DTYPES or meta.layout != schema.Layout.Strided:
        raise CheckpointError(f"{what} is a {meta.dtype.name} of layout {meta.layout.name}; it must be dense")
    numbers = [_whole(value, what) for value in (*meta.sizes, *meta.strides, meta.storage_offset)]
    rank = len(meta.sizes)
    if rank > _RANK or len(meta.strides) != rank:
        raise CheckpointError(f"{what} has {rank} sizes and {len(meta.strides)} strides")
    return DTYPES[meta.dtype], numbers[:rank], numbers[rank:-1], numbers[-1]


def check_extent(
    available: int, dtype: torch.dtype, sizes: list[int], strides: list[int], offset: int, what: str
) -> None:
    """Raises CheckpointError unless every element lies within ``available`` bytes."""
    last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    end = 0 if 0 in sizes else (last + 1) * dtype.itemsize
    if end > available or offset * dtype.itemsize > available:
        shape = "×".join(map(str, sizes)) or "1"
        raise CheckpointError(f"{what} of {shape} {_name(dtype)} does not fit the {available} bytes of its record")


def check_booleans(storage: torch.Tensor, dtype: torch.dtype, what: str) -> None:
    """Raises CheckpointError for bytes that are neither 0 nor 1 where they are to be booleans."""
    if dtype == torch.bool and storage.numel() and storage.max() > 1:
        raise CheckpointError(f"{what} holds other bytes than 0 and 1 for its booleans")


def _whole(value: Any, what: str) -> int:
    if value.type != "as_int" or not 0 <= value.as_int < 1 << 62:
        raise CheckpointError(f"{what} has sizes, strides or an offset that are not natural numbers")
    return value.as_int


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
