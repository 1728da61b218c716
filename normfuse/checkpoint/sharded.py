"""Weights that lie in a folder, or in several files with an index."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from normfuse.checkpoint import archive, kinds
from normfuse.checkpoint.archive import CheckpointError, one_line, some_of
from normfuse.checkpoint.strict_json import parse_json

INDEX = ".index.json"
_INDEX_BYTES = 1 << 26
_STEMS = (
    "model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
)
NAMES = tuple(name + ending for name in _STEMS for ending in ("", INDEX))  # the first one that is there is read
_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", INDEX)
# What trainings keep beside weights, and parts of weights.
_BESIDE = re.compile(
    r"optim|sched|scaler|sampler|dataloader|random_states|rng_state|training_args|-\d+-of-\d+\.", re.IGNORECASE
)


def weight_file(folder: Path) -> Path:
    """The file with a folder's weights: as transformers, diffusers and accelerate name it, or the only one.

    CheckpointError if there is none, or more than one of other names.
    """
    for name in NAMES:
        if (folder / name).is_file():
            return folder / name
    if (folder / ".metadata").is_file():
        raise CheckpointError(
            f"{folder} is a checkpoint of torch.distributed in parts; join them: python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {shlex.quote(str(folder))} weights.pt"
        )
    others = sorted(
        path
        for path in folder.iterdir()
        if path.name.endswith(_ENDINGS) and path.is_file() and not _BESIDE.search(path.name)
    )
    if len(others) == 1:
        return others[0]
    if others:
        raise CheckpointError(
            f"{folder} holds {some_of([path.name for path in others])}; name the file with the weights"
        )
    raise CheckpointError(
        f"{folder} holds no weights: none of {', '.join(_STEMS)}, whole or with {INDEX}, and no file that ends in "
        f"{', '.join(_ENDINGS[2:5])}; name the file with the weights"
    )


def read_index(path: Path, trust: bool) -> dict[str, Any]:
    """The tensors of all files that an index (``….index.json``) names, by name."""
    with kinds.opened(path) as file:
        index = parse_json(file.read(_INDEX_BYTES), f"{path} is not an index of weights: it")
    try:
        files = index["weight_map"]
        by_file: dict[str, list[str]] = {}
        for name, file in files.items():
            by_file.setdefault(file, []).append(name)
        # A name with a folder in it could lead anywhere on the disk.
        outside = [file for file in by_file if Path(file).name != file]
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not an index of weights ({one_line(error, 120)})") from error
    if outside:
        raise CheckpointError(f"{path} names {outside[0]!r}; only files beside the index are read")
    tensors: dict[str, Any] = {}
    for other, names in by_file.items():
        content = archive.read(path.with_name(other), archive.file_kind(path.with_name(other)), trust)
        absent = [name for name in names if name not in content]
        if absent:
            raise CheckpointError(f"{path} says that {other} holds {absent[0]!r}; it does not")
        tensors.update({name: content[name] for name in names})
    return tensors
