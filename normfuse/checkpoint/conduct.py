"""What a program does in evaluation that belongs to training."""

from __future__ import annotations

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from normfuse.errors import some_of

aten = torch.ops.aten
# Operations that draw numbers only in training, and the place of the argument that says so.
_RANDOM_IN_TRAINING = {
    aten.dropout.default: 2,
    aten.dropout_.default: 2,
    aten.native_dropout.default: 2,
    aten.alpha_dropout.default: 2,
    aten.alpha_dropout_.default: 2,
    aten.feature_dropout.default: 2,
    aten.feature_dropout_.default: 2,
    aten.feature_alpha_dropout.default: 2,
    aten.feature_alpha_dropout_.default: 2,
    aten.rrelu.default: 3,
    aten.rrelu_.default: 3,
    aten.rrelu_with_noise.default: 4,
    **dict.fromkeys((aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input), 6),
}
_ADVICE = "pass training=self.training, or call it in training only"


def training_in_evaluation(program: ExportedProgram) -> str:
    """What a program does that belongs to training, in words; empty if it does nothing of the kind.

    These are functions that are told to train (``F.batch_norm(training=True)``, ``F.dropout`` without ``training``,
    ``dropout_p`` of attention), and random numbers.
    """
    found = [problem for node in program.graph.nodes if (problem := _problem(node))]
    return some_of(list(dict.fromkeys(found)))


def _problem(node: Node) -> str:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return ""
    name = f"F.{node.target._opname.rstrip('_')}{_place(node)}"
    if node.target in _RANDOM_IN_TRAINING:
        return (
            f"{name} drops at random in evaluation ({_ADVICE})" if _flag(node, _RANDOM_IN_TRAINING[node.target]) else ""
        )
    if node.target is aten.scaled_dot_product_attention.default:
        dropped = node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0.0)
        advice = "pass dropout_p=0.0 unless self.training"
        return f"{name} drops at random in evaluation ({advice})" if dropped else ""
    if node.target is aten.batch_norm.default and node.args[5] and node.args[3] is not None:
        return f"{name} takes the statistics of the batch in evaluation, and changes its running ones ({_ADVICE})"
    if torch.Tag.nondeterministic_seeded in node.target.tags:
        return f"{node.target._opname}{_place(node)} draws random numbers in evaluation"
    return ""


def _flag(node: Node, place: int) -> bool:
    argument = node.target._schema.arguments[place]
    given = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
    return given is None or bool(given)  # None stands for the mode that native_dropout was called in


def _place(node: Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path, kind = stack[-1] if stack else ("", "")
    kind = kind if isinstance(kind, str) else kind.__name__
    return f" in {path} ({kind.rpartition('.')[2]})" if path else f" in {kind.rpartition('.')[2]}" if kind else ""
