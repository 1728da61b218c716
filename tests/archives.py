"""Making PT2 archives by hand: records, digests that fit them, operations in the JSON of a graph."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import warnings
import zipfile
from typing import Any

OWN = "extra/normfuse.json"
MODEL = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"

Contents = dict[str, bytes]


def unpack(data: bytes) -> Contents:
    """The records of an archive by name without its folder, in order."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {entry.filename.partition("/")[2]: archive.read(entry) for entry in archive.infolist()}


def pack(contents: Contents, fit: bool = True) -> bytes:
    """An archive of stored records; with digests that fit the records, if it has digests."""
    contents = dict(contents)
    if fit and OWN in contents:
        try:
            own = json.loads(contents[OWN])
            own["records"] = {
                name: hashlib.sha256(data).hexdigest()
                for name, data in contents.items()
                if name != OWN and name in own["records"]
            } | {name: digest for name, digest in own["records"].items() if name not in contents}
            contents[OWN] = json.dumps(own).encode()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            pass  # the record itself is what was changed
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in contents.items():
            archive.writestr(f"archive/{name}", data)
    return buffer.getvalue()


def zipped(records: Any, packed: str | None = None) -> bytes:
    """An archive of records, one of them compressed; names may occur twice."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of zipfile, about names that occur twice
        for name, data in records:
            kind = zipfile.ZIP_DEFLATED if name == packed else zipfile.ZIP_STORED
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), data, kind)
    return buffer.getvalue()


def overlapping(contents: Contents, one: int, other: int) -> bytes:
    """An archive whose directory says of two records that they begin in one place."""
    data = bytearray(pack(contents))
    entries = directory(data)
    at, place = entries[one] + 42, entries[other] + 42
    data[at : at + 4] = data[place : place + 4]
    return bytes(data)


def directory(data: bytes) -> list[int]:
    """Where the entries of an archive's directory begin."""
    (at,) = struct.unpack("<I", data[-6:-2])
    found = []
    while data[at : at + 4] == b"PK\x01\x02":
        found.append(at)
        at += 46 + sum(struct.unpack("<3H", data[at + 28 : at + 34]))
    return found


def item(name: str, argument: Any) -> Any:
    """An operand by its position."""
    return {"name": name, "arg": argument, "kind": 1}


def insert(graph: Any, at: int, target: str, inputs: Any, name: str, shape: list[int]) -> None:
    """Puts an operation that returns one tensor into the JSON of a graph."""
    graph["nodes"].insert(
        at,
        {
            "target": target,
            "inputs": [item(key, value) for key, value in inputs.items()],
            "outputs": [{"as_tensor": {"name": name}}],
            "metadata": {},
            "name": name,
        },
    )
    whole = target.endswith(("arange.default", "tril_indices.default"))
    graph["tensor_values"][name] = _meta(shape, 5 if whole else 7)


def _meta(shape: list[int], dtype: int) -> Any:
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return {
        "dtype": dtype,
        "sizes": [{"as_int": size} for size in shape],
        "requires_grad": False,
        "device": {"type": "cpu", "index": None},
        "strides": [{"as_int": min(stride, 2**62)} for stride in strides],
        "storage_offset": {"as_int": 0},
        "layout": 7,
    }
