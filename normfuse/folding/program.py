"""An exported program open for rewriting: constants, new parameters, and a valid program at the end."""

from __future__ import annotations

import copy
import math
import operator
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from operator import attrgetter

import torch
from torch.export import ExportedProgram, ModuleCallEntry
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, TensorArgument
from torch.fx import Node

from .report import FoldError

aten = torch.ops.aten
_CONSTANT_KINDS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
_VIEWS = {
    *(aten.view.default, aten.reshape.default, aten.permute.default, aten.transpose.int, aten.t.default),
    *(aten.numpy_T.default, aten.mT.default, aten.movedim.int, aten.flatten.using_ints, aten.unsqueeze.default),
    *(aten.squeeze.dim, aten.expand.default, aten.slice.Tensor, aten.select.int, aten.chunk.default, aten.split.Tensor),
    *(aten.detach.default, aten.alias.default, aten.clone.default, aten.contiguous.default, aten.to.dtype),
    operator.getitem,
}
# Arithmetic that float64 only makes more exact. Anything else, a floor of an arange say, is evaluated as written.
_SMOOTH = {
    *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.neg.default, aten.reciprocal.default),
    *(aten.sqrt.default, aten.rsqrt.default, aten.exp.default, aten.pow.Tensor_Scalar, aten.addcmul.default),
    *(aten.view.default, aten.reshape.default, aten.permute.default, aten.transpose.int, aten.t.default),
    *(aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default, aten.slice.Tensor, aten.select.int),
    *(aten.detach.default, aten.alias.default, aten.clone.default, aten.contiguous.default),
}
# Entries of a weight that are rewritten at once: 8 MB in float64, which the allocator reuses and caches hold.
BLOCK_ENTRIES = 1 << 20
_FOLDED = re.compile(r"(_folded(_\d+)?)+$")  # what :meth:`Program.add_parameter` adds to a name
_CASTS = {aten.to.dtype, aten._to_copy.default, aten.type_as.default}


class Program:
    """A private copy of an exported program; tensors are shared with the original until they are replaced."""

    def __init__(self, program: ExportedProgram) -> None:
        if any(_mutates(node) for node in program.graph.nodes):
            program = _restore_batch_norms(program.run_decompositions({}))  # functionalises
        self._original = program
        self.graph = copy.deepcopy(program.graph)
        for copied, node in zip(self.graph.nodes, program.graph.nodes, strict=True):
            copied.name = node.name  # a copy renames what shadows a builtin, such as an input called "input"
            _write_plainly(copied)
        self.graph.eliminate_dead_code()
        self.signature = _copy_signature(program.graph_signature)
        self.state_dict = dict(program.state_dict)
        self.constants = dict(program.constants)
        self.bytes_copied = 0
        mutated = set(self.signature.buffers_to_mutate.values())
        if mutated:
            raise FoldError(
                f"the program updates {sorted(mutated)[0]!r} while it runs, as norms do in training: "
                "call model.eval() before torch.export.export"
            )
        self._targets = {
            spec.arg.name: spec.target for spec in self.signature.input_specs if spec.kind in _CONSTANT_KINDS
        }
        self._constant_nodes: set[Node] = set()
        for node in self.graph.nodes:
            if node.name in self._targets or _is_pure_constant(node, self._constant_nodes):
                self._constant_nodes.add(node)
        self._readers = Counter(
            self._storage(source)
            for node in self.graph.nodes
            if node not in self._constant_nodes
            for operand in node.all_input_nodes
            for source in self._sources(operand)
        )
        self._parameters = sum(spec.kind == InputKind.PARAMETER for spec in self.signature.input_specs)
        self._behind_parameters = list(self.graph.nodes)[self._parameters]
        self._new: set[Node] = set()
        self._stored: dict[int, list[tuple[torch.Tensor, Node]]] = {}

    # -- constants ---------------------------------------------------------------------------------------------

    def is_constant(self, node: object) -> bool:
        """Whether the value depends on parameters, buffers and literals only."""
        return isinstance(node, Node) and node in self._constant_nodes

    def constant(self, node: Node) -> torch.Tensor:
        """The value of a constant in float64, computed in float64 where that only makes it more exact."""
        with torch.no_grad():
            return _widen(self._evaluate(node, self._smooth(node)).detach())

    def _smooth(self, node: Node) -> bool:
        if node.name in self._targets:
            return True
        smooth = node.target in _SMOOTH or node.target in _CASTS
        return smooth and all(self._smooth(operand) for operand in node.all_input_nodes)

    def blocks(self, node: Node) -> Iterator[tuple[slice, torch.Tensor]]:
        """The value of a constant in float64, piece by piece along its first axis, so that large weights fit."""
        if node.name not in self._targets:
            yield slice(None), self.constant(node)
            return
        tensor = self._tensor(node).detach()
        rows = max(1, BLOCK_ENTRIES * max(tensor.shape[0], 1) // max(tensor.numel(), 1))
        for start in range(0, tensor.shape[0], rows):
            yield slice(start, start + rows), _widen(tensor[start : start + rows])

    def name(self, node: Node) -> str:
        """The name of the parameter a constant comes from (the first, when it is computed from several)."""
        return next(iter(self.names(node)), node.name)

    def names(self, node: Node) -> list[str]:
        """The names of all parameters and buffers a constant comes from."""
        return [_FOLDED.sub("", self._targets[source.name]) for source in self._sources(node)]

    def computed(self, node: Node) -> bool:
        """Whether arithmetic makes the value from parameters, and not only another view of one."""
        if node.op != "call_function" or node in self._new:
            return False
        return node.target not in _VIEWS or any(self.computed(operand) for operand in node.all_input_nodes)

    def shared(self, node: Node) -> bool:
        """Whether another operation reads the same stored tensor."""
        return any(self._readers[self._storage(source)] > 1 for source in self._sources(node))

    def _sources(self, node: Node) -> Iterator[Node]:
        if node.name in self._targets:
            yield node
        elif node in self._constant_nodes:
            for operand in node.all_input_nodes:
                yield from self._sources(operand)

    def _tensor(self, source: Node) -> torch.Tensor:
        target = self._targets[source.name]
        return self.state_dict[target] if target in self.state_dict else self.constants[target]

    def _storage(self, source: Node) -> int:
        return self._tensor(source).untyped_storage().data_ptr() or id(self._tensor(source))

    def _evaluate(self, node: Node, wide: bool) -> torch.Tensor:
        if node.name in self._targets:
            return _widen(self._tensor(node)) if wide else self._tensor(node)
        args = torch.fx.map_arg(node.args, lambda operand: self._evaluate(operand, wide))
        kwargs = torch.fx.map_arg(node.kwargs, lambda operand: self._evaluate(operand, wide))
        if wide and node.target in _CASTS and node.meta["val"].is_floating_point():
            return _widen(args[0])
        return node.target(*args, **kwargs)

    # -- rewriting ---------------------------------------------------------------------------------------------

    def add_parameter(self, name: str, value: torch.Tensor, like: Node) -> Node:
        """A new parameter with `value`, cast once to the dtype of the constant `like`.

        Equal values made from the same stored tensor are stored once.
        """
        dtype = like.meta["val"].dtype
        tensor = value.to(dtype).contiguous()
        if not math.isfinite(largest_entry(tensor)):
            raise FoldError(f"folding into {name!r} leaves the range of {str(dtype).removeprefix('torch.')}")
        sources = list(self._sources(like))
        known = self._stored.setdefault(self._storage(sources[0]) if sources else id(like), [])
        for stored, node in known:
            if stored.shape == tensor.shape and torch.equal(stored, tensor):
                return node
        target = self._free_name(name + "_folded")
        with self.graph.inserting_before(self._behind_parameters):
            node = self.graph.placeholder("p_" + target.replace(".", "_"))
        node.meta["val"] = _fake_mode(like).from_tensor(tensor, static_shapes=True)
        spec = InputSpec(InputKind.PARAMETER, TensorArgument(node.name), target, None)
        self.signature.input_specs.insert(self._parameters, spec)
        self._parameters += 1
        self.state_dict[target] = torch.nn.Parameter(tensor, requires_grad=False)
        self._targets[node.name] = target
        self._constant_nodes.add(node)
        self._new.add(node)
        known.append((tensor, node))
        return node

    def _free_name(self, name: str) -> str:
        candidate, count = name, 1
        while candidate in self.state_dict or candidate in self.constants:
            candidate, count = f"{name}_{count}", count + 1
        return candidate

    def insert(self, before: Node, target: object, args: tuple, like: Node) -> Node:
        """A new operation whose result looks like that of `like`."""
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args)
        node.meta = dict(like.meta)
        return node

    def redirect(self, node: Node, to: Node, users: list[Node] | None = None) -> None:
        """Let readers of `node` (all but `to`, or those given) read `to` instead, the outputs included."""
        for user in users if users is not None else [user for user in node.users if user is not to]:
            user.replace_input_with(node, to)
            if user.op == "output":
                self.signature.replace_all_uses(node.name, to.name)

    def replace(self, node: Node, by: Node) -> None:
        """Let every reader of `node` read `by`, and remove `node`."""
        self.redirect(node, by)
        self.graph.erase_node(node)

    def operations(self) -> int:
        """The number of tensor operations that are not constants."""
        return sum(
            node.op == "call_function"
            and node not in self._constant_nodes
            and node.target is not operator.getitem
            and isinstance(node.meta.get("val"), torch.Tensor | list | tuple)
            for node in self.graph.nodes
        )

    def bytes(self) -> int:
        """The size of all stored tensors; tied ones count once."""
        tensors = [
            *self.state_dict.values(),
            *(c for c in self.constants.values() if isinstance(c, torch.Tensor)),
        ]
        return sum({t.untyped_storage().data_ptr(): t.numel() * t.element_size() for t in tensors}.values())

    def finish(self) -> ExportedProgram:
        """Remove what nothing reads any more and return a validated program."""
        self.graph.eliminate_dead_code()
        live = {node.name for node in self.graph.nodes if node.op == "placeholder" and node.users}
        dead = {
            spec.arg.name
            for spec in self.signature.input_specs
            if spec.kind in _CONSTANT_KINDS and spec.arg.name not in live
        }
        for node in list(self.graph.nodes):
            if node.op == "placeholder" and node.name in dead:
                self.graph.erase_node(node)
        self.signature.input_specs[:] = [s for s in self.signature.input_specs if s.arg.name not in dead]
        kept = {spec.target for spec in self.signature.input_specs if spec.target}
        self.state_dict = {name: value for name, value in self.state_dict.items() if name in kept}
        self.constants = {
            name: value for name, value in self.constants.items() if name in kept or not isinstance(value, torch.Tensor)
        }
        for node in self.graph.nodes:
            # A view was traced on a result that lay in memory otherwise than what now takes its place may.
            if node.target is aten.view.default:
                node.target = aten.reshape.default
        self._count_copies(live)
        bodies = {node.target for node in self.graph.nodes if node.op == "get_attr"}  # of torch.no_grad() and the like
        folded = ExportedProgram(
            root={name: copy.deepcopy(attrgetter(name)(self._original.graph_module)) for name in bodies},
            graph=self.graph,
            graph_signature=self.signature,
            state_dict=self.state_dict,
            range_constraints=copy.deepcopy(self._original.range_constraints),
            module_call_graph=[_copy_entry(entry) for entry in self._original.module_call_graph],
            example_inputs=self._original.example_inputs,
            constants=self.constants,
            verifiers=self._original.verifiers,
        )
        folded.graph_module.meta.update(self._original.graph_module.meta)
        return folded

    def _count_copies(self, live: set[str]) -> None:
        """Bytes of weights that are stored more than once now: the original, where still read, and its variants."""
        originals = {self._storage(n) for n in self._constant_nodes if n.name in live and n not in self._new}
        for key, variants in self._stored.items():
            sizes = [t.numel() * t.element_size() for t, node in variants if node.name in live and t.dim() > 1]
            if sizes:
                self.bytes_copied += max(sizes) * (len(sizes) - 1 + (key in originals))


def piece(numbers: torch.Tensor, rows: slice) -> torch.Tensor:
    """The part of numbers laid against a weight that belongs to some of its rows."""
    return numbers if numbers.shape[0] == 1 else numbers[rows]


def largest_entry(tensor: torch.Tensor) -> float:
    """The largest absolute entry, not a number if any entry is none; zero where there are no entries."""
    if not tensor.numel():
        return 0.0
    low, high = torch.aminmax(tensor)
    return float(torch.maximum(-low, high))


def _mutates(node: Node) -> bool:
    # A torch.tensor(...) in a forward is traced with a detach_, which changes no value.
    if not isinstance(node.target, torch._ops.OpOverload) or node.target is aten.detach_.default:
        return False
    return node.target._schema.is_mutable


def _write_plainly(node: Node) -> None:
    """Operations that read more, or do more, than their result needs, as those that do not."""
    if node.target is aten.detach_.default:
        node.target = aten.detach.default
    elif node.target is aten.type_as.default:
        value, other = (operand.meta["val"] for operand in node.args)
        if value.device == other.device:
            node.target, node.args = aten.to.dtype, (node.args[0], other.dtype)


def _restore_batch_norms(program: ExportedProgram) -> ExportedProgram:
    """Functionalising takes batch_norm apart into an operation with three results; only the first is read."""
    native = aten._native_batch_norm_legit_no_training.default
    for node in list(program.graph.nodes):
        if node.target is operator.getitem and node.args[0].target is native and node.args[1] == 0:
            *inputs, momentum, eps = node.args[0].args
            with program.graph.inserting_before(node):
                whole = program.graph.call_function(
                    aten.batch_norm.default, (*inputs, False, momentum, eps, False), name=f"{node.name}_whole"
                )
            whole.meta = dict(node.args[0].meta) | {"val": node.meta["val"]}
            program.graph_signature.replace_all_uses(node.name, whole.name)
            node.replace_all_uses_with(whole)
            program.graph.erase_node(node)
    program.graph.eliminate_dead_code()
    return program


def _is_pure_constant(node: Node, constants: set[Node]) -> bool:
    # Only ATen: what another library computes from constants, a quantised weight say, is to stay as it is.
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":
        return False
    if torch.Tag.nondeterministic_seeded in node.target.tags or not isinstance(node.meta.get("val"), torch.Tensor):
        return False
    return all(operand in constants for operand in node.all_input_nodes)


def _widen(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.float64) if tensor.is_floating_point() else tensor


def _copy_signature(signature: ExportGraphSignature) -> ExportGraphSignature:
    specs = (signature.input_specs, signature.output_specs)
    return ExportGraphSignature(*([replace(spec, arg=replace(spec.arg)) for spec in side] for side in specs))


def _copy_entry(entry: ModuleCallEntry) -> ModuleCallEntry:
    signature = entry.signature
    if signature is not None:
        signature = replace(signature, inputs=list(signature.inputs), outputs=list(signature.outputs))
    return replace(entry, signature=signature)


def _fake_mode(node: Node) -> torch._subclasses.FakeTensorMode:
    return node.meta["val"].fake_mode
