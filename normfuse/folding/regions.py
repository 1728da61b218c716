"""Regions of a program, such as ``torch.no_grad()`` and autocast, are opened: their operations join those around them.

The exporter hides what runs inside a context in a graph of its own, behind one operation. A context that only concerns
gradients or memory changes no value. Autocast does: it casts the operands of some operations. Which ones PyTorch knows
alone, so each operation is run on fake tensors with autocast and without it, and opened with the casts with which both
do the same. Where there are none, the region stays closed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from operator import attrgetter, getitem
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node, map_arg
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .exported import copy_graph, copy_signature, rebuild
from .nodes import tensors_of
from .operations import returns_alias

aten = torch.ops.aten
higher_order = torch.ops.higher_order
# Operations that call no others, beside those that PyTorch counts as its core.
_KERNELS = {
    *(aten.native_batch_norm.default, aten._native_batch_norm_legit.default, aten._fused_rms_norm.default),
    *(aten._native_batch_norm_legit.no_stats, aten._batch_norm_no_update.default, aten.roll.default),
    *(
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._unsafe_view.default,
        aten.baddbmm.default,
        aten._safe_softmax.default,
    ),
}


class _Closed(Exception):
    """A region cannot be opened."""


@dataclass(frozen=True)
class _Region:
    """One call of a body in a context."""

    body: Node
    operands: tuple[Any, ...]
    autocast: tuple[str, torch.dtype | None, bool] | None = None  # None: as around it

    def context(self) -> AbstractContextManager:
        if self.autocast is None:
            return nullcontext()
        device, dtype, enabled = self.autocast
        return torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False)


def _region(node: Node) -> _Region | None:
    """What a node calls, if it is a region whose context is known."""
    name = getattr(node.target, "_name", "") if node.op == "call_function" else ""
    if name == "wrap_with_set_grad_enabled":
        return _Region(node.args[1], node.args[2:])
    if name == "wrap_with_autocast":
        device, dtype, enabled, _cache, body, *operands = node.args
        return _Region(body, tuple(operands), (device, dtype, enabled))
    if name in ("tag_activation_checkpoint", "wrap_activation_checkpoint", "wrap"):
        return _Region(node.args[0], node.args[1:])
    if name == "invoke_subgraph":
        return _Region(node.args[0], node.args[2:])
    return None


def bodies(module: GraphModule, graph: Graph) -> Iterator[tuple[Node, GraphModule]]:
    """The graphs that operations of `graph` call, with the nodes that name them."""
    for node in graph.nodes:
        if node.op == "get_attr" and isinstance(body := attrgetter(node.target)(module), GraphModule):
            yield node, body


def open_regions(program: ExportedProgram) -> ExportedProgram:
    """The same program without regions whose context is known; `program` itself if it has none."""
    if not any(map(_region, program.graph.nodes)):
        return program
    graph, signature = copy_graph(program.graph), copy_signature(program.graph_signature)
    kept = {node.target: body for node, body in bodies(program.graph_module, graph)}
    for node in list(graph.nodes):
        if (region := _region(node)) is None:
            continue
        opening = _Opening(graph, kept)
        try:
            with graph.inserting_before(node):
                results = opening.copy(kept[region.body.target], region.operands, region)
        except _Closed:
            opening.take_back()
            continue
        for reader in list(node.users):
            if reader.target is not getitem:
                raise AssertionError(f"{reader} reads {node} as a whole")
            result = results[reader.args[1]]
            signature.replace_all_uses(reader.name, result.name)
            reader.replace_all_uses_with(result)
            graph.erase_node(reader)
        graph.erase_node(node)
    graph.eliminate_dead_code()
    return rebuild(program, graph, signature, program.state_dict, program.constants, kept)


@dataclass
class _Opening:
    """The copy of one region's operations into the graph around it.

    Attributes:
        graph: where they go.
        kept: the bodies that this graph calls, by name; those of regions that stay closed join it.
    """

    graph: Graph
    kept: dict[str, GraphModule]
    _new: list[Node] = field(default_factory=list)
    _casts: dict[tuple[Node, torch.dtype], Node] = field(default_factory=dict)

    def copy(self, module: GraphModule, operands: tuple[Any, ...], region: _Region) -> Any:
        """The body's operations on `operands`; returns its results."""
        values: dict[Node, Any] = {}
        known, inputs = dict(bodies(module, module.graph)), iter(operands)
        for node in module.graph.nodes:
            args, kwargs = (map_arg(part, lambda n: values[n]) for part in (node.args, node.kwargs))
            if node.op == "placeholder":
                values[node] = next(inputs)
            elif node.op == "output":
                return args[0]
            elif node.op == "get_attr":
                values[node] = self._keep(node, known[node]) if node in known else None
            elif (inner := _region(node)) is not None:
                around = region.autocast if inner.autocast is None else inner.autocast
                called = map_arg(inner.operands, lambda n: values[n])
                values[node] = self.copy(known[inner.body], called, _Region(inner.body, called, around))
            elif node.target is getitem and not isinstance(args[0], Node):
                values[node] = args[0][args[1]]
            else:
                values[node] = self._emit(node, args, kwargs, region)
        raise AssertionError("a body without output")

    def take_back(self) -> None:
        """Remove what has been copied."""
        for node in reversed(self._new):
            self.graph.erase_node(node)

    def _keep(self, node: Node, body: GraphModule) -> Node:
        name = node.target
        while name in self.kept and self.kept[name] is not body:
            name += "_"
        self.kept[name] = body
        return self._insert(self.graph.get_attr(name), node)

    def _emit(self, node: Node, args: Any, kwargs: Any, region: _Region) -> Node:
        cast = self._operand_casts(node, args, kwargs, region)

        def operand(n: Node) -> Node:
            return self._cast(n, cast[n], node) if n in cast else n

        return self._insert(
            self.graph.call_function(node.target, map_arg(args, operand), map_arg(kwargs, operand)), node
        )

    def _insert(self, new: Node, like: Node) -> Node:
        new.meta = dict(like.meta)
        self._new.append(new)
        return new

    def _cast(self, operand: Node, dtype: torch.dtype, like: Node) -> Node:
        if (operand, dtype) not in self._casts:
            cast = self._insert(self.graph.call_function(aten.to.dtype, (operand, dtype)), like)
            cast.meta["val"] = operand.meta["val"].to(dtype)
            self._casts[operand, dtype] = cast
        return self._casts[operand, dtype]

    def _operand_casts(self, node: Node, args: Any, kwargs: Any, region: _Region) -> dict[Node, torch.dtype]:
        """The casts of operands that autocast stands for at one operation."""
        operands = {n: n.meta["val"] for n in _nodes(args, kwargs) if isinstance(n.meta.get("val"), torch.Tensor)}
        if region.autocast is None or not region.autocast[2] or not operands or not tensors_of(node):
            return {}
        if not isinstance(node.target, torch._ops.OpOverload):
            raise _Closed

        def run(casts: dict[Node, torch.dtype], context: AbstractContextManager) -> _Trace:
            # Of the example's sizes: not every operation on fake tensors takes symbols below a dispatch mode. Without
            # gradients: whether an operand has one decides how a product is computed.
            with FakeTensorMode(), torch.no_grad():
                values = {n: _of_example(v).to(casts.get(n, v.dtype)) for n, v in operands.items()}
                trace = _Trace({id(value): n for n, value in values.items()})

                def value(n: Node) -> Any:
                    return values[n] if n in values else _of_example(n.meta.get("val"))

                given, named = map_arg(args, value), map_arg(kwargs, value)
                with context, trace:
                    node.target(*given, **named)
            return trace

        try:
            wanted = run({}, region.context())
        except RuntimeError as error:  # an operation that does not run on fake tensors cannot be looked into
            raise _Closed from error
        if not all(_one_kernel(function) for function, _ in wanted.computed):
            raise _Closed
        floats = [n for n, value in operands.items() if value.is_floating_point()]
        for casts in ({}, wanted.casts, dict.fromkeys(floats, region.autocast[1])):
            try:
                found = run(casts, nullcontext())
            except RuntimeError:  # operands of several dtypes, which only casts bring together
                continue
            if (found.computed if casts else found.everything) == (wanted.computed if casts else wanted.everything):
                return casts
        raise _Closed


class _Trace(TorchDispatchMode):
    """What an operation consists of.

    Attributes:
        casts: operands that are cast as they are, and to what.
        computed: the operations that compute, with the dtypes of their operands and results.
        everything: all operations, also casts and views.
    """

    def __init__(self, operands: dict[int, Node]) -> None:
        super().__init__()
        self.casts: dict[Node, torch.dtype] = {}
        self.computed: list[tuple[object, list[torch.dtype]]] = []
        self.everything: list[tuple[object, list[torch.dtype]]] = []
        self._operands = operands

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace != "aten":
            return result
        tensors = (t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor))
        entry = (func, [t.dtype for t in tensors])
        self.everything.append(entry)
        if func is aten._to_copy.default:
            if id(args[0]) in self._operands:
                self.casts[self._operands[id(args[0])]] = result.dtype
        elif not returns_alias(func):
            self.computed.append(entry)
        return result


def _one_kernel(function: Any) -> bool:
    """Whether an operation is known to call no other, which autocast would see but a run on fake tensors does not."""
    return function in _KERNELS or bool({torch.Tag.core, torch.Tag.pointwise, torch.Tag.reduction} & set(function.tags))


def _of_example(value: Any) -> Any:
    """A tensor, or a size, with the example's sizes in the place of symbols."""
    if isinstance(value, torch.SymInt):
        return value.node.hint if value.node.has_hint() else 2
    if not isinstance(value, torch.Tensor):
        return value
    sizes, strides = ([_of_example(size) for size in part] for part in (value.shape, value.stride()))
    return torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)


def _nodes(args: Any, kwargs: Any) -> list[Node]:
    found: list[Node] = []
    map_arg((args, kwargs), found.append)
    return found
