"""Folds every ONNX file in folders, and says what became of each.

    python benchmarks/onnx_files.py FOLDER... [--json results.json]

Prints a table in Markdown: operations before and after, norms and maps per channel that folded, the largest
difference of an output relative to its largest value, or the reason why a file was refused. Files with the same content
count once.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import time
from pathlib import Path

import records

from normfuse.onnx import fold_file

COLUMNS = ("file", "opset", "nodes", "folded", "largest difference", "what to know")


def fold_one(path: Path, folder: Path) -> dict:
    """What became of one file."""
    started = time.perf_counter()
    try:
        result = fold_file(path, folder / path.name)
    except ValueError as error:  # what every refusal is
        return {"refused": str(error), "seconds": round(time.perf_counter() - started, 1)}
    report = result.report
    return {
        "opset": result.opset,
        "nodes": [report.nodes_before, report.nodes_after],
        "norms": len(report.norms),
        "folded": len(report.norms) - len(report.remaining),
        "difference": result.verification.worst("ONNX file"),
        "inputs": result.verification.shapes,
        "notes": result.notes,
        "seconds": round(time.perf_counter() - started, 1),
    }


def row(name: str, entry: dict) -> str:
    """One line of the table."""
    if "refused" in entry:
        cells = (name, "", "", "", "", f"refused: {entry['refused']}")
    else:
        before, after = entry["nodes"]
        nodes = f"{before} → {after}" if before != after else f"{before}, a copy"
        difference = f"{entry['difference']:.1e}" if entry["inputs"] else ""
        cells = (name, entry["opset"], nodes, f"{entry['folded']} of {entry['norms']}", difference,
                 "; ".join(note for note in entry["notes"] if not note.startswith("nothing folds")))  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args()
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS), flush=True)
    results, seen = {}, set()
    for folder in options.folders:
        for path in sorted(folder.rglob("*.onnx")):
            digest = hashlib.sha256(path.read_bytes()).digest()
            if digest in seen:
                continue
            seen.add(digest)
            name = str(path.relative_to(folder))
            with tempfile.TemporaryDirectory() as scratch:
                results[name] = fold_one(path, Path(scratch))
            print(row(name.replace(str(folder), ""), results[name]), flush=True)
    if options.json is not None:
        records.write(options.json, results)


if __name__ == "__main__":
    main()
