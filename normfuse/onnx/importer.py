"""An ONNX file from elsewhere as a PyTorch module, so that the same engine folds it."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import InlinePass
from torch import nn

from normfuse.checkpoint import Checkpoint, Dimension, InputSpec, parse_input
from normfuse.checkpoint import inputs as specs
from normfuse.checkpoint.archive import one_line
from normfuse.checkpoint.loading import captured
from normfuse.files import Output
from normfuse.onnx.exporter import ExportResult, export
from normfuse.onnx.graph import GraphError, summarize
from normfuse.onnx.operations import OPERATIONS, Untranslated
from normfuse.onnx.publish import external_files, publish
from normfuse.onnx.restored import restore
from normfuse.onnx.verifier import RTOL, session, verify
from normfuse.onnx.writer import save_model
from normfuse.options import ExportError

_OLDEST = 13  # before, Softmax worked on flattened tensors and axes were attributes


class OnnxModule(nn.Module):
    """Computes an ONNX graph with PyTorch's operations; the weights keep their names.

    Raises GraphError if the graph holds an operation that has no translation.
    """

    def __init__(self, model: ir.Model) -> None:
        super().__init__()
        self._graph = model.graph
        self._version = model.opset_imports.get("", 0)
        if self._version < _OLDEST:
            raise GraphError(
                f"cannot be folded: operator set {self._version} is older than {_OLDEST}; "
                "onnx.version_converter makes it newer"
            )
        unknown = sorted({_kind(node) for node in model.graph} - OPERATIONS.keys() - {"Constant"})
        if unknown:
            raise GraphError(f"cannot be folded: {', '.join(unknown)} have no translation here{_advice(unknown)}")
        self._fixed: dict[ir.Value, Any] = {}
        self._weights: dict[ir.Value, str] = {}
        self.weights = nn.ModuleDict()
        for value in model.graph.initializers.values():
            self._take(value, value.const_value.numpy())
        for node in model.graph:
            if node.op_type == "Constant":
                self._take(node.outputs[0], ir.convenience.get_const_tensor(node.outputs[0]).numpy())
        # One module for every operation, so that reports name norms as the file does.
        self.operations = nn.ModuleDict()
        for number, node in enumerate(model.graph):
            if node.op_type != "Constant":
                name = _identifier(node.name or f"{node.op_type}_{number}", "node")
                self.operations[name if name not in self.operations else f"{name}_{number}"] = _operation(node)

    def _take(self, value: ir.Value, array: np.ndarray) -> None:
        if np.issubdtype(array.dtype, np.integer) and array.ndim <= 1:
            self._fixed[value] = array.tolist()
        elif np.issubdtype(array.dtype, np.floating) and array.ndim == 0:
            self._fixed[value] = float(array)
        else:
            name = _identifier(str(value.name), "weight")
            name = name if name not in self.weights else f"{name}_{len(self.weights)}"
            self.weights[name] = _Weight(array)
            self._weights[value] = name

    def forward(self, *inputs: torch.Tensor) -> Any:
        known: dict[ir.Value, Any] = dict(self._fixed)
        known.update((value, self.weights[name].weight) for value, name in self._weights.items())
        known.update(zip(self._graph.inputs, inputs, strict=True))
        operations = iter(self.operations.values())
        for node in self._graph:
            if node.op_type == "Constant":
                continue
            results = next(operations)(*(None if value is None else known[value] for value in node.inputs))
            known.update(zip(node.outputs, results, strict=False))
        outputs = [known[value] for value in self._graph.outputs]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


def module_of(model: ir.Model) -> OnnxModule:
    """The module of an ONNX model, whose ``forward`` takes arguments named like the model's inputs."""
    names = [_identifier(str(value.name), "input") for value in model.graph.inputs]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD

    def forward(self: OnnxModule, *inputs: torch.Tensor) -> Any:
        return OnnxModule.forward(self, *inputs)

    forward.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in ("self", *names)])
    return type("OnnxModule", (OnnxModule,), {"forward": forward})(model).eval()


class _Weight(nn.Module):
    """A weight in a module of its own, next to which folding may put a bias."""

    def __init__(self, array: np.ndarray) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.from_numpy(array.copy()), requires_grad=False)


class _Operation(nn.Module):
    def __init__(self, node: ir.Node) -> None:
        super().__init__()
        self._node = node

    def forward(self, *operands: Any) -> Sequence[Any]:
        outputs = self._node.outputs
        try:
            results = OPERATIONS[_kind(self._node)](self._node, *operands)
            results = results if isinstance(results, tuple) else (results,)
            for number, output in enumerate(outputs):
                wanted = output.uses() or output.is_graph_output()
                if wanted and (number >= len(results) or results[number] is None):
                    raise Untranslated(f"output {number} is used")
        except Untranslated as error:
            raise GraphError(f"cannot be folded: {error} at {_kind(self._node)} {self._node.name!r}") from error
        return results


def _operation(node: ir.Node) -> _Operation:
    """A module whose class is named like the operation, which is what reports call it."""
    return type(node.op_type, (_Operation,), {})(node)


def _kind(node: ir.Node) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type


def _advice(unknown: Sequence[str]) -> str:
    """What a user can do about operations that other tools have put into a file."""
    if any(kind.startswith("com.microsoft.nchwc.") for kind in unknown):
        return (
            ": ONNX Runtime saved it in the layout of one processor; take the file before that, or save it with "
            "graph_optimization_level ORT_ENABLE_EXTENDED"
        )
    if any("Quant" in kind or "Integer" in kind or kind.startswith("QLinear") for kind in unknown):
        return ": fold first, then quantise"
    return ""


def _identifier(name: str, default: str) -> str:
    found = re.sub(r"\W+", "_", name).strip("_") or default
    return f"{default}_{found}" if found[0].isdigit() else found


def fold_file(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    inputs: Sequence[str | InputSpec] | None = None,
    rtol: float | None = None,
    atol: float = 0.0,
    progress: Callable[[str], None] = lambda stage: None,
    **options: Any,
) -> ExportResult:
    """Folds the norms of an ONNX file: BatchNormalization, Mul and Add per channel, gains of LayerNormalization.

    The graph is translated to PyTorch, checked against the file in ONNX Runtime, folded, written and checked again.

    Args:
        source: the file to read, of operator set 13 or newer.
        path: the file to write; its inputs and outputs have the names of the source's.
        inputs: what the inputs look like, if the file says too little: ``"tokens:int64[batch,seq<=512]<30000"``.
        rtol, atol: allowed difference, as in :func:`normfuse.onnx.export`.
        progress: called with the name of each stage when it begins.
        options: ``opset``, ``dtype``, ``copy_shared``, ``keep_dynamic_norms``, ``target``, ``no_shape`` of
            :func:`normfuse.onnx.export`.

    Raises:
        GraphError: the file cannot be read, or holds an operation that has no translation here.
        ExportError, FoldError, VerificationError, WriteError: as in :func:`normfuse.onnx.export`.
    """
    source, path = Path(source), Path(path)
    output = Output(path, reads=[source, *external_files(source)], error=ExportError)
    progress(f"read {source}")
    summarize(source)
    try:
        model = ir.external_data.load_to_model(ir.load(source))
    except (OSError, ValueError) as error:
        raise GraphError(f"the weights of {source} cannot be read: {one_line(error)}") from error
    InlinePass()(model)  # operations that exporters define in the file itself
    names = [[str(value.name) for value in values] for values in (model.graph.inputs, model.graph.outputs)]
    for value in model.graph.inputs:
        value.name = _identifier(str(value.name), "input")
    with output:
        staged = output.folder / "folded.onnx"
        renamed = output.folder / "source.onnx"
        save_model(model, renamed)
        restore(model)
        checkpoint = _checkpoint(model, source, inputs)
        progress("verify the translation in ONNX Runtime")
        verify(checkpoint, renamed, rtol=RTOL["float32"] if rtol is None else rtol, atol=atol)
        result = export(checkpoint, staged, rtol=rtol, atol=atol, progress=progress, **options)
        written = ir.load(staged)
        for values, old in zip((written.graph.inputs, written.graph.outputs), names, strict=True):
            for value, name in zip(values, old, strict=True):
                value.name = name
        save_model(written, output.staged)
        session(output.staged)
        publish(output)
    return replace(result, path=path)


def _checkpoint(model: ir.Model, source: Path, inputs: Sequence[str | InputSpec] | None) -> Checkpoint:
    """The model as a module, with random inputs of the shapes that are given, or that the file says."""
    module = module_of(model)
    given = None if inputs is None else [parse_input(i) if isinstance(i, str) else i for i in inputs]
    described = given or [_spec(value) for value in model.graph.inputs]
    sizes, generator = specs.first_sizes(described), torch.Generator().manual_seed(0)
    examples = {spec.name: specs.make_up(spec, sizes, generator) for spec in described}
    return captured(module, described, examples, str(source))


def _spec(value: ir.Value) -> InputSpec:
    """What a file says about an input. Dynamic dimensions without a name get one of their own."""
    if value.shape is None or value.dtype is None:
        raise GraphError(f"the file does not say the shape of its input {value.name!r}: give it (--input)")
    dims = [
        size if isinstance(size, int) else Dimension(_identifier(size.value or f"{value.name}_{axis}", "dim"))
        for axis, size in enumerate(value.shape)
    ]
    dtype = torch.from_numpy(np.zeros(0, value.dtype.numpy())).dtype
    return InputSpec(str(value.name), dtype, tuple(dims))
