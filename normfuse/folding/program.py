"""An exported program open for rewriting: constants, new parameters, and a valid program at the end."""

from __future__ import annotations

import math
import operator
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import GraphModule, Node

from .aliases import memory_of, output_values, separate_outputs, shared_by_outputs
from .constants import Constants, storage_of, widen
from .exported import copy_graph, copy_signature, rebuild
from .functional import functionalised, has_vmap
from .nodes import argument, is_float, module_of, operation_name
from .operations import NORMALISING
from .regions import bodies, open_regions
from .report import FoldError, OutOfRange
from .spellings import write_plainly

aten = torch.ops.aten
_CONSTANT_KINDS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
# Entries of a weight that are rewritten at once: 8 MB in float64, which the allocator reuses and caches hold.
BLOCK_ENTRIES = 1 << 20
_FOLDED = re.compile(r"(_folded(_\d+)?)+$")  # what :meth:`Program.add_parameter` adds to a name


class Program:
    """A private copy of an exported program; tensors are shared with the original until they are replaced."""

    def __init__(self, program: ExportedProgram) -> None:
        program = open_regions(program)
        if has_vmap(program) or any(_mutates(node) for node in program.graph.nodes):
            program = functionalised(program)
        self._original = program
        self.graph = copy_graph(program.graph)
        for node in self.graph.nodes:
            _refuse_batch_statistics(node)
            write_plainly(node)
        self.graph.eliminate_dead_code()
        self.signature = copy_signature(program.graph_signature)
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
        self._constants = Constants(self.graph, self._tensor)
        for node in list(self.graph.nodes):  # what is asserted of a constant is known, and would keep it alive
            if node.target is aten._assert_tensor_metadata.default and node.args[0] in self._constants:
                self.graph.erase_node(node)
            elif node.target is aten.fill.Tensor and is_float(node) and node.args[1] in self._constants:  # x[0] = 0.0
                node.target, node.args = aten.full_like.default, (node.args[0], float(self.constant(node.args[1])))
        self._parameters = sum(spec.kind == InputKind.PARAMETER for spec in self.signature.input_specs)
        self._behind_parameters = list(self.graph.nodes)[self._parameters]
        #: Values in which several outputs lie, and the readers that lead to these.
        self.shared_by_outputs = shared_by_outputs(self.graph)
        self._memory = [memory_of(value) for value in output_values(self.graph)]
        self._new: set[Node] = set()
        self._stored: dict[object, dict[Any, list[tuple[torch.Tensor, Node]]]] = {}

    # -- constants ---------------------------------------------------------------------------------------------

    def is_constant(self, node: object) -> TypeGuard[Node]:
        """Whether the value depends on parameters, buffers and literals only."""
        return node in self._constants

    def constant(self, node: Node) -> torch.Tensor:
        """The value of a constant in float64, see :meth:`Constants.value`."""
        return self._constants.value(node)

    def blocks(self, node: Node) -> Iterator[tuple[slice, torch.Tensor]]:
        """The value of a constant in float64, piece by piece along its first axis, so that large weights fit."""
        tensor = self._tensor(node)
        if tensor is None:
            yield slice(None), self.constant(node)
            return
        tensor = tensor.detach()
        rows = max(1, BLOCK_ENTRIES * max(tensor.shape[0], 1) // max(tensor.numel(), 1))
        for start in range(0, tensor.shape[0], rows):
            yield slice(start, start + rows), widen(tensor[start : start + rows])

    def name(self, node: Node) -> str:
        """The name of the parameter a constant comes from (the first, when it is computed from several)."""
        source = self._constants.first_source(node)
        return node.name if source is None else self._name(source)

    def names(self, node: Node) -> list[str]:
        """The names of all parameters and buffers a constant comes from."""
        return [self._name(source) for source in self._constants.sources(node)]

    def computed(self, node: Node) -> bool:
        """Whether arithmetic makes the value from parameters, and not only another view of one."""
        return self._constants.computed(node)

    def shared(self, node: Node) -> bool:
        """Whether another operation reads the same stored tensor."""
        return self._constants.shared(node)

    def _name(self, source: Node) -> str:
        return _FOLDED.sub("", self._targets[source.name])

    def _tensor(self, node: Node) -> torch.Tensor | None:
        """The tensor of a stored constant."""
        target = self._targets.get(node.name)
        if target is None:
            return None
        return self.state_dict[target] if target in self.state_dict else self.constants[target]

    def norms_in_branches(self) -> Iterator[tuple[str, Node]]:
        """Norms in graphs that operations of this one call, and what calls them."""
        module = self._original.graph_module
        for node, body in bodies(module, module.graph):
            caller = next((operation_name(user) for user in node.users), node.name)
            for graph in (part.graph for part in body.modules() if isinstance(part, GraphModule)):
                yield from ((caller, inner) for inner in graph.nodes if inner.target in NORMALISING)

    def statistics_in_branches(self) -> Iterator[tuple[str, str]]:
        """Modules whose running statistics are read by operations that call graphs, with what these are called."""
        module = self._original.graph_module
        for caller in dict.fromkeys(user for node, _ in bodies(module, module.graph) for user in node.users):
            names = [self._targets.get(operand.name) or "" for operand in caller.all_input_nodes]
            paths = [path for path, _, name in (name.rpartition(".") for name in names) if name.startswith("running_")]
            yield from ((operation_name(caller), path) for path in dict.fromkeys(paths))

    def runnable(self) -> GraphModule:
        """A module that runs the graph as it is now, on tensors for all its placeholders in their order."""
        return GraphModule(self._original.graph_module, self.graph)

    # -- rewriting ---------------------------------------------------------------------------------------------

    def add_parameter(self, name: str, value: torch.Tensor, like: Node) -> Node:
        """A new parameter with `value`, cast once to the dtype of the constant `like`.

        Equal values made from the same stored tensor are stored once.
        """
        dtype = like.meta["val"].dtype
        tensor = value.to(dtype).contiguous()
        if not math.isfinite(largest_entry(tensor)):
            raise OutOfRange(f"folding into {name!r} leaves the range of {str(dtype).removeprefix('torch.')}")
        source = self._constants.first_source(like)
        origin = like if source is None else storage_of(self._tensor(source))
        known = self._stored.setdefault(origin, {}).setdefault(_fingerprint(tensor), [])
        for stored, node in known:
            if torch.equal(stored, tensor):
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
        self._constants.add(node)
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
            and node not in self._constants
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
        self._store_pieces()
        live = {node.name for node in self.graph.nodes if node.op == "placeholder" and node.users}
        self._count_copies(live)
        separate_outputs(self.graph, self.signature, self._memory, self.is_constant)
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
        called = {node.target: body for node, body in bodies(self._original.graph_module, self._original.graph)}
        return rebuild(self._original, self.graph, self.signature, self.state_dict, self.constants, called)

    def _store_pieces(self) -> None:
        """Where a part of a stored tensor has been rewritten, the parts that have not are stored by themselves."""
        for node in [node for node in self._constants if node.users and self._tensor(node) is not None]:
            if node in self._new or storage_of(self._tensor(node)) not in self._stored or self.shared(node):
                continue
            for piece in self._constants.pieces(node):
                if piece is not node:
                    self.redirect(piece, self.add_parameter(self.name(piece), self.constant(piece), piece))
        self.graph.eliminate_dead_code()

    def _count_copies(self, live: set[str]) -> None:
        """Bytes of weights that are stored more than once now: the original, where still read, and its variants."""
        stored = [(node, tensor) for node in self._constants if (tensor := self._tensor(node)) is not None]
        size, read = Counter[object](), set()
        for node, tensor in stored:
            if node not in self._new:
                size[storage_of(tensor)] = max(size[storage_of(tensor)], tensor.numel() * tensor.element_size())
                read |= {storage_of(tensor)} if node.name in live else set()
        for origin, alike in self._stored.items():
            variants = [variant for entries in alike.values() for variant in entries]
            sizes = [t.numel() * t.element_size() for t, node in variants if node.name in live and t.dim() > 1]
            if sizes and size[origin]:
                self.bytes_copied += max(0, sum(sizes) - size[origin] * (origin not in read))


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


def _refuse_batch_statistics(node: Node) -> None:
    measured = {aten.batch_norm.default: "training", aten.instance_norm.default: "use_input_stats"}.get(node.target)
    if measured and argument(node, measured) and argument(node, "running_mean") is not None:
        path = module_of(node)[0] or node.name
        raise FoldError(
            f"{operation_name(node)} in {path!r} measures each batch and updates its running statistics while it runs: "
            f"pass {measured}=False for inference, or no running statistics"
        )


def _fingerprint(tensor: torch.Tensor) -> Any:
    """What equal tensors have in common, and few others: shape, dtype and some entries."""
    entries = tensor.flatten()
    return tensor.shape, tensor.dtype, tuple(entries[:: max(1, len(entries) // 16)].tolist())


def _fake_mode(node: Node) -> torch._subclasses.FakeTensorMode:
    return node.meta["val"].fake_mode
