"""Recurrent layers and their cells."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .base import SEQUENCE, Case

aten = torch.ops.aten


def layers(function: Callable[..., tuple[Tensor, ...]], gates: int, *, cells: bool = False) -> list[Case]:
    """One layer, with and without biases; two of them in both directions; the input as the state."""
    inward, onward, bias = (5 * gates, 6), (5 * gates, 5), (5 * gates,)
    upper, square = (5 * gates, 10), (6 * gates, 6)

    def apply(x: Tensor, state: Tensor, *weights: Tensor, layers: int = 1, directions: int = 1) -> tuple[Tensor, ...]:
        with_biases = len(weights) % 4 == 0
        states = [state, state] if cells else state
        return function(x, states, weights, with_biases, layers, 0.0, False, directions > 1, True)

    both = (inward, onward, bias, bias)
    return [
        Case(apply, (SEQUENCE, (1, 2, 5)), both),
        Case(apply, (SEQUENCE, (1, 2, 5)), (inward, onward)),
        Case(
            lambda x, *w: apply(x, x.new_zeros(4, 2, 5), *w, layers=2, directions=2),
            (SEQUENCE,),
            (*both, *both, *((upper, onward, bias, bias) * 2)),
        ),
        Case(lambda x, *w: apply(x, x.transpose(0, 1), *w), ((2, 1, 6),), (square, square, square[:1], square[:1])),
    ]


def cells(function: Callable[..., Tensor | tuple[Tensor, ...]], gates: int, *, two: bool = False) -> list[Case]:
    """With and without biases; the input as the state; one weight for both."""

    def apply(x: Tensor, state: Tensor, *weights: Tensor) -> Tensor | tuple[Tensor, ...]:
        return function(x, [state, state] if two else state, *weights)

    inward, onward, bias, square = (5 * gates, 6), (5 * gates, 5), (5 * gates,), (6 * gates, 6)
    return [
        Case(apply, ((4, 6), (4, 5)), (inward, onward, bias, bias)),
        Case(apply, ((4, 6), (4, 5)), (inward, onward)),
        Case(lambda x, *w: apply(x, x, *w), ((4, 6),), (square, square)),
        Case(lambda x, h, w: apply(x, h, w, w), ((4, 6), (4, 6)), (square,)),
    ]


CASES: dict[object, list[Case]] = {
    aten.lstm.input: layers(aten.lstm.input, 4, cells=True),
    aten.gru.input: layers(aten.gru.input, 3),
    aten.rnn_tanh.input: layers(aten.rnn_tanh.input, 1),
    aten.rnn_relu.input: layers(aten.rnn_relu.input, 1),
    aten.lstm_cell.default: cells(aten.lstm_cell.default, 4, two=True),
    aten.gru_cell.default: cells(aten.gru_cell.default, 3),
    aten.rnn_tanh_cell.default: cells(aten.rnn_tanh_cell.default, 1),
    aten.rnn_relu_cell.default: cells(aten.rnn_relu_cell.default, 1),
}
