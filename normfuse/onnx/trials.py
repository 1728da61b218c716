"""What a model and its other forms are compared on: the examples, random inputs, and inputs that look for trouble."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from normfuse.checkpoint import ExportableModel, InputSpec
from normfuse.checkpoint import inputs as specs
from normfuse.onnx.roles import Role, roles

EXAMPLE, RANDOM, EDGE, MASK, LARGE, SOFT = "example", "random", "edge", "mask", "large", "soft"
_LARGE = 100.0  # times the example: far outside of training, far inside of float32
_HIDDEN = -100.0  # what is lower in a mask that is added hides
_GROWTH = 4  # times the example's size, where a dimension has no largest one
_MOST_ENTRIES, _MOST_SECONDS = 2**21, 2.0  # of the inputs, and of one run, at the largest sizes
_SEVERAL = 3  # rows, so that one can be masked and another not
_MOST_ALONE = 4  # dimensions that are tried at their smallest by themselves


@dataclass(frozen=True)
class Trial:
    """Inputs to compare on.

    Attributes:
        label: what they are, with their shapes.
        tensors: one per input.
        kind: ``example``; ``random``, which the model must take; ``edge``, which it need not take, but if it does,
            the other forms must agree; ``mask`` and ``large``, edges of which :meth:`in_half` says more; ``soft``,
            where a form that does not agree is a note.
    """

    label: str
    tensors: tuple[Tensor, ...]
    kind: str

    def in_half(self) -> Trial | None:
        """The trial for a form that computes in float16, whose numbers end early; None where it cannot agree.

        What hides in float32 is no number of float16: where every key is hidden, the two may differ.
        """
        if self.kind == LARGE:
            return None
        return replace(self, kind=SOFT) if self.kind == MASK else self


def example(model: ExportableModel) -> Trial:
    """The example inputs."""
    tensors = model.example_inputs
    return Trial(f"the example inputs {shapes(tensors)}", tensors, EXAMPLE)


def random(model: ExportableModel, number: int, generator: torch.Generator) -> Trial:
    """Random inputs of the examples' kinds; number 0 has the smallest sizes, which break what was specialised."""
    now = specs.consistent_sizes(model.inputs, model.example_inputs)
    sizes = {
        name: _smallest(dim)
        if number == 0
        else specs.clamp(int(torch.randint(1, 2 * now[name] + 2, (), generator=generator)), dim)
        for name, dim in specs.dimensions(model.inputs).items()
    }
    tensors = _drawn(model, sizes, generator)
    return Trial(f"random inputs {shapes(tensors)}", tensors, RANDOM)


def edges(model: ExportableModel, generator: torch.Generator, pace: float = 0.0) -> Iterator[Trial]:
    """Inputs that look for trouble: masks, integers, sizes and numbers at their ends.

    Args:
        model: the model.
        generator: of what is random in them.
        pace: seconds that a run takes ÷ the square of the entries of its inputs.
    """
    now = specs.consistent_sizes(model.inputs, model.example_inputs)
    dims = specs.dimensions(model.inputs)
    several = {name: specs.clamp(max(now[name], _SEVERAL), dim) for name, dim in dims.items()}
    drawn = _drawn(model, several, generator)
    found = roles(model.program)
    yield from _masks(model, found, drawn)
    yield from _integers(model, found, drawn)
    yield from _floats(model, found, drawn)
    alone = list(dims)[:_MOST_ALONE] if len(dims) > 1 else []
    for name in alone:
        tensors = _drawn(model, several | {name: _smallest(dims[name])}, generator)
        yield Trial(f"inputs with the smallest {name} {shapes(tensors)}", tensors, EDGE)
    largest = _largest(model, now, pace)
    if largest != now:
        tensors = _drawn(model, largest, generator)
        yield Trial(f"inputs of the largest sizes {shapes(tensors)}", tensors, EDGE)
    rows = _rows(model.inputs)
    if rows is not None:
        none = several | {rows: 0}
        tensors = tuple(specs.resize(x, spec.shape(none)) for spec, x in zip(model.inputs, drawn, strict=True))
        yield Trial(f"an empty {rows} {shapes(tensors)}", tensors, SOFT)


def _masks(model: ExportableModel, found: Sequence[Role], drawn: Sequence[Tensor]) -> Iterator[Trial]:
    """Every mask by itself: nothing hidden, one row hidden, everything hidden."""
    for index, (spec, role) in enumerate(zip(model.inputs, found, strict=True)):
        example = model.example_inputs[index]
        if not _is_mask(example, role):
            continue
        for value, what in _mask_values(example, spec):
            whole = torch.full_like(drawn[index], value)
            for part, changed in (("all of it", whole), *_parts(drawn[index], value)):
                tensors = (*drawn[:index], changed, *drawn[index + 1 :])
                yield Trial(f"mask {spec.name} with {part} {what} {shapes(tensors)}", tensors, MASK)


def _is_mask(example: Tensor, role: Role) -> bool:
    if example.dtype == torch.bool:
        return True
    if example.is_floating_point():
        return role.mask and not role.data
    return role.mask or (role.rows is None and len(example.unique()) <= 2)


def _mask_values(example: Tensor, spec: InputSpec) -> list[tuple[float, str]]:
    if example.dtype == torch.bool:
        return [(False, "False"), (True, "True")]
    if not example.is_floating_point():
        low, high = _ends(example, spec, Role())
        return [(value, str(value)) for value in dict.fromkeys((low, high))]
    finite = example[example.isfinite()]
    own = float(finite.min()) if finite.numel() else 0.0
    lowest = torch.finfo(example.dtype).min
    values = [0.0, own, lowest, float("-inf")] if lowest < own < _HIDDEN else [0.0, lowest, float("-inf")]
    return [(value, f"{value:.3g}") for value in values]


def _parts(mask: Tensor, value: float) -> list[tuple[str, Tensor]]:
    """One row, in the first dimension and in the one before the last, which is the queries' in [..., queries, keys]."""
    changed = []
    for axis, what in ((0, "a row"), (-2, "a query")):
        if mask.dim() > 1 and mask.shape[axis] > 1 and (axis == 0 or mask.dim() > 2):
            part = mask.clone()
            part.select(axis, 0).fill_(value)
            changed.append((what, part))
    return changed


def _integers(model: ExportableModel, found: Sequence[Role], drawn: Sequence[Tensor]) -> Iterator[Trial]:
    """All integers at both ends of their ranges, and rows of a number that the program compares them with."""
    whole = [
        (index, *_ends(model.example_inputs[index], spec, found[index]))
        for index, spec in enumerate(model.inputs)
        if not spec.dtype.is_floating_point and spec.dtype != torch.bool
    ]
    for place, what in ((1, "lowest"), (2, "highest")):
        tensors = list(drawn)
        for entry in whole:
            tensors[entry[0]] = torch.full_like(drawn[entry[0]], entry[place])
        if whole:
            yield Trial(f"all integers at their {what} {shapes(tensors)}", tuple(tensors), EDGE)
    for index, low, high in whole:
        for value in sorted(set(found[index].compared))[:3]:
            if low <= value <= high:
                for part, changed in _parts(drawn[index], value):
                    others = (*drawn[:index], changed, *drawn[index + 1 :])
                    name = model.inputs[index].name
                    yield Trial(f"{name} with {part} of {value} {shapes(others)}", others, EDGE)


def _ends(example: Tensor, spec: InputSpec, role: Role) -> tuple[int, int]:
    """The lowest and the highest integer that an input takes, as far as that is known."""
    if spec.high is not None:
        return 0, spec.high - 1
    if role.rows is not None and not role.data:
        return 0, role.rows - 1
    return (int(example.min()), int(example.max())) if example.numel() else (0, 1)


def _floats(model: ExportableModel, found: Sequence[Role], drawn: Sequence[Tensor]) -> Iterator[Trial]:
    """All numbers zero, all the same, and all large."""
    places = [
        index
        for index, spec in enumerate(model.inputs)
        if spec.dtype.is_floating_point and not _is_mask(model.example_inputs[index], found[index])
    ]
    changes: list[tuple[str, str, Callable[[Tensor], Tensor]]] = [
        ("zeros", EDGE, torch.zeros_like),
        ("ones", EDGE, torch.ones_like),
        ("large numbers", LARGE, lambda x: x * _LARGE),
    ]
    for what, kind, change in changes if places else ():
        tensors = tuple(change(x) if index in places else x for index, x in enumerate(drawn))
        yield Trial(f"{what} {shapes(tensors)}", tensors, kind)


def _largest(model: ExportableModel, now: dict[str, int], pace: float) -> dict[str, int]:
    """Every dynamic dimension at its largest, or a multiple of the example's, within what a run may take."""
    dims = specs.dimensions(model.inputs)
    sizes = {n: dim.maximum or specs.clamp(_GROWTH * max(now[n], 1), dim) for n, dim in dims.items()}
    entries = _entries(model.inputs, now)
    while sizes != now:
        grown = _entries(model.inputs, sizes)
        # Attention takes the square of the length: at most that of what the inputs grow by.
        if grown <= max(_MOST_ENTRIES, entries) and pace * grown**2 <= _MOST_SECONDS:
            break
        sizes = {name: max(now[name], size // 2) for name, size in sizes.items()}
    return sizes


def _smallest(dim: specs.Dimension) -> int:
    """One, or none where a dimension is meant to be empty, such as a past."""
    return specs.clamp(min(1, dim.minimum), dim)


def _entries(inputs: Sequence[InputSpec], sizes: dict[str, int]) -> int:
    return sum(torch.Size(spec.shape(sizes)).numel() for spec in inputs)


def _rows(inputs: Sequence[InputSpec]) -> str | None:
    """The dynamic dimension that comes first in the first input that has one, if it may be empty: the batch."""
    for spec in inputs:
        if spec.dims and isinstance(spec.dims[0], specs.Dimension):
            return spec.dims[0].name if spec.dims[0].minimum <= 1 else None
    return None


def _drawn(model: ExportableModel, sizes: dict[str, int], generator: torch.Generator) -> tuple[Tensor, ...]:
    return tuple(
        specs.redraw(spec, example, sizes, generator)
        for spec, example in zip(model.inputs, model.example_inputs, strict=True)
    )


def shapes(tensors: Sequence[Tensor]) -> str:
    """The shapes of tensors, as labels show them."""
    return ", ".join(str(list(tensor.shape)).replace(" ", "") for tensor in tensors)
