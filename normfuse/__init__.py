"""Train with fast norms, deploy with none.

Modules whose norms keep per-channel statistics (:mod:`normfuse.nn`), folding that makes such norms vanish from an
exported program (:func:`fold`, :func:`fuse`), checkpoints that are data only (:func:`save`, :func:`load`) and export
to ONNX (:mod:`normfuse.onnx`, the command ``normfuse``).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .deprecation import deprecated_names

if TYPE_CHECKING:
    from . import checkpoint, convert, folding, nn, onnx, ops, optim, plotting, sources
    from ._native import build_info
    from .checkpoint import CheckpointError, ExportableModel, save
    from .errors import NormfuseError
    from .folding import FoldError, FoldReport, NormRecord, fold
    from .fused import FusedModel, fuse
    from .sources import load

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "ExportableModel",
    "FoldError",
    "FoldReport",
    "FusedModel",
    "NormRecord",
    "NormfuseError",
    "build_info",
    "checkpoint",
    "convert",
    "fold",
    "folding",
    "fuse",
    "load",
    "nn",
    "onnx",
    "ops",
    "optim",
    "plotting",
    "save",
    "sources",
]

_HOMES = {
    "CheckpointError": "checkpoint",
    "ExportableModel": "checkpoint",
    "FoldError": "folding",
    "FoldReport": "folding",
    "FusedModel": "fused",
    "NormRecord": "folding",
    "NormfuseError": "errors",
    "build_info": "_native",
    "fold": "folding",
    "fuse": "fused",
    "load": "sources",
    "save": "checkpoint",
}


_deprecated = deprecated_names(__name__, {"Checkpoint": "ExportableModel"})


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: training needs no ONNX, and the command's help no torch."""
    if name not in __all__:
        return _deprecated(name)
    home = importlib.import_module(f".{_HOMES.get(name, name)}", __name__)
    found = getattr(home, name) if name in _HOMES else home
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
