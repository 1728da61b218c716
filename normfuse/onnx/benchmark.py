"""Latency of one ONNX file, or of two side by side, in ONNX Runtime on the CPU."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from normfuse.checkpoint.inputs import Dimension, clamp, dimensions, parse_input
from normfuse.errors import NormfuseError
from normfuse.onnx import sizes as sizes_module
from normfuse.onnx.graph import GraphError
from normfuse.onnx.runtime import RuntimeEnded, RuntimeFailure, Session, Value, clock
from normfuse.onnx.verifier import advised_names, runtime_problem, session
from normfuse.onnx.writer import INPUTS
from normfuse.options import check_timing

_NUMPY = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64,
    "tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(int16)": np.int16, "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8, "tensor(uint16)": np.uint16, "tensor(uint32)": np.uint32, "tensor(uint64)": np.uint64,
    "tensor(bool)": np.bool_,
}  # fmt: skip
_LONGEST_RUN = 3600.0  # seconds of the first run of a file


class BenchError(NormfuseError):
    """The files cannot be timed side by side; the message is one line."""


class _TooLarge(BenchError):
    """Inputs of these sizes do not fit in memory."""


@dataclass(frozen=True)
class Timing:
    """Latencies in milliseconds, one per file and round, of the same round side by side.

    Attributes:
        paths: the files.
        shapes: of the inputs, under the first file's names.
        threads: of ONNX Runtime.
        milliseconds: a list for each file.
        notes: what was decided on sizes, in words.
    """

    paths: list[str]
    shapes: dict[str, list[int]]
    threads: int
    milliseconds: list[list[float]]
    notes: list[str] = field(default_factory=list)

    def quartiles(self, index: int) -> tuple[float, float, float]:
        """Lower quartile, median and upper quartile of a file's milliseconds."""
        low, middle, high = statistics.quantiles(self.milliseconds[index], n=4)
        return low, middle, high

    def ratio(self, index: int = 1) -> tuple[float, float, float]:
        """Median of a file ÷ the first over the rounds, and its quartiles."""
        ratios = [b / a for a, b in zip(self.milliseconds[0], self.milliseconds[index], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        return middle, low, high

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def bench(
    paths: Sequence[str | os.PathLike[str]],
    *,
    sizes: Mapping[str, int] | None = None,
    mapping: Mapping[str, str] | None = None,
    rounds: int = 50,
    threads: int = 1,
    seed: int = 0,
) -> Timing:
    """Time ONNX files on the same random inputs.

    Every round runs each file once, in rotated order, and threads do not spin between runs. So noise on the machine
    affects all files alike, and ratios are more reliable than milliseconds.

    Args:
        paths: files with the same inputs. Their dtypes may differ in width, and one may have a size fixed that is
            dynamic in the other.
        sizes: of dynamic dimensions by name (``x.1`` for one of input x without a name). Default: 1 for batches, 224
            for pictures, 128 for others; if a file does not accept that size, others are tried and a note says so.
        mapping: for inputs with different names: from the name in the first file to the name in the others.
        rounds: timed rounds, at least 4; a tenth more runs first to warm up.
        threads: of ONNX Runtime within an operation.
        seed: of the inputs. Integers are 0 or 1, because the file does not contain their range.

    Returns:
        Milliseconds of every round, and ratios to the first file.

    Raises:
        BenchError, ExportError, VerificationError: a file cannot be loaded or run, the files take different inputs, or
            sizes or threads are no numbers to time with.

    Example:
        >>> import normfuse
        >>> from normfuse.nn import UnifiedNorm
        >>> model = nn.Sequential(nn.Linear(4, 8), UnifiedNorm(8), nn.ReLU(), nn.Linear(8, 2))
        >>> _ = normfuse.onnx.export(model, "model.onnx", example_inputs=torch.randn(3, 4))
        >>> timing = normfuse.onnx.bench(["model.onnx"], rounds=4)
    """
    if rounds < 4:
        raise BenchError(f"rounds is {rounds}; at least 4 are needed for quartiles")
    check_timing(sizes, threads)
    sessions = [session(Path(path), threads, {"session.force_spinning_stop": "1"}) for path in paths]
    inputs = [_with_axes(Path(path), loaded.inputs) for path, loaded in zip(paths, sessions, strict=True)]
    entries = _matched(paths, inputs, mapping or {})
    feeds, notes = _fitting(paths, sessions, entries, sizes or {}, seed)
    warm_up = max(3, rounds // 10)
    try:
        times = clock(sessions, feeds, warm_up=warm_up, rounds=rounds)
    except RuntimeFailure as error:
        raise BenchError(f"{' or '.join(map(str, paths))} fails: {runtime_problem(error)}") from error
    shapes = {name: list(array.shape) for name, array in feeds[0].items()}
    return Timing([str(path) for path in paths], shapes, threads, times, notes)


def _with_axes(path: Path, inputs: Sequence[Value]) -> list[Value]:
    """The inputs of a file. One without a shape is a number for ONNX Runtime: it gets the axes that readers need."""
    if all(entry.shape for entry in inputs):
        return list(inputs)
    listed, found = _hints(path)
    ranks = {v.name: found[v.name].rank or 2 for v in listed if not v.type.tensor_type.HasField("shape")}
    return [e._replace(shape=[None] * ranks[e.name]) if e.name in ranks else e for e in inputs]


def _matched(
    paths: Sequence[str | os.PathLike[str]],
    inputs: Sequence[Sequence[Value]],
    mapping: Mapping[str, str],
) -> list[list[Any]]:
    """For each input of the first file, its entry in every file."""
    first = {entry.name: entry for entry in inputs[0]}
    unknown = [name for name in mapping if name not in first]
    if unknown:
        raise BenchError(f"{paths[0]} has no input {unknown[0]!r} to map; it takes {', '.join(first)}")
    matched = [[entry] for entry in first.values()]
    for path, other in zip(paths[1:], inputs[1:], strict=True):
        entries = {entry.name: entry for entry in other}
        wanted = {name: mapping.get(name, name) for name in first}
        missing = [name for name in first if wanted[name] not in entries]
        left = [name for name in entries if name not in wanted.values()]
        if missing or left:
            raise BenchError(
                f"{path} takes other inputs than {paths[0]}: {', '.join(entries)} instead of {', '.join(first)}; name "
                f"those that are the same (mapping={{first: second}})",
                advice=advised_names(missing, left),
            )
        for row in matched:
            row.append(entries[wanted[row[0].name]])
    for row in matched:
        for path, entry in zip(paths, row, strict=True):
            if entry.type not in _NUMPY:
                raise BenchError(
                    f"input {entry.name!r} is a {entry.type}; values can only be generated for dense tensors of numbers"
                )
            if len(entry.shape) != len(row[0].shape) or _kind(entry) != _kind(row[0]):
                raise BenchError(
                    f"{path} takes other inputs than {paths[0]}: {entry.name!r} is a {entry.type} of "
                    f"{len(entry.shape)} axes, not a {row[0].type} of {len(row[0].shape)}"
                )
    return matched


def _kind(entry: Any) -> str:
    """``f`` for all floats, ``i`` for all integers, ``b`` for booleans."""
    return "i" if np.dtype(_NUMPY[entry.type]).kind == "u" else np.dtype(_NUMPY[entry.type]).kind


def _fitting(
    paths: Sequence[str | os.PathLike[str]],
    sessions: Sequence[Session],
    entries: Sequence[Sequence[Any]],
    given: Mapping[str, int],
    seed: int,
) -> tuple[list[dict[str, np.ndarray]], list[str]]:
    """Inputs for each file that every file can take; and a note if the usual sizes were not among them."""
    shapes = {row[0].name: [_dimension(row, axis) for axis in range(len(row[0].shape))] for row in entries}
    usual: dict[str, int] = {}
    dynamic = any(isinstance(dimension, str) for shape in shapes.values() for dimension in shape)
    needed = _needed(Path(paths[0])) if dynamic else {}
    for row in entries:
        for axis, dimension in enumerate(shapes[row[0].name]):
            if isinstance(dimension, str):
                named = not dimension.endswith(f".{axis}")
                size = needed.get((row[0].name, axis))
                for word in sizes_module.words(dimension):
                    usual.setdefault(word, size or sizes_module.usual(word, axis, len(row[0].shape), named))
    for name, bounded in _bounds(sessions[0]).items():
        if name in usual:
            usual[name] = clamp(usual[name], bounded)
    aliases = _aliases(entries, shapes)
    chosen = {aliases.get(name, name): size for name, size in given.items()}
    unknown = [name for name in given if aliases.get(name, name) not in usual]
    if unknown:
        raise BenchError(sizes_module.no_dimension(unknown[0], usual))
    refusal: BenchError | None = None
    for sizes in sizes_module.attempts(usual, chosen):
        try:
            feeds = _feeds(entries, shapes, sizes, seed)
            problem = _first_problem(paths, sessions, feeds)
        except _TooLarge as error:
            problem = error
        if problem is None:
            changed = [f"{name} is {sizes[name]}, not {usual[name]}" for name in usual if sizes[name] != usual[name]]
            changed = [text for text in changed if text.split()[0] not in chosen]
            return feeds, [f"{', '.join(changed)}: {refusal}"] if changed and refusal else []
        refusal = refusal or problem
    assert refusal is not None
    raise refusal


def _needed(path: Path) -> dict[tuple[str, int], int]:
    """Sizes that operations of a file ask for, by input and axis: the channels of a convolution."""
    return {(name, axis): size for name, hints in _hints(path)[1].items() for axis, size in hints.sizes.items()}


def _hints(path: Path) -> tuple[list[Any], dict[str, Any]]:
    """The inputs as a file lists them, and what its operations say of them; nothing where it cannot be read."""
    from .editing.hints import hints_of
    from .editing.onnx_file import OnnxFile

    try:
        file = OnnxFile(path)
        return file.inputs, hints_of(file)
    except GraphError:
        return [], {}


def _bounds(loaded: Session) -> dict[str, Dimension]:
    """The dynamic dimensions with their bounds, where normfuse wrote the file."""
    text = loaded.properties.get(INPUTS, "")
    # Names of inputs may be none that an option takes (past_key_values.0.key); their dimensions are what counts.
    return dimensions([parse_input(f"x:{line.rpartition(':')[2]}") for line in text.splitlines()])


def _first_problem(
    paths: Sequence[str | os.PathLike[str]],
    sessions: Sequence[Session],
    feeds: Sequence[dict[str, np.ndarray]],
) -> BenchError | None:
    for path, loaded, feed in zip(paths, sessions, feeds, strict=True):
        try:
            loaded.run(feed, seconds=_LONGEST_RUN)
        except RuntimeFailure as error:
            shapes = {name: list(array.shape) for name, array in feed.items()}
            if isinstance(error, RuntimeEnded):  # not only sizes that do not fit
                raise BenchError(f"{path} fails on {shapes}: {runtime_problem(error)}") from error
            return BenchError(f"{path} fails on {shapes}: {runtime_problem(error)}; give other sizes (--size NAME=N)")
    return None


def _dimension(row: Sequence[Any], axis: int) -> int | str:
    """What the files say of an axis: a fixed size in one of them holds for all."""
    fixed = {entry.shape[axis] for entry in row if isinstance(entry.shape[axis], int)}
    if len(fixed) > 1:
        raise BenchError(f"input {row[0].name!r} has size {' and '.join(map(str, sorted(fixed)))} in axis {axis}")
    return fixed.pop() if fixed else sizes_module.label(row[0].shape[axis], row[0].name, axis)


def _aliases(entries: Sequence[Sequence[Any]], shapes: Mapping[str, Sequence[int | str]]) -> dict[str, str]:
    """Names of dimensions in the other files, to the first file's."""
    return {
        sizes_module.label(entry.shape[axis], entry.name, axis): dimension
        for row in entries
        for axis, dimension in enumerate(shapes[row[0].name])
        for entry in row[1:]
        if isinstance(dimension, str) and not isinstance(entry.shape[axis], int)
    }


def _feeds(
    entries: Sequence[Sequence[Any]], shapes: Mapping[str, Sequence[int | str]], sizes: Mapping[str, int], seed: int
) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(seed)
    feeds: list[dict[str, np.ndarray]] = [{} for _ in entries[0]] if entries else []
    for row in entries:
        shape = [d if isinstance(d, int) else sizes_module.value(d, sizes) for d in shapes[row[0].name]]
        floating = _kind(row[0]) == "f"
        try:
            drawn = generator.standard_normal(shape) if floating else generator.integers(0, 2, shape)
        except (MemoryError, ValueError) as error:  # ValueError: more than numpy can count
            raise _TooLarge(
                f"input {row[0].name!r} of shape {shape} does not fit in memory; give smaller sizes"
            ) from error
        for feed, entry in zip(feeds, row, strict=True):
            feed[entry.name] = drawn.astype(_NUMPY[entry.type])
    return feeds
