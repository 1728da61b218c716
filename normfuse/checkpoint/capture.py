"""A model as a flat traced program, with what the live model gave on its examples."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram, ShapesCollection

from normfuse.checkpoint import inputs as specs_module
from normfuse.checkpoint import structure
from normfuse.checkpoint.archive import CheckpointError, one_line, some_of
from normfuse.checkpoint.arguments import Axes, Call, bind, dynamic_axes
from normfuse.checkpoint.conduct import training_in_evaluation
from normfuse.checkpoint.dimensions import found
from normfuse.checkpoint.evaluation import evaluation, has_own_modes
from normfuse.checkpoint.inputs import Axis, Derived, Dimension, InputSpec
from normfuse.checkpoint.numbers import check_numbers
from normfuse.checkpoint.sizes import narrowed
from normfuse.checkpoint.structure import Path
from normfuse.checkpoint.tracing import line_of_model, trace
from normfuse.checkpoint.wrappers import unwrapped
from normfuse.errors import NormfuseError
from normfuse.programs import Runner, relative_difference

_REPEATED = 1e-5  # what sums in another order of threads may differ by; what is drawn or counted differs by more


@dataclass(frozen=True)
class ExportableModel:
    """A model ready for export, from any source: a traced program with tensors as inputs and outputs.

    Attributes:
        program: traced in evaluation mode; takes the tensors of `inputs` and returns those of `outputs`. Floating
            point is float32.
        inputs: one :class:`InputSpec` per tensor that the program takes, in order.
        outputs: one name per tensor that it returns, in order.
        example_inputs: tensors that the program takes; saved with it, or made up from `inputs`.
        expected_outputs: what the live model gave on them, recorded before tracing, in the model's own dtype; empty
            where there was no live model but only a program.
        source: the file or class that it comes from, for messages.
        notes: decisions in words: bounds that tracing found, arguments that became constants.
    """

    program: ExportedProgram
    inputs: tuple[InputSpec, ...]
    outputs: tuple[str, ...]
    example_inputs: tuple[torch.Tensor, ...]
    expected_outputs: tuple[torch.Tensor, ...]
    source: str
    notes: tuple[str, ...] = ()

    @classmethod
    def from_model(cls, model: nn.Module, example_inputs: Any, dynamic_shapes: Any = None) -> ExportableModel:
        """Trace a module in evaluation mode.

        The module's modes, parameters and buffers and the example inputs do not change. Hooks and parametrisations are
        traced too. Wrappers of training (DistributedDataParallel, torch.compile, moving averages, accelerate's
        autocast) are removed; PEFT's adapters are merged into a copy. A module on a GPU, or in another dtype than
        float32, is copied.

        Args:
            model: the module.
            example_inputs: a tuple or list of arguments in order, a mapping by argument name, or a single argument.
                Arguments have any structure (lists, dictionaries, dataclasses, named tuples, `None`); numbers and
                flags in them keep their values.
            dynamic_shapes: which dimensions may vary, as torch.export takes them: by argument name or in order, in
                the structure of the arguments, for each tensor ``{axis: dim}`` or one entry per axis. A `dim` is a
                name, a :class:`torch.export.Dim`, an expression (``past + 1``), or ``Dim.AUTO``. A
                :class:`torch.export.ShapesCollection` serves too. Bounds that tracing
                finds are taken and noted. None: all fixed.

        Returns:
            The traced model.

        Raises:
            CheckpointError: the module fails on the example inputs, cannot be traced, or holds invalid numbers (not
                finite, a negative variance).

        Example:
            >>> from normfuse import ExportableModel
            >>> ExportableModel.from_model(nn.Linear(4, 2), torch.ones(3, 4), ({0: "batch"},)).outputs
            ('output',)
        """
        return capture_model(model, example_inputs, dynamic_shapes).model

    @property
    def input_names(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.inputs)

    def run(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run the program.

        Args:
            tensors: in the order of `inputs`.

        Returns:
            Its outputs, in the order of `outputs`.
        """
        return self._runner(*tensors)

    @cached_property
    def _runner(self) -> Runner:
        return Runner(self.program)


@dataclass(frozen=True)
class Captured:
    """A traced model, and what a flat program says nothing of.

    Attributes:
        model: the program and its inputs and outputs.
        live: the module without its wrappers.
        call: how it was called.
        returned: what it returned, with empty tensors, and 0 for numbers that are among the program's outputs.
        paths: where each of the program's outputs belongs in it.
    """

    model: ExportableModel
    live: nn.Module
    call: Call
    returned: Any
    paths: tuple[Path, ...]


def capture_model(
    model: nn.Module,
    example_inputs: Any,
    dynamic_shapes: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    widen: bool = True,
) -> Captured:
    """Traces a module in evaluation mode; see :meth:`ExportableModel.from_model`.

    Args:
        model: the module.
        example_inputs: its arguments.
        dynamic_shapes: which dimensions may vary.
        kwargs: more arguments by name.
        widen: whether to trace in float32 on the CPU, else in the dtype and on the device of the module.
    """
    live, plain, notes = unwrapped(model)
    call = bind(live, example_inputs, kwargs)
    if isinstance(dynamic_shapes, ShapesCollection):
        dynamic_shapes = dynamic_shapes.dynamic_shapes(live, call.args, call.kwargs)
    specs, unnamed = asked(call, dynamic_axes(call, dynamic_shapes))
    name = type(live).__name__
    return _captured(live, call, specs, name, plain=plain, unnamed=unnamed, notes=notes, widen=widen)


def capture(
    module: nn.Module,
    call: Call,
    specs: Sequence[InputSpec],
    source: str,
    *,
    plain: nn.Module | None = None,
    notes: Sequence[str] = (),
) -> ExportableModel:
    """Records what a module gives on a call, and traces it; see :meth:`ExportableModel.from_model`.

    Args:
        module: without wrappers.
        call: how it is called.
        specs: dtype and dimensions of each tensor of the call.
        source: for messages.
        plain: what to trace in place of `module`, if not itself.
        notes: what was decided before.
    """
    return _captured(module, call, specs, source, plain=plain, notes=notes).model


def _captured(
    live_module: nn.Module,
    call: Call,
    specs: Sequence[InputSpec],
    source: str,
    *,
    plain: nn.Module | None = None,
    unnamed: frozenset[str] = frozenset(),
    notes: Sequence[str] = (),
    widen: bool = True,
) -> Captured:
    """See :func:`capture`; `unnamed` are dimensions whose names nobody gave, `widen` is :func:`capture_model`'s."""
    same = plain is None or plain is live_module
    module = _ready(live_module, on_cpu=widen)
    plain = module if same else _ready(plain, on_cpu=widen)
    check_numbers(plain, source)
    notes = [*notes, *_fixed_arguments(call)]
    with evaluation(*{module, plain}):
        tensors = [tensor.detach().clone() for tensor in call.tensors]
        tensors = [tensor.cpu() for tensor in tensors] if widen else tensors
        specs, tensors = list(specs), _with_rows(specs, tensors, notes)
        live, again = (_record(module, call, tensors, notes) for _ in range(2))
        single = tensors
        if widen:
            plain, specs, single = _in_float32(plain, call, specs, tensors, notes)
        sizes, specs = _traceable_sizes(plain, call, specs, single, unnamed)
        resized = [specs_module.resize(x, spec.shape(sizes)) for spec, x in zip(specs, single, strict=True)]
        traced = trace(plain, call, specs, resized)
        _check_conduct(traced.program, live, again, source)
        specs, changes = found(traced, specs, unnamed)
        expected = _expected(live, traced.paths, source)
        specs, narrower = narrowed(
            traced.program,
            specs,
            resized,
            lambda tensors: _expected(_record(plain, call, tensors, []), traced.paths, source),
        )
    names = structure.output_names(traced.paths, [spec.name for spec in specs])
    if traced.left_out:
        listed = [
            f"{structure.identifier(path, 'output')} ({one_line(repr(leaf), 40)})" for path, leaf in traced.left_out
        ]
        changes.append(f"no tensors, left out of the outputs: {some_of(listed)}")
    traced.program.example_inputs = (tuple(single), {})
    notes = [*notes, *changes, *narrower]
    model = ExportableModel(traced.program, specs, tuple(names), tuple(single), expected, source, tuple(notes))
    return Captured(model, live_module, call, traced.returned, traced.paths)


def asked(call: Call, axes: Sequence[Axes]) -> tuple[list[InputSpec], frozenset[str]]:
    """The inputs as they were asked for, and the names of dimensions that have none of the user's."""
    unnamed, specs = set[str](), []
    for name, tensor, dynamic in zip(call.names, call.tensors, axes, strict=True):
        dims: list[Axis] = list(tensor.shape)
        for axis, dim in dynamic.items():
            if not isinstance(dim, (Dimension, Derived)):
                dim = Dimension(f"{name}_dim_{axis}", max(dim.min or 1, 1), dim.max)
                unnamed.add(dim.name)
            dims[axis] = dim
        specs.append(InputSpec(name, tensor.dtype, tuple(dims)))
    specs_module.consistent_sizes(specs, call.tensors)
    return specs, frozenset(unnamed)


def _fixed_arguments(call: Call) -> list[str]:
    constants = [f"{name}={one_line(repr(value), 40)}" for name, value in call.constants.items()]
    return [f"fixed in the program: {some_of(constants, 6)}"] if constants else []


def _ready(module: nn.Module, on_cpu: bool) -> nn.Module:
    """The module, on the CPU if that is asked for; a copy where it is elsewhere, or would change when its mode does."""
    own = [*module.named_parameters(), *module.named_buffers()]
    for name, tensor in own:
        if isinstance(tensor, nn.parameter.UninitializedTensorMixin):
            raise CheckpointError(f"tensor {name!r} is not initialised yet: run the model once before")
        if tensor.is_meta:
            raise CheckpointError(f"tensor {name!r} has no data (meta device): load the weights before")
    elsewhere = on_cpu and any(tensor.device.type != "cpu" for _, tensor in own)
    if elsewhere or has_own_modes(module):
        module = _copied(module)
    return module.cpu() if elsewhere else module


def _copied(module: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(module)
    except Exception as error:  # whatever the parts of a module raise
        raise CheckpointError(
            f"{type(module).__name__} cannot be copied ({type(error).__name__}: {one_line(error, 160)}), which it must "
            "be unless it is in evaluation mode, in float32 and on the CPU"
        ) from error


def _with_rows(specs: Sequence[InputSpec], tensors: list[torch.Tensor], notes: list[str]) -> list[torch.Tensor]:
    """Examples in which no dynamic dimension is empty: nothing can be compared on those."""
    sizes = specs_module.consistent_sizes(specs, tensors)
    dims = specs_module.dimensions(specs)
    empty = [name for name, size in sizes.items() if size == 0 and name in dims]
    if not empty:
        return tensors
    sizes |= {name: specs_module.clamp(3, dims[name]) for name in empty}
    notes.append(f"the examples have no {some_of(empty)}: generated instead, with {sizes[empty[0]]}")
    generator = torch.Generator().manual_seed(0)
    return [
        x if spec.shape(sizes) == list(x.shape) else specs_module.redraw(spec, x, sizes, generator)
        for spec, x in zip(specs, tensors, strict=True)
    ]


def _in_float32(
    module: nn.Module, call: Call, specs: Sequence[InputSpec], tensors: Sequence[torch.Tensor], notes: list[str]
) -> tuple[nn.Module, list[InputSpec], list[torch.Tensor]]:
    """Module and inputs in float32: a copy, unless they are already."""
    dtypes = {t.dtype for t in (*module.parameters(), *module.buffers(), *tensors) if t.is_floating_point()}
    others = sorted(str(dtype).removeprefix("torch.") for dtype in dtypes - {torch.float32})
    if not others:
        return module, list(specs), list(tensors)
    notes.append(f"traced in float32; the model has {some_of(others)}")
    wide = [replace(s, dtype=torch.float32) if s.dtype.is_floating_point else s for s in specs]
    copied, single = _copied(module).float(), [t.float() if t.is_floating_point() else t for t in tensors]
    try:
        _record(copied, call, single, [])
    except CheckpointError as error:
        raise CheckpointError(
            f"the model has {some_of(others)} and is traced in float32, where {error}: let its forward cast to the "
            "dtype of a weight, x.to(self.weight.dtype), not to a fixed one"
        ) from error
    return copied, wide, single


def _traceable_sizes(
    module: nn.Module, call: Call, specs: list[InputSpec], tensors: list[torch.Tensor], unnamed: frozenset[str]
) -> tuple[dict[str, int], list[InputSpec]]:
    """Sizes above 1 for every dynamic dimension, which torch.export would otherwise take for constants.

    A dimension whose name nobody gave stays fixed at 1 where the module takes no other size.
    """
    dims, sizes = specs_module.dimensions(specs), specs_module.consistent_sizes(specs, tensors)
    grown = {name: specs_module.clamp(3, dims[name]) for name, size in sizes.items() if size < 2}
    named = {name: size for name, size in grown.items() if name not in unnamed}
    candidates = [sizes | grown, sizes | named]
    # A dimension that has another name may be the sum of one that grew and something else: past + 1, say.
    more = sum(named.values()) - sum(sizes[name] for name in named)
    candidates += [sizes | named | {name: size + more} for name, size in sizes.items() if name not in grown]
    problem: CheckpointError | None = None
    for candidate in candidates if grown else ():
        fixed = {name: size for name, size in candidate.items() if size < 2 and name in unnamed}
        dims_now = [tuple(fixed.get(d.name, d) if isinstance(d, Dimension) else d for d in spec.dims) for spec in specs]
        resized = [specs_module.resize(x, spec.shape(candidate)) for spec, x in zip(specs, tensors, strict=True)]
        try:
            _record(module, call, resized, [])
        except CheckpointError as error:
            problem = problem or error
            continue
        return candidate, [replace(spec, dims=row) for spec, row in zip(specs, dims_now, strict=True)]
    if problem is not None:
        listed = ", ".join(f"{name}={size}" for name, size in grown.items())
        raise CheckpointError(
            f"a dimension of size 1 is traced with another size, and {problem} with {listed}: give examples in which "
            "dynamic dimensions have sizes above 1, or make these fixed"
        ) from problem
    return sizes, specs


def _check_conduct(program: ExportedProgram, live: Mapping[Path, Any], again: Mapping[Path, Any], source: str) -> None:
    """CheckpointError for a model that trains in evaluation, or gives other outputs when it runs again."""
    training = training_in_evaluation(program)
    if training:
        raise CheckpointError(f"{source} trains in evaluation: {training}")
    tensors = [[leaf for leaf in found.values() if isinstance(leaf, torch.Tensor)] for found in (live, again)]
    other = len(tensors[0]) != len(tensors[1]) or max(map(relative_difference, *tensors), default=0.0)
    if other > _REPEATED:
        raise CheckpointError(
            f"{source} is not deterministic: run again on the same inputs it gives outputs that differ by {other:.2g} "
            "of their largest value; it draws random numbers, or keeps a state from one call to the next"
        )


def _record(module: nn.Module, call: Call, tensors: Sequence[torch.Tensor], notes: list[str]) -> Mapping[Path, Any]:
    """What the live module gives: its numbers and copies of its tensors, by path."""
    given = [tensor.clone() for tensor in tensors]
    args, kwargs = call.with_tensors(given)
    try:
        with torch.no_grad():
            outputs = module(*args, **kwargs)
        changed = [n for n, x, y in zip(call.names, tensors, given, strict=True) if relative_difference(y, x) > 0]
        note = f"the model changes its input {some_of(changed)} in place; the program and the file do not"
        if changed and note not in notes:
            notes.append(note)
    except NormfuseError:
        raise
    except Exception as error:  # the module is free to fail in its own way
        guess = f"; {call.guess}" if call.guess else ""
        why = f"{type(error).__name__}: {one_line(error, 240)}{line_of_model(error)}{guess}"
        raise CheckpointError(f"{type(module).__name__} fails on the example inputs: {why}") from error
    return {
        path: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf
        for path, leaf in structure.leaves(outputs)
    }


def _expected(live: Mapping[Path, Any], paths: Sequence[Path], source: str) -> tuple[torch.Tensor, ...]:
    """The live model's outputs in the order of the program's."""
    returned = {path for path, leaf in live.items() if isinstance(leaf, torch.Tensor)}
    if not returned <= set(paths) <= set(live):
        raise CheckpointError(f"{source} returns other outputs when it is traced than when it runs")
    return tuple(torch.as_tensor(live[path]) for path in paths)
