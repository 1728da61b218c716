"""Run the whole zoo and write docs/models.md from what came of it: python -m tests.zoo.report.

Takes about an hour on two cores. What has run is kept in a folder, where an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import multiprocessing
import tempfile
import warnings
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import torch

from normfuse.checkpoint.archive import one_line

from .models import ZOO, Entry
from .runs import built, declare_torchvision, run, swapped

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
HEAD = """# What becomes of which architecture

Models with random weights, a few channels and layers, of timm and transformers as in `requirements/ecosystem.txt`:

- folded in float64 and compared with the program as it was, column *float64*;
- exported and verified in ONNX Runtime in float32 for several batch sizes and lengths, column *float32*.

Errors are the largest difference relative to the largest value of the output. "Swapped" has Unified Norms in the place
of every LayerNorm and RMSNorm (BatchNorms stay); its errors count too. *Gains* are those of norms that measure each
input. What the words of the last column mean: [folding.md](folding.md).

Written by `python -m tests.zoo.report` on {date}, {machine}.
`NORMFUSE_ZOO=all python -m pytest tests/zoo` checks the counts against those of `tests/zoo/models.py`.

"""
COLUMNS = (
    "architecture", "from", "LayerNorm → RMSNorm", "gains folded", "BatchNorms folded", "swapped: folded", "float64",
    "float32", "why something stayed",
)  # fmt: skip
AS_IS, SWAPPED = "as it is", "swapped"


@dataclass(frozen=True)
class Found:
    """What one run is written down as: counts, errors, and why something stayed; or how it failed.

    Attributes:
        counts: see :meth:`tests.zoo.runs.Outcome.counts`; empty for a model without norms to exchange.
        errors: in float64 and float32.
        reasons: all that the report of folding gives.
        failure: what was raised, or that it took too long; empty if nothing.
    """

    counts: dict[str, list[int]]
    errors: tuple[float, float] = (0.0, 0.0)
    reasons: tuple[str, ...] = ()
    failure: str = ""


def find(entry: Entry, variant: str) -> Found:
    """Run one model; whatever torch or its library raise is what the table is to say."""
    try:
        model = built(entry) if variant == AS_IS else swapped(entry)
        if model is None:
            return Found({})
        with tempfile.TemporaryDirectory() as folder:
            outcome = run(entry, model, Path(folder))
    except Exception as error:
        return Found({}, failure=f"{type(error).__name__}: {one_line(error, 200)}")
    whys = [why for record in outcome.report.dynamic for why in record.reasons.values()]
    whys += [record.reason for record in outcome.report.remaining]
    counts = {key: list(count) for key, count in outcome.counts().items()}
    return Found(counts, (outcome.error64, outcome.error32), tuple(dict.fromkeys(whys)))


def find_within(entry: Entry, variant: str, seconds: float, folder: Path) -> Found:
    """What an earlier run left in the folder, else :func:`find` in a process of its own, for so long and no longer."""
    kept = folder / f"{entry.name}, {variant}.json"
    if kept.exists():
        return Found(**json.loads(kept.read_text()))
    child = multiprocessing.get_context("fork").Process(target=_keep, args=(entry, variant, kept))
    child.start()
    child.join(seconds)
    if child.is_alive():
        child.kill()
        return Found({}, failure=f"not done in {seconds:.0f} seconds" if seconds else "not run yet")
    if not kept.exists():
        return Found({}, failure=f"its process ended with code {child.exitcode}")
    print(f"{entry.name}, {variant}", flush=True)
    return Found(**json.loads(kept.read_text()))


def _keep(entry: Entry, variant: str, path: Path) -> None:
    begun = path.with_suffix(".part")
    begun.write_text(json.dumps(vars(find(entry, variant))))
    begun.rename(path)


def row(entry: Entry, found: Found, other: Found) -> str:
    """One line of the table; what fails is listed with its reason."""
    cells = [entry.name, entry.library]
    cells += [_of(found.counts.get(key)) for key in ("rms", "gains", "static")] + [_of(other.counts.get("static"))]
    for errors in zip(found.errors, other.errors, strict=True):
        cells.append("–" if found.failure or other.failure else f"{max(errors):.0e}")
    cells.append("; ".join(_reasons(entry, found, other)))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _of(count: Any) -> str:
    return f"{count[0]} of {count[1]}" if count and count[1] else "–"


def _reasons(entry: Entry, found: Found, other: Found) -> list[str]:
    """How it failed, else what was found by hand."""
    failures = [f"{what}: {each.failure}" for what, each in ((AS_IS, found), (SWAPPED, other)) if each.failure]
    return failures or [entry.expected.why]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--out", type=Path, default=PAGE)
    options.add_argument("--jobs", type=int, default=2, help="processes at once (default 2)")
    options.add_argument(
        "--seconds", type=float, default=600, help="for one model at most (default 600); 0 runs nothing"
    )
    options.add_argument("--folder", type=Path, default=Path("build/zoo"), help="where results are kept (build/zoo)")
    options.add_argument("--machine", default="a machine without a name", help="what the page calls this machine")
    given = options.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    library = declare_torchvision()
    for name in {entry.library for entry in ZOO}:  # once, for all processes
        importlib.import_module(name)
    with ThreadPool(given.jobs) as pool:
        runs = [(entry, variant, given.seconds, given.folder) for entry in ZOO for variant in (AS_IS, SWAPPED)]
        found = pool.starmap(find_within, runs, chunksize=1)
    rows = map(row, ZOO, found[::2], found[1::2])
    table = [" | ".join(("", *COLUMNS, "")).strip() + "\n", "|---" * len(COLUMNS) + "|\n", *rows]
    given.out.write_text(HEAD.format(date=datetime.date.today(), machine=given.machine) + "".join(table))
    del library


if __name__ == "__main__":
    main()
