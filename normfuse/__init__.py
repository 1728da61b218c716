"""Train with fast norms, deploy with none.

Modules whose norms keep per-channel statistics (:mod:`normfuse.nn`), folding that makes such norms vanish from an
exported program (:func:`fold`, :func:`fuse`), checkpoints that are data only (:func:`save`, :func:`load`) and export
to ONNX (:mod:`normfuse.onnx`, the command ``normfuse``).
"""

from __future__ import annotations

import importlib
from types import ModuleType

from . import nn, ops
from ._native import build_info
from .checkpoint import Checkpoint, CheckpointError, load, save
from .folding import FoldError, FoldReport, NormRecord, fold, fuse

__version__ = "0.1.0"

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "FoldError",
    "FoldReport",
    "NormRecord",
    "build_info",
    "fold",
    "fuse",
    "load",
    "nn",
    "ops",
    "save",
]


def __getattr__(name: str) -> ModuleType:
    """Import :mod:`normfuse.onnx` when it is first used: training needs no ONNX."""
    if name == "onnx":
        return importlib.import_module(".onnx", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
