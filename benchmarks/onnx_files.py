"""Folds every ONNX file in folders, and says what became of each.

    python benchmarks/onnx_files.py FOLDER... [--time ROUNDS] [--json results.json]

Prints a table in Markdown: operations before and after, norms and maps per channel that folded, the largest
difference of an output relative to its largest value, or the reason why a file was refused. Files with the same content
count once. With --time, files that changed are run beside their originals, one after the other in every round, on one
thread, and the ratio of the times is printed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from normfuse.onnx import fold_file
from normfuse.onnx.editing.fold_file import find_trials
from normfuse.onnx.editing.onnx_file import OnnxFile
from normfuse.onnx.runtime import clock
from normfuse.onnx.verifier import session

COLUMNS = ("file", "opset", "nodes", "folded", "largest difference", "time", "what to know")
_LARGEST = 300 << 20  # bytes of a file that is tried
_SECONDS = 20.0  # for the rounds of one file


def fold_one(path: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """What became of one file."""
    started = time.perf_counter()
    try:
        result = fold_file(path, folder / path.name)
    except ValueError as error:  # what every refusal is
        return {"refused": str(error), "seconds": round(time.perf_counter() - started, 1)}
    report = result.report
    entry = {
        "opset": result.opset,
        "nodes": [report.nodes_before, report.nodes_after],
        "norms": len(report.norms),
        "folded": len(report.norms) - len(report.remaining),
        "difference": result.verification.worst("ONNX file"),
        "inputs": result.verification.shapes,
        "notes": result.notes,
        "seconds": round(time.perf_counter() - started, 1),
    }
    if rounds and report.nodes_after != report.nodes_before:
        entry |= compare(path, result.path, rounds)
    return entry


def compare(before: Path, after: Path, rounds: int) -> dict[str, Any]:
    """Time of the folded file ÷ time of the original, in the same round: median and quartiles."""
    trials = find_trials(OnnxFile(before))[1]
    feeds = max(trials, key=lambda trial: sum(np.size(value) for value in trial.feeds.values())).feeds
    sessions = [session(path, 1, {"session.force_spinning_stop": "1"}) for path in (before, after)]
    once = sum(time for (time,) in clock(sessions, [feeds, feeds], warm_up=1, rounds=1))
    rounds = max(4, min(rounds, int(1e3 * _SECONDS / once)))
    ratios = [b / a for a, b in zip(*clock(sessions, [feeds, feeds], warm_up=0, rounds=rounds), strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"ratio": middle, "quartiles": [low, high], "rounds": len(ratios)}


def row(name: str, entry: dict[str, Any]) -> str:
    """One line of the table."""
    if "refused" in entry:
        cells: tuple[Any, ...] = (name, "", "", "", "", "", f"refused: {entry['refused']}")
    else:
        before, after = entry["nodes"]
        nodes = f"{before} → {after}" if before != after else f"{before}, a copy"
        folded = f"{entry['folded']} of {entry['norms']}" if entry["norms"] else ""
        difference = f"{entry['difference']:.1e}" if entry["inputs"] else ""
        ratio = "{ratio:.2f} ({quartiles[0]:.2f} to {quartiles[1]:.2f})".format(**entry) if "ratio" in entry else ""
        notes = "; ".join(note for note in entry["notes"] if not note.startswith("nothing folds"))
        cells = (name, entry["opset"], nodes, folded, difference, ratio, notes)
    return "| " + " | ".join(map(str, cells)) + " |"


def label(path: Path, folder: Path) -> str:
    """The folder in which a file's package lies, and the file's own name."""
    parts = path.relative_to(folder).parts
    return f"{parts[0]}: {parts[-1]}" if len(parts) > 1 else parts[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--time", type=int, default=0, metavar="ROUNDS", help="also time what changed")
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args()
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS), flush=True)
    results, seen = {}, set()
    for folder in options.folders:
        for path in sorted(folder.rglob("*.onnx")):
            digest = hashlib.sha256(path.read_bytes()).digest()
            if digest in seen or path.stat().st_size > _LARGEST:
                continue
            seen.add(digest)
            name = label(path, folder)
            with tempfile.TemporaryDirectory() as scratch:
                results[str(path.relative_to(folder))] = entry = fold_one(path, Path(scratch), options.time)
            print(row(name, entry), flush=True)
    changed = sum("refused" not in entry and entry["nodes"][0] != entry["nodes"][1] for entry in results.values())
    refused = sum("refused" in entry for entry in results.values())
    print(f"\n{len(results)} files: {changed} changed, {refused} refused, the others are copies")
    if options.json is not None:
        options.json.write_text(json.dumps(results, separators=(",", ":"), ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
