"""What kind of file this is, whether it is whole, and what tensors it holds.

Nothing in here runs code from a file unless the caller trusts it.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from normfuse.checkpoint import kinds
from normfuse.checkpoint.errors import CheckpointError
from normfuse.checkpoint.factory import on_path
from normfuse.checkpoint.pickled import data_globals, way_out
from normfuse.errors import one_line, some_of

FORMAT = "normfuse checkpoint"
VERSION = 1


def digest(metadata: str, tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> str:
    """SHA-256 (hex) over the format, the metadata and every group of tensors: names, dtypes, shapes, bytes."""
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
    """What a plain file is, see :func:`normfuse.checkpoint.kinds.kind_of`.

    CheckpointError if it is nothing that can be read.
    """
    with kinds.opened(path) as file:
        return kinds.kind_of(file, path)


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
    if trust:
        with on_path(os.getcwd()):  # where the script may lie whose classes are in the file
            return guarded(path, lambda file: torch.load(file, map_location="cpu", weights_only=False))
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(data_globals()):
            warnings.simplefilter("ignore")  # about pickle protocols that no torch.save writes: refused anyway
            # Memory mapping keeps one copy of the weights fewer in memory; only zip archives offer it.
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=kind == "torch")
    except pickle.UnpicklingError as error:
        foreign = _foreign_globals(path) if kind == "torch" else []
        named = f" ({one_line(some_of(foreign), 60)})" if foreign else ""
        raise CheckpointError(
            f"{path} holds pickled objects{named}: reading them can run code; if you know who made it, give --trust "
            f"(trust=True), or keep its weights alone: {way_out(path)}",
            advice=["--trust"],
            limit=4000,  # half a command would be no way out
        ) from error
    except Exception as error:  # torch.load raises at least four more types for files that are not whole
        raise CheckpointError(f"{path} cannot be read as tensors ({one_line(error, 120)})") from error


def guarded(path: Path, reader: Callable[[Path], Any]) -> Any:
    """What a reader returns that may run code; CheckpointError, in one line, for whatever it raises."""
    try:
        return reader(path)
    except (Exception, SystemExit) as error:  # a trusted pickle may fail in any way its classes can
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
        with torch.serialization.safe_globals(data_globals()):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # a pickle that cannot be disassembled has no names to show; it is refused all the same
        return []
