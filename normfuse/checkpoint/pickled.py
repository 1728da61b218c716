"""What a refused pickle holds, found by disassembling it, and how to get its weights out."""

from __future__ import annotations

import pickletools
import shlex
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

try:
    from numpy._core import multiarray
except ImportError:  # numpy 1
    from numpy.core import multiarray

# Names under which scripts keep weights, the likeliest first.
PREFERRED = (
    "state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "weights", "params",
    "parameters", "generator", "backbone", "encoder",
)  # fmt: skip


def numpy_globals() -> list[Any]:
    """What pickles of numpy's numbers and arrays ask for, under the names of both numpy 1 and 2. They are data: what is
    inside them is read by the same rules.

    Scripts store a best score as a numpy number, which alone would keep a file from being read.
    """
    kinds = [kind for kind in vars(np.dtypes).values() if isinstance(kind, type)]
    functions = [
        (getattr(multiarray, name), f"{module}.multiarray.{name}")
        for name in ("scalar", "_reconstruct")
        for module in ("numpy.core", "numpy._core")
    ]
    return [np.ndarray, np.dtype, *kinds, *functions]


def way_out(path: Path) -> str:
    """The command that keeps the weights of a file and nothing else, for those who trust the file."""
    entry = _entry(path)
    target = path.with_suffix(".weights.pt").name
    code = f"import torch; torch.save(torch.load({path.name!r}, weights_only=False){entry}, {target!r})"
    return f'python -c "{code}"' if "'" not in path.name else f"python -c {shlex.quote(code)}"


def _entry(path: Path) -> str:
    """How the weights are reached: by the key that the file holds, or as a module's state."""
    names, modules = set(), False
    try:
        with zipfile.ZipFile(path) as archive:
            record = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            for opcode, argument, _ in pickletools.genops(archive.read(record)):
                if opcode.name == "GLOBAL" and "torch.nn.modules" in str(argument):
                    modules = True
                elif isinstance(argument, str):
                    names.add(argument)
                    modules = modules or argument.startswith("torch.nn.modules")
    except Exception:  # a pickle that cannot be disassembled has no names to show
        return ""
    found = [name for name in PREFERRED if name in names]
    state = ".state_dict()" if modules else ""
    return f"['{found[0]}']{state}" if found else state
