"""Values of a program that depend on parameters, buffers and literals only: which they are, and what they are."""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from operator import getitem
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node, map_arg

from .nodes import tensors_of
from .operations import CASTS, is_smooth, is_view, returns_alias

# Bytes of computed values that are kept for the next reader; beyond, those that were read longest ago go.
KEPT_BYTES = 1 << 28
# Larger results than this many entries, or this many times what is stored, are no constants: a file of a few bytes may
# ask for a tensor of any size.
MAX_ENTRIES = 1 << 24
MAX_GROWTH = 4


class _Key(NamedTuple):
    """A value as the program computes it, or (`wide`) in float64 wherever that only makes it more exact."""

    node: Node
    wide: bool


class Constants:
    """The constants of a graph.

    Args:
        graph: operations in an order in which they can run.
        stored: the tensor of every stored constant, by the name of its node.
    """

    def __init__(self, graph: Graph, stored: Callable[[Node], torch.Tensor | None]) -> None:
        self._stored = stored
        self._first: dict[Node, Node | None] = {}
        self._computed: set[Node] = set()
        self._kept: OrderedDict[_Key, Any] = OrderedDict()
        self._kept_bytes = 0
        tensors = [tensor for node in graph.nodes if (tensor := stored(node)) is not None]
        limit = max(MAX_ENTRIES, MAX_GROWTH * sum(tensor.numel() for tensor in tensors))
        for node in graph.nodes:
            if stored(node) is not None:
                self._first[node] = node
            elif self._is_pure(node, limit):
                operands = node.all_input_nodes
                self._first[node] = next((first for o in operands if (first := self._first[o]) is not None), None)
                if not (is_view(node) or node.target in CASTS) or any(o in self._computed for o in operands):
                    self._computed.add(node)
        self._names = Counter(storage_of(tensor) for tensor in tensors)  # of each stored tensor: how many it has
        self._shared = self._read_twice(graph)

    def _is_pure(self, node: Node, limit: int) -> bool:
        if node.op != "call_function" or not all(operand in self._first for operand in node.all_input_nodes):
            return False
        if node.target is not getitem:
            # Only ATen: what another library computes from constants, a quantised weight say, is to stay as it is.
            if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":
                return False
            if torch.Tag.nondeterministic_seeded in node.target.tags:
                return False
        tensors = tensors_of(node)
        sizes = [tensor.numel() for tensor in tensors]  # one that depends on values is no number
        return bool(tensors) and all(isinstance(n, int) for n in sizes) and sum(sizes) <= limit

    def _read_twice(self, graph: Graph) -> set[Node]:
        """Constants of which a stored tensor is read at several places, directly or through other constants."""
        several = object()
        reader: dict[object, object] = {}  # of a constant or of a stored tensor: the one place where it ends

        def note(read: object, place: object) -> None:
            reader[read] = place if reader.get(read, place) == place else several

        for node in reversed(graph.nodes):
            for operand in node.all_input_nodes:
                if operand in self._first and (node not in self._first or node in reader):
                    note(operand, (node, operand) if node not in self._first else reader[node])
        for node in self._first:
            if node in reader and (tensor := self._stored(node)) is not None:
                note(storage_of(tensor), reader[node])
        found: set[Node] = set()
        for node in self._first:
            tensor = self._stored(node)
            twice = tensor is not None and reader.get(storage_of(tensor)) is several
            if any(o in found for o in node.all_input_nodes) or (twice and not self._is_divided(node)):
                found.add(node)
        return found

    def _is_divided(self, stored: Node) -> bool:
        """Whether the places that read a stored tensor read parts of it that have no entry in common."""
        tensor = self._stored(stored)
        assert tensor is not None
        pieces = self.pieces(stored)
        if self._names[storage_of(tensor)] > 1 or any(len(self._readers(piece)) > 1 for piece in pieces):
            return False
        spans = sorted(map(_span, pieces.values()))
        return bool(spans) and all(before[1] <= after[0] for before, after in itertools.pairwise(spans))

    def pieces(self, stored: Node) -> dict[Node, torch.Tensor]:
        """The views of a stored tensor that operations read, without their values; none if one of these copies it."""
        tensor = self._stored(stored)
        assert tensor is not None
        whole = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        views: dict[Node, Any] = {stored: whole}
        pending = [stored]
        while pending:
            for user in pending.pop().users:
                if user not in self._first:
                    continue
                if user.target is not getitem and not returns_alias(user.target):
                    return {}
                views[user] = user.target(*map_arg(user.args, views.get), **user.kwargs)
                if any(_memory(view) != _memory(whole) for view in _parts(views[user])):
                    return {}
                pending.append(user)
        return {node: view for node, view in views.items() if self._readers(node)}

    def _readers(self, node: Node) -> list[Node]:
        """The operations that read a constant and give none."""
        return [user for user in node.users if user not in self._first]

    def __contains__(self, node: object) -> bool:
        return node in self._first

    def __iter__(self) -> Iterator[Node]:
        return iter(self._first)

    def add(self, node: Node) -> None:
        """A stored constant that is new."""
        self._first[node] = node

    def first_source(self, node: Node) -> Node | None:
        """The stored constant a value comes from (the first, when it is computed from several)."""
        return self._first.get(node)

    def sources(self, node: Node) -> list[Node]:
        """All stored constants that a value comes from."""
        found, pending, seen = [], [node], {node}
        while pending:
            current = pending.pop()
            if self._first.get(current) is current:
                found.append(current)
            for operand in reversed(current.all_input_nodes if current in self._first else []):
                if operand not in seen:
                    seen.add(operand)
                    pending.append(operand)
        return found

    def computed(self, node: Node) -> bool:
        """Whether arithmetic makes the value from stored ones, and not only another view of one."""
        return node in self._computed

    def shared(self, node: Node) -> bool:
        """Whether another operation reads the same stored tensor."""
        return node in self._shared

    def value(self, node: Node) -> torch.Tensor:
        """The value in float64.

        Smooth arithmetic, which float64 only makes more exact, is done in it. What rounds, compares or counts is done
        as the program does it, in its own dtypes: elsewhere it would find another side of an edge.
        """
        with torch.no_grad():
            return self._evaluate(_Key(node, True)).detach()

    def _evaluate(self, wanted: _Key) -> torch.Tensor:
        order, uses, values = self._plan(wanted)
        for key in order:
            values[key] = self._compute(key, values)
            self._keep(key, values[key])
            for operand in self._operands(key):
                uses[operand] -= 1
                if not uses[operand]:
                    del values[operand]
        return values[wanted]

    def _plan(self, wanted: _Key) -> tuple[list[_Key], dict[_Key, int], dict[_Key, Any]]:
        """What has to be computed, in order; how often each value is read; and the values that are there."""
        order: list[_Key] = []
        uses: dict[_Key, int] = {wanted: 1}
        values: dict[_Key, Any] = {}
        pending, seen = [(wanted, False)], set()
        while pending:
            key, operands_done = pending.pop()
            if operands_done:
                order.append(key)
            elif key in self._kept:
                self._kept.move_to_end(key)
                values[key] = self._kept[key]
            elif key not in seen:
                seen.add(key)
                pending.append((key, True))
                for operand in self._operands(key):
                    uses[operand] = uses.get(operand, 0) + 1
                    pending.append((operand, False))
        return order, uses, values

    def _operands(self, key: _Key) -> list[_Key]:
        node, wide = key
        if self._stored(node) is not None:
            return []
        if wide and not is_smooth(node):
            return [_Key(node, False)]
        return [_Key(operand, wide) for operand in node.all_input_nodes]

    def _compute(self, key: _Key, values: dict[_Key, Any]) -> Any:
        node, wide = key
        stored = self._stored(node)
        if stored is not None:
            return widen(stored) if wide else stored
        if wide and not is_smooth(node):
            return widen(values[_Key(node, False)])
        if wide and node.target in CASTS:
            return values[_Key(node.args[0], True)]
        args, kwargs = (map_arg(part, lambda n: values[_Key(n, wide)]) for part in (node.args, node.kwargs))
        result = node.target(*args, **kwargs)
        return widen(result) if wide else result

    def _keep(self, key: _Key, value: Any) -> None:
        size = _bytes(value)
        if self._stored(key.node) is not None or size > KEPT_BYTES // 8:
            return
        self._kept[key] = value
        self._kept_bytes += size
        while self._kept_bytes > KEPT_BYTES:
            _, dropped = self._kept.popitem(last=False)
            self._kept_bytes -= _bytes(dropped)


def widen(value: Any) -> Any:
    """Floating-point tensors in float64; others as they are."""
    if isinstance(value, list | tuple):
        return [widen(part) for part in value]
    return value.to(torch.float64) if value.is_floating_point() else value


def _bytes(value: Any) -> int:
    return sum(part.numel() * part.element_size() for part in _parts(value))


def _parts(value: Any) -> list[torch.Tensor]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _span(view: torch.Tensor) -> tuple[int, int]:
    """From where to where a view reaches in its memory."""
    length = sum((size - 1) * stride for size, stride in zip(view.shape, view.stride(), strict=True)) + 1
    return view.storage_offset(), view.storage_offset() + length


def storage_of(tensor: torch.Tensor) -> int:
    """What tells tensors of the same memory from others."""
    return tensor.untyped_storage().data_ptr() or id(tensor)
