"""Writing a program as a PT2 archive that says nothing of the machine it was traced on."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any, BinaryIO, cast

import torch
from torch.export import ExportedProgram
from torch.export.pt2_archive import PT2ArchiveWriter

from normfuse.checkpoint.errors import CheckpointError
from normfuse.checkpoint.pt2.reader import MODELS, OWN_FOLDER, OWN_RECORD
from normfuse.checkpoint.records import Records
from normfuse.errors import one_line

_KEPT = ("nn_module_stack", "torch_fn")  # module paths, class names and function names; the rest are source lines
_OWN_TO_THE_CONTAINER = (".data/", ".format_version", ".storage_alignment", "byteorder")


def write_archive(
    file: BinaryIO, program: ExportedProgram, record: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Writes what ``torch.export.save`` writes, without stack traces, and a record of ours.

    Args:
        file: where to, open for writing and seekable.
        program: tensors on the CPU; it is not changed.
        record: JSON-ready; is written as ``extra/normfuse.json`` with the SHA-256 of every other record under
            ``records``.
        tensors: further tensors by name; the bytes of each become a record ``data/normfuse/NAME``.

    Raises:
        CheckpointError: the program holds something that is not data.
    """
    digests: dict[str, str] = {}
    with tempfile.TemporaryFile() as plain, _outlasting(file) as outer, PT2ArchiveWriter(outer) as archive:
        try:
            with _outlasting(plain) as inner:
                torch.export.save(_compact(program), inner)
        except (RuntimeError, AssertionError, ValueError) as error:  # of its serialiser, for what has no form in JSON
            raise CheckpointError(f"torch.export cannot save the program ({one_line(error, 240)})") from error
        written = Records(plain, "the program")

        def add(name: str, data: bytes) -> None:
            archive.write_bytes(name, data)
            digests[name] = hashlib.sha256(data).hexdigest()

        for name, size in written.sizes.items():
            if name.startswith(_OWN_TO_THE_CONTAINER):
                continue
            data = written.read(name, size)
            add(name, _without_traces(data) if name.startswith(MODELS) else data)
        for name, tensor in tensors.items():
            add(f"{OWN_FOLDER}{name}", _bytes_of(tensor))
        archive.write_string(OWN_RECORD, json.dumps({**record, "records": digests}, indent=1, allow_nan=False) + "\n")


class _Outlasting(io.RawIOBase):
    """A file for torch's writer, which ends the process if a write raises: what is written after that goes nowhere."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._attempt(lambda: self._file.write(data))
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._attempt(lambda: self._file.seek(offset, whence))
        return offset

    def _attempt(self, operation: Callable[[], int]) -> None:
        if self.error is None:
            try:
                operation()
            except OSError as error:
                self.error = error


@contextmanager
def _outlasting(file: BinaryIO) -> Iterator[IO[bytes]]:
    """A file for torch's writer; OSError once that is done, if a write failed."""
    outlasting = _Outlasting(file)
    yield cast("IO[bytes]", outlasting)
    if outlasting.error is not None:
        raise outlasting.error
    file.flush()


def _without_traces(model: bytes) -> bytes:
    content = json.loads(model)
    content["guards_code"] = []
    content["graph_module"]["metadata"] = {}
    graphs = [content["graph_module"]["graph"]]
    while graphs:
        for node in graphs.pop()["nodes"]:
            node["metadata"] = {key: text for key, text in node["metadata"].items() if key in _KEPT}
            graphs += [item["arg"]["as_graph"]["graph"] for item in node["inputs"] if "as_graph" in item["arg"]]
    return json.dumps(content, allow_nan=False).encode()


def _compact(program: ExportedProgram) -> ExportedProgram:
    """The program with tensors that are plain and fill their storage; those that share it still do."""
    compact = copy.copy(program)
    packed: dict[Any, torch.Tensor] = {}

    def pack(name: str, tensor: Any) -> torch.Tensor:
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"constant {name!r} is a {type(tensor).__name__}; only tensors can be saved")
        plain = type(tensor.data) is torch.Tensor and tensor.layout is torch.strided and not tensor.is_quantized
        if not plain or tensor.is_meta:
            kind = (
                "has no data (meta device)" if tensor.is_meta else f"is a {tensor.layout} {type(tensor.data).__name__}"
            )
            raise CheckpointError(f"tensor {name!r} {kind}; only plain dense tensors can be saved")
        storage = tensor.untyped_storage()
        key = (storage.data_ptr(), tensor.storage_offset(), tensor.dtype, tensor.shape, tensor.stride())
        if key not in packed:
            whole = tensor.is_contiguous() and storage.nbytes() == tensor.nbytes and not tensor.is_conj()
            data = tensor.detach()
            packed[key] = data if whole else data.resolve_conj().clone(memory_format=torch.contiguous_format)
        made = packed[key]
        return torch.nn.Parameter(made, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else made

    compact._state_dict = {name: pack(name, tensor) for name, tensor in program.state_dict.items()}
    compact._constants = {name: pack(name, tensor) for name, tensor in program.constants.items()}
    return compact


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
