"""An ONNX graph as a program that :func:`normfuse.fold` takes, with the way back for each of its operations."""

from __future__ import annotations

import logging
import operator
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from onnx import NodeProto, TensorProto
from torch._subclasses import FakeTensorMode
from torch.export import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx import Graph, Node, map_arg
from torch.utils import _pytree as pytree

from normfuse.errors import one_line
from normfuse.folding.nodes import CALLED
from normfuse.onnx.protos import uses_of
from normfuse.quiet import quiet

from . import attention, fused, movements, operations  # noqa: F401 (they fill the table that translate looks into)
from .calls import Call, NotATensor, Origin, unknown_operation
from .observing import Observed
from .onnx_file import OnnxFile, torch_dtype
from .pairs import Front, pairs_of
from .restored import WITH_SCALES, restored_values, restored_weights
from .symbols import Sizes
from .translating import translate

aten = torch.ops.aten
_OLDEST = 7  # operators before that broadcast, and normalise, in other ways


@dataclass
class Reading:
    """A file as a program.

    Attributes:
        file: what was read.
        program: the program.
        origins: where its operations come from, by their names.
        names: the names of its values in the file, by their names in the program.
        paths: positions of the file's operations by what reports call them.
        opaque: positions of those of which nothing is known, so that all that they read is as it was.
        scales: names of the scales of quantised weights, by what the program has for them.
    """

    file: OnnxFile
    program: ExportedProgram
    origins: dict[str, Origin] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    paths: dict[str, int] = field(default_factory=dict)
    opaque: set[int] = field(default_factory=set)
    scales: dict[str, str] = field(default_factory=dict)


class Reader:
    """Builds the program of a file.

    Args:
        file: the file.
        observed: types and sizes of all that its graph computes.
        inputs: the same of its inputs.
        pinned: positions of operations that folding must leave as they are.
    """

    def __init__(
        self, file: OnnxFile, observed: Mapping[str, Observed], inputs: Mapping[str, Observed], pinned: frozenset[int]
    ) -> None:
        self.file = file
        self._observed = {**observed, **inputs}
        self._pinned = pinned
        self._sizes = Sizes([shape for value in inputs.values() for shape in zip(*value.shapes, strict=True)])
        self.mode = FakeTensorMode(shape_env=self._sizes.env, static_shapes=False)
        self.graph = Graph()
        self.values: dict[str, Node] = {}
        self.origins: dict[str, Origin] = {}
        self.names: dict[str, str] = {}
        self.paths: dict[str, int] = {}
        self._inputs: list[InputSpec] = []
        self._state: dict[str, torch.Tensor] = {}
        self._derived: dict[tuple[Any, ...], Node] = {}
        self._fakes: dict[str, torch.Tensor | None] = {}
        self.fixed: set[Node] = set()
        self.uses = uses_of(file.proto.graph)
        self.restored = restored_weights(file, pinned | file.dead)
        self.factors: dict[int, Node] = {}
        self.scales: dict[str, str] = {}
        self._restored_values = restored_values(file)

    def read(self) -> Reading:
        """The whole file."""
        self._constants()
        for value in self.file.inputs:
            self._input(value.name)
        for name in self.file.settable:
            self._opaque_source(name)
        alone = self._pinned | self.file.dead
        pairs: dict[int, Front | None] = {} if self.file.version < _OLDEST else pairs_of(self, alone)
        opaque = set()
        for position, node in zip(self.file.positions, self.file.nodes, strict=True):
            if any(node.output) and all(name in self.file.constants for name in node.output if name):
                continue
            if position in pairs and pairs[position] is None:
                continue  # read with what follows
            call = Call(self, position, node, pairs.get(position))
            if position in self.file.dead:
                call.unread()
            elif position in self._pinned or self.file.version < _OLDEST or not translate(call):
                call.opaque()
                opaque.add(position)
        return Reading(self.file, self._program(), self.origins, self.names, self.paths, opaque, self.scales)

    # -- values ------------------------------------------------------------------------------------------------

    def value(self, name: str) -> Node | None:
        """The value of a name; what no constant or operation gives comes from nowhere that matters."""
        if not name:
            return None
        if name not in self.values:
            self._opaque_source(name)
        return self.values[name]

    def fake(self, name: str) -> torch.Tensor | None:
        """What a value of the file looks like; None where it is no tensor of a type that PyTorch has."""
        if name not in self._fakes:
            self._fakes[name] = self._fake(name)
        return self._fakes[name]

    def _fake(self, name: str) -> torch.Tensor | None:
        seen = self._observed.get(name)
        dtype = torch_dtype(seen.kind) if seen is not None else None
        if seen is None or dtype is None or len({len(shape) for shape in seen.shapes}) != 1:
            return None
        shape = [self._sizes.size(sizes) for sizes in zip(*seen.shapes, strict=True)]
        with self.mode:
            return torch.empty(shape, dtype=dtype)

    def _constants(self) -> None:
        tensors = {}
        for name in self.file.constants:
            tensor = _as_tensor(self.file, name)
            if tensor is not None:
                tensors[name] = tensor
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                self._constant(name, tensor)
        for position, weight in self.restored.items():  # what the scales of its weight are multiplied by
            name = f"{self.file.proto.graph.node[position].output[0]}.weight"
            while name in tensors:
                name = f"_{name}"
            self.factors[position] = self._constant(name, torch.ones(weight.channels, dtype=weight.dtype))
            self.names[self.factors[position].name] = self.scales[name] = weight.name
        for name, tensor in tensors.items():
            if not tensor.is_floating_point():
                self._constant(name, tensor)

    def _constant(self, name: str, tensor: torch.Tensor) -> Node:
        floating = tensor.is_floating_point()
        node = self.graph.placeholder(_identifier("p", name))
        node.meta["val"] = self.mode.from_tensor(tensor, static_shapes=True)
        kind = InputKind.PARAMETER if floating else InputKind.BUFFER
        self._inputs.append(InputSpec(kind, TensorArgument(node.name), name, None if floating else True))
        self._state[name] = torch.nn.Parameter(tensor, requires_grad=False) if floating else tensor
        self.fixed.add(node)
        self._known(name, node)
        return node

    def _input(self, name: str) -> None:
        value = self.fake(name)
        if value is None:
            self._opaque_source(name)
            return
        node = self.graph.placeholder(_identifier("i", name))
        node.meta["val"] = value
        self._inputs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), None))
        self._known(name, node)

    def _opaque_source(self, name: str) -> None:
        node = self.graph.call_function(unknown_operation("Input"), ([],), name=_identifier("i", name))
        node.meta["val"] = self.fake(name)
        self._known(name, node)

    def _known(self, name: str, node: Node) -> None:
        self.values[name] = node
        self.names[node.name] = name

    def derived(self, target: Any, constant: Node, *args: Any) -> Node:
        """What an operation makes of a constant; the same for every reader."""
        key = (target, constant, str(args))
        if key not in self._derived:
            self._derived[key] = self._computed(target, (constant, *args), "")
            self.fixed.add(self._derived[key])
        return self._derived[key]

    def inner(self, target: Any, args: tuple, position: int, node: NodeProto, value: torch.Tensor | None) -> Node:
        """An operation of the program whose result has no name in the file; `value` is what it looks like."""
        name = _identifier("s", node.name or next(iter(node.output), ""))
        result = self._computed(target, args, name, value)
        path = self._path(position, node, next(iter(node.output), ""))
        result.meta.update({"nn_module_stack": {path: (path, node.op_type)}, CALLED: self._called(node)})
        return result

    def _computed(self, target: Any, args: tuple, name: str, value: torch.Tensor | None = None) -> Node:
        try:
            with self.mode, quiet(logging.ERROR):
                value = target(*map_arg(args, lambda operand: operand.meta["val"])) if value is None else value
        except RuntimeError as error:  # sizes that differ from run to run, and in one of them are one
            raise NotATensor(one_line(error)) from error
        # Sizes that are not known stand in the value alone.
        plain = [[-1 if isinstance(n, torch.SymInt) else n for n in a] if isinstance(a, list) else a for a in args]
        result = self.graph.call_function(target, tuple(plain), name=name or None)
        result.meta["val"] = value
        return result

    def add(self, target: object, args: tuple, position: int, node: NodeProto, outputs: Sequence[str]) -> Node:
        """An operation of the program that gives `outputs`."""
        result = self.graph.call_function(target, args, name=_identifier("o", node.name or outputs[0]))
        path = self._path(position, node, outputs[0])
        result.meta.update({"nn_module_stack": {path: (path, node.op_type)}, CALLED: self._called(node)})
        values = [self.fake(name) if name else None for name in outputs]
        if len(outputs) == 1:
            result.meta["val"] = values[0]
            self._known(outputs[0], result)
            return result
        result.meta["val"] = values
        for number, (name, value) in enumerate(zip(outputs, values, strict=True)):
            if name:
                piece = self.graph.call_function(operator.getitem, (result, number))
                piece.meta["val"] = value
                piece.meta["nn_module_stack"] = result.meta["nn_module_stack"]
                self._known(name, piece)
        return result

    def _called(self, node: NodeProto) -> str:
        """What reasons call an operation."""
        quantised = node.op_type in WITH_SCALES or not self._restored_values.isdisjoint(node.input)
        return f"{node.op_type} with quantised weights" if quantised else node.op_type

    def _path(self, position: int, node: NodeProto, output: str) -> str:
        """What reports call an operation."""
        path = node.name or output or node.op_type
        path = path if self.paths.get(path, position) == position else f"{path} ({position})"
        self.paths[path] = position
        return path

    # -- the program -------------------------------------------------------------------------------------------

    def _returned(self, value: Node) -> Node:
        """What is returned: read by an operation that nothing is known of, because no value in ONNX is a view."""
        node = self.graph.call_function(unknown_operation("Output"), ([value],))
        node.meta.update({"val": value.meta["val"], CALLED: f"the model's output {self.names.get(value.name, '')!r}"})
        return node

    def _program(self) -> ExportedProgram:
        results: list[Node] = [self.value(value.name) for value in self.file.proto.graph.output]
        # What nobody reads is kept from being cleared away by being a result.
        idle = [n for n in self.graph.nodes if n.op == "call_function" and not n.users and n not in results]
        results += [node for node in idle if not isinstance(node.meta["val"], list)]
        results = [self._returned(value) for value in results]
        self.graph.output(tuple(results))
        outputs = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in results]
        user = [spec.arg.name for spec in self._inputs if spec.kind == InputKind.USER_INPUT]
        _, given = pytree.tree_flatten((tuple(user), {}))
        _, gives = pytree.tree_flatten(tuple(range(len(results))))
        signature = ModuleCallSignature([], [], given, gives, user)
        with quiet():  # PyTorch remarks on names that Python does not have
            return ExportedProgram(
                root=torch.nn.Module(),
                graph=self.graph,
                graph_signature=ExportGraphSignature(self._inputs, outputs),
                state_dict=self._state,
                range_constraints={},
                module_call_graph=[ModuleCallEntry("", signature)],
                constants={},
            )


def _identifier(kind: str, name: str) -> str:
    return f"{kind}_{re.sub(r'[^A-Za-z0-9_]', '_', name)}"


def _as_tensor(file: OnnxFile, name: str) -> torch.Tensor | None:
    kind = file.constants[name].data_type
    dtype = torch_dtype(kind)
    if dtype is None:
        return None
    array = np.ascontiguousarray(file.array(name)).reshape(file.constants[name].dims)
    if kind == TensorProto.BFLOAT16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it may not be written to: nothing here does
        return torch.from_numpy(array)
