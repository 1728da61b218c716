"""Values inside a graph that edits leave as they are, so that they can be compared as outputs are."""

from __future__ import annotations

from onnx import ModelProto, NodeProto

from .onnx_file import OnnxFile
from .reading import Reading

#: Operations whose results lie between -1 and 1, however large what they read is.
BOUNDED = frozenset(("Sigmoid", "HardSigmoid", "Softmax", "Tanh", "Erf"))
_MOVING = frozenset(("Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Cast"))
_MOST = 16


def inner_values(reading: Reading, edited: ModelProto) -> list[tuple[str, str]]:
    """What the operations read that write the outputs, through any number of operations that folding does not know.

    Outputs of a Sigmoid or a Softmax may be nearly 0 or 1 whatever they are made from; what they are made from shows
    more.

    Args:
        reading: of the file; all that opaque operations read is the same after the edits.
        edited: the model after them.

    Returns:
        Names in the file, and in the edited model.
    """
    file = reading.file
    positions = {id(node): position for position, node in enumerate(file.proto.graph.node)}
    before, after = _makers(file.proto), _makers(edited)
    own = {value.name for value in file.proto.graph.output}
    pending, seen, found = [(name, name) for name in sorted(own)], set(), []
    while pending:
        pair = pending.pop(0)
        if pair in seen or pair[0] not in before or pair[1] not in after:
            continue
        old, new = before[pair[0]], after[pair[1]]
        if old.op_type != new.op_type:
            continue
        seen.add(pair)
        if old.op_type in _MOVING and file.is_own(old):
            pending.append((old.input[0], new.input[0]))
        elif positions[id(old)] in reading.opaque:
            read = [(a, b) for a, b in zip(old.input, new.input, strict=False) if a in before and b in after]
            found += [(a, b) for a, b in read if (a, b) not in found and a not in own and b not in own]
            pending += read
    return [pair for pair in found if _is_frontier(before[pair[0]], positions, reading)][:_MOST]


def is_bounded(file: OnnxFile, name: str) -> bool:
    """Whether a value lies between -1 and 1 by what writes it."""
    makers = _makers(file.proto)
    while name in makers and makers[name].op_type in _MOVING and file.is_own(makers[name]):
        name = makers[name].input[0]
    return name in makers and makers[name].op_type in BOUNDED and file.is_own(makers[name])


def _is_frontier(maker: NodeProto, positions: dict[int, int], reading: Reading) -> bool:
    """Whether folding knows what writes a value; what stands before it is compared otherwise."""
    return positions[id(maker)] not in reading.opaque


def _makers(model: ModelProto) -> dict[str, NodeProto]:
    return {name: node for node in model.graph.node for name in node.output if name}
