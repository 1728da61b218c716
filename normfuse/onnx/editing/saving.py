"""Edited models on the disk: what lay beside the file lies beside the new one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import IO

import onnx
from onnx import TensorProto

from normfuse.onnx.graph import GraphError
from normfuse.onnx.protos import tensors_of
from normfuse.onnx.publish import data_name

from .edits import Edited
from .onnx_file import OnnxFile

_ALIGNED = 4096  # so that a weight can be mapped
_SMALL = 1024  # bytes that stay in the file itself
_PIECE = 1 << 24
_LARGEST = 2**31 - 1


def save(file: OnnxFile, edited: Edited, path: Path) -> None:
    """Write an edited model in a staging folder; weights lie beside it if any did in the file it came from.

    Raises:
        GraphError: the model is larger than 2 GiB without its weights beside it.
    """
    model = onnx.ModelProto()
    model.CopyFrom(edited.proto)
    for left in path.parent.glob(f"{path.name}*"):
        left.unlink()
    beside = any(tensor.data_location == TensorProto.EXTERNAL for tensor in tensors_of(file.proto))
    if beside:
        data = path.with_name(data_name(path))
        with data.open("wb") as stream:
            for tensor in tensors_of(model):
                if tensor.data_location == TensorProto.EXTERNAL:
                    start = _copy(file, tensor, stream)
                elif tensor.name in edited.fresh and len(tensor.raw_data) > _SMALL:
                    start = _start(stream)
                    stream.write(tensor.raw_data)
                    tensor.ClearField("raw_data")
                    tensor.data_location = TensorProto.EXTERNAL
                else:
                    continue
                length = stream.tell() - start
                del tensor.external_data[:]
                for key, value in (("location", data.name), ("offset", start), ("length", length)):
                    tensor.external_data.add(key=key, value=str(value))
        if not data.stat().st_size:
            data.unlink()
    if model.ByteSize() > _LARGEST:
        raise GraphError(f"{path.name} would be larger than 2 GiB")
    path.write_bytes(model.SerializeToString())


def copy(file: OnnxFile, staged: Path, folder: Path) -> list[str] | None:
    """A copy of a file as it is, with what lies beside it if it is to lie in another folder.

    Returns:
        Names of the files beside it that were copied. None where they cannot have the names that they have, because
        others have them there, or because they lie in a folder of their own: the model then names another file.
    """
    shutil.copyfile(file.path, staged)
    if os.path.realpath(folder) == os.path.realpath(file.path.parent):
        return []
    sources = file.beside()
    names = [source.relative_to(file.path.parent) for source in sources]
    if any(len(name.parts) > 1 or (folder / name).exists() for name in names):
        save(file, Edited(file.proto), staged)
        return None
    for source, name in zip(sources, names, strict=True):
        shutil.copyfile(source, staged.with_name(name.name))
    return [name.name for name in names]


def _start(stream: IO[bytes]) -> int:
    start = -(-stream.tell() // _ALIGNED) * _ALIGNED
    stream.write(b"\0" * (start - stream.tell()))
    return start


def _copy(file: OnnxFile, tensor: onnx.TensorProto, stream: IO[bytes]) -> int:
    source, offset, length = file.place(tensor)
    start = _start(stream)
    with source.open("rb") as data:
        data.seek(offset)
        while length > 0:
            piece = data.read(min(_PIECE, length))
            stream.write(piece)
            length -= len(piece)
    return start
