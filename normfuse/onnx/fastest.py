"""The target ``auto``: the files for all targets side by side on this machine, and the fastest of them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from normfuse.checkpoint import InputSpec
from normfuse.checkpoint.inputs import dimensions
from normfuse.files import Output
from normfuse.onnx.benchmark import Timing, bench
from normfuse.onnx.publish import data_beside
from normfuse.onnx.sizes import no_dimension
from normfuse.options import TARGETS, ExportError

ROUNDS = 60
TIMED = tuple(target for target in TARGETS if target != "cuda")  # a GPU cannot be timed here


def fastest(
    export: Callable[[str, Path, Callable[[str], None]], Any],
    output: Output,
    sizes: Mapping[str, int],
    threads: int,
    progress: Callable[[str], None],
) -> Any:
    """Stages the file for every target, times them in turns, and leaves the fastest in the place to publish from.

    Args:
        export: writes the file for a target; takes the target, a path and ``progress``.
        output: what will be published.
        sizes: to time with, see :func:`normfuse.onnx.export`.
        threads: to time with.
        progress: called with the name of each stage.

    Returns:
        What `export` gave for the fastest, with the times in its notes.
    """
    results, files = [], []
    for target in TIMED:
        folder = output.folder / target
        folder.mkdir()
        files.append(folder / output.target.name)
        results.append(export(target, files[-1], partial(_prefixed, progress, target)))
    progress("time the files in ONNX Runtime")
    timing = bench(files, sizes=sizes, rounds=ROUNDS, threads=threads)
    chosen = choose(timing)
    for name in (*data_beside(files[chosen]), output.target.name):
        os.replace(files[chosen].with_name(name), output.folder / name)
    result = results[chosen]
    return dataclasses.replace(result, notes=[*result.notes, _told(timing, chosen), *timing.notes])


def check_sizes(sizes: Mapping[str, int], inputs: Sequence[InputSpec]) -> None:
    """ExportError for a size of no dimension, which would show only when the files are timed."""
    known = dimensions(inputs)
    for name in sizes:
        if name not in known:
            raise ExportError(no_dimension(name, known))


def _prefixed(progress: Callable[[str], None], target: str, stage: str) -> None:
    progress(f"{target}: {stage}")


def choose(timing: Timing) -> int:
    """The file whose ratio to the first has the lowest median, if it is below one in three of four rounds."""
    ratios = [timing.ratio(number) for number in range(len(timing.paths))]
    best = min(range(len(ratios)), key=lambda number: ratios[number][0])
    return best if ratios[best][2] < 1 else 0


def _told(timing: Timing, chosen: int) -> str:
    shapes = ", ".join(f"{name} {shape}" for name, shape in timing.shapes.items())
    times = ", ".join(f"{target} {timing.quartiles(number)[1]:.3f} ms" for number, target in enumerate(TIMED))
    return f"target {TIMED[chosen]} was chosen for {shapes} and {timing.threads} thread(s): {times}"
