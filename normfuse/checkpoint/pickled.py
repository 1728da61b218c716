"""What a refused pickle holds, found by disassembling it, and how to get its weights out."""

from __future__ import annotations

import pathlib
import pickletools
import shlex
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

try:
    from numpy._core import multiarray
except ImportError:  # numpy 1
    from numpy.core import multiarray  # type: ignore[no-redef]

# Names under which scripts keep weights, the likeliest first.
PREFERRED = (
    "state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "weights", "params",
    "parameters", "generator", "backbone", "encoder",
)  # fmt: skip


def data_globals() -> list[Any]:
    """What pickles of paths and of numpy's numbers and arrays ask for, under the names of old and new versions.

    They are data: what is inside them is read by the same rules.

    Scripts store a best score as a numpy number and the folder of the data set as a path, which alone would keep a file
    from being read.
    """
    kinds = [kind for kind in vars(np.dtypes).values() if isinstance(kind, type)]
    functions = [
        (getattr(multiarray, name), f"{module}.multiarray.{name}")
        for name in ("scalar", "_reconstruct")
        for module in ("numpy.core", "numpy._core")
    ]
    paths = [
        (kind, f"{module}.{kind.__name__}")
        for kind in (pathlib.PosixPath, pathlib.PurePosixPath)
        for module in ("pathlib", "pathlib._local")
    ]
    return [np.ndarray, np.dtype, *kinds, *functions, *paths]


def way_out(path: Path) -> str:
    """The command that keeps the weights of a file and nothing else, for those who trust the file."""
    entry = _entry(path)
    target = path.with_suffix(".weights.pt").name
    code = f"import torch; torch.save(torch.load({str(path)!r}, weights_only=False){entry}, {target!r})"
    return f'python -c "{code}"' if not set("'\"$`\\") & set(str(path)) else f"python -c {shlex.quote(code)}"


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
