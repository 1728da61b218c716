"""Opening, rewriting and closing an exported program."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import export

from normfuse.fold import program as programs
from normfuse.fold.program import Program

from .checks import assert_nothing_left, folded
from .networks import Transformer, look_trained


def test_a_large_weight_is_rewritten_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "BLOCK_ENTRIES", 40)  # a few rows of every matrix
    model = look_trained(Transformer("unified", "post"))
    assert_nothing_left(*folded(model, (torch.randint(0, 11, (3, 7)),), carry_biases=True))


def test_closing_an_untouched_program_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2)).eval()
    x = torch.randn(5, 3)
    closed = Program(export(model, (x,))).finish()
    assert torch.equal(closed.module()(x), model(x))
    assert closed.state_dict.keys() == model.state_dict().keys()


def test_unread_parameters_and_buffers_are_dropped() -> None:
    class Unread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.used

    closed = Program(export(Unread(), (torch.ones(2, 3),))).finish()
    assert list(closed.state_dict) == ["used"]


def test_inputs_keep_their_names() -> None:
    class Named(nn.Module):
        def forward(self, input: Tensor, max: Tensor) -> Tensor:
            return input + max

    program = export(Named(), (torch.ones(2), torch.ones(2)))
    closed = Program(program).finish()
    assert closed.graph_signature.user_inputs == program.graph_signature.user_inputs == ("input", "max")


def test_sizes_count_tied_tensors_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert Program(export(model, (torch.ones(2, 4),))).bytes() == 4 * 4 * 4
