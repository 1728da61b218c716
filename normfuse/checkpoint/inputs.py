"""What a model takes: names, dtypes and dimensions of its inputs, and tensors that fit them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from normfuse.checkpoint.archive import CheckpointError

DTYPES = {
    name: getattr(torch, name) for name in "float32 float16 bfloat16 float64 int64 int32 int16 int8 uint8 bool".split()
}
_SPEC = re.compile(r"(?P<name>[A-Za-z_]\w*):(?P<dtype>\w+)\[(?P<dims>[^\]]*)\](?:<(?P<high>\d+))?")
_DIM = re.compile(r"(?:(?P<low>\d+)<=)?(?P<name>[A-Za-z_]\w*)(?:<=(?P<high>\d+))?")
_TERM = re.compile(r"(?P<sign>[+-]?)(?:(?P<factor>\d+)\*)?(?P<name>[A-Za-z_]\w*)|(?P<offset>[+-]?\d+)")
_EXAMPLE = 'e.g. "tokens:int64[batch,seq]<1000" or "image:float32[batch,3,32,32]"'
# Sizes of dynamic dimensions in made-up examples: above 1, and told apart at a glance.
_FIRST_SIZES = (3, 8, 5, 7, 6)


@dataclass(frozen=True)
class Dimension:
    """A dynamic dimension.

    Args:
        name: what it is called in the file.
        minimum: the smallest size.
        maximum: the largest size; None: no bound.

    Example:
        >>> from normfuse.checkpoint import Dimension
        >>> print(Dimension("seq", maximum=512))
        seq<=512
    """

    name: str
    minimum: int = 1
    maximum: int | None = None

    def __post_init__(self) -> None:
        bounds = [self.minimum] if self.maximum is None else [self.minimum, self.maximum]
        if not (isinstance(self.name, str) and self.name.isidentifier() and all(type(b) is int for b in bounds)):
            raise CheckpointError(f"dimension {self.name!r} needs a word as its name and integers as its bounds")

    def __str__(self) -> str:
        low = f"{self.minimum}<=" if self.minimum != 1 else ""
        return f"{low}{self.name}" + ("" if self.maximum is None else f"<={self.maximum}")


@dataclass(frozen=True)
class Derived:
    """A size that follows from dynamic dimensions: the sum of ``factor · size``, and ``offset``.

    Args:
        terms: pairs of a dimension and its factor.
        offset: added to the sum.

    Example:
        >>> from normfuse.checkpoint import Derived, Dimension
        >>> Derived(((Dimension("past"), 1),), 1).size({"past": 7})
        8
    """

    terms: tuple[tuple[Dimension, int], ...]
    offset: int = 0

    def __str__(self) -> str:
        parts = [f"{factor:+d}*{dim.name}".replace("1*", "", abs(factor) == 1) for dim, factor in self.terms]
        parts += [f"{self.offset:+d}"] * bool(self.offset)
        return "".join(parts).removeprefix("+")

    def size(self, sizes: Mapping[str, int]) -> int:
        """The size for given sizes of the dimensions.

        Args:
            sizes: by the dimensions' names.

        Returns:
            A size.
        """
        return self.offset + sum(factor * sizes[dim.name] for dim, factor in self.terms)


Axis = int | Dimension | Derived


@dataclass(frozen=True)
class InputSpec:
    """One input of a model.

    Args:
        name: in the file.
        dtype: of the tensor.
        dims: one entry per axis: an int where it is fixed, a :class:`Dimension` where it is dynamic, a
            :class:`Derived` where it follows from others.
        high: made-up integers are from 0 to ``high - 1``; None: values like those of the example input are
            admissible.

    Example:
        >>> from normfuse.checkpoint import Dimension, InputSpec
        >>> print(InputSpec("tokens", torch.int64, (Dimension("batch"), 16), high=100))
        tokens:int64[batch,16]<100
    """

    name: str
    dtype: torch.dtype
    dims: tuple[Axis, ...]
    high: int | None = None

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        bound = "" if self.high is None else f"<{self.high}"
        return f"{self.name}:{dtype}[{','.join(map(str, self.dims))}]{bound}"

    def shape(self, sizes: Mapping[str, int]) -> list[int]:
        """The shape for given sizes of the dynamic dimensions.

        Args:
            sizes: by the dimensions' names.

        Returns:
            One size per axis.
        """
        return [size_of(dim, sizes) for dim in self.dims]


def size_of(dim: Axis, sizes: Mapping[str, int]) -> int:
    """The size of an axis for given sizes of the dynamic dimensions."""
    if isinstance(dim, Derived):
        return dim.size(sizes)
    return sizes[dim.name] if isinstance(dim, Dimension) else dim


def parse_input(text: str) -> InputSpec:
    """Read an input's name, dtype and sizes: ``name:dtype[dims]``, with an optional bound for integers.

    A number is a fixed dimension, a word a dynamic one; ``seq<=512`` or ``2<=seq<=512`` bounds it; ``past+1``,
    ``past+seq`` and ``32*height`` follow from others. ``<N`` after the bracket says that integers run from 0 to N-1
    (default: 0 and 1).

    Args:
        text: the description.

    Returns:
        The input.

    Raises:
        CheckpointError: the text is not of that form; the message says what was given and what is allowed.

    Example:
        >>> from normfuse.checkpoint import parse_input
        >>> parse_input("tokens:int64[batch,seq<=512]<30000").high
        30000
    """
    compact = re.sub(r"\s*([^\w\s]+)\s*", r"\1", text.strip())
    match = _SPEC.fullmatch(compact)
    if match is None:
        raise CheckpointError(f"input {text!r} is not of the form name:dtype[dims], {_EXAMPLE}")
    dtype = DTYPES.get(match["dtype"])
    if dtype is None:
        raise CheckpointError(f"input {text!r}: dtype {match['dtype']!r} is not one of {', '.join(DTYPES)}")
    dims = tuple(_parse_axis(dim, text) for dim in match["dims"].split(",")) if match["dims"] else ()
    integer = not dtype.is_floating_point and dtype != torch.bool
    if match["high"] is not None and (not integer or int(match["high"]) < 1):
        raise CheckpointError(f"input {text!r}: a bound <{match['high']} needs an integer dtype and must be at least 1")
    high = int(match["high"] or 2) if integer else None
    return InputSpec(match["name"], dtype, dims, high)


def _parse_axis(dim: str, text: str) -> Axis:
    return int(dim) if dim.isdecimal() else parse_dimension(dim, f"input {text!r}")


def parse_dimension(text: str, label: str) -> Dimension | Derived:
    """Reads ``seq``, ``seq<=512``, ``2<=seq<=512``, ``past+1``, ``past+seq`` or ``32*height``."""
    compact = re.sub(r"\s*([^\w\s]+)\s*", r"\1", text.strip())
    match = _DIM.fullmatch(compact)
    if match is not None:
        low = 1 if match["low"] is None else int(match["low"])
        return Dimension(match["name"], low, None if match["high"] is None else int(match["high"]))
    terms = list(_TERM.finditer(compact))
    apart = all(term.start() == 0 or term[0][0] in "+-" for term in terms)
    if not apart or "".join(term[0] for term in terms) != compact or not any(term["name"] for term in terms):
        raise CheckpointError(f"{label}: dimension {text!r} needs a word or a number, {_EXAMPLE}")
    named = [(Dimension(t["name"]), int(f"{t['sign']}{t['factor'] or 1}")) for t in terms if t["name"]]
    return Derived(tuple(named), sum(int(t["offset"]) for t in terms if not t["name"]))


def consistent_sizes(specs: Sequence[InputSpec], examples: Sequence[torch.Tensor]) -> dict[str, int]:
    """The size of every dynamic dimension in the examples.

    CheckpointError if an example does not fit its spec.
    """
    for spec, example in zip(specs, examples, strict=True):
        if example.dtype != spec.dtype or example.dim() != len(spec.dims):
            raise CheckpointError(f"example input {spec.name!r} is {example.dtype} {list(example.shape)}, not {spec}")
    axes = [
        (spec, example, dim, size)
        for spec, example in zip(specs, examples, strict=True)
        for dim, size in zip(spec.dims, example.shape, strict=True)
    ]
    sizes: dict[str, int] = {}
    for _, _, dim, size in axes:
        if isinstance(dim, Dimension):
            sizes.setdefault(dim.name, size)
    for _, _, dim, size in axes:  # a name that stands by itself nowhere follows from the first sum that holds it
        unknown = [term for term in dim.terms if term[0].name not in sizes] if isinstance(dim, Derived) else []
        if len(unknown) == 1 and isinstance(dim, Derived):
            root, factor = unknown[0]
            sizes[root.name] = (size - dim.size({**sizes, root.name: 0})) // factor
    for spec, example, dim, size in axes:
        if size != (expected := size_of(dim, sizes)):
            raise CheckpointError(
                f"example input {spec.name!r} has shape {list(example.shape)}, but {dim} is {expected} elsewhere"
            )
    return sizes


def dimensions(specs: Sequence[InputSpec]) -> dict[str, Dimension]:
    """The dynamic dimensions by name, each with the narrowest bounds given for it."""
    found: dict[str, Dimension] = {}
    axes = [axis for spec in specs for axis in spec.dims]
    own = [axis for axis in axes if isinstance(axis, Dimension)]
    names = {dim.name for dim in own}
    roots = [root for axis in axes if isinstance(axis, Derived) for root, _ in axis.terms if root.name not in names]
    for dim in (*own, *roots):
        other = found.get(dim.name, dim)
        highs = [high for high in (dim.maximum, other.maximum) if high is not None]
        found[dim.name] = Dimension(dim.name, max(dim.minimum, other.minimum), min(highs) if highs else None)
    for dim in found.values():
        if dim.maximum is not None and dim.maximum < dim.minimum:
            raise CheckpointError(
                f"dimension {dim.name!r} can have no size: it is at least {dim.minimum} and at most {dim.maximum}"
            )
    return found


def first_sizes(specs: Sequence[InputSpec]) -> dict[str, int]:
    """Sizes of the dynamic dimensions for inputs that have no example."""
    return {
        name: clamp(_FIRST_SIZES[index % len(_FIRST_SIZES)], dim)
        for index, (name, dim) in enumerate(dimensions(specs).items())
    }


def clamp(size: int, dim: Dimension) -> int:
    """The nearest size that the dimension allows."""
    size = max(size, dim.minimum)
    return size if dim.maximum is None else min(size, dim.maximum)


def make_up(spec: InputSpec, sizes: Mapping[str, int], generator: torch.Generator) -> torch.Tensor:
    """An input without an example to follow: normal floats, integers below ``high``, booleans of both kinds."""
    shape = spec.shape(sizes)
    if spec.dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(spec.dtype)
    if spec.dtype == torch.bool:
        # Both values in every row: a mask that hides everything has no meaning for attention.
        drawn = torch.randint(2, shape, generator=generator).bool()
        if drawn.dim() and drawn.shape[-1] > 1:
            drawn[..., 0], drawn[..., -1] = False, True
        return drawn
    return torch.randint(spec.high or 2, shape, generator=generator).to(spec.dtype)


def resize(example: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The example, cut or repeated along each axis to ``shape``: every value stays an admissible one.

    Zeros where the example is empty.
    """
    if not example.numel():
        return example.new_zeros(tuple(shape))
    for axis, size in enumerate(shape):
        if size != example.shape[axis]:
            example = example.index_select(axis, torch.arange(size) % example.shape[axis])
    return example.contiguous()


def redraw(
    spec: InputSpec, example: torch.Tensor, sizes: Mapping[str, int], generator: torch.Generator
) -> torch.Tensor:
    """Another input of the example's kind, in another shape.

    Floats are normal with the example's mean and spread, integers are drawn from the example's values (or
    below ``high``). An example with at most two distinct values is a mask: its rows are redrawn whole and cut
    or repeated, because masks with values drawn one by one may hide everything.
    """
    shape = spec.shape(sizes)
    if example.numel() == 0:
        return make_up(spec, sizes, generator)
    values = example.unique()
    if spec.high is not None and spec.high > 2:
        return torch.randint(spec.high, shape, generator=generator).to(spec.dtype)
    if len(values) <= 2 or not example.isfinite().all():
        return _redraw_mask(example, shape, generator)
    if spec.dtype.is_floating_point:
        spread = example.double()
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (noise * spread.std() + spread.mean()).to(spec.dtype)
    return values[torch.randint(len(values), shape, generator=generator)]


def _redraw_mask(example: torch.Tensor, shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    if not example.dim():
        return example
    rows = example[torch.randint(example.shape[0], (shape[0],), generator=generator)]
    width = shape[-1]
    if example.dim() < 2 or not 0 < width < example.shape[-1]:
        return resize(rows, shape)
    rows = resize(rows, [*shape[:-1], example.shape[-1]])
    # A row that shows something and hides something must go on doing so: it is cut around its first change.
    # One
    # column is cut at the end where all rows agree, which is where the sequence is, not its padding.
    if width == 1:
        first, last = rows[..., :1], rows[..., -1:]
        left_padded = len(example[..., 0].unique()) > 1 and len(example[..., -1].unique()) == 1
        return (last if left_padded else first).contiguous()
    changes = (rows[..., 1:] != rows[..., :-1]).int()
    change = changes.argmax(-1, keepdim=True) + 1
    start = torch.where(changes.any(-1, keepdim=True), change + 1 - width, 0).clamp(min=0)
    return rows.gather(-1, start + torch.arange(width))
