"""A small checkpoint, ways to damage it, and what loading says of it."""

import os
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
    defaults = {"factory": PERCEPTRON, "dynamic_shapes": {"x": {0: "batch"}}, "example_inputs": torch.ones(2, 4)}
    save(model, path, **(defaults | options))
    return model


def content_of(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def rewrite(path: Path, **changes) -> None:
    """Changes parts of a checkpoint and makes its digest right again, as an attacker or a bug would."""
    content = content_of(path) | changes
    groups = {name: content[name] for name in ("state_dict", "examples")}
    torch.save(content | {"sha256": archive.digest(content["metadata"], groups)}, path)


def refusal(path: Path, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(path, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    return message


class Canary:
    """Unpickling one creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)
