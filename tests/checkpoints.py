"""A small checkpoint, ways to damage it, and what loading says of it."""

import json
import os
import zipfile
from pathlib import Path

import pytest
import tiny_models
import torch
from torch import nn

from normfuse.checkpoint import CheckpointError, archive, load, save

PERCEPTRON = "tiny_models:Perceptron"


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return tiny_models.trained(tiny_models.Perceptron())


def save_perceptron(path: Path, model: nn.Module | None = None, **options) -> nn.Module:
    model = perceptron() if model is None else model
    save(model, path, **({"dynamic_shapes": {"x": {0: "batch"}}, "example_inputs": torch.ones(2, 4)} | options))
    return model


def write_format_1(
    path: Path, model: nn.Module | None = None, factory: str | None = PERCEPTRON, kwargs: dict | None = None
) -> nn.Module:
    """What earlier versions saved: weights, and the class that they belong to."""
    model = perceptron() if model is None else model
    inputs = [{"name": "x", "dtype": "float32", "dims": [{"name": "batch", "minimum": 1, "maximum": None}, 4]}]
    metadata = json.dumps({"factory": factory, "kwargs": kwargs or {}, "inputs": inputs, "extra_dtypes": {}})
    groups = {"state_dict": model.state_dict(), "examples": {"x": torch.ones(2, 4)}}
    content = {"format": archive.FORMAT, "version": archive.VERSION, "metadata": metadata, **groups}
    torch.save({**content, "sha256": archive.digest(metadata, groups)}, path)
    return model


def content_of(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def own_record(path: Path) -> dict:
    """The record of ours in a file of format 2."""
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read("archive/extra/normfuse.json"))


def rewrite(path: Path, **changes) -> None:
    """Changes parts of a checkpoint and makes its digest right again, as an attacker or a bug would."""
    content = content_of(path) | changes
    groups = {name: content[name] for name in ("state_dict", "examples")}
    torch.save(content | {"sha256": archive.digest(content["metadata"], groups)}, path)


def refusal(path: Path, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(path, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message.replace(str(path), "")) <= 400
    return message


class Canary:
    """Unpickling one creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)
