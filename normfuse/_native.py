"""The compiled library: loads it, and says what was built.

``available`` is False when the library is missing or does not load, or ``NORMFUSE_DISABLE_NATIVE=1`` is set;
the operations then run their PyTorch references. ``autograd`` is the module that runs a training step's autograd in
C++, None where it was built for another torch or Python: autograd functions in Python then do the same.
"""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

#: Counts changes of what the library takes or computes; one that was built before the last is not used.
INTERFACE = 4

_HERE = Path(__file__).parent
_LIBRARY = _HERE / "_C.abi3.so"
_FACTS = _HERE / "_build_info.json"
_BUILD = "run `pip install --no-build-isolation -e .` in the source folder"

available: bool = False
unavailable_reason: str = ""  # one line, empty when available
autograd: Any = None  # a module, or None


def _load() -> str:
    """Loads the library; returns the reason why not, or an empty string."""
    if os.environ.get("NORMFUSE_DISABLE_NATIVE", "0") not in ("", "0"):
        return "switched off by NORMFUSE_DISABLE_NATIVE"
    if not _LIBRARY.exists():
        return f"not built: {_BUILD}"
    if _facts().get("interface") != INTERFACE:
        return f"built from other sources than these: {_BUILD}"
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:
        return f"does not load in torch {torch.__version__}: {error}"
    return ""


def _facts() -> dict[str, Any]:
    return json.loads(_FACTS.read_text()) if _FACTS.exists() else {}


def _load_autograd() -> ModuleType | None:
    if not available or _facts().get("torch") != torch.__version__:
        return None
    try:
        return importlib.import_module("._autograd", __package__)
    except ImportError:  # built with another Python, or not at all
        return None


def build_info() -> dict[str, Any]:
    """Report the build of the compiled library, and whether it is in use.

    Returns:
        A JSON-ready dict. About this process: ``available`` (bool), ``reason`` (str, why it is not), ``path`` of
        the library (str), ``autograd`` (bool: a training step's autograd runs in C++; else in Python, which costs
        some 40 microseconds a step), ``emulator`` (bool: the sources of the host emulator, which runs the CUDA
        kernels in the tests, are at hand). About the build, None when nothing was built: ``torch`` it was built against
        (str), ``cuda`` toolkit (str, None without CUDA kernels), ``architectures`` (list of str), ``compiler``
        (str), ``python_abi`` (str), ``interface`` (int: what the library takes, see INTERFACE).

    Example:
        >>> import normfuse
        >>> sorted(normfuse.build_info())[:3]
        ['architectures', 'autograd', 'available']
    """
    facts: dict[str, Any] = dict.fromkeys(("torch", "cuda", "architectures", "compiler", "python_abi", "interface"))
    facts.update(_facts())
    emulator = (_HERE.parent / "csrc" / "emulator").is_dir()
    return {
        "available": available,
        "reason": unavailable_reason,
        "path": str(_LIBRARY),
        "autograd": autograd is not None,
        **facts,
        "emulator": emulator,
    }


unavailable_reason = _load()
available = not unavailable_reason
autograd = _load_autograd()
