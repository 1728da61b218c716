"""The target ``auto``: the files for all targets side by side on this machine, and the fastest of them."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from normfuse.files import check_target
from normfuse.onnx.benchmark import Timing, bench
from normfuse.options import TARGETS

ROUNDS = 60
_ON_A_GPU = ("cuda",)  # cannot be timed here


def export_fastest(
    export: Callable[..., Any],
    path: Path,
    sizes: Mapping[str, int],
    threads: int,
    progress: Callable[[str], None],
    before_publish: Callable[[Any], None],
) -> Any:
    """Export for every target into a folder of our own, time the files in turns, and export for the fastest.

    Args:
        export: takes a path, a target and ``progress``.
        path, sizes, threads, progress, before_publish: see :func:`normfuse.onnx.export`.
    """
    check_target(path)
    targets = [target for target in TARGETS if target not in _ON_A_GPU]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{target}.onnx" for target in targets]
        for target, file in zip(targets, files, strict=True):
            export(file, target=target, progress=lambda stage, target=target: progress(f"{target}: {stage}"))
        progress("time the files in ONNX Runtime")
        timing = bench(files, sizes=sizes, rounds=ROUNDS, threads=threads)
    chosen = choose(timing)

    def told(result: Any) -> Any:
        return dataclasses.replace(result, notes=[*result.notes, _told(timing, targets, chosen), *timing.notes])

    return told(
        export(
            path,
            target=targets[chosen],
            progress=progress,
            before_publish=lambda result: before_publish(told(result)),
        )
    )


def choose(timing: Timing) -> int:
    """The file whose ratio to the first has the lowest median, if it is below one in three of four rounds."""
    ratios = [timing.ratio(number) for number in range(len(timing.paths))]
    best = min(range(len(ratios)), key=lambda number: ratios[number][0])
    return best if ratios[best][2] < 1 else 0


def _told(timing: Timing, targets: list[str], chosen: int) -> str:
    shapes = ", ".join(f"{name} {shape}" for name, shape in timing.shapes.items())
    times = ", ".join(f"{target} {timing.quartiles(number)[1]:.3f} ms" for number, target in enumerate(targets))
    return f"target {targets[chosen]} was chosen for {shapes} and {timing.threads} thread(s): {times}"
