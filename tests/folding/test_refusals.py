"""What folding refuses, what it leaves, and the words it says it with."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn
from torch.export import export
from torch.nn import functional as F

import normfuse.nn
from normfuse.folding import FoldError, fold

from .checks import folded, operations
from .maps import C, MapNorm, Net, sequence, status
from .networks import Transformer, look_trained


def test_training_mode_is_refused() -> None:
    model = nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C)).train()
    program = export(model, (torch.randn(4, C),))
    with pytest.raises(FoldError, match=r"model\.eval\(\)"):
        fold(program)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_statistics_that_are_not_finite_name_the_layer(value: float) -> None:
    model = nn.Sequential(nn.Linear(C, C), normfuse.nn.UnifiedNorm(C), nn.Linear(C, 2)).eval()
    model[1].running_var[2] = value
    if value == float("inf"):
        model[1].weight.data[2] = value
    with pytest.raises(FoldError, match=r"UnifiedNorm '1'"):
        fold(export(model, sequence()[0].float().split(3)))


def test_a_norm_stays_whose_numbers_would_leave_the_dtype_of_a_weight() -> None:
    model = nn.Sequential(nn.Linear(C, C), normfuse.nn.UnifiedNorm(C), nn.GELU(), nn.Linear(C, C), MapNorm(), nn.GELU())
    model.eval()[1].weight.data.fill_(1e11)
    model[0].weight.data.fill_(1e30)
    program, report = fold(export(model, (torch.randn(3, C) * 1e-30,)))
    assert status(report) == ["kept", "folded"] and report.verified is not None
    assert "'0.weight' leaves the range of float32" in report.norms[0].reason
    assert operations(fold(program)[0]) == operations(program)


class Times(nn.Module):
    def __init__(self, *factors: float) -> None:
        super().__init__()
        self.factors = factors

    def forward(self, x: Tensor) -> Tensor:
        for factor in self.factors:
            x = x * factor
        return x


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ((nn.Linear(C, C), nn.BatchNorm1d(C), nn.Tanh()), "'0.weight'"),
        ((nn.Tanh(), nn.BatchNorm1d(C), nn.Linear(C, C)), "'2.weight'"),
        ((nn.LayerNorm(C), nn.Linear(C, C)), "'1.weight'"),
    ],
    ids=["in front", "behind", "of a dynamic norm"],
)
@torch.no_grad()
def test_in_float16_as_well(layers: tuple[nn.Module, ...], reason: str) -> None:
    for layer in layers:
        if isinstance(layer, nn.Linear):
            layer.weight.fill_(3e4)
        elif isinstance(layer, nn.BatchNorm1d | nn.LayerNorm):
            layer.weight.fill_(20.0)
    model = nn.Sequential(*layers).half().eval()
    program, report = fold(export(model, (torch.full((3, C), 1e-3).half(),)))
    reasons = [r.reason for r in report.norms] + [r.reasons["gain"] for r in report.dynamic]
    assert len(reasons) == 1 and reason in reasons[0] and "float16" in reasons[0]
    assert all(bool(value.isfinite().all()) for value in program.state_dict.values())


def test_two_factors_do_not_become_one_that_float16_does_not_hold() -> None:
    model = nn.Sequential(Times(300.0, 300.0), nn.Tanh()).half()
    x = torch.randn(3, C).half() * 1e-4
    program, _ = fold(export(model, (x,)))
    torch.testing.assert_close(program.module()(x), model(x), rtol=0.0, atol=1e-3)


class Shared(nn.Module):
    """One linear behind two norms: a shared weight cannot absorb two maps without a copy."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm1, self.norm2 = nn.Linear(C, C), MapNorm(seed=1), MapNorm(seed=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm1(x)) + self.linear(self.norm2(x))


def test_a_shared_weight_is_copied_with_its_price() -> None:
    program, report = folded(Shared(), sequence())
    assert status(report) == ["folded", "folded"]
    assert report.bytes_copied == C * C * 8
    assert operations(program) == ["aten.linear.default", "aten.linear.default", "aten.add.Tensor"]


def test_without_copies_a_shared_weight_stays_and_says_so() -> None:
    _, report = folded(Shared(), sequence(), copy_shared=False)
    assert status(report) == ["kept", "kept"] and report.bytes_copied == 0
    assert "'linear.weight' is shared and may not be copied" in report.norms[0].reason


def test_equal_changes_of_a_shared_weight_are_stored_once() -> None:
    model = Shared()
    model.norm2.load_state_dict(model.norm1.state_dict())
    _, report = folded(model, sequence())
    assert status(report) == ["folded", "folded"] and report.bytes_copied == 0


def test_tied_embedding_and_head_keep_one_table_where_the_stream_allows() -> None:
    """Pre-norm: the final norm goes into the head, which becomes a table of its own; the embedding stays."""
    model = look_trained(Transformer("unified", "pre", causal=True))
    model.head = nn.Linear(16, 11, bias=False)
    model.head.weight = model.embed.weight
    _program, report = folded(model, (torch.randint(0, 11, (3, 7)),))
    assert not report.remaining and report.bytes_copied == 11 * 16 * 8
    _, report = folded(model, (torch.randint(0, 11, (3, 7)),), copy_shared=False)
    assert [record.name for record in report.remaining] == ["norm"]


def test_zero_gains_fold_into_weights_behind_them() -> None:
    model = nn.Sequential(nn.GELU(), MapNorm(), nn.Linear(C, 4))
    model[1].scale.data[2] = 0.0
    _, report = folded(model, sequence())
    assert status(report) == ["folded"]


def test_zero_gains_one_after_another() -> None:
    """A factor outside a norm, which is taken later, in front of a norm: the norm's scale builds on the factor's."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor, self.norm, self.linear = nn.Parameter(torch.rand(C) + 0.5), MapNorm(), nn.Linear(C, 4)
            self.factor.data[1] = self.norm.scale.data[2] = 0.0

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.norm(F.gelu(x) * self.factor))

    program, report = folded(Twice(), sequence())
    assert operations(program) == ["aten.gelu.default", "aten.linear.default"] and not report.remaining


def test_zero_gains_stay_where_the_stream_needs_the_value() -> None:
    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = MapNorm(), nn.Linear(C, C)
            self.norm.scale.data[1] = 0.0

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x)
            return self.linear(x + F.gelu(self.linear(x)))

    _, report = folded(Stream(), sequence())
    assert status(report) == ["kept"] and "zero" in report.norms[0].reason


def test_a_norm_added_to_its_own_input_stays() -> None:
    def loop(m: nn.Module, x: Tensor) -> Tensor:
        x = m.first(x)
        return m.last(x + m.norm(x))

    _, report = folded(Net(loop, first=nn.Linear(C, C), norm=MapNorm(), last=nn.Linear(C, 2)), sequence())
    assert status(report) == ["kept"] and "meets its own input" in report.norms[0].reason


def test_a_stream_whose_scales_span_too_much_keeps_as_few_norms_as_needed() -> None:
    """Eight norms, each with a gain of 10 on one channel, and room for 1000 between the extremes."""
    torch.manual_seed(0)
    model = look_trained(Transformer("unified", "post", depth=4, width=16, vocabulary=None))
    model.embed_norm = nn.Identity()
    for block in model.blocks:
        for norm in (block.norm1, block.norm2):
            norm.weight.data.fill_(1.0)
            norm.weight.data[3] = 10.0
            norm.running_var.fill_(1.0)
    inputs = (torch.randn(3, 7, 6, dtype=torch.float64),)
    _, report = folded(model, inputs, max_scale_range=1001.0)
    assert [record.name for record in report.remaining] == ["blocks.1.norm2", "blocks.3.norm2"]
    assert "span more than" in report.remaining[0].reason
    _, report = folded(model, inputs)
    assert not report.remaining


def test_norms_on_queries_and_keys_go_into_their_projections() -> None:
    class QKNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(C, C) for _ in range(3))
            self.q_norm, self.k_norm = MapNorm(seed=1), MapNorm(seed=2)

        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(self.q_norm(self.q(x)), self.k_norm(self.k(x)), self.v(x))

    _, report = folded(QKNorm(), sequence())
    assert status(report) == ["folded", "folded"]


def test_in_place_arithmetic_is_understood() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.norm, self.last = nn.Linear(C, C), MapNorm(), nn.Linear(C, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            z = self.norm(y)
            y += 1.0
            z.mul_(2.0).relu_()
            return self.last(z + y)

    _, report = folded(InPlace(), sequence())
    assert status(report) == ["folded"]


def test_in_place_batch_norm_networks_fold() -> None:
    """Functionalising an in-place ReLU must not hide the BatchNorms."""
    norm = nn.BatchNorm2d(4)
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), norm, nn.ReLU(inplace=True))
    program, report = folded(model, (torch.randn(2, 3, 5, 5, dtype=torch.float64),))
    assert status(report) == ["folded"] and report.norms[0].name == "1"
    assert operations(program) == ["aten.conv2d.default", "aten.relu.default"]


def test_constants_that_float64_would_change_are_computed_as_written() -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(C, C)

        def forward(self, x: Tensor) -> Tensor:
            # In float32 0.1 * 30 rounds to 3.0, in float64 to 3.0000000000000004 and others below an integer.
            steps = torch.floor(torch.arange(25, 25 + C, dtype=torch.float32) * 0.1 * 10)
            return F.gelu(self.linear(x) + steps.to(x.dtype) * self.linear.bias)

    folded(Steps(), sequence())


def test_reading_only_a_shape_stops_nothing() -> None:
    def shapeonly(m: nn.Module, x: Tensor) -> Tensor:
        y = m.linear(x)
        return F.gelu(m.norm(y.flatten(0, 1)).reshape_as(y))

    _, report = folded(Net(shapeonly, linear=nn.Linear(C, C, bias=False), norm=MapNorm()), sequence())
    assert status(report) == ["folded"]


def test_report_is_json() -> None:
    _, report = folded(Shared(), sequence())
    data = json.loads(json.dumps(report.to_dict()))
    assert data["norms"][0]["name"] == "norm1" and data["nodes_after"] < data["nodes_before"]
    assert data["scale_range"][0] <= 1.0 <= data["scale_range"][1]


def test_dead_ends_do_no_harm() -> None:
    def dead(m: nn.Module, x: Tensor) -> Tensor:
        y = m.norm(x)
        F.gelu(y)
        return m.linear(y)

    program, report = folded(Net(dead, norm=MapNorm(), linear=nn.Linear(C, 2)), sequence())
    assert operations(program) == ["aten.linear.default"] and status(report) == ["folded"]


def test_parts_with_one_scale_and_different_shifts_get_theirs_written_out() -> None:
    """A shared weight that may not be copied fixes the scale, so that channels are joined like positions."""

    class Rejoined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear, self.norm = nn.Linear(C, C), MapNorm()

        def forward(self, x: Tensor) -> Tensor:
            x = self.linear(self.linear(x))
            x = self.norm(F.rms_norm(x, (C,))) + x
            x = torch.cat([x[..., :1], x[..., 1:]], -1)
            return torch.tanh(x[:, :1]) * x

    folded(Rejoined(), sequence(), copy_shared=False)


class Pieces(nn.Module):
    """One parameter whose rows several operations read, a norm in front of one of them."""

    def __init__(self, *rows: slice) -> None:
        super().__init__()
        self.rows, self.first, self.norm = rows, nn.Linear(C, C), MapNorm(C)
        self.weight = nn.Parameter(torch.randn(3 * C, C))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        operands = [self.norm(torch.tanh(self.first(x))), *(x for _ in self.rows[1:])]
        return tuple(F.linear(y, self.weight[rows]) for y, rows in zip(operands, self.rows, strict=True))


@pytest.mark.parametrize(
    ("rows", "status"),
    [
        ((slice(0, C), slice(C, 2 * C), slice(2 * C, None)), "folded"),
        ((slice(C, None), slice(0, C)), "folded"),
        ((slice(0, C), slice(C - 1, 2 * C)), "kept"),
        ((slice(0, C), slice(0, C)), "kept"),
        ((slice(0, C), slice(None)), "kept"),
    ],
)
def test_parts_of_one_parameter_are_shared_only_where_they_overlap(rows: tuple[slice, ...], status: str) -> None:
    program, report = folded(Pieces(*rows), sequence(), copy_shared=False)
    assert [record.status for record in report.norms] == [status]
    assert report.bytes_copied == 0 and report.bytes_after <= report.bytes_before
    assert ("weight" in program.state_dict) == (status == "kept")
