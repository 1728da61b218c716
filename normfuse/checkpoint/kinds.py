"""What a file is, found by looking at its first bytes; nothing but plain files is opened."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from normfuse.checkpoint.errors import CheckpointError
from normfuse.checkpoint.records import Records

_HEAD = 1 << 16
_NUMPY = "an array or archive of NumPy: save the weights with torch.save or safetensors"
_STARTS = {
    b"\x1f\x8b": "a gzip archive: unpack it first",
    b"BZh": "a bzip2 archive: unpack it first",
    b"\xfd7zXZ": "an xz archive: unpack it first",
    b"\x28\xb5\x2f\xfd": "a zstd archive: unpack it first",
    b"7z\xbc\xaf": "a 7-Zip archive: unpack it first",
    b"Rar!": "a RAR archive: unpack it first",
    b"GGUF": "a GGUF file, whose weights are quantised: save the model's own weights with torch.save or safetensors",
    b"\x89HDF": "an HDF5 file, as Keras writes them: save the weights with torch.save or safetensors",
    b"\x93NUMPY": _NUMPY,
    b"%PDF": "a PDF document, not a checkpoint",
    b"\x89PNG": "a picture, not a checkpoint",
    b"\xff\xd8\xff": "a picture, not a checkpoint",
    b"\x7fELF": "a program or library, not a checkpoint",
}
_OTHERS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A plain file open for reading.

    CheckpointError if there is none: folders, pipes, devices and sockets are refused before anything waits for them.
    """
    try:
        _refuse_others(path, os.stat(path))
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            _refuse_others(path, os.fstat(descriptor))  # what is behind a name can change
            yield file
    except (OSError, ValueError) as error:  # ValueError for a name with a zero in it
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def kind_of(file: BinaryIO, path: Path) -> str:
    """``safetensors``, ``torchscript``, ``pt2``, ``torch`` (a zip with a pickle of tensors) or ``pickle``.

    Raises CheckpointError, saying what it is, for a file that is none of these.
    """
    head = file.read(_HEAD)
    if not head:
        raise CheckpointError(f"{path} is empty")
    if head.startswith(b"PK\x03\x04"):
        if _first_record(head).endswith(b".npy"):
            raise CheckpointError(f"{path} is {_NUMPY}")
        return _zip_kind(file, path)
    if _is_safetensors(head, os.fstat(file.fileno()).st_size):
        return "safetensors"
    if head[:1] == b"\x80" and len(head) > 1 and head[1] <= 5:
        return "pickle"
    if what := _foreign(head, path, "a checkpoint"):
        raise CheckpointError(f"{path} is {what}")
    if path.suffix == ".onnx" or _looks_like_onnx(head):
        raise CheckpointError(f"{path} is an ONNX file: normfuse fold reads those")
    raise CheckpointError(f"{path} is not a checkpoint: neither torch.save, torch.export.save nor safetensors wrote it")


def what_instead_of_onnx(path: Path) -> str:
    """What a file is that ought to be an ONNX file, as far as its first bytes show it; empty for nothing known."""
    try:
        with opened(path) as file:
            head = file.read(_HEAD)
            size = os.fstat(file.fileno()).st_size
    except CheckpointError:
        return ""
    if head[4:8] == b"ORTM":
        return "in ONNX Runtime's own format: give the ONNX file that it was made from"
    if head.startswith(b"PK\x03\x04") or _is_safetensors(head, size):
        return "a checkpoint or another archive, not an ONNX file: normfuse export reads checkpoints"
    return _foreign(head, path, "an ONNX file")


def _foreign(head: bytes, path: Path, wanted: str) -> str:
    """What a file is that is nothing that normfuse reads; empty for nothing known."""
    found = next((what for start, what in _STARTS.items() if head.startswith(start)), "")
    if head[257:262] == b"ustar":
        found = "a tar archive: unpack it, or save it again if an old torch wrote it"
    return (found or (_text_kind(head, path) if head and _is_text(head) else "")).replace("a checkpoint", wanted)


def _refuse_others(path: Path, status: os.stat_result) -> None:
    kind = stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFDIR and ((path / "config.json").exists() or (path / "model.safetensors.index.json").exists()):
        raise CheckpointError(f"cannot read {path}: it is a folder; name the file with the weights in it")
    if kind in _OTHERS:
        raise CheckpointError(f"cannot read {path}: it is {_OTHERS[kind]}, not a file")


def _first_record(head: bytes) -> bytes:
    """The name of the first record of a zip archive."""
    return head[30 : 30 + int.from_bytes(head[26:28], "little")]


def _zip_kind(file: BinaryIO, path: Path) -> str:
    names = set(Records(file, str(path), compressed=True).sizes)  # TorchScript compresses its code
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        return "torchscript"
    if "archive_format" in names or any(name.startswith("models/") for name in names):
        return "pt2"
    if "data.pkl" not in names:
        raise CheckpointError(f"{path} is a zip archive, but holds nothing that torch.save wrote")
    Records(file, str(path)).check()
    return "torch"


def _is_safetensors(head: bytes, size: int) -> bool:
    length = int.from_bytes(head[:8], "little")
    return head[8:9] == b"{" and 2 <= length <= size - 8


def _looks_like_onnx(head: bytes) -> bool:
    """Whether these are the first bytes of an ONNX model.

    A protobuf whose first field is a small number, ir_version, and whose next is one of the model's texts, numbers or
    messages.
    """
    return (
        len(head) > 3
        and head[0] == 0x08
        and 1 <= head[1] <= 30
        and head[2] in (0x12, 0x1A, 0x22, 0x28, 0x32, 0x3A, 0x42)
    )


def _is_text(head: bytes) -> bool:
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4:  # else a character that the end of what was read cuts
            return False
        text = head[: error.start].decode()
    return all(character.isprintable() or character in "\n\r\t\f\ufeff" for character in text[:4096])


def _text_kind(head: bytes, path: Path) -> str:
    start = head.lstrip()
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the file itself: git lfs pull"
    if b'"weight_map"' in head or path.name.endswith(".index.json"):
        return "an index of several safetensors files: give the folder's model to transformers, or merge them"
    if start[:1] in (b"{", b"["):
        return "a JSON text, not a checkpoint"
    if start[:5].lower() in (b"<!doc", b"<html"):
        return "a web page, not a checkpoint: download the file itself"
    return "a text, not a checkpoint"
