"""Inputs with which a file can be run: made from what it says of itself, and tried until ONNX Runtime takes them."""

from __future__ import annotations

import itertools
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import TensorProto, ValueInfoProto, helper

from normfuse.checkpoint import Dimension, InputSpec
from normfuse.onnx.graph import GraphError
from normfuse.onnx.runtime import LONGEST_RUN, SLOWER, RuntimeEnded, RuntimeFailure, Session
from normfuse.onnx.verifier import runtime_problem

from .hints import Hints, hints_of
from .onnx_file import OnnxFile

# Sizes of dynamic dimensions, in the order in which they are tried: small ones that differ from all else, then what
# strides, windows and samplings ask for.
_BASES = (
    *(5, 7, 8, 12, 16, 28, 32, 48, 64, 80, 96, 100, 112, 128, 160, 192, 224, 256, 299, 320, 384, 416, 512, 640, 1024),
    *(1600, 4000, 16000, 32000),
)
_BATCHES = (2, 1)
_SECONDS = 40.0  # for finding sizes
_QUICK = 1.0  # seconds of a run, below which batches of three are tried too
_ONE_RUN = 20.0  # seconds, after which a run is ended where other sizes may do
_LARGEST_INPUT = 1 << 22  # entries, where the file leaves the sizes open
_LARGEST_FIXED = 1 << 26  # entries of an input, where the file fixes the sizes
_DRAWS = (0, 1, 2)  # see Search.run
_FEW = 8  # entries of an input that may hold sizes, such as those of the picture that a mask is for
_LEAST, _MOST = 8, 64  # such sizes
#: Numbers of axes that are tried where nothing shows it.
GUESSES = (2, 4, 3, 1, 5)
_WAYS = 4  # in which dimensions may belong together, see Search._sizes


@dataclass(frozen=True)
class Input:
    """One input as the file describes it: a size is a number, a symbol, or None where nothing is said."""

    name: str
    kind: int
    dims: tuple[int | str, ...] | None
    hints: Hints
    sequence: bool = False
    bounds: Mapping[str, Dimension] | None = None


@dataclass(frozen=True)
class Trial:
    """Inputs that a file takes, and what it gives for them.

    Attributes:
        sizes: of the dynamic dimensions.
        feeds: the inputs by name.
        outputs: in the order of the file.
        draw: which kind of numbers the inputs are, see :meth:`Search.run`.
        seconds: how long the run took.
    """

    sizes: dict[str, int]
    feeds: dict[str, Any]
    outputs: list[Any]
    draw: int = 0
    seconds: float = 0.0

    @property
    def shapes(self) -> str:
        """The shapes of the inputs in words."""
        return ", ".join(f"{name} {list(np.shape(value))}".replace(", ", ",") for name, value in self.feeds.items())


def plain_session(source: str | bytes, folder: str = "", optimised: str | None = None) -> Session:
    """A session that runs a file as it is written, or one that writes what ONNX Runtime makes of it.

    Args:
        source: a path, or a model in bytes with weights beside it in `folder`.
        folder: see `source`.
        optimised: where to write the optimised graph, empty for nowhere; None switches all optimisations off.

    Raises:
        GraphError: ONNX Runtime cannot load it; one line.
    """
    try:
        return Session(source, folder=folder, optimise=optimised is not None, optimised=optimised or "", threads=1)
    except RuntimeFailure as error:
        raise GraphError(f"ONNX Runtime cannot load it: {runtime_problem(error)}") from error


def describe_inputs(file: OnnxFile, given: Sequence[InputSpec] = (), guess: int = GUESSES[0]) -> list[Input]:
    """What the file says of its inputs, narrowed by what the caller says of some.

    Args:
        file: the file.
        given: what the caller says.
        guess: see :func:`hints_of`.

    Raises:
        GraphError: an input is no tensor and no sequence of tensors, or the caller names one that the file lacks.
    """
    hints = hints_of(file, guess)
    bounds = {spec.name: spec for spec in given}
    names = {plain_name(value.name): value.name for value in file.inputs}
    unknown = [name for name in bounds if name not in names and name not in names.values()]
    if unknown:
        raise GraphError(f"there is no input {unknown[0]!r}; the file takes {', '.join(v.name for v in file.inputs)}")
    return [
        _input(value, hints[value.name], bounds.get(value.name) or bounds.get(plain_name(value.name)))
        for value in file.inputs
    ]


def plain_name(name: str) -> str:
    """A name as --input can write it: letters, digits and underscores."""
    found = re.sub(r"\W+", "_", name).strip("_") or "input"
    return f"input_{found}" if found[0].isdigit() else found


def _input(value: ValueInfoProto, hints: Hints, spec: InputSpec | None) -> Input:
    kind, sequence = value.type, False
    if kind.HasField("sequence_type"):
        kind, sequence = kind.sequence_type.elem_type, True
    if not kind.HasField("tensor_type"):
        raise GraphError(f"the input {value.name!r} is not a tensor, so its values cannot be generated")
    tensor = kind.tensor_type
    dims: tuple[int | str, ...] | None = None
    if tensor.HasField("shape"):
        dims = tuple(
            dim.dim_value if dim.HasField("dim_value") and dim.dim_value >= 0
            else dim.dim_param or f"{value.name}[{axis}]"
            for axis, dim in enumerate(tensor.shape.dim)
        )  # fmt: skip
    bounds: dict[str, Dimension] = {}
    if spec is not None:
        if dims is not None and len(spec.dims) != len(dims):
            raise GraphError(f"the input {value.name!r} has {len(dims)} axes, not {len(spec.dims)} as in {spec}")
        own = dims or tuple(f"{value.name}[{axis}]" for axis in range(len(spec.dims)))
        dims = tuple(new if isinstance(new, int) else old for new, old in zip(spec.dims, own, strict=True))
        bounds = {o: d for o, d in zip(own, spec.dims, strict=True) if isinstance(o, str) and isinstance(d, Dimension)}
        if spec.high is not None and (spec.high != 2 or hints.below is None):
            hints.below = spec.high
    return Input(value.name, tensor.elem_type, dims, hints, sequence, bounds)


class Search:
    """Finds inputs of several sizes that a file takes.

    Args:
        file: the file.
        inputs: what is known of its inputs.

    Raises:
        GraphError: ONNX Runtime cannot load the file.
    """

    def __init__(self, file: OnnxFile, inputs: Sequence[Input]) -> None:
        self.session = plain_session(str(file.path))
        self._inputs = [_with_rank(entry) for entry in inputs]
        self._deadline = time.monotonic() + _SECONDS / (len(GUESSES) if file.rank_guessed else 1)
        self._failure, self._crashed = "", False
        self._symbols = self._tied()
        self._way = 0
        self._states = {
            entry.dims[1]
            for entry in self._inputs
            if entry.dims and len(entry.dims) == 3 and isinstance(entry.dims[0], int) and isinstance(entry.dims[1], str)
        }

    def first(self) -> Trial:
        """Inputs with which the file runs. Raises GraphError, one line, if none are found."""
        tried, crashed = [], 0  # the size at which it crashed: no other way is tried with it, each costs a process
        for base, batch, way in itertools.product(_BASES, _BATCHES, range(_WAYS)):
            sizes = self._sizes(base, batch, way)
            if sizes in tried or base == crashed:
                continue
            tried.append(sizes)
            for draw in _DRAWS if any(map(_may_be_sizes, self._inputs)) else _DRAWS[:2]:
                found = self.run(sizes, seed=draw, draw=draw)
                if found is not None or self._crashed or self._late():
                    break
            crashed = base if self._crashed else crashed
            if found is not None:
                self._way = way
                return found
            if self._late():
                break
        raise GraphError(f"it does not run at any size that was tried: {self._failure}{self._advice()}")

    def others(self, trial: Trial) -> Iterator[Trial]:
        """The same file at other sizes, as many dimensions changed as it allows; nothing where all are fixed."""
        seen = [trial.sizes]
        free = [symbol for symbol, size in self._sizes(3, 3, self._way).items() if size == 3]
        if not free:
            found = self.run(trial.sizes, seed=7, draw=trial.draw)
            if found is not None:
                yield found
            return
        for base in _BASES:
            sizes = self._sizes(base, 3, self._way)
            if any(sizes[s] == trial.sizes[s] for s in free if not self._is_batch(s)) or self._late():
                continue
            for batch in (3, 1) if trial.seconds < _QUICK and self._has_batches(trial, free) else (1,):
                sizes = self._sizes(base, batch, self._way)
                found = self.run(sizes, seed=base, draw=trial.draw) if sizes not in seen else None
                if found is not None:
                    yield found
                    seen.append(sizes)
                    break
            if len(seen) > 1:
                break
        changed = {s for s in free if any(sizes[s] != trial.sizes[s] for sizes in seen)}
        for symbol in free:  # those that could not change together may do so alone
            for size in () if symbol in changed else (3, 4) if self._is_batch(symbol) else _BASES:
                sizes = {**trial.sizes, symbol: self._bounded(symbol, size)}
                found = None if sizes in seen or self._late() else self.run(sizes, seed=size, draw=trial.draw)
                if found is not None:
                    yield found
                    break

    def run(self, sizes: dict[str, int], *, seed: int, draw: int = 0) -> Trial | None:
        """What the file gives at these sizes; None where it fails, or gives nothing but NaN.

        Args:
            sizes: of the dynamic dimensions.
            seed: of the numbers.
            draw: 0 for normal numbers, 1 for numbers from 0 to 1, 2 for sizes where a few numbers may be some.
        """
        feeds = {}
        generator = np.random.default_rng(seed)
        for entry in self._inputs:
            shape = [dim if isinstance(dim, int) else sizes[dim] for dim in entry.dims or ()]
            if math.prod(shape) > (_LARGEST_INPUT if self._symbols else _LARGEST_FIXED):
                self._failure = self._failure or f"the input {entry.name!r} of shape {shape} is too large"
                return None
            value = _draw(entry, shape, generator, draw)
            feeds[entry.name] = [value, value] if entry.sequence else value
        started, self._crashed = time.monotonic(), False
        try:
            outputs = self.session.run(feeds, seconds=_ONE_RUN if self._symbols else LONGEST_RUN)
        except RuntimeFailure as error:
            self._failure, self._crashed = runtime_problem(error), isinstance(error, RuntimeEnded)
            return None
        if draw == 0 and any(isinstance(o, np.ndarray) and o.dtype.kind == "f" and np.isnan(o).all() and o.size
                             for o in outputs):  # fmt: skip
            self._failure = "its outputs are not a number"
            return None
        return Trial(sizes, feeds, outputs, draw, time.monotonic() - started)

    def _advice(self) -> str:
        """How to name sizes that it takes; nothing where all are fixed."""
        if not self._symbols:
            return ""
        entry = next(entry for entry in self._inputs if any(isinstance(dim, str) for dim in entry.dims or ()))
        sizes = ",".join(str(dim) if isinstance(dim, int) else "N" for dim in entry.dims or ())
        kind = helper.tensor_dtype_to_np_dtype(entry.kind).name
        spec = f"{plain_name(entry.name)}:{kind}[{sizes}]"
        return f"; if it takes others, give numbers for N (--input {spec!r}, inputs=)"

    def _late(self) -> bool:
        return time.monotonic() > self._deadline

    def _tied(self) -> dict[str, tuple[int, bool]]:
        """The symbols: the axis where each stands first, and whether the file gave it a name."""
        found: dict[str, tuple[int, bool]] = {}
        for entry in self._inputs:
            for axis, dim in enumerate(entry.dims or ()):
                if isinstance(dim, str):
                    found.setdefault(dim, (axis, dim != f"{entry.name}[{axis}]"))
        return found

    def _has_batches(self, trial: Trial, free: Sequence[str]) -> bool:
        return any(trial.sizes[symbol] > 1 for symbol in free if self._is_batch(symbol))

    def _is_batch(self, symbol: str) -> bool:
        return self._symbols[symbol][0] == 0

    def _needed(self, symbol: str) -> int | None:
        for entry in self._inputs:
            for axis, dim in enumerate(entry.dims or ()):
                if dim == symbol and axis in entry.hints.sizes:
                    return entry.hints.sizes[axis]
        return None

    def _sizes(self, base: int, batch: int, way: int) -> dict[str, int]:
        """Sizes of all symbols. First axes are batches.

        Others are told apart by name, or by axis where they have none; in the second way states [layers, batch, width]
        have theirs on the second axis; in the third all are told apart by axis; in the last they are all the same.
        """
        sizes, names = {}, [symbol for symbol, (axis, named) in self._symbols.items() if named and axis]
        for symbol, (axis, named) in self._symbols.items():
            needed = self._needed(symbol)
            if needed is not None:
                sizes[symbol] = needed
            elif axis == 0 or (way == 1 and symbol in self._states):
                sizes[symbol] = self._bounded(symbol, batch)
            else:
                step = 0 if way == 3 else names.index(symbol) if named and way < 2 else axis - 1
                sizes[symbol] = self._bounded(symbol, base * (1 + step) if base > 7 else base + 2 * step)
        return sizes

    def _bounded(self, symbol: str, size: int) -> int:
        for entry in self._inputs:
            bound = (entry.bounds or {}).get(symbol)
            if bound is not None:
                size = max(size, bound.minimum)
                size = size if bound.maximum is None else min(size, bound.maximum)
        return size


def run_session(session: Session, trial: Trial) -> list[Any]:
    """What a session gives for the inputs of a trial, if that takes not much longer. Raises RuntimeFailure."""
    return session.run(trial.feeds, seconds=_ONE_RUN + SLOWER * trial.seconds)


def _with_rank(entry: Input) -> Input:
    if entry.dims is not None:
        return entry
    axes = range(entry.hints.rank or 0)
    dims = tuple(entry.hints.sizes.get(axis, f"{entry.name}[{axis}]") for axis in axes)
    return Input(entry.name, entry.kind, dims, entry.hints, entry.sequence, entry.bounds)


def _may_be_sizes(entry: Input) -> bool:
    """Whether an input is a few numbers that may say how large something is to be."""
    dims = entry.dims or ()
    fixed = [dim for dim in dims if isinstance(dim, int)]
    number = entry.kind not in (TensorProto.STRING, TensorProto.BOOL) and entry.hints.below is None
    return number and len(dims) < 3 and len(fixed) == len(dims) and math.prod(fixed) <= _FEW


def _draw(entry: Input, shape: Sequence[int], generator: np.random.Generator, draw: int) -> Any:
    """Numbers of an input's type: normal, from 0 to 1, or sizes; integers as the graph's indices allow."""
    if entry.kind == TensorProto.STRING:
        return np.array(generator.choice(["a", "b", "1"], shape), object)
    dtype = helper.tensor_dtype_to_np_dtype(entry.kind)
    if dtype.kind == "b":
        return generator.random(shape) < 0.5
    if draw == 2 and _may_be_sizes(entry):
        return np.asarray(generator.integers(_LEAST, _MOST, shape)).astype(dtype)
    if dtype.kind in "iu":
        if entry.hints.equals and not shape:
            return np.array(entry.hints.equals[0], dtype)
        below = entry.hints.below or (256 if dtype.itemsize == 1 and dtype.kind == "u" else 2)
        return generator.integers(0, max(1, min(below, np.iinfo(dtype).max)), shape).astype(dtype)
    numbers = generator.random(shape) if draw == 1 else generator.normal(size=shape)
    return np.asarray(numbers).astype(dtype)
