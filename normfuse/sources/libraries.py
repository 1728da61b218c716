"""Models that timm and torchvision build by name, whose configurations know the size of their pictures."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from normfuse.checkpoint import CheckpointError, Dimension, InputSpec
from normfuse.checkpoint.factory import build as build_with
from normfuse.errors import one_line

LIBRARIES = ("timm", "torchvision")
_BATCH = "batch"


def is_library(model: str) -> bool:
    """Whether a model's name is of the form ``timm:NAME`` or ``torchvision:NAME``."""
    return model.partition(":")[0] in LIBRARIES


def build(model: str, arguments: Mapping[str, Any]) -> tuple[nn.Module, list[InputSpec]]:
    """The module, without pretrained weights, and what it takes.

    Args:
        model: ``timm:vit_tiny_patch16_224``, ``torchvision:resnet18``.
        arguments: for the function that builds it (``num_classes``).

    Raises:
        CheckpointError: the library is missing, has no such model, or cannot build it with these arguments.
    """
    library, _, name = model.partition(":")
    builder = _timm if library == "timm" else _torchvision
    try:
        create, known = builder(name)
    except ImportError as error:
        raise CheckpointError(
            f"--model {model} needs {library}, which cannot be imported ({one_line(error, 120)}): pip install {library}"
        ) from error
    if create is None:
        close = f"; there are {', '.join(known)}" if known else ""
        raise CheckpointError(f"--model {model}: {library} has no model {name!r}{close}")
    module = build_with(create, arguments, model)
    return module, [_picture(module, library, arguments)]


def _timm(name: str) -> tuple[Any, list[str]]:
    import timm

    if not timm.is_model(name):
        return None, timm.list_models(f"*{name[:5]}*")[:6]

    def create(**arguments: Any) -> nn.Module:
        return timm.create_model(name, pretrained=False, **arguments)

    return create, []


def _torchvision(name: str) -> tuple[Any, list[str]]:
    from torchvision import models

    known = models.list_models()
    if name not in known:
        return None, [other for other in known if other.startswith(name[:4])][:6]

    def create(**arguments: Any) -> nn.Module:
        return models.get_model(name, weights=None, **{"init_weights": False} if name in _SLOW else {}, **arguments)

    return create, []


_SLOW = ("googlenet", "inception_v3")  # whose initial values, which are replaced at once, take half a minute to draw


def _picture(module: nn.Module, library: str, arguments: Mapping[str, Any]) -> InputSpec:
    """The pictures that a module takes: in timm what its configuration says, in torchvision its own size or 224."""
    parameter = _first_parameter(module)
    if library == "timm":
        size = tuple(module.pretrained_cfg.get("input_size") or (3, 224, 224))
        side = arguments.get("img_size") or getattr(getattr(module, "patch_embed", None), "img_size", None)
        height, width = (side, side) if isinstance(side, int) else tuple(side or size[1:])
        channels = arguments.get("in_chans", size[0])
    else:
        side = arguments.get("image_size") or getattr(module, "image_size", None) or _sides(module)
        channels, (height, width) = 3, (side, side)
    return InputSpec(parameter, torch.float32, (Dimension(_BATCH), channels, height, width))


def _sides(module: nn.Module) -> int:
    return 299 if type(module).__name__ == "Inception3" else 224


def _first_parameter(module: nn.Module) -> str:
    return next(iter(inspect.signature(module.forward).parameters))
