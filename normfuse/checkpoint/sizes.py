"""Sizes that a program was not traced for, although no bound says so: tried on the live model."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.export import ExportedProgram

from normfuse.checkpoint import inputs as specs_module
from normfuse.checkpoint.archive import CheckpointError, some_of
from normfuse.checkpoint.inputs import Axis, Derived, Dimension, InputSpec

Run = Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]

_TRIED = 128  # sizes of a dimension that guards are asked about
_SAME = 1e-2  # of the largest value; tells another computation from rounding


def narrowed(
    program: ExportedProgram, specs: tuple[InputSpec, ...], tensors: Sequence[torch.Tensor], live: Run
) -> tuple[tuple[InputSpec, ...], list[str]]:
    """The inputs without sizes for which the program would not compute what the model does.

    torch.export decides as the example decides wherever the model asks for a size. What it took for granted is asked
    of its guards; for sizes of 0 and 1, on which it asks nothing, the model is run.

    Args:
        program: from :func:`normfuse.checkpoint.tracing.trace`.
        specs: its inputs, with the bounds that tracing found.
        tensors: what it was traced with.
        live: gives the model's outputs, in the order of the program's; raises CheckpointError where it fails.

    Returns:
        The inputs, and in words what was narrowed.
    """
    notes: list[str] = []
    specs = _guarded(program, specs, tensors, notes)
    run = program.module(check_guards=False)
    sizes = specs_module.consistent_sizes(specs, tensors)
    for name, dim in specs_module.dimensions(specs).items():
        for size in range(max(dim.minimum, 0), 2):
            why = _differs(run, live, specs, tensors, sizes | {name: size})
            if why:
                notes.append(f"{name} >= {size + 1}: {why} with {size}")
                specs = _with(specs, name, replace(dim, minimum=size + 1))
    return specs, list(dict.fromkeys(notes))


def _differs(
    run: nn.Module, live: Run, specs: Sequence[InputSpec], tensors: Sequence[torch.Tensor], sizes: Mapping[str, int]
) -> str:
    """Why the program is not the model at these sizes; empty if it is."""
    shapes = [spec.shape(sizes) for spec in specs]
    if any(size < 0 for shape in shapes for size in shape):
        return "other sizes would be negative"
    resized = [specs_module.resize(x, shape) for x, shape in zip(tensors, shapes, strict=True)]
    try:
        expected = live(resized)
    except CheckpointError:
        return "the model fails"
    try:
        with torch.no_grad():
            outputs = run(*(x.clone() for x in resized))
    except Exception:  # whatever an operation raises for a size that it was not traced for
        return "the model takes another path"
    return "" if all(map(_same, outputs, expected)) else "the model takes another path"


def _same(got: torch.Tensor, want: torch.Tensor) -> bool:
    if got.shape != want.shape:
        return False
    finite = want[want.isfinite()].double().abs()
    scale = float(finite.max()) if finite.numel() else 1.0
    return torch.allclose(got.double(), want.double(), rtol=0, atol=_SAME * scale, equal_nan=True)


def _guarded(
    program: ExportedProgram, specs: tuple[InputSpec, ...], tensors: Sequence[torch.Tensor], notes: list[str]
) -> tuple[InputSpec, ...]:
    """Bounds and multiples where guards want them; guards that are neither become notes."""
    guards = getattr(program.module(), "_guards_fn", None)
    if guards is None:
        return specs
    sizes, dims = specs_module.consistent_sizes(specs, tensors), specs_module.dimensions(specs)
    for name, dim in dims.items():
        tried = [s for s in range(2, _TRIED) if s == specs_module.clamp(s, dim)]
        refused = {size: why for size in tried if (why := _refusal(guards, specs, sizes | {name: size}))}
        taken = [size for size in tried if size not in refused]
        doubled = {other: specs_module.clamp(2 * size, dims[other]) for other, size in sizes.items() if other != name}
        alone = taken == [size for size in tried if not _refusal(guards, specs, {**doubled, name: size})]
        if not refused or not taken:
            continue
        step, reasons = math.gcd(*taken), dict.fromkeys(_named(why, specs) for why in refused.values())
        regular = taken == [size for size in tried if size % step == 0 and taken[0] <= size <= taken[-1]]
        if not (regular and alone and len(taken) > 1):
            notes.append(f"traced for sizes with {some_of(list(reasons))}; with others the model takes another path")
            continue
        low, high = taken[0] // step, taken[-1] // step
        part = Dimension(
            f"{name}_{step}" if step > 1 else name,
            low if low > 2 else 1,  # 0 and 1 are tried on the model
            high if taken[-1] + step <= tried[-1] or dim.maximum is not None else None,
        )
        specs = _with(specs, name, part if step == 1 else Derived(((part, step),)))
        notes.append(f"{name} is always {step}*{part}" if step > 1 else f"only {part} can be traced")
    return specs


def _refusal(guards: nn.Module, specs: Sequence[InputSpec], sizes: Mapping[str, int]) -> str:
    shapes = [spec.shape(sizes) for spec in specs]
    try:
        guards(*(torch.empty(shape, dtype=s.dtype, device="meta") for s, shape in zip(specs, shapes, strict=True)))
    except (AssertionError, ZeroDivisionError) as error:
        return str(error).removeprefix("Guard failed: ")
    return ""


def _named(guard: str, specs: Sequence[InputSpec]) -> str:
    """A guard with the names of dimensions in place of ``x.size()[1]``, and ``a - b`` in place of ``a + -1 * b``."""
    names = {
        f"{spec.name}.size()[{axis}]": dim.name if isinstance(dim, Dimension) else str(dim)
        for spec in specs
        for axis, dim in enumerate(spec.dims)
    }
    named = re.sub(r"\w+\.size\(\)\[\d+\]", lambda match: names.get(match[0], match[0]), guard)
    return re.sub(r" \+ -(?:1 ?\* ?)?", " - ", named)


def _with(specs: tuple[InputSpec, ...], name: str, new: Dimension | Derived) -> tuple[InputSpec, ...]:
    """The inputs with another dimension in place of one, wherever that stands."""
    inner = new if isinstance(new, Derived) else Derived(((new, 1),))

    def changed(dim: Axis) -> Axis:
        if isinstance(dim, Dimension):
            return new if dim.name == name else dim
        if not isinstance(dim, Derived) or name not in {root.name for root, _ in dim.terms}:
            return dim
        terms, offset = [], dim.offset
        for root, factor in dim.terms:
            own = inner if root.name == name else Derived(((root, 1),))
            terms += [(part, factor * times) for part, times in own.terms]
            offset += factor * own.offset
        return Derived(tuple(terms), offset)

    return tuple(replace(spec, dims=tuple(map(changed, spec.dims))) for spec in specs)
