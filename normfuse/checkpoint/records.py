"""The records of a zip archive as torch writes it: stored as they are, one beside the other, under one folder."""

from __future__ import annotations

import encodings.cp437  # noqa: F401 (zipfile reads names in it, and nothing is to be imported while a file is read)
import hashlib
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, BinaryIO

import torch

from normfuse.checkpoint.errors import CheckpointError
from normfuse.errors import one_line

_END = struct.Struct("<4s4H2LH")  # end of the central directory, which is the end of the file
_LOCATOR = struct.Struct("<4sLQL")  # where the 64-bit end is
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCAL = struct.Struct("<4s5H3L2H")  # what stands before a record
_MOST_RECORDS = 1 << 16
_DIRECTORY_BYTES = 1 << 25
_BLOCK = 1 << 22
_ENCRYPTED = 1


@dataclass(frozen=True)
class _Record:
    start: int
    size: int
    crc: int


class Records:
    """What a zip archive holds, by name without the folder that all names begin with.

    Opening reads the directory only. Refused with CheckpointError: compressed or encrypted records, names that
    occur twice or leave the folder, records that overlap or reach beyond the file. Every read is as large as the
    record, hence never larger than the file.

    Args:
        file: open for reading; it stays open as long as records are read.
        source: the file's name, for messages.
        compressed: whether compressed records pass, for those who only want to know the names.
    """

    def __init__(self, file: BinaryIO, source: str, compressed: bool = False) -> None:
        self._file: Any = file  # a BinaryIO; typeshed gives those no readinto
        self._source, self._compressed = source, compressed
        self.file_size = file.seek(0, os.SEEK_END)
        try:
            self._records = self._directory()
        except CheckpointError:
            raise
        except Exception as error:  # a single flipped bit makes zipfile raise any of seven exception types
            raise self._damaged(f"its zip archive cannot be read ({one_line(error, 80)})") from error

    @property
    def sizes(self) -> Mapping[str, int]:
        """The size of each record in bytes, in the order in which they lie in the file."""
        return MappingProxyType({name: record.size for name, record in self._records.items()})

    def read(self, name: str, at_most: int) -> bytes:
        """The bytes of a record.

        CheckpointError if there is none of that name, if it has more than ``at_most`` bytes, or if they do not fit its
        checksum.
        """
        record = self._record(name)
        if record.size > at_most:
            raise CheckpointError(f"{self._source}: record {name!r} has {record.size} bytes; {at_most} are allowed")
        self._file.seek(record.start)
        data = self._file.read(record.size)
        if len(data) != record.size or zlib.crc32(data) != record.crc:
            raise self._damaged(f"record {name!r} fails its checksum")
        return data

    def tensor(self, name: str) -> tuple[torch.Tensor, str]:
        """The bytes of a record as an uint8 tensor of shape [size], and their SHA-256.

        CheckpointError as in :meth:`read`.
        """
        record = self._record(name)
        tensor = torch.empty(record.size, dtype=torch.uint8)
        sha, crc = hashlib.sha256(), 0
        view = memoryview(tensor.numpy())
        self._file.seek(record.start)
        for begin in range(0, record.size, _BLOCK):
            block = view[begin : begin + _BLOCK]
            if self._file.readinto(block) != len(block):
                raise self._damaged(f"record {name!r} ends early")
            sha.update(block)
            crc = zlib.crc32(block, crc)
        if crc != record.crc:
            raise self._damaged(f"record {name!r} fails its checksum")
        return tensor, sha.hexdigest()

    def check(self) -> None:
        """Reads every record against its checksum; CheckpointError for the first that does not fit."""
        for name, record in self._records.items():
            crc = 0
            self._file.seek(record.start)
            for begin in range(0, record.size, _BLOCK):
                crc = zlib.crc32(self._file.read(min(_BLOCK, record.size - begin)), crc)
            if crc != record.crc:
                raise self._damaged(f"record {name!r} fails its checksum")

    def _record(self, name: str) -> _Record:
        try:
            return self._records[name]
        except KeyError:
            raise CheckpointError(f"{self._source} has no record {name!r}; save it again") from None

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._source} is damaged: {what}; copy or save it again")

    def _directory(self) -> dict[str, _Record]:
        begin = self._directory_start()
        with zipfile.ZipFile(self._file) as archive:
            entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
        records: dict[str, _Record] = {}
        folder, end = None, 0
        for entry in entries:
            name = entry.orig_filename
            first, _, rest = name.partition("/")
            folder = first if folder is None else folder
            what = f"record {one_line(rest or name, 60)!r}"
            if first != folder or not _plain(rest):
                raise self._damaged(f"a record is called {one_line(repr(name), 60)}")
            stored = entry.compress_type == zipfile.ZIP_STORED and entry.compress_size == entry.file_size
            if not stored and not self._compressed:
                raise self._damaged(f"{what} is compressed, which torch does not write")
            if entry.flag_bits & _ENCRYPTED:
                raise self._damaged(f"{what} is encrypted")
            if rest in records:
                raise self._damaged(f"{what} is there twice")
            start = self._record_start(entry.header_offset, end, what)
            end = start + entry.compress_size
            if end > begin:
                raise self._damaged(f"{what} reaches beyond its place")
            records[rest] = _Record(start, entry.compress_size, entry.CRC)
        return records

    def _directory_start(self) -> int:
        """Where the directory begins, after its size was found bearable."""
        size = self.file_size
        if size < _END.size:
            raise self._damaged("its zip archive ends early")
        magic, *_, count, length, start, comment = _END.unpack(self._at(size - _END.size, _END.size))
        if magic != b"PK\x05\x06" or comment:
            raise self._damaged("its zip archive ends early")
        if size >= _END.size + _LOCATOR.size:
            magic, _, where, _ = _LOCATOR.unpack(self._at(size - _END.size - _LOCATOR.size, _LOCATOR.size))
            if magic == b"PK\x06\x07":
                if where + _END64.size > size:
                    raise self._damaged("its zip archive ends early")
                *_, count, length, start = _END64.unpack(self._at(where, _END64.size))
        if count > _MOST_RECORDS or length > _DIRECTORY_BYTES:
            raise self._damaged(f"its directory is said to have {count} records and {length} bytes")
        return start

    def _record_start(self, offset: int, free: int, what: str) -> int:
        if offset < free:
            raise self._damaged(f"{what} overlaps the one before it")
        magic, *_, name, extra = _LOCAL.unpack(self._at(offset, _LOCAL.size))
        if magic != b"PK\x03\x04":
            raise self._damaged(f"{what} has no header")
        return offset + _LOCAL.size + name + extra

    def _at(self, offset: int, size: int) -> bytes:
        self._file.seek(offset)
        return self._file.read(size)


def _plain(name: str) -> bool:
    parts = name.split("/")
    return name.isascii() and name.isprintable() and "\\" not in name and all(p not in ("", ".", "..") for p in parts)
