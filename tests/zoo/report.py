"""Run the whole zoo and write docs/models.md from what came of it: python -m tests.zoo.report"""

from __future__ import annotations

import argparse
import datetime
import tempfile
import warnings
from pathlib import Path

from normfuse.checkpoint.archive import one_line

from .models import ZOO, Entry
from .runs import Outcome, built, declare_torchvision, run, swapped

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
HEAD = """# What becomes of which architecture

Written by `python -m tests.zoo.report` ({date}; timm and transformers of requirements/ecosystem.txt): models with
random weights, a few channels and layers, folded in float64 against the program as it was, and exported in float32 and
verified in ONNX Runtime. Errors are relative to the output's largest value. "Swapped" has Unified Norms in the place of
every LayerNorm and RMSNorm.

"""
COLUMNS = (
    "architecture", "from", "LayerNorm → RMSNorm", "gains folded", "BatchNorms folded", "swapped: folded", "float64",
    "float32", "why something stayed",
)  # fmt: skip


def row(entry: Entry) -> str:
    """One line of the table; what fails is listed with its reason."""
    cells = [entry.name, entry.library]
    try:
        found = outcome(entry, built(entry))
        counts = found.counts()
        cells += [_of(counts[key]) for key in ("rms", "gains", "static")]
        model = swapped(entry)
        other = None if model is None else outcome(entry, model)
        cells.append("–" if other is None else _of(other.counts()["static"]))
        errors = [o for o in (found, other) if o is not None]
        cells += [f"{max(getattr(o, name) for o in errors):.0e}" for name in ("error64", "error32")]
        cells.append(_reason(found))
    except Exception as error:  # whatever torch or timm raise: it is what the table is to say
        cells += [""] * (8 - len(cells)) + [f"{type(error).__name__}: {one_line(error, 200)}"]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def outcome(entry: Entry, model: object) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        return run(entry, model, Path(folder))


def _of(count: tuple[int, int]) -> str:
    return f"{count[0]} of {count[1]}" if count[1] else "–"


def _reason(found: Outcome) -> str:
    """The first reason of those that stayed; the report of an export has all of them."""
    whys = [why for record in found.report.dynamic for why in record.reasons.values()]
    return (whys + [record.reason for record in found.report.remaining] + [""])[0]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--out", type=Path, default=PAGE)
    given = options.parse_args()
    warnings.filterwarnings("ignore")
    library = declare_torchvision()
    table = [" | ".join(("", *COLUMNS, "")).strip() + "\n", "|---" * len(COLUMNS) + "|\n", *map(row, ZOO)]
    given.out.write_text(HEAD.format(date=datetime.date.today()) + "".join(table))
    del library


if __name__ == "__main__":
    main()
