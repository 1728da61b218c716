"""An ONNX graph as a program that :func:`normfuse.fold` takes, with the way back for each of its operations."""

from __future__ import annotations

import operator
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from onnx import NodeProto, TensorProto, helper
from torch._dynamo.source import ConstantSource
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
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils import _pytree as pytree

from normfuse.onnx.writer import quiet

from .observing import Observed
from .onnx_file import OnnxFile, outer_names, torch_dtype

aten = torch.ops.aten
_LIBRARY = torch.library.Library("normfuse_onnx", "DEF")
_DEFINED: set[str] = set()


@dataclass(frozen=True)
class Slot:
    """Where an argument of an operation in the program stands in the file.

    Attributes:
        path: of the argument: its position, and its position in a list.
        node: position of the ONNX operation in the file.
        operand: which of its operands it is; None for a name that its graphs read.
        transposed: whether the file holds it with its two axes exchanged.
        required: whether the ONNX operation cannot do without it.
    """

    path: tuple[int, ...]
    node: int
    operand: int | None
    transposed: bool = False
    required: bool = False


@dataclass(frozen=True)
class Origin:
    """The ONNX operations that one operation of the program stands for; the last one writes its result."""

    nodes: tuple[int, ...]
    slots: tuple[Slot, ...]


@dataclass
class Reading:
    """A file as a program.

    Attributes:
        file: what was read.
        program: the program.
        origins: where its operations come from, by their names.
        names: the names of its values in the file, by their names in the program.
        paths: positions of the file's operations by what reports call them.
    """

    file: OnnxFile
    program: ExportedProgram
    origins: dict[str, Origin] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    paths: dict[str, int] = field(default_factory=dict)


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
        self._sizes = _Sizes([shape for value in inputs.values() for shape in zip(*value.shapes, strict=True)])
        self.mode = FakeTensorMode(shape_env=self._sizes.env, static_shapes=False)
        self.graph = Graph()
        self.values: dict[str, Node] = {}
        self.origins: dict[str, Origin] = {}
        self.names: dict[str, str] = {}
        self.paths: dict[str, int] = {}
        self._inputs: list[InputSpec] = []
        self._state: dict[str, torch.Tensor] = {}
        self._transposed: dict[Node, Node] = {}
        self.fixed: set[Node] = set()

    def read(self) -> Reading:
        """The whole file."""
        from .operations import translate

        self._constants()
        for value in self.file.inputs:
            self._input(value.name)
        for name in self.file.settable:
            self._opaque_source(name)
        skip = self._products_with_bias()
        for position, node in zip(self.file.positions, self.file.nodes, strict=True):
            if any(node.output) and all(name in self.file.constants for name in node.output if name):
                continue
            if position in skip and skip[position] is None:
                continue  # read with the Add behind it
            call = Call(self, position, node, skip.get(position))
            if position in self._pinned or not (self.file.is_own(node) and translate(call)):
                call.opaque()
        return Reading(self.file, self._program(), self.origins, self.names, self.paths)

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
        for floating in (True, False):
            for name, tensor in tensors.items():
                if tensor.is_floating_point() == floating:
                    self._constant(name, tensor)

    def _constant(self, name: str, tensor: torch.Tensor) -> None:
        floating = tensor.is_floating_point()
        node = self.graph.placeholder(_identifier("p", name))
        node.meta["val"] = self.mode.from_tensor(tensor, static_shapes=True)
        kind = InputKind.PARAMETER if floating else InputKind.BUFFER
        self._inputs.append(InputSpec(kind, TensorArgument(node.name), name, None if floating else True))
        self._state[name] = torch.nn.Parameter(tensor, requires_grad=False) if floating else tensor
        self.fixed.add(node)
        self._known(name, node)

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
        node = self.graph.call_function(_operation("Input"), ([],), name=_identifier("i", name))
        node.meta["val"] = self.fake(name)
        self._known(name, node)

    def _known(self, name: str, node: Node) -> None:
        self.values[name] = node
        self.names[node.name] = name

    def transposed(self, weight: Node) -> Node:
        """A constant of two axes with its axes exchanged."""
        if weight not in self._transposed:
            node = self.graph.call_function(aten.t.default, (weight,))
            with self.mode:
                node.meta["val"] = weight.meta["val"].t()
            self._transposed[weight] = node
        return self._transposed[weight]

    def add(self, target: object, args: tuple, position: int, node: NodeProto, outputs: Sequence[str]) -> Node:
        """An operation of the program that gives `outputs`."""
        result = self.graph.call_function(target, args, name=_identifier("o", node.name or outputs[0]))
        path = node.name or outputs[0] or node.op_type
        path = path if path not in self.paths else f"{path} ({position})"
        self.paths[path] = position
        result.meta["nn_module_stack"] = {path: (path, node.op_type)}
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

    def _products_with_bias(self) -> dict[int, tuple[int, NodeProto] | None]:
        """Products with a constant whose only reader adds a bias: the position of the Add to that of the product."""
        makers, readers = {}, {}
        kept = {value.name for value in self.file.proto.graph.output}
        for position, node in zip(self.file.positions, self.file.nodes, strict=True):
            for name in (*node.input, *outer_names(node)):
                readers.setdefault(name, []).append(position)
            makers[node.output[0] if node.output else ""] = (position, node)
        found: dict[int, tuple[int, NodeProto] | None] = {}
        constants = self.file.constants
        for position, node in zip(self.file.positions, self.file.nodes, strict=True):
            if node.op_type != "Add" or not self.file.is_own(node) or position in self._pinned:
                continue
            for product, bias in (node.input, reversed(node.input)):
                place, maker = makers.get(product, (None, None))
                if maker is None or bias not in constants or maker.op_type != "MatMul" or product in kept:
                    continue
                weight = constants.get(maker.input[1])
                fits = weight is not None and len(weight.dims) == 2
                fits = fits and list(constants[bias].dims) == [weight.dims[1]]
                free = self.file.is_own(maker) and place not in self._pinned and readers[product] == [position]
                known = self.fake(node.output[0]) is not None and maker.input[0] not in constants
                if fits and free and known:
                    found[position], found[place] = (place, maker), None
                    break
        return found

    # -- the program -------------------------------------------------------------------------------------------

    def _program(self) -> ExportedProgram:
        results = [self.value(value.name) for value in self.file.proto.graph.output]
        # What nobody reads is kept from being cleared away by being a result.
        idle = [n for n in self.graph.nodes if n.op == "call_function" and not n.users and n not in results]
        results += [node for node in idle if not isinstance(node.meta["val"], list)]
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


class Call:
    """One ONNX operation about to be read; what a translation is given.

    Attributes:
        node: the operation.
        operands: its operands in the program; None for absent ones.
        attributes: by name.
    """

    def __init__(self, reader: Reader, position: int, node: NodeProto, product: tuple[int, NodeProto] | None) -> None:
        self._reader, self._position, self.node = reader, position, node
        self.product = product
        own = () if product is None else product[1].output  # which nothing else reads, so that it is no value here
        self.operands = [None if name in own else reader.value(name) for name in node.input]
        self._attributes = {attribute.name: attribute for attribute in node.attribute}
        self.version = reader.file.version

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute."""
        if name not in self._attributes:
            return default
        value = helper.get_attribute_value(self._attributes[name])
        return value.decode(errors="replace") if isinstance(value, bytes) else value

    def number(self, operand: int) -> np.ndarray | None:
        """The value of an operand that is a constant."""
        name = self.node.input[operand] if operand < len(self.node.input) else ""
        return self._reader.file.array(name) if name in self._reader.file.constants else None

    def is_constant(self, operand: int) -> bool:
        return operand < len(self.node.input) and self.node.input[operand] in self._reader.file.constants

    def shape(self, operand: int) -> list[Any] | None:
        """The sizes of an operand; None where it is not known to be a tensor."""
        value = self.operands[operand].meta["val"] if self.operand(operand) is not None else None
        return list(value.shape) if isinstance(value, torch.Tensor) else None

    def is_fixed(self) -> bool:
        """Whether all operands are constants, so that the result is one."""
        return all(operand is None or operand in self._reader.fixed for operand in self.operands)

    def operand(self, number: int) -> Node | None:
        return self.operands[number] if number < len(self.operands) else None

    def result(self, number: int = 0) -> torch.Tensor | None:
        """What a result looks like."""
        return self._reader.fake(self.node.output[number])

    def only_first(self) -> bool:
        """Whether no result but the first is asked for."""
        return not any(self.node.output[1:])

    def transposed(self, weight: Node) -> Node:
        return self._reader.transposed(weight)

    def emit(
        self, target: object, *args: Any, outputs: int = 1, slots: Sequence[Slot] = (), optional: Mapping[int, int] = {}
    ) -> bool:
        """Put the operation into the program.

        Args:
            target: of PyTorch.
            args: its arguments.
            outputs: how many results it has.
            slots: where arguments stand in the file, beside the operands among `args`, which are found.
            optional: absent operands that folding may create: argument to operand.
        """
        found = [*slots, *self._slots(args, optional, slots)]
        nodes = (self._position,) if self.product is None else (self.product[0], self._position)
        names = list(self.node.output)[:outputs]
        node = self._reader.add(target, args, self._position, self.node, names)
        self._reader.origins[node.name] = Origin(nodes, tuple(found))
        if self.is_fixed():
            self._reader.fixed.add(node)
        return True

    def emit_product(self) -> bool:
        """A product with a constant and the Add of its bias, as one operation."""
        assert self.product is not None
        place, maker = self.product
        x, weight = (self._reader.value(name) for name in maker.input)
        bias = next(i for i, name in enumerate(self.node.input) if name != maker.output[0])
        slots = (Slot((0,), place, 0), Slot((1,), place, 1, transposed=True), Slot((2,), self._position, bias))
        node = self._reader.add(
            aten.linear.default, (x, self.transposed(weight), self.operands[bias]), self._position, self.node,
            self.node.output[:1],
        )  # fmt: skip
        self._reader.origins[node.name] = Origin((place, self._position), slots)
        return True

    def slot(self, path: tuple[int, ...], operand: int, *, transposed: bool = False, required: bool = False) -> Slot:
        return Slot(path, self._position, operand, transposed, required)

    def opaque(self) -> None:
        """Put the operation into the program as one of which nothing is known."""
        operands = [*self.operands, *(self._reader.value(name) for name in outer_names(self.node))]
        slots = [
            Slot((0, place), self._position, place if place < len(self.operands) else None)
            for place, operand in enumerate(operands)
            if operand is not None
        ]
        outputs = list(self.node.output)
        while outputs and not outputs[-1]:
            outputs.pop()
        node = self._reader.add(_operation(self.node.op_type), (operands,), self._position, self.node, outputs or [""])
        self._reader.origins[node.name] = Origin((self._position,), tuple(slots))

    def _slots(self, args: tuple, optional: Mapping[int, int], given: Sequence[Slot]) -> list[Slot]:
        waiting: dict[Node, list[int]] = {}
        for number, operand in enumerate(self.operands):
            if operand is not None and number not in {slot.operand for slot in given}:
                waiting.setdefault(operand, []).append(number)
        found = []
        for path, value in arguments(args):
            if path in {slot.path for slot in given}:
                continue
            if isinstance(value, Node) and waiting.get(value):
                found.append(Slot(path, self._position, waiting[value].pop(0)))
            elif value is None and path[0] in optional:
                found.append(Slot(path, self._position, optional[path[0]]))
        return found


def arguments(args: tuple) -> Iterator[tuple[tuple[int, ...], Any]]:
    """Arguments with their paths, see :class:`Slot`; those in lists one by one."""
    for place, argument in enumerate(args):
        if isinstance(argument, list | tuple):
            yield from (((place, position), entry) for position, entry in enumerate(argument))
        else:
            yield (place,), argument


class _Sizes:
    """Sizes seen in several runs as numbers, or as products of symbols and a number.

    What is the same in all runs is a number. The dynamic sizes of the inputs are symbols; a size that is a multiple of
    them in every run is that product, and any other one is a symbol of its own.
    """

    def __init__(self, inputs: Sequence[tuple[int, ...]]) -> None:
        self.env = ShapeEnv()
        self._known: dict[tuple[int, ...], Any] = {}
        self._symbols: list[tuple[int, ...]] = []
        for sizes in inputs:
            if len(set(sizes)) > 1 and sizes not in self._known:
                self._symbol(sizes)

    def size(self, sizes: tuple[int, ...]) -> Any:
        if len(set(sizes)) == 1:
            return sizes[0]
        if sizes not in self._known:
            product = self._product(sizes)
            if product is None:
                self._symbol(sizes)
            else:
                self._known[sizes] = product
        return self._known[sizes]

    def _product(self, sizes: tuple[int, ...]) -> Any:
        for count, first in enumerate(self._symbols):
            for second in (None, *self._symbols[count:]):
                factors = [f * (1 if second is None else second[i]) for i, f in enumerate(first)]
                if all(factors) and len({size / factor for size, factor in zip(sizes, factors, strict=True)}) == 1:
                    if sizes[0] % factors[0]:
                        continue
                    product = self._known[first] if second is None else self._known[first] * self._known[second]
                    return product * (sizes[0] // factors[0])
        return None

    def _symbol(self, sizes: tuple[int, ...]) -> None:
        source = ConstantSource(f"size_{len(self._symbols)}")
        symbol = self.env.create_symbol(max(sizes[0], 2), source, dynamic_dim=DimDynamic.DYNAMIC)
        self._known[sizes] = self.env.create_symintnode(symbol, hint=max(sizes[0], 2), source=source)
        self._symbols.append(sizes)


def _operation(kind: str) -> Any:
    """An operation of which nothing is known but its name."""
    name = re.sub(r"\W", "_", kind) or "unnamed"
    if name not in _DEFINED:
        _LIBRARY.define(f"{name}(Tensor?[] operands) -> Tensor[]")
        _DEFINED.add(name)
    return getattr(torch.ops.normfuse_onnx, name).default


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
