"""What folding decided, written into the file it was read from: weights, biases, and operations that go or come."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import numpy as np
import torch
from onnx import ModelProto, NodeProto, helper
from torch.export import ExportedProgram
from torch.fx import Node

from normfuse.onnx.protos import (
    all_names,
    attribute,
    graphs_of,
    reads,
    remove_attribute,
    rename,
    replace_entries,
    sort_by_place,
    to_proto,
    uses_of,
)

from .calls import Origin, Slot, arguments, aten
from .inner import inner_values
from .onnx_file import label
from .reading import Reading

Store = Callable[[torch.Tensor], torch.Tensor] | None  # see Slot.store
_ADDED = {
    aten.mul.Tensor: "Mul",
    aten.add.Tensor: "Add",
    aten.maximum.default: "Max",
    aten.minimum.default: "Min",
    aten.mse_loss.default: "Sub",  # and a product of the difference by itself
}
_STORED_FOR = re.compile(r"(.*)\.(?:scale|shift)(?:_folded(?:_\d+)?)*")  # what folding calls the numbers of a map
_SUFFIX = re.compile(r"(_folded(_\d+)?)+$")


class EditError(ValueError):
    """Folding made something that cannot be written as edits of the file; one line.

    Attributes:
        position: of the operation that would have to be left as it is; None where that is not known.
    """

    def __init__(self, message: str, position: int | None = None) -> None:
        super().__init__(message)
        self.position = position


@dataclass
class Edited:
    """A model after the edits.

    Attributes:
        proto: the model; constants beside the file still lie there.
        fresh: names of the constants that are new or changed.
        unlisted: names of constants that were listed among the inputs, and of which the edits used the value.
        inner: values that are the same in the file and after the edits, by their names in both: what the operations
            read that write the outputs.
    """

    proto: ModelProto
    fresh: set[str] = field(default_factory=set)
    unlisted: list[str] = field(default_factory=list)
    inner: list[tuple[str, str]] = field(default_factory=list)


def edit(reading: Reading, folded: ExportedProgram) -> Edited:
    """The file of a reading, changed as its program was."""
    return _Editor(reading, folded).run()


def rewritten_maps(reading: Reading, folded: ExportedProgram) -> dict[int, list[Node]]:
    """Maps that stay with other numbers: their positions in the file, and the Mul and the Add that they became."""
    alive = {node.name for node in folded.graph.nodes}
    gone = {max(origin.nodes) for name, origin in reading.origins.items() if name not in alive}
    targets = {spec.arg.name: spec.target for spec in folded.graph_signature.input_specs if spec.target}
    found: dict[int, list[Node]] = {}
    for node in folded.graph.nodes:
        if node.op != "call_function" or node.name in reading.names or node.target not in _ADDED:
            continue
        stored = _STORED_FOR.fullmatch(targets.get(getattr(node.args[1], "name", ""), ""))
        position = reading.paths.get(stored[1]) if stored else None
        if position in gone:
            found.setdefault(position, []).append(node)
    return found


class _Editor:
    def __init__(self, reading: Reading, folded: ExportedProgram) -> None:
        self._reading, self._folded = reading, folded
        self._proto = ModelProto()
        self._proto.CopyFrom(reading.file.proto)
        self._graph = self._proto.graph
        self._nodes = dict(enumerate(self._graph.node))  # by position; those that go leave
        self._used_before = uses_of(self._graph)
        self._taken = all_names(self._proto)
        self._names = dict(reading.names)
        self._before = {node.name: node for node in reading.program.graph.nodes}
        self._behind: dict[int, list[NodeProto]] = {}  # new operations by the position that they follow
        self._places: dict[str, int] = {}  # where values of the program are written
        self._targets = {spec.arg.name: spec.target for spec in folded.graph_signature.input_specs if spec.target}
        self._fresh: dict[tuple[str, Store], str] = {}
        self._wished: dict[str, set[str]] = {}  # which new constants want to be called as an old one is
        self._renamed: dict[str, str] = {}

    def run(self) -> Edited:
        nodes = list(self._folded.graph.nodes)
        alive = {node.name for node in nodes}
        for name, origin in self._reading.origins.items():
            if name in alive:
                self._places[name] = max(origin.nodes)
        norms = self._norms_that_stay()
        products = {product for _, product in norms.values()}
        for node in nodes:
            if node.op == "call_function" and node.name in self._reading.origins:
                self._rewire(node, self._reading.origins[node.name])
            elif node in norms:
                self._readjust(node, *norms[node])
            elif node not in products and node.op == "call_function" and node.name not in self._before and node.users:
                self._insert(node)
        for position in self._gone(alive) - {position for position, _ in norms.values()}:
            del self._nodes[position]
        self._keep_output_names(nodes[-1])
        unlisted = self._unlist()
        self._assemble()
        self._clear()
        self._settle_names()
        self._check()
        return Edited(self._proto, set(self._fresh.values()), unlisted, inner_values(self._reading, self._proto))

    # -- operations --------------------------------------------------------------------------------------------

    def _gone(self, alive: Collection[str]) -> set[int]:
        """Positions of operations that are no longer in the program. EditError where one of several parts is."""
        parts: dict[int, set[bool]] = {}
        for name, origin in self._reading.origins.items():
            for position in origin.nodes:
                parts.setdefault(position, set()).add(name in alive)
        halves = [position for position, states in parts.items() if len(states) > 1]
        if halves:
            raise EditError(f"a part of {label(self._graph.node[halves[0]])} would go", halves[0])
        return {position for position, states in parts.items() if states == {False}}

    def _rewire(self, node: Node, origin: Origin) -> None:
        """Let an operation that stays read what it reads in the folded program."""
        before, args = self._before[node.name], node.args
        if (before.target, node.target) == (aten.layer_norm.default, aten.rms_norm.default):
            norm = self._nodes[origin.nodes[0]]
            norm.op_type = "RMSNormalization"  # all attributes mean the same
            del norm.output[1:]
            args = (*args[:3], None, *args[3:])
        elif node.target is not before.target:
            raise EditError(f"{node.name} became {node.target}", max(origin.nodes))
        old, new = dict(arguments(before.args)), dict(arguments(args))
        for slot in origin.slots:
            was, now = old.get(slot.path), new.get(slot.path)
            if (was and was.name) != (now and now.name):
                self._set(slot, was, now, origin)
        known = {slot.path for slot in origin.slots}
        for path, value in new.items():
            if path not in known and isinstance(value, Node) and value.name != getattr(old.get(path), "name", None):
                raise EditError(f"{node.name} got an operand that cannot be stored in the file", max(origin.nodes))

    def _set(self, slot: Slot, old: Node | None, new: Node | None, origin: Origin) -> None:
        target = self._nodes[slot.node]
        if new is None and len(origin.nodes) > 1 and slot.node == origin.nodes[-1]:
            # A product whose bias went writes what the Add behind it wrote.
            product, addition = (self._nodes[position] for position in origin.nodes)
            self._call(product.output[0], addition.output[0])
            del self._nodes[slot.node]
            return
        if new is None and not slot.required and slot.operand is not None:
            if slot.operand < len(target.input):
                target.input[slot.operand] = ""
            while target.input and not target.input[-1]:
                target.input.pop()
            return
        if new is None:
            assert old is not None, "only what was there can go"
            fill = float(slot.operand == 1)  # the gain of a norm; others are biases
            value = old.meta["val"]
            tensor = torch.full(tuple(value.shape), fill, dtype=value.dtype)
            name = self._store(f"{old.name}:{fill}", slot.store, tensor, self._wish(old) or old.name)
        else:
            name = self._name(new, slot.store, old)
        remove_attribute(target, slot.factor)
        if slot.operand is None:
            assert old is not None, "graphs read only what was there"
            for graph in graphs_of(target):
                rename(graph, {self._names[old.name]: name})
            return
        while len(target.input) <= slot.operand:
            target.input.append("")
        target.input[slot.operand] = name
        if target.op_type == "MatMul" and slot.operand == 2:
            target.op_type = "Gemm"
        if slot.axis is not None and new is not None:
            self._spread(target, slot.axis, new.meta["val"].numel())

    def _spread(self, target: NodeProto, axis: int, channels: int) -> None:
        """Let a DequantizeLinear have a zero point for each of the scales that it now has along an axis."""
        remove_attribute(target, "axis")
        target.attribute.append(helper.make_attribute("axis", axis))
        file, zero = self._reading.file, target.input[2] if len(target.input) > 2 else ""
        if zero and file.array(zero).size != channels:
            points = torch.from_numpy(file.array(zero).reshape(-1).copy()).expand(channels)
            target.input[2] = self._store(f"{zero}:{channels}", None, points, zero)

    def _norms_that_stay(self) -> dict[Node, tuple[int, Node]]:
        """BatchNormalizations of which a Mul and an Add are left: one operation with other numbers does the same.

        By the Add: the position in the file, and the Mul.
        """
        found: dict[Node, tuple[int, Node]] = {}
        for position, pieces in rewritten_maps(self._reading, self._folded).items():
            kinds = [piece.target for piece in pieces]
            norm = self._nodes[position]
            if norm.op_type == "BatchNormalization" and kinds == [aten.mul.Tensor, aten.add.Tensor]:
                product, addition = pieces
                channels = self._reading.file.array(norm.input[3]).size
                single = all(self._stored(piece.args[1]).numel() in (1, channels) for piece in pieces)
                if single and list(product.users) == [addition]:
                    found[addition] = (position, product)
        return found

    def _readjust(self, addition: Node, position: int, product: Node) -> None:
        """Let a BatchNormalization compute ``x * scale + shift``."""
        norm, file = self._nodes[position], self._reading.file
        names = list(norm.input)
        mean, variance = (file.array(name).astype(np.float64) for name in names[3:5])
        eps = attribute(norm, "epsilon", 1e-5)
        scale, shift = (
            np.broadcast_to(self._stored(node.args[1]).double().numpy().ravel(), mean.shape)
            for node in (product, addition)
        )
        numbers = {1: scale * np.sqrt(variance + eps), 2: shift + scale * mean}
        for place, values in numbers.items():
            tensor = torch.from_numpy(values.copy()).to(self._stored(product.args[1]).dtype)
            name = self._store(f"{addition.name}:{place}", None, tensor, names[place])
            self._wished.setdefault(names[place], set()).add(name)
            norm.input[place] = name
        norm.input[0] = self._name(product.args[0])
        self._names[addition.name] = norm.output[0]
        self._places[addition.name] = position

    def _stored(self, node: Node) -> torch.Tensor:
        return self._folded.state_dict[self._targets[node.name]].detach()

    def _insert(self, node: Node) -> None:
        """A Mul, an Add, a bound or a squared difference that was not there before."""
        if node.target not in _ADDED:
            raise EditError(f"{node.target} was added")
        operands = [argument for argument in node.args[:2] if isinstance(argument, Node)]
        if len(operands) != 2:
            raise EditError(f"{node.name} has {len(operands)} operands")
        place = max(self._places.get(self._source(operand).name, -1) for operand in operands)
        result = self._free(f"{self._base(operands[0])}_{_ADDED[node.target].lower()}")
        self._names[node.name] = result
        self._places[node.name] = place
        inputs = [self._name(operand) for operand in operands]
        behind = self._behind.setdefault(place, [])
        behind.append(helper.make_node(_ADDED[node.target], inputs, [result], name=result))
        if node.target is aten.mse_loss.default:
            self._names[node.name] = square = self._free(f"{self._base(operands[0])}_square")
            behind.append(helper.make_node("Mul", [result, result], [square], name=square))

    def _source(self, node: Node) -> Node:
        """The operation that writes a value, where that is one of several."""
        return node.args[0] if node.op == "call_function" and "getitem" in str(node.target) else node

    def _base(self, node: Node) -> str:
        return _SUFFIX.sub("", self._names.get(node.name, node.name))

    def _keep_output_names(self, output: Node) -> None:
        """The results of the graph are called as before, whatever writes them now."""
        own = [value.name for value in self._graph.output]
        fixed = {*own, *(value.name for value in self._graph.input), *(t.name for t in self._graph.initializer)}
        alive = {self._names[node.name] for node in self._folded.graph.nodes if node.name in self._names}
        for name, returned in dict(zip(own, output.args[0], strict=False)).items():  # one may be listed twice
            result = returned.args[0][0]
            written = self._name(result)
            if written == name:
                continue
            maker = self._source(result).name
            if written in fixed or written in self._renamed or maker not in self._places:
                place = self._places.get(maker, -1)
                self._behind.setdefault(place, []).append(helper.make_node("Identity", [written], [name], name=name))
                continue
            if name in alive:  # what wrote the result before is read by what does now
                self._call(name, self._free(f"{name}_inner"))
            self._call(written, name)

    def _call(self, old: str, new: str) -> None:
        """Let a value have another name."""
        for earlier, name in self._renamed.items():
            if name == old:
                self._renamed[earlier] = new
        self._renamed[old] = new

    # -- constants ---------------------------------------------------------------------------------------------

    def _name(self, node: Node, store: Store = None, old: Node | None = None) -> str:
        """What a value is called in the file; a new constant is stored there."""
        if node.name in self._names:
            return self._names[node.name]
        if node.op != "placeholder":
            inside = self._reading.origins.get(node.name)
            raise EditError(f"{node.name} has no name in the file", max(inside.nodes) if inside else None)
        wish = self._wish(old)
        name = self._store(node.name, store, self._stored(node), wish or _SUFFIX.sub("", self._targets[node.name]))
        if wish is not None:
            self._wished.setdefault(wish, set()).add(name)
        return name

    def _wish(self, old: Node | None) -> str | None:
        """What a constant in place of another one would best be called: as that one, or as what it is computed from."""
        while isinstance(old, Node):
            if old.name in self._names:
                return self._names[old.name]
            old = old.args[0] if old.op == "call_function" else None
        return None

    def _store(self, key: str, store: Store, tensor: torch.Tensor, base: str) -> str:
        if (key, store) not in self._fresh:
            name = self._free(base)
            self._graph.initializer.append(to_proto(tensor if store is None else store(tensor), name))
            if self._proto.ir_version < 4:
                stored = self._graph.initializer[-1]
                self._graph.input.append(helper.make_tensor_value_info(name, stored.data_type, stored.dims))
            self._fresh[key, store] = name
        return self._fresh[key, store]

    def _free(self, base: str) -> str:
        name, count = f"{base}_folded" if base in self._taken else base, 1
        while name in self._taken:
            name, count = f"{base}_folded_{count}", count + 1
        self._taken.add(name)
        return name

    # -- the graph as a whole ----------------------------------------------------------------------------------

    def _unlist(self) -> list[str]:
        """Take constants off the inputs that operations read which have changed or gone.

        Whoever sets one has to see that it no longer does what it did.
        """
        used = set()
        for position, before in enumerate(self._reading.file.proto.graph.node):
            if before != self._nodes.get(position):
                used.update(before.input)
        used &= {*self._reading.file.listed} - {*self._reading.file.settable}
        if used:
            replace_entries(self._graph.input, [value for value in self._graph.input if value.name not in used])
        return [name for name in self._reading.file.listed if name in used]

    def _assemble(self) -> None:
        """Operations in the order of the file, new ones behind what they read."""
        order = list(self._behind.get(-1, []))
        for position in range(len(self._graph.node)):
            order += [self._nodes[position]] if position in self._nodes else []
            order += self._behind.get(position, [])
        replace_entries(self._graph.node, order)
        if self._renamed:
            rename(self._graph, self._renamed, outputs=True)

    def _clear(self) -> None:
        """Take away constants, and what computes them, that nothing reads any more."""
        kept = {value.name for value in self._graph.output}
        nodes = list(self._graph.node)
        read = {id(node): [name for name in reads(node) if name] for node in nodes}
        while True:
            uses = {name for node in nodes for name in read[id(node)]} | kept
            idle = self._used_before.keys() - uses
            left = [n for n in nodes if not any(n.output) or not all(name in idle for name in n.output if name)]
            if len(left) == len(nodes):
                break
            nodes = left
        if len(nodes) < len(self._graph.node):
            replace_entries(self._graph.node, nodes)
        stored = {tensor.name for tensor in self._reading.file.proto.graph.initializer} - {*self._reading.file.settable}
        for entries in (self._graph.initializer, self._graph.input):
            left = [entry for entry in entries if entry.name not in idle or entry.name not in stored]
            if len(left) < len(entries):
                replace_entries(entries, left)
        written = {name for node in self._graph.node for name in node.output}
        written |= {value.name for value in self._graph.input} | {tensor.name for tensor in self._graph.initializer}
        replace_entries(self._graph.value_info, [info for info in self._graph.value_info if info.name in written])

    def _settle_names(self) -> None:
        """A changed constant is called as the old one was, and stands where it stood, if that one is gone."""
        left = {tensor.name for tensor in self._graph.initializer}
        left |= {name for node in self._graph.node for name in node.output}
        left |= {value.name for value in (*self._graph.input, *self._graph.output)}
        places = {t.name: place for place, t in enumerate(self._reading.file.proto.graph.initializer)}
        listed = {v.name: place for place, v in enumerate(self._reading.file.proto.graph.input)}
        renamed: dict[str, str] = {}
        for old, wishing in self._wished.items():
            if old not in left and len(wishing) == 1 and old not in renamed.values():
                renamed[next(iter(wishing))] = old
        if not renamed:
            return
        for entries in (self._graph.initializer, self._graph.input):
            for entry in entries:
                entry.name = renamed.get(entry.name, entry.name)
        rename(self._graph, renamed)
        self._fresh = {key: renamed.get(name, name) for key, name in self._fresh.items()}
        sort_by_place(self._graph.initializer, places)
        sort_by_place(self._graph.input, listed)

    def _check(self) -> None:
        known = {"", *(value.name for value in self._graph.input), *(t.name for t in self._graph.initializer)}
        known |= {tensor.values.name for tensor in self._graph.sparse_initializer}
        known |= {name for node in self._graph.node for name in node.output}
        missing = [name for node in self._graph.node for name in reads(node) if name not in known]
        missing += [value.name for value in self._graph.output if value.name not in known]
        if missing:
            raise EditError(f"nothing would write {missing[0]!r} any more")
