"""Opening, rewriting and closing an exported program."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram, export

from normfuse.folding import program as programs
from normfuse.folding.program import Program
from normfuse.nn import UnifiedNorm

from .checks import assert_nothing_left, folded
from .networks import Transformer, look_trained

aten = torch.ops.aten


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


def test_a_tensor_made_in_a_forward_is_no_mutation() -> None:
    class Choice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.index_select(1, torch.tensor([1, 0]))

    program = export(nn.Sequential(nn.BatchNorm1d(2), Choice(), nn.Linear(2, 2)).eval(), (torch.ones(3, 2),))
    targets = [node.target for node in program.graph.nodes]
    assert aten.detach_.default in targets  # otherwise this shows nothing
    with patch.object(ExportedProgram, "run_decompositions", side_effect=AssertionError):
        opened = Program(program)
    assert aten.detach.default in (node.target for node in opened.graph.nodes)
    assert [node.target for node in program.graph.nodes] == targets


def test_a_cast_to_the_type_of_another_value_does_not_read_it() -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.constant = nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x.type_as(y) + self.constant.type_as(x)

    x, y = torch.randn(3), torch.randn(3, dtype=torch.float64)
    opened = Program(export(Cast(), (x, y)))
    value, constant = (node for node in opened.graph.nodes if node.target is aten.to.dtype)
    assert (value.args[1], constant.args[1]) == (torch.float64, torch.float32)
    assert opened.is_constant(constant) and not opened.is_constant(value)
    model = Cast()
    assert torch.equal(Program(export(model, (x, y))).finish().module()(x, y), model(x, y))


def test_bodies_of_nested_code_are_copied() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda y: y * 2, lambda y: y.exp(), (x,))

    x = torch.randn(2)
    program = export(Branches(), (x,))
    closed = Program(program).finish()
    bodies = [node.target for node in closed.graph.nodes if node.op == "get_attr"]
    assert bodies  # otherwise this shows nothing
    assert all(getattr(closed.graph_module, b) is not getattr(program.graph_module, b) for b in bodies)
    assert torch.equal(closed.module()(x), Branches()(x))


def test_sizes_count_tied_tensors_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert Program(export(model, (torch.ones(2, 4),))).bytes() == 4 * 4 * 4


class Mapped(nn.Module):
    """torch.vmap around norms and weights, and twice around a comparison, as masks are written."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.group, self.batch = nn.LayerNorm(4), nn.GroupNorm(2, 4), UnifiedNorm(4)
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[1])
        seen = torch.vmap(torch.vmap(torch.ge, in_dims=(None, 0)), in_dims=(0, None))(at, at)
        y = torch.vmap(lambda row: self.inner(self.batch(self.group(self.layer(row)))))(x)
        return self.outer(nn.functional.scaled_dot_product_attention(y, y, y, attn_mask=seen))


def test_what_runs_under_vmap_folds() -> None:
    model = look_trained(Mapped())
    _, report = folded(model, (torch.randn(2, 5, 4).double(),))
    assert "batch" in {norm.name for norm in report.norms}
    assert {norm.status for norm in report.norms} == {"folded"}
    assert "layer" in {norm.name for norm in report.dynamic}
