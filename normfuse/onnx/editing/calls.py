"""One ONNX operation on its way into the program, and the way back."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from onnx import NodeProto, helper
from torch.fx import Node

from normfuse.onnx.protos import outer_names

if TYPE_CHECKING:
    from .pairs import Front
    from .reading import Reader

aten = torch.ops.aten
_LIBRARY = torch.library.Library("normfuse_onnx", "DEF")
_DEFINED: set[str] = set()


class NotATensor(Exception):
    """Nothing is known of an operand or a result, or it is no tensor: the operation has no translation then."""


@dataclass(frozen=True)
class Slot:
    """Where an argument of an operation in the program stands in the file.

    Attributes:
        path: of the argument: its position, and its position in a list.
        node: position of the ONNX operation in the file.
        operand: which of its operands it is; None for a name that its graphs read.
        store: makes what the file holds of a new value; None where both are the same.
        required: whether the ONNX operation cannot do without it.
        factor: the attribute that multiplies it in the file, and is 1 once the value is a new one.
        axis: of a quantised weight, along which the operand then has a number for each channel.
    """

    path: tuple[int, ...]
    node: int
    operand: int | None
    store: Callable[[torch.Tensor], torch.Tensor] | None = None
    required: bool = False
    factor: str = ""
    axis: int | None = None


@dataclass(frozen=True)
class Origin:
    """The ONNX operations that one operation of the program stands for; the last one writes its result."""

    nodes: tuple[int, ...]
    slots: tuple[Slot, ...]


class Call:
    """One ONNX operation about to be read; what a translation is given.

    Attributes:
        node: the operation.
        operands: its operands in the program; None for absent ones.
        domain: whose operation it is: empty for ONNX's own, None for one that the file defines itself.
    """

    def __init__(self, reader: Reader, position: int, node: NodeProto, front: Front | None) -> None:
        self._reader, self._position, self.node = reader, position, node
        self.front = front
        own = () if front is None else front.node.output  # which nothing else reads, so that it is no value here
        self.operands = [None if name in own else reader.value(name) for name in node.input]
        self._attributes = {attribute.name: attribute for attribute in node.attribute}
        self.domain = reader.file.domain(node)
        self._placed: set[int] = set()  # operands that operations of the program read
        self.restored = reader.restored.get(position)
        self.file = reader.file
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

    def is_tensor(self, operand: int) -> bool:
        """Whether an operand is there, and known to be a tensor."""
        node = self.operand(operand)
        return node is not None and isinstance(node.meta["val"], torch.Tensor)

    def only_tensors(self) -> bool:
        """Whether every operand is one."""
        return all(self.is_tensor(operand) for operand in range(len(self.operands)))

    def tensor(self, operand: int) -> torch.Tensor:
        """What an operand looks like. Raises :class:`NotATensor`."""
        node = self.operand(operand)
        value = None if node is None else node.meta["val"]
        if not isinstance(value, torch.Tensor):
            raise NotATensor(f"operand {operand} of {self.node.op_type}")
        return value

    def shape(self, operand: int) -> list[Any]:
        """The sizes of an operand. Raises :class:`NotATensor`."""
        return list(self.tensor(operand).shape)

    def is_fixed(self) -> bool:
        """Whether all operands are constants, so that the result is one."""
        fixed = self._reader.fixed
        return self.front is None and all(operand is None or operand in fixed for operand in self.operands)

    def operand(self, number: int) -> Node | None:
        return self.operands[number] if number < len(self.operands) else None

    def result(self, number: int = 0) -> torch.Tensor:
        """What a result looks like. Raises :class:`NotATensor`."""
        result = self._reader.fake(self.node.output[number])
        if result is None:
            raise NotATensor(f"result {number} of {self.node.op_type}")
        return result

    def sizes(self) -> list[int]:
        """The sizes of the result, -1 for those that differ from run to run."""
        return [size if isinstance(size, int) else -1 for size in self.result().shape]

    def only_first(self) -> bool:
        """Whether no result but the first is read."""
        return not any(self._reader.uses[name] for name in self.node.output[1:] if name)

    def is_padded(self, kernel: Sequence[Any]) -> bool:
        """Whether a window of this size may reach beyond its operand."""
        auto = self.get("auto_pad", "NOTSET")
        if auto in ("NOTSET", ""):
            return any(self.get("pads", []))
        return auto != "VALID" and any(size != 1 for size in kernel)

    def derived(self, target: Any, constant: Node, *args: Any) -> Node:
        """A constant that is computed from another one, as the program needs it."""
        return self._reader.derived(target, constant, *args)

    def step(
        self,
        target: Any,
        *args: Any,
        slots: Sequence[Slot] = (),
        optional: Mapping[int, int] = {},
        value: torch.Tensor | None = None,
    ) -> Node:
        """Put a part of the operation into the program whose result has no name in the file.

        See :meth:`emit`; `value` is what the result looks like, where the operation cannot say.
        """
        found = [*slots, *self._slots(args, optional, slots)]
        node = self._reader.inner(target, args, self._position, self.node, value)
        self._reader.origins[node.name] = Origin((self._position,), tuple(found))
        return node

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
        nodes = (self._position,) if self.front is None else (self.front.position, self._position)
        names = list(self.node.output)[:outputs]
        node = self._reader.add(target, args, self._position, self.node, names)
        self._reader.origins[node.name] = Origin(nodes, tuple(found))
        if self.is_fixed():
            self._reader.fixed.add(node)
        return True

    def emit_pair(self) -> bool:
        """The operation and the one in front of it as one, see :mod:`.pairs`."""
        assert self.front is not None
        own = next(i for i, name in enumerate(self.node.input) if name not in self.front.node.output)
        if self.front.axis is None:
            return self._emit_product(*self.front[:2], own)
        return self._emit_scales(*self.front[:2], own, self.front.axis)

    def _emit_product(self, place: int, maker: NodeProto, bias: int) -> bool:
        """A product with a constant and the Add of its bias."""
        x, weight = (self._reader.value(name) for name in maker.input)
        slots = (Slot((0,), place, 0), Slot((1,), place, 1, torch.Tensor.t), Slot((2,), self._position, bias))
        args = (x, self.derived(aten.t.default, weight), self.operands[bias])
        return self.emit(aten.linear.default, *args, slots=slots)

    def _emit_scales(self, place: int, maker: NodeProto, numbers: int, axis: int) -> bool:
        """What integers are multiplied by; the measured scale of the input belongs to them, and stays where it is."""
        value = self.tensor(numbers)
        operand = next(i for i, name in enumerate(maker.input) if name in self.file.constants)
        scale = self.derived(aten.reshape.default, self._reader.value(maker.input[operand]), [-1])
        if scale.meta["val"].shape[0] == 1:
            scale = self.derived(aten.expand.default, scale, [value.shape[axis]])
        rest = [1] * (value.dim() - 1 - axis % value.dim())
        slot = Slot((1, 1), place, operand, lambda scale: scale.reshape(-1, *rest))
        return self.scale_channels(self.operands[numbers], scale, slot, axis)

    def scale_channels(self, value: Node, scale: Node, slot: Slot, axis: int = -1) -> bool:
        """Put the operation into the program as a value times a number for each entry of an axis."""
        letters = "abcdefgh"[: value.meta["val"].dim()]
        equation = f"{letters},{letters[axis]}->{letters}"
        return self.emit(aten.einsum.default, equation, [value, scale], slots=[slot])

    def factor(self, *path: int) -> tuple[Node, Slot]:
        """A factor for each channel of the result, which the scales of the weight take, and its slot."""
        weight = self.restored
        assert weight is not None
        slot = Slot(path, weight.position, weight.operand, weight.store, axis=weight.axis)
        return self._reader.factors[self._position], slot

    def slot(self, argument: int, operand: int, **more: Any) -> Slot:
        """Where an argument of the program's operation stands; see :class:`Slot`."""
        return Slot((argument,), self._position, operand, **more)

    def opaque(self, parts: Sequence[Node] = (), read: Container[int] = ()) -> bool:
        """Put the operation into the program as one of which nothing is known.

        Args:
            parts: what is known of it, see :meth:`step`.
            read: the operands that these read.
        """
        own = [None if number in read else operand for number, operand in enumerate(self.operands)]
        operands = [*own, *(self._reader.value(name) for name in outer_names(self.node)), *parts]
        slots = [
            Slot((0, place), self._position, place if place < len(self.operands) else None)
            for place, operand in enumerate(operands[: len(operands) - len(parts)])
            if operand is not None
        ]
        outputs = list(self.node.output)
        while outputs and not outputs[-1]:
            outputs.pop()
        node = self._reader.add(
            unknown_operation(self.node.op_type), (operands,), self._position, self.node, outputs or [""]
        )
        self._reader.origins[node.name] = Origin((self._position,), tuple(slots))
        return True

    def unread(self) -> None:
        """Put the operation into the program as one whose results nobody reads: its operands may change."""
        fixed = self._reader.fixed
        free = [n for n, operand in enumerate(self.operands) if self.is_tensor(n) and operand not in fixed]
        self.opaque([self.step(aten.empty_like.default, self.operands[number]) for number in free], free)

    def _slots(self, args: tuple, optional: Mapping[int, int], given: Sequence[Slot]) -> list[Slot]:
        waiting: dict[Node, list[int]] = {}
        self._placed.update(slot.operand for slot in given if slot.operand is not None)
        for number, operand in enumerate(self.operands):
            if operand is not None and number not in self._placed:
                waiting.setdefault(operand, []).append(number)
        found = []
        for path, value in arguments(args):
            if path in {slot.path for slot in given}:
                continue
            if isinstance(value, Node) and waiting.get(value):
                operand = waiting[value].pop(0)
                found.append(Slot(path, self._position, operand))
                self._placed.add(operand)
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


def unknown_operation(kind: str) -> Any:
    """An operation of which nothing is known but its name."""
    name = re.sub(r"\W", "_", kind) or "unnamed"
    if name not in _DEFINED:
        _LIBRARY.define(f"{name}(Tensor?[] operands) -> Tensor[]")
        _DEFINED.add(name)
    return getattr(torch.ops.normfuse_onnx, name).default
