"""From a module and one call of it to a flat program: tensors in, tensors out, whatever the structure around them."""

from __future__ import annotations

import inspect
import os
import re
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from typing import Any

import sympy
import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument
from torch.fx import GraphModule
from torch.nn.modules import transformer

from normfuse.checkpoint import structure
from normfuse.checkpoint.archive import CheckpointError, one_line
from normfuse.checkpoint.arguments import Call
from normfuse.checkpoint.inputs import Derived, Dimension, InputSpec
from normfuse.checkpoint.pure import copy_what_changes
from normfuse.checkpoint.structure import Path
from normfuse.folding.functional import functionalised, has_vmap

_EMPTY = torch.empty(0)
_INNER = "model"  # what the traced module is called inside the one that flattens its arguments
# Folders of torch and normfuse: a line in them says nothing about a model.
_NOT_OF_A_MODEL = tuple(
    os.path.join(folder, "") for folder in (*torch.__path__, os.path.dirname(os.path.dirname(__file__)))
)


@dataclass(frozen=True)
class Traced:
    """A flat program.

    Attributes:
        program: takes the tensors of a call, returns the tensors in what the module returns.
        paths: where each of these is in what the module returns.
        left_out: what else it returns, by path; None is not mentioned.
        returned: what the module returns, with empty tensors, and 0 for numbers that are among the outputs.
        bounds: smallest and largest size for each symbol in its inputs' sizes, where there is one.
    """

    program: ExportedProgram
    paths: tuple[Path, ...]
    left_out: tuple[tuple[Path, Any], ...]
    returned: Any
    bounds: dict[sympy.Symbol, tuple[int, int | None]]


def trace(module: nn.Module, call: Call, specs: Sequence[InputSpec], tensors: Sequence[torch.Tensor]) -> Traced:
    """Traces ``module.forward`` with torch.export.

    Args:
        module: in evaluation mode.
        call: how it is called.
        specs: dtype and dimensions of each tensor of the call. Bounds, and whether a dimension can vary at all, are
            what tracing finds: see :func:`normfuse.checkpoint.dimensions.found`.
        tensors: what to trace with; torch.export takes a size of 0 or 1 for a constant.

    Raises:
        CheckpointError: torch.export cannot trace it.
    """
    paths: list[Path] = []
    left_out: list[tuple[Path, Any]] = []
    returned: list[Any] = []

    def forward(self: nn.Module, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        _relate(specs, tensors)
        args, kwargs = call.with_tensors(tensors)
        result = self.model(*args, **kwargs)
        leaves = [(path, leaf, _as_tensor(leaf)) for path, leaf in structure.leaves(result)]
        outputs = [(path, leaf, tensor) for path, leaf, tensor in leaves if tensor is not None]
        paths[:] = [path for path, _, _ in outputs]
        left_out[:] = [(path, leaf) for path, leaf, tensor in leaves if leaf is not None and tensor is None]
        empty = {path: _EMPTY if isinstance(leaf, torch.Tensor) else 0 for path, leaf, _ in outputs}
        returned[:] = [structure.rebuilt(result, empty)]
        return tuple(tensor for _, _, tensor in outputs)

    names = structure.parameter_names(call.names)
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature([inspect.Parameter(name, kind) for name in ("self", *names)])
    setattr(forward, "__signature__", signature)  # noqa: B010
    flat = type("Flat", (nn.Module,), {"forward": forward})().eval()
    flat.add_module(_INNER, module)
    shapes = {
        name: {axis: _free(dim) for axis, dim in enumerate(spec.dims) if not isinstance(dim, int)}
        for name, spec in zip(names, specs, strict=True)
    }
    try:
        # torch.export prints the graph of a model that it gives up; the error says what is wrong with it.
        with torch.no_grad(), redirect_stderr(StringIO()), _masks_as_they_are(), _conversions_to_the_same_left_out():
            program = torch.export.export(flat, tuple(tensors), dynamic_shapes=shapes)
            if _leaves_weights_inside(program):
                with torch.compiler.set_stance("default"):  # in which torch.compile hands them to torch.cond's branches
                    program = torch.export.export(flat, tuple(tensors), dynamic_shapes=shapes)
            if has_vmap(program):
                program = functionalised(program)
    except Exception as error:  # torch.export has no common base for what it raises
        raise CheckpointError(f"torch.export cannot trace {type(module).__name__}: {_problem(error)}") from error
    if not paths:
        raise CheckpointError(f"{type(module).__name__} returns no tensor")
    allowed = _bounds(program)
    for expression in [key for key in program.range_constraints if not isinstance(key, sympy.Symbol)]:
        # Sizes 0 and 1 are allowed in spite of a bound of 2, which stands for all; past + 1 >= 3 is taken literally.
        del program.range_constraints[expression]
    _lift_out(program, module)
    separate_outputs(program)
    copy_what_changes(program)
    program.validate()
    return Traced(program, tuple(paths), tuple(left_out), returned[0], allowed)


def _leaves_weights_inside(program: ExportedProgram) -> bool:
    """Whether graphs that the program calls hold weights without numbers, instead of taking the program's."""
    return any(True for body in program.graph_module.modules() for _ in (*body.parameters(), *body.buffers()))


@contextmanager
def _masks_as_they_are() -> Iterator[None]:
    """torch's encoders and decoders do not look at the numbers in a mask to see whether it is causal.

    That only chooses between two kernels with the same result, and cannot be traced.
    """
    detect = transformer._detect_is_causal_mask
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: is_causal is True
    try:
        yield
    finally:
        transformer._detect_is_causal_mask = detect


@contextmanager
def _conversions_to_the_same_left_out() -> Iterator[None]:
    """``module.to(dtype)`` in a forward does nothing where the module has that dtype: it cannot be traced.

    Routers of mixtures of experts do that.
    """
    convert = nn.Module.to

    def to(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        device, dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)
        tensors = [t for t in (*self.parameters(), *self.buffers()) if t.is_floating_point()]
        same = all(device in (None, t.device) and dtype in (None, t.dtype) for t in tensors)
        return self if same and layout is None else convert(self, *args, **kwargs)

    nn.Module.to = to  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.to = convert  # type: ignore[method-assign]


def _as_tensor(leaf: Any) -> torch.Tensor | None:
    """A tensor, or a number that follows from a dynamic size as one; None for anything that is the same every time."""
    if isinstance(leaf, torch.SymInt):
        return torch.scalar_tensor(leaf, dtype=torch.int64)
    if isinstance(leaf, torch.SymFloat):
        return torch.scalar_tensor(leaf)
    return leaf if isinstance(leaf, torch.Tensor) else None


def _free(dim: Dimension | Derived) -> Any:
    """A dimension of which tracing may find that it is bounded, fixed, or follows from others."""
    if isinstance(dim, Derived):
        return Dim.AUTO
    return Dim.AUTO(min=dim.minimum, max=dim.maximum)


def _relate(specs: Sequence[InputSpec], tensors: Sequence[torch.Tensor]) -> None:
    """Tells torch.export which sizes are equal, or follow from others, by their names."""
    axes = [(d, n) for spec, x in zip(specs, tensors, strict=True) for d, n in zip(spec.dims, x.shape, strict=True)]
    sizes: dict[str, Any] = {}
    for dim, size in axes:
        if isinstance(dim, Dimension):
            torch._check(size == sizes.setdefault(dim.name, size))
    for dim, size in axes:
        if not isinstance(dim, Derived):
            continue
        unknown = [term for term in dim.terms if term[0].name not in sizes]
        if len(unknown) == 1:
            root, factor = unknown[0]
            rest = size - dim.size({**sizes, root.name: 0})
            torch._check(rest % factor == 0)
            sizes[root.name] = rest // factor
        else:
            torch._check(size == dim.size(sizes))


def _problem(error: Exception) -> str:
    """Why torch.export gave up, and the line of the model where it did."""
    text = str(error)
    place = line_of_model(error)
    if type(error).__name__ == "GuardOnDataDependentSymNode":
        return (
            f"a decision or a number depends on the values of a tensor{place}; torch.where and its like can be traced"
        )
    if "functorch tensor" in text or "fake tensor in the exported program constant" in text:
        return (
            f"a part of it runs out of torch.export's sight{place}, such as torch.func.grad or torch.autograd.grad in "
            "forward; export the part that it differentiates, or write its gradient with other operations"
        )
    return f"{type(error).__name__}: {one_line(text.split('The error above occurred')[0], 300)}{place}"


def line_of_model(error: Exception) -> str:
    """The line of the model: the last one in the error's text, or else the innermost one that it was raised through."""
    lines = re.findall(r'File "([^"]+)", line (\d+), in \w+\n {4}(\S.*)', str(error))
    lines = lines or [
        (frame.filename, frame.lineno, frame.line)
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.line and not frame.filename.startswith(_NOT_OF_A_MODEL)
    ]
    if not lines:
        return ""
    file, number, line = lines[-1]
    return f" ({os.path.basename(file)}, line {number}: {one_line(line, 80)})"


def _lift_out(program: ExportedProgram, module: nn.Module) -> None:
    """Calls everything as the module itself does, not the one around it: parameters, constants, paths of modules."""
    prefix = f"{_INNER}."

    def outer(name: str) -> str:
        inner = name.removeprefix(_INNER).removeprefix(".") if name == _INNER or name.startswith(prefix) else name
        return re.sub(r"(^|\.)_orig_mod(\.|$)", r"\1", inner).removesuffix(".")  # of parts that are compiled

    for tensors in (program.state_dict, program.constants):
        renamed = {outer(name): tensor for name, tensor in tensors.items()}
        tensors.clear()
        tensors.update(renamed)
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    for spec in program.graph_signature.input_specs:
        if spec.target is not None:
            spec.target = outer(spec.target)
            node, kind = placeholders[spec.arg.name], spec.arg.name.partition("_")[0]
            name = spec.arg.name.replace(f"{kind}_{_INNER}_", f"{kind}_", 1)
            if name not in placeholders:
                node.name = node.target = spec.arg.name = name
    for spec in program.graph_signature.output_specs:
        if spec.target is not None:
            spec.target = outer(spec.target)
    calls = program.module_call_graph
    calls[:] = [calls[0]] + [entry for entry in calls[1:] if entry.fqn not in ("", _INNER)]
    for entry in calls:
        entry.fqn = outer(entry.fqn)
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    for body in program.graph_module.modules():
        for node in body.graph.nodes if isinstance(body, GraphModule) else ():
            stack = node.meta.get("nn_module_stack")
            if stack:
                inner = [(outer(path), cls) for path, cls in list(stack.values())[1:]] or [("", kind)]
                node.meta["nn_module_stack"] = {f"L__self__{path and '_'}{path}": (path, cls) for path, cls in inner}


def separate_outputs(program: ExportedProgram) -> None:
    """Copies outputs that are inputs or constants, or were outputs before: ONNX has one value for one name."""
    seen: set[torch.fx.Node] = set()
    output = program.graph.output_node()
    values = list(output.args[0])
    for index, (value, spec) in enumerate(zip(values, program.graph_signature.output_specs, strict=True)):
        if spec.kind is not OutputKind.USER_OUTPUT:
            continue
        if value in seen or value.op == "placeholder":
            with program.graph.inserting_before(output):
                copied = program.graph.call_function(torch.ops.aten.clone.default, (value,))
            copied.meta = {key: value.meta[key] for key in ("val", "nn_module_stack") if key in value.meta}
            values[index], spec.arg = copied, TensorArgument(copied.name)
        seen.add(value)
    output.args = (tuple(values),)
    program.graph_module.recompile()


def user_sizes(program: ExportedProgram) -> list[tuple[Any, ...]]:
    """The sizes of every tensor that a program takes: integers and symbols."""
    values = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    return [
        tuple(size if isinstance(size, int) else size.node.expr for size in values[spec.arg.name].shape)
        for spec in program.graph_signature.input_specs
        if spec.kind is InputKind.USER_INPUT
    ]


def _bounds(program: ExportedProgram) -> dict[sympy.Symbol, tuple[int, int | None]]:
    """The sizes that tracing allows each symbol. What torch.export says of 0 and 1 is left out: it never tries them."""
    found: dict[sympy.Symbol, tuple[int, int | None]] = {}
    for expression, allowed in program.range_constraints.items():
        affine = linear(expression)
        if affine is None or len(affine[0]) != 1:
            continue
        (symbol, factor), offset = affine[0][0], affine[1]
        low, high = found.get(symbol, (0, None))
        if factor > 0:
            if allowed.upper.is_Integer and allowed.upper < 2**31:
                upper = (int(allowed.upper) - offset) // factor
                high = upper if high is None else min(high, upper)
            if allowed.lower.is_Integer:  # sizes that only running shows have none
                lower = -((offset - int(allowed.lower)) // factor)
                low = max(low, lower if lower > 2 else 0)
        found[symbol] = (low, high)
    return found


def linear(expression: Any) -> tuple[list[tuple[sympy.Symbol, int]], int] | None:
    """Symbols with their factors, and an offset; None for an expression that is no such sum."""
    terms, offset = [], 0
    for part, factor in expression.expand().as_coefficients_dict().items():
        if not factor.is_Integer or not (part == 1 or isinstance(part, sympy.Symbol)):
            return None
        if part == 1:
            offset = int(factor)
        else:
            terms.append((part, int(factor)))
    return sorted(terms, key=lambda term: str(term[0])), offset
