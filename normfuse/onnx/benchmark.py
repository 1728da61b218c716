"""Latency of one ONNX file, or of two side by side, in ONNX Runtime on the CPU."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from normfuse.onnx.verifier import session

_NUMPY = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64,
    "tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(int16)": np.int16, "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8, "tensor(bool)": np.bool_,
}  # fmt: skip
_SIZES = {"batch": 1}
_OTHER_SIZE = 128


class BenchError(ValueError):
    """The files cannot be timed side by side; the message is one line."""


@dataclass(frozen=True)
class Timing:
    """Latencies in milliseconds, one per file and round, of the same round side by side."""

    paths: list[str]
    shapes: dict[str, list[int]]
    threads: int
    milliseconds: list[list[float]]

    def quartiles(self, index: int) -> tuple[float, float, float]:
        """Lower quartile, median and upper quartile of a file's milliseconds."""
        low, middle, high = statistics.quantiles(self.milliseconds[index], n=4)
        return low, middle, high

    def ratio(self) -> tuple[float, float, float]:
        """Median of second ÷ first over the rounds, and its quartiles."""
        ratios = [b / a for a, b in zip(*self.milliseconds[:2], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        return middle, low, high

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def bench(
    paths: Sequence[str | os.PathLike[str]],
    *,
    sizes: Mapping[str, int] | None = None,
    rounds: int = 50,
    threads: int = 1,
    seed: int = 0,
) -> Timing:
    """Times ONNX files on the same random inputs.

    Every round runs each file once, in rotated order, and threads do not spin between runs: so a busy moment
    of the machine meets all files alike, and the ratio of a round means something where its milliseconds do
    not.

    Args:
        paths: files with the same inputs.
        sizes: of dynamic dimensions by name; ``batch`` defaults to 1, every other to 128.
        rounds: timed rounds, at least 4; a tenth more runs first to warm up.
        threads: of ONNX Runtime within an operation.
        seed: of the inputs. Integers are 0 or 1, because the file does not tell which are admissible.

    Raises:
        BenchError, VerificationError: a file cannot be loaded or run, or the files take different inputs.
    """
    if rounds < 4:
        raise BenchError(f"rounds is {rounds}; at least 4 are needed for quartiles")
    sessions = [_session(Path(path), threads) for path in paths]
    feeds = _feeds(sessions[0], sizes or {}, seed)
    wanted = _signature(sessions[0])
    for path, other in zip(paths, sessions, strict=True):
        if _signature(other) != wanted:
            raise BenchError(f"{path} takes other inputs than {paths[0]}: {_signature(other)} instead of {wanted}")
    times: list[list[float]] = [[] for _ in sessions]
    order = list(range(len(sessions)))
    warm_up = max(3, rounds // 10)
    for number in range(warm_up + rounds):
        for index in order[number % len(order) :] + order[: number % len(order)]:
            start = time.perf_counter()
            try:
                sessions[index].run(None, feeds)
            except Exception as error:  # a dozen exception types of ONNX Runtime, without a common base
                shapes = {name: list(array.shape) for name, array in feeds.items()}
                raise BenchError(
                    f"{paths[index]} fails on {shapes}: {' '.join(str(error).split())[:200]}; give other sizes"
                ) from error
            if number >= warm_up:
                times[index].append(1e3 * (time.perf_counter() - start))
    return Timing([str(path) for path in paths], {n: list(array.shape) for n, array in feeds.items()}, threads, times)


def _session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    return session(path, threads, {"session.force_spinning_stop": "1"})


def _signature(loaded: onnxruntime.InferenceSession) -> dict[str, str]:
    return {entry.name: f"{entry.type} of {len(entry.shape)} axes" for entry in loaded.get_inputs()}


def _feeds(loaded: onnxruntime.InferenceSession, sizes: Mapping[str, int], seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    feeds = {}
    for entry in loaded.get_inputs():
        dtype = _NUMPY.get(entry.type)
        if dtype is None:
            raise BenchError(f"input {entry.name!r} is a {entry.type}; only dense tensors can be made up")
        shape = [
            size if isinstance(size, int) else sizes.get(size, _SIZES.get(size, _OTHER_SIZE)) for size in entry.shape
        ]
        floating = np.issubdtype(dtype, np.floating)
        drawn = generator.standard_normal(shape) if floating else generator.integers(0, 2, shape)
        feeds[entry.name] = drawn.astype(dtype)
    unknown = [name for name in sizes if not any(name in entry.shape for entry in loaded.get_inputs())]
    if unknown:
        raise BenchError(f"size {unknown[0]!r} names no dynamic dimension of the inputs")
    return feeds
