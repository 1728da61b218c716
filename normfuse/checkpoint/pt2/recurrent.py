"""Recurrent networks: whether their weights have the shapes that they must have, and what they return.

ATen does not check the shapes before it reads the weights; torch would find the results out step by step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from normfuse.checkpoint.errors import CheckpointError

_aten = torch.ops.aten
_GATES = {_aten.lstm.input: 4, _aten.gru.input: 3, _aten.rnn_tanh.input: 1, _aten.rnn_relu.input: 1}


def is_recurrent(function: Any) -> bool:
    """Whether an operation is a whole recurrent network."""
    return function in _GATES


def result(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
    """Tensors of the shapes that a recurrent network returns.

    CheckpointError if its states and weights do not fit each other.
    """
    names = [argument.name for argument in function._schema.arguments]
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    missing = [name for name in names if name not in given]
    if missing:
        raise CheckpointError(f"{function} is called without {missing[0]}")
    tensor, states = given["input"], given["hx"] if isinstance(given["hx"], list) else [given["hx"]]
    lstm = function is _aten.lstm.input
    if len(states) != (2 if lstm else 1) or tensor.dim() not in (2, 3):
        raise CheckpointError(f"{function} is given {len(states)} states and an input of {tensor.dim()} axes")
    batch = tensor.shape[1 - given["batch_first"] :][:1] if tensor.dim() == 3 else ()
    directions = 1 + given["bidirectional"]
    layers = given["num_layers"] * directions
    out, hidden = states[0].shape[-1], states[-1].shape[-1]
    shapes = [(layers, *batch, out), (layers, *batch, hidden)][: len(states)]
    weights = [list(group) for group in _weights(given, tensor.shape[-1], out, hidden, _GATES[function], directions)]
    expected = [*shapes, *(shape for group in weights for shape in group)]
    found = [*states, *given["params"]]
    if [tuple(t.shape) for t in found] != expected or any(t.dtype != tensor.dtype for t in found):
        raise CheckpointError(
            f"{function} of {layers} layers has states or weights of other shapes or dtypes than it takes"
        )
    return (tensor.new_empty((*tensor.shape[:-1], out * directions)), *(torch.empty_like(state) for state in states))


def _weights(
    given: Mapping[str, Any], features: int, out: int, hidden: int, gates: int, directions: int
) -> Iterator[list[tuple[int, ...]]]:
    """The shapes of the weights of every layer and direction, in order."""
    count = len(given["params"])
    for _ in range(min(given["num_layers"], count)):
        for _ in range(directions):
            yield [(gates * hidden, features), (gates * hidden, out)]
            if given["has_biases"]:
                yield [(gates * hidden,)] * 2
            if out != hidden:
                yield [(out, hidden)]
        features = out * directions
