"""A model as a flat traced program, with what the live model gave on its examples."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from normfuse.checkpoint import inputs as specs_module
from normfuse.checkpoint import structure
from normfuse.checkpoint.archive import CheckpointError, one_line, some_of
from normfuse.checkpoint.arguments import Axes, Call, bind, dynamic_axes
from normfuse.checkpoint.dimensions import found
from normfuse.checkpoint.inputs import Axis, Derived, Dimension, InputSpec
from normfuse.checkpoint.numbers import check_numbers
from normfuse.checkpoint.structure import Path
from normfuse.checkpoint.tracing import trace
from normfuse.checkpoint.wrappers import unwrapped
from normfuse.errors import NormfuseError


@dataclass(frozen=True)
class Checkpoint:
    """A model ready to be exported: a program of tensors, whatever it came from.

    Attributes:
        program: traced in evaluation mode; takes the tensors of `inputs` and returns those of `outputs`. Floating
            point is float32.
        inputs: one :class:`InputSpec` per tensor that the program takes, in order.
        outputs: one name per tensor that it returns, in order.
        example_inputs: tensors that the program takes; saved with it, or made up from `inputs`.
        expected_outputs: what the live model gave on them, recorded before tracing, in the model's own dtype.
        source: where it came from, for messages.
        notes: what was decided on the way, in words: bounds that tracing found, arguments that became constants.
    """

    program: ExportedProgram
    inputs: tuple[InputSpec, ...]
    outputs: tuple[str, ...]
    example_inputs: tuple[torch.Tensor, ...]
    expected_outputs: tuple[torch.Tensor, ...]
    source: str
    notes: tuple[str, ...] = ()

    @classmethod
    def from_model(cls, model: nn.Module, example_inputs: Any, dynamic_shapes: Any = None) -> Checkpoint:
        """Traces a live module in evaluation mode.

        The module's modes, parameters and buffers and the example inputs are as they were afterwards. It is traced as
        it stands, hooks and parametrisations included; wrappers of training (DistributedDataParallel, torch.compile,
        moving averages) are taken off. A module on a GPU, or in another dtype than float32, is copied.

        Args:
            model: the module.
            example_inputs: a tuple or list of arguments in order, a mapping by argument name, or a single argument.
                Arguments have any structure (lists, dictionaries, dataclasses, named tuples, `None`); numbers and
                flags in them keep their values.
            dynamic_shapes: which dimensions may vary, as torch.export takes them: by argument name or in order, in
                the structure of the arguments, for each tensor ``{axis: dim}`` or one entry per axis. A `dim` is a
                name, a :class:`torch.export.Dim`, an expression (``past + 1``), or ``Dim.AUTO``. Bounds that tracing
                finds are taken and noted. None: all fixed.

        Raises:
            CheckpointError: in one line: the module fails on the example inputs, cannot be traced, or holds numbers
                that no training leaves behind.

        Example:
            >>> Checkpoint.from_model(nn.Linear(4, 2), torch.ones(3, 4), ({0: "batch"},)).outputs
            ('output',)
        """
        model, notes = unwrapped(model)
        call = bind(model, example_inputs)
        specs, unnamed = asked(call, dynamic_axes(call, dynamic_shapes))
        return capture(model, call, specs, type(model).__name__, unnamed=unnamed, notes=notes)

    @property
    def input_names(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.inputs)

    def run(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The program's outputs, in the order of `outputs`, for tensors in the order of `inputs`."""
        with torch.inference_mode():
            return list(self._module(*tensors))

    @cached_property
    def _module(self) -> nn.Module:
        return self.program.module()


def capture(
    module: nn.Module,
    call: Call,
    specs: Sequence[InputSpec],
    source: str,
    *,
    unnamed: frozenset[str] = frozenset(),
    notes: Sequence[str] = (),
) -> Checkpoint:
    """Records what a module gives on a call, and traces it; see :meth:`Checkpoint.from_model`.

    Args:
        module: without wrappers.
        call: how it is called.
        specs: dtype and dimensions of each tensor of the call.
        source: for messages.
        unnamed: dimensions among them whose names nobody gave.
        notes: what was decided before.
    """
    module, tensors = _on_cpu(module, call)
    check_numbers(module, source)
    notes = [*notes, *_fixed_arguments(call)]
    with _evaluation(module):
        tensors = _with_rows(specs, tensors, notes)
        live = _record(module, call, tensors)
        plain, specs, single = _in_float32(module, specs, tensors, notes)
        sizes, specs = _traceable_sizes(plain, call, specs, single, unnamed)
        resized = [specs_module.resize(x, spec.shape(sizes)) for spec, x in zip(specs, single, strict=True)]
        traced = trace(plain, call, specs, resized)
    specs, changes = found(traced.program, specs, unnamed)
    expected = _expected(live, traced.paths, source)
    names = structure.output_names(traced.paths, [spec.name for spec in specs])
    if traced.left_out:
        listed = [
            f"{structure.identifier(path, 'output')} ({one_line(repr(leaf), 40)})" for path, leaf in traced.left_out
        ]
        changes.append(f"no tensors, left out of the outputs: {some_of(listed)}")
    traced.program.example_inputs = (tuple(single), {})
    return Checkpoint(traced.program, specs, tuple(names), tuple(single), expected, source, (*notes, *changes))


def asked(call: Call, axes: Sequence[Axes]) -> tuple[list[InputSpec], frozenset[str]]:
    """The inputs as they were asked for, and the names of dimensions that have none of the user's."""
    unnamed, specs = set(), []
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


def _on_cpu(module: nn.Module, call: Call) -> tuple[nn.Module, list[torch.Tensor]]:
    """The module and copies of the call's tensors on the CPU."""
    own = [*module.named_parameters(), *module.named_buffers()]
    for name, tensor in own:
        if isinstance(tensor, nn.parameter.UninitializedTensorMixin):
            raise CheckpointError(f"tensor {name!r} is not initialised yet: run the model once before")
        if tensor.is_meta:
            raise CheckpointError(f"tensor {name!r} has no data (meta device): load the weights before")
    if any(tensor.device.type != "cpu" for _, tensor in own):
        module = copy.deepcopy(module).cpu()
    return module, [tensor.detach().cpu().clone() for tensor in call.tensors]


def _with_rows(specs: Sequence[InputSpec], tensors: list[torch.Tensor], notes: list[str]) -> list[torch.Tensor]:
    """Examples in which no dynamic dimension is empty: nothing can be compared on those."""
    sizes = specs_module.consistent_sizes(specs, tensors)
    dims = specs_module.dimensions(specs)
    empty = [name for name, size in sizes.items() if size == 0 and name in dims]
    if not empty:
        return tensors
    sizes |= {name: specs_module.clamp(3, dims[name]) for name in empty}
    notes.append(f"the examples have no {some_of(empty)}: made up instead, with {sizes[empty[0]]}")
    generator = torch.Generator().manual_seed(0)
    return [
        x if spec.shape(sizes) == list(x.shape) else specs_module.redraw(spec, x, sizes, generator)
        for spec, x in zip(specs, tensors, strict=True)
    ]


def _in_float32(
    module: nn.Module, specs: Sequence[InputSpec], tensors: Sequence[torch.Tensor], notes: list[str]
) -> tuple[nn.Module, list[InputSpec], list[torch.Tensor]]:
    """Module and inputs in float32: a copy, unless they are already."""
    dtypes = {t.dtype for t in (*module.parameters(), *module.buffers(), *tensors) if t.is_floating_point()}
    others = sorted(str(dtype).removeprefix("torch.") for dtype in dtypes - {torch.float32})
    if not others:
        return module, list(specs), list(tensors)
    notes.append(f"traced in float32; the model has {some_of(others)}")
    wide = [replace(s, dtype=torch.float32) if s.dtype.is_floating_point else s for s in specs]
    return copy.deepcopy(module).float(), wide, [t.float() if t.is_floating_point() else t for t in tensors]


def _traceable_sizes(
    module: nn.Module, call: Call, specs: list[InputSpec], tensors: list[torch.Tensor], unnamed: frozenset[str]
) -> tuple[dict[str, int], list[InputSpec]]:
    """Sizes above 1 for every dynamic dimension, which torch.export would otherwise take for constants.

    A dimension whose name nobody gave stays fixed at 1 where the module takes no other size.
    """
    dims, sizes = specs_module.dimensions(specs), specs_module.consistent_sizes(specs, tensors)
    larger = {name: size if size > 1 else specs_module.clamp(3, dims[name]) for name, size in sizes.items()}
    small = {name for name, size in sizes.items() if size != larger[name]} & unnamed
    try:
        if small:
            resized = [specs_module.resize(x, spec.shape(larger)) for spec, x in zip(specs, tensors, strict=True)]
            _record(module, call, resized)
        return larger, specs
    except CheckpointError:
        fixed = [
            tuple(sizes[d.name] if isinstance(d, Dimension) and d.name in small else d for d in spec.dims)
            for spec in specs
        ]
        return larger, [replace(spec, dims=row) for spec, row in zip(specs, fixed, strict=True)]


def _record(module: nn.Module, call: Call, tensors: Sequence[torch.Tensor]) -> Mapping[Path, Any]:
    """What the live module gives: its numbers and copies of its tensors, by path."""
    args, kwargs = call.with_tensors([tensor.clone() for tensor in tensors])
    try:
        with torch.no_grad():
            outputs = module(*args, **kwargs)
    except NormfuseError:
        raise
    except Exception as error:  # the module is free to fail in its own way
        guess = f"; {call.guess}" if call.guess else ""
        why = f"{type(error).__name__}: {one_line(error, 240)}{guess}"
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


@contextmanager
def _evaluation(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, as a program without the fast path of attention computes it; leaves the module as it was."""
    modes = [(part, part.training) for part in module.modules()]
    buffers = [(buffer, buffer.clone(), buffer._version) for buffer in module.buffers()]
    fast, disabled = torch.backends.mha.get_fastpath_enabled(), logging.root.manager.disable
    torch.backends.mha.set_fastpath_enabled(False)
    logging.disable(logging.WARNING)
    try:
        if any(training for _, training in modes):
            _evaluate(module)
        with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
            warnings.simplefilter("ignore")  # of torch.export, about what is decided and noted here
            yield
    finally:
        logging.disable(disabled)
        torch.backends.mha.set_fastpath_enabled(fast)
        for part, training in modes:
            part.training = training
        with torch.no_grad():
            for buffer, before, version in buffers:
                if buffer._version != version:
                    buffer.copy_(before)


def _evaluate(module: nn.Module) -> None:
    try:
        module.eval()
    except NotImplementedError:  # the module of an exported program: its mode was decided when it was traced
        for part in module.modules():
            part.training = False
