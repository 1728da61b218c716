"""What a program does with its inputs: which are masks, and which integers mean something."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

aten = torch.ops.aten

# Operands of products and tables: what arrives here is data, whatever it was made of.
_DATA = frozenset(
    "linear matmul mm bmm addmm mv dot conv1d conv2d conv3d convolution einsum layer_norm rms_norm group_norm "
    "batch_norm native_layer_norm gelu relu silu tanh sigmoid exp erf sin cos".split()
)
_SOFTMAX = frozenset("softmax _softmax _safe_softmax log_softmax _log_softmax".split())
_COMPARE = frozenset("eq ne lt le gt ge".split())
_JOIN = frozenset(
    "add sub rsub where masked_fill maximum minimum logical_and logical_or bitwise_and bitwise_or".split()
)


@dataclass
class Role:
    """What becomes of an input.

    Attributes:
        mask: it decides what attention, or a selection, sees.
        data: it takes part in arithmetic as well.
        rows: how many rows a table has that it picks from; None if it picks from none.
        compared: integers that it is compared with, such as the number of a padding token.
    """

    mask: bool = False
    data: bool = False
    rows: int | None = None
    compared: list[int] = field(default_factory=list)


def roles(program: ExportedProgram) -> list[Role]:
    """The role of each tensor that a program takes, in order."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    specs = program.graph_signature.input_specs
    return [_role(nodes[spec.arg.name]) for spec in specs if spec.kind is InputKind.USER_INPUT]


def _role(start: Node) -> Role:
    role, seen, queue = Role(), set(), [(start, False)]
    while queue:
        node, joined = queue.pop()
        for user in node.users:
            if user.op != "call_function" or (user, joined) in seen:
                continue
            seen.add((user, joined))
            step = _follow(role, node, user, joined)
            if step is not None:
                queue.append((user, step))
    return role


def _follow(role: Role, node: Node, user: Node, joined: bool) -> bool | None:
    """Notes what a user does with a value; whether it was joined with others on the way if its result says as much."""
    name = getattr(user.target, "_opname", "").rstrip("_")
    if isinstance(user.meta.get("val"), (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)):
        return None  # its size, not its entries
    places = [place for place, arg in enumerate(user.args) if arg is node]
    if name == "scaled_dot_product_attention":
        is_mask = user.kwargs.get("attn_mask") is node or places == [3]
        role.mask, role.data = role.mask or is_mask, role.data or not is_mask
        return None
    if name in _SOFTMAX:
        role.mask, role.data = role.mask or joined, role.data or not joined
        return None
    if name == "embedding":
        weight = user.args[0].meta.get("val")
        rows = int(weight.shape[0]) if weight is not None and places == [1] else None
        role.rows = rows if role.rows is None else min(role.rows, rows or role.rows)
        return None
    if name in ("baddbmm", "addmm") and places == [0]:
        return True
    if name in _DATA or name in ("baddbmm", "addmm"):
        role.data = True
        return None
    if name in _COMPARE and len(user.args) > 1 and type(user.args[1]) is int:
        role.compared.append(user.args[1])
    if name in ("where", "masked_fill") and places == [1 if name == "masked_fill" else 0]:
        role.mask = True
    others = [arg for arg in user.all_input_nodes if arg is not node]
    return joined or (name in _JOIN and bool(others or name in ("where", "masked_fill")))
