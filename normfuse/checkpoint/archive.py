"""What kind of file is this, is it whole, and what tensors does it hold: nothing in here runs code from a
file unless the caller trusts it."""

from __future__ import annotations

import hashlib
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from normfuse.checkpoint.pickled import way_out
from normfuse.errors import NormfuseError, one_line, some_of

FORMAT = "normfuse checkpoint"
VERSION = 1
_ZIP_MAGIC = b"PK\x03\x04"


class CheckpointError(NormfuseError):
    """A checkpoint cannot be written or used. The message is one line: which file, what is wrong, what to
    do."""


def digest(metadata: str, tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> str:
    """SHA-256 over the format, the metadata and every group of tensors: names, dtypes, shapes, bytes
    (hex)."""
    sha = hashlib.sha256()

    def add(text: str) -> None:
        encoded = text.encode()
        sha.update(len(encoded).to_bytes(8, "little"))  # lengths keep ("ab", "c") apart from ("a", "bc")
        sha.update(encoded)

    for text in (FORMAT, str(VERSION), metadata):
        add(text)
    for group, members in tensors.items():
        add(f"{group} {len(members)}")
        for name, tensor in members.items():
            add(name)
            add(f"{tensor.dtype} {list(tensor.shape)}")
            sha.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def file_kind(path: Path) -> str:
    """``safetensors``, ``torchscript``, ``pt2``, ``torch`` (a zip with a pickle of tensors) or ``pickle``.

    Raises CheckpointError if the file cannot be read, or is a zip archive that is damaged or holds none of
    these.
    """
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    if path.suffix == ".safetensors":
        return "safetensors"
    if head[:4] == _ZIP_MAGIC:
        return _zip_kind(path)
    if not head:
        raise CheckpointError(f"{path} is empty")
    return "pickle"


def _zip_kind(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            names = {entry.filename.partition("/")[2] for entry in entries}
            kind = _kind_of_records(names)
            # torch stores tensors as they are. Anything else is damage, or a small file that unpacks to a
            # huge one.
            packed = [e.filename for e in entries if e.compress_type or e.compress_size != e.file_size]
            if kind != "torch":
                broken = None  # refused, or trusted and read as a whole by its own reader
            else:
                broken = packed[0] if packed else archive.testzip()
    except Exception as error:  # a single flipped bit makes zipfile raise any of seven exception types
        raise CheckpointError(
            f"{path} is damaged: its zip archive cannot be read ({one_line(error, 120)}); copy or save it again"
        ) from error
    if kind is None:
        raise CheckpointError(f"{path} is a zip archive, but holds no tensors written by torch.save")
    if broken is not None:
        raise CheckpointError(f"{path} is damaged: record {broken!r} fails its checksum; copy or save it again")
    return kind


def _kind_of_records(names: set[str]) -> str | None:
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        return "torchscript"
    if "archive_format" in names or any(name.startswith("models/") for name in names):
        return "pt2"
    return "torch" if "data.pkl" in names else None


def read(path: Path, kind: str, trust: bool) -> Any:
    """The object in a file of ``kind`` (see :func:`file_kind`), read as data only unless ``trust`` is given.

    Raises CheckpointError, in one line, for everything that is not data and for everything unreadable.
    """
    if kind == "torchscript":
        raise CheckpointError(
            f"{path} is a TorchScript archive, whose module cannot be exported again: read it with "
            "torch.jit.load(path).state_dict(), save that with torch.save, and name the module's factory "
            "(--model)"
        )
    if kind == "safetensors":
        return _read_safetensors(path)
    if kind == "pt2":
        if not trust:
            raise CheckpointError(
                f"{path} is an exported program (.pt2): reading one can run code, so it was not read; "
                "give --trust (trust=True) if you know who made it",
                advice=["--trust"],
            )
        return _guarded(path, torch.export.load)
    if trust:
        return _guarded(path, lambda file: torch.load(file, map_location="cpu", weights_only=False))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols that no torch.save writes: refused anyway
            # Memory mapping keeps one copy of the weights fewer in memory; only zip archives offer it.
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=kind == "torch")
    except pickle.UnpicklingError as error:
        foreign = _foreign_globals(path) if kind == "torch" else []
        if not foreign and "load key" in str(error):
            raise CheckpointError(f"{path} is not a checkpoint: neither torch.save nor safetensors wrote it") from error
        named = f" ({some_of(foreign)})" if foreign else ""
        raise CheckpointError(
            f"{path} holds pickled objects{named}: reading them can run code, so it was not read; if you know who made "
            f"it, keep its weights alone, {way_out(path)}, or give --trust (trust=True)",
            advice=["--trust"],
        ) from error
    except Exception as error:  # torch.load raises at least four more types for files that are not whole
        raise CheckpointError(f"{path} cannot be read as tensors ({one_line(error, 120)})") from error


def _guarded(path: Path, reader: Any) -> Any:
    try:
        return reader(path)
    except Exception as error:  # a trusted pickle may fail in any way its classes can
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}: {one_line(error, 200)})") from error


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise CheckpointError(f"reading {path} needs the safetensors package: pip install safetensors") from error
    try:
        return load_file(path)
    except Exception as error:  # SafetensorError, and UnicodeDecodeError or ValueError for some damaged headers
        raise CheckpointError(f"{path} is damaged or no safetensors file ({one_line(error, 120)})") from error


def _foreign_globals(path: Path) -> list[str]:
    """Names that the pickle asks for and tensors do not need; found by disassembling, not by running it."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # a pickle that cannot be disassembled has no names to show; it is refused all the same
        return []
