"""Traps in which published folding tools give wrong results without a word. Each must be right or refused here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normfuse.folding import fold
from normfuse.nn import UnifiedNorm

from .checks import folded, operations
from .maps import Net
from .networks import look_trained


def batch_norm(kind: type[nn.Module], channels: int) -> nn.Module:
    torch.manual_seed(1)
    norm = kind(channels)
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    norm.weight.data.uniform_(0.5, 2)
    norm.bias.data.uniform_(-1, 1)
    return norm


def test_a_layer_used_twice_with_a_norm_behind_one_use() -> None:
    """Folding the norm into the layer in place changes the other use as well."""
    _, report = folded(
        Net(
            lambda m, x: F.relu(m.norm(m.linear(x))) + F.relu(m.linear(x)),
            linear=nn.Linear(6, 6),
            norm=batch_norm(nn.BatchNorm1d, 6),
        ),
        (torch.randn(5, 6, dtype=torch.float64),),
    )
    assert not report.remaining


def test_linear_with_a_batch_norm_over_another_axis() -> None:
    """BatchNorm1d on [batch, positions, features] normalises positions; a linear's weight knows features only."""
    program, report = folded(
        Net(lambda m, x: F.gelu(m.norm(m.linear(x))), linear=nn.Linear(6, 6), norm=batch_norm(nn.BatchNorm1d, 6)),
        (torch.randn(5, 6, 6, dtype=torch.float64),),
    )
    assert [record.status for record in report.norms] == ["kept"]
    assert "aten.mul.Tensor" in operations(program) or "aten.batch_norm.default" in operations(program)


def test_a_vector_that_broadcasts_over_the_width_is_no_channel_scale() -> None:
    """Conv, then a product with a vector of as many entries as there are channels and columns."""
    program, _ = folded(
        Net(
            lambda m, x: F.gelu(m.conv(x) * m.factor),
            conv=nn.Conv2d(3, 4, 3, padding=1),
            factor=nn.Parameter(torch.rand(4) + 0.5),
        ),
        (torch.randn(2, 3, 4, 4, dtype=torch.float64),),
    )
    assert "aten.mul.Tensor" in operations(program)


@pytest.mark.parametrize(("beta", "alpha"), [(0.5, 1.0), (1.0, 3.0), (0.0, 1.0)])
def test_a_product_with_beta_and_alpha(beta: float, alpha: float) -> None:
    folded(
        Net(
            lambda m, x: torch.addmm(m.b, m.norm(x), m.w, beta=beta, alpha=alpha),
            norm=batch_norm(nn.BatchNorm1d, 6),
            w=nn.Parameter(torch.randn(6, 4)),
            b=nn.Parameter(torch.randn(4)),
        ),
        (torch.randn(5, 6, dtype=torch.float64),),
    )


@pytest.mark.parametrize("groups", [2, 3, 6])
def test_a_grouped_convolution_between_additions(groups: int) -> None:
    _, report = folded(
        Net(
            lambda m, x: F.gelu(m.norm(m.conv(m.norm(F.gelu(x)) + m.constant) + m.constant)),
            conv=nn.Conv2d(6, 6, 3, groups=groups),
            norm=batch_norm(nn.BatchNorm2d, 6),
            constant=nn.Parameter(torch.randn(6, 1, 1)),
        ),
        (torch.randn(2, 6, 5, 5, dtype=torch.float64),),
    )
    assert not report.remaining


def test_a_shift_in_front_of_zero_padding() -> None:
    """The border sees no shift: only the scale may go into the convolution."""
    model = nn.Sequential(batch_norm(nn.BatchNorm2d, 3), nn.Conv2d(3, 4, 3, padding=1))
    program, report = folded(model, (torch.randn(2, 3, 5, 5, dtype=torch.float64),))
    assert [record.status for record in report.norms] == ["partly folded"]
    assert operations(program) == ["aten.add.Tensor", "aten.conv2d.default"]


def test_a_norm_stays_where_a_weight_would_leave_float16() -> None:
    model = nn.Sequential(nn.Linear(6, 6), batch_norm(nn.BatchNorm1d, 6), nn.GELU()).half().eval()
    model[1].running_var.fill_(1e-2)
    model[0].weight.data.fill_(6e4)
    x = 1e-3 * torch.randn(3, 6).half()
    program, report = fold(torch.export.export(model, (x,)))
    assert [norm.status for norm in report.norms] == ["kept"] and "float16" in report.norms[0].reason
    assert torch.equal(program.module()(x), model(x))


def test_quantised_weights_are_left_alone() -> None:
    """A weight that another library computes from integers is not ours to rewrite."""
    import torch.ao.quantization.fx._decomposed

    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = batch_norm(nn.BatchNorm1d, 6)
            self.register_buffer("weight", torch.randint(-100, 100, (4, 6), dtype=torch.int8))

        def forward(self, x: Tensor) -> Tensor:
            weight = torch.ops.quantized_decomposed.dequantize_per_tensor(self.weight, 0.01, 0, -128, 127, torch.int8)
            return F.linear(self.norm(x), weight.to(x.dtype))

    program, report = folded(Quantised(), (torch.randn(5, 6, dtype=torch.float64),))
    assert [record.status for record in report.norms] == ["kept"]
    assert any("dequantize" in name for name in operations(program))


def test_control_flow_is_left_alone() -> None:
    _, report = folded(
        Net(
            lambda m, x: m.linear(torch.cond(x.sum() > 0, lambda y: y.sin(), lambda y: y.cos(), (m.norm(x),))),
            norm=batch_norm(nn.BatchNorm1d, 6),
            linear=nn.Linear(6, 4),
        ),
        (torch.randn(5, 6, dtype=torch.float64),),
    )
    assert [record.status for record in report.norms] == ["kept"]


def test_rotary_embeddings_stop_what_comes_from_queries() -> None:
    """Rotation mixes pairs of channels with computed angles: a norm in front of it goes into the projection."""

    def rotary(m: nn.Module, x: Tensor) -> Tensor:
        q = m.norm(m.q(x).mT).mT
        angle = torch.arange(x.shape[1], device=x.device)[:, None] * torch.exp(-torch.arange(4, dtype=x.dtype))
        cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()
        rotated = torch.cat([-q[..., 4:], q[..., :4]], -1)
        q = q * cos + rotated * sin
        return (q @ q.mT).softmax(-1)

    _, report = folded(
        Net(rotary, q=nn.Linear(8, 8), norm=batch_norm(nn.BatchNorm1d, 8)), (torch.randn(2, 5, 8, dtype=torch.float64),)
    )
    assert {record.status for record in report.norms if record.kind == "BatchNorm1d"} == {"folded"}


@pytest.mark.parametrize("mask", ["computed", "parameter"])
def test_an_additive_attention_mask_keeps_its_factor(mask: str) -> None:
    """``(1 − visible) · −10⁴`` is a constant factor in front of a softmax, which no scale passes."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.bias = nn.Linear(6, 6), nn.Parameter(torch.randn(5, 5))

        def forward(self, x: Tensor, visible: Tensor) -> Tensor:
            y = self.linear(x)[:, None]
            added = (1.0 - visible[:, None, None, :].to(x.dtype)) * -1e4 if mask == "computed" else self.bias * 3.0
            return F.scaled_dot_product_attention(y, y, y, attn_mask=added)[:, 0]

    visible = torch.arange(5).expand(2, 5) < 3
    folded(Masked(), (torch.randn(2, 5, 6, dtype=torch.float64), visible))


def test_zero_gains_in_front_of_a_maximum_keep_their_signs() -> None:
    """A zero gain folds into the weights behind it; a negative one beside it must not pass a maximum."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = batch_norm(nn.BatchNorm1d, 6), nn.Linear(6, 4)
            self.norm.weight.data[:2] = torch.tensor([0.0, -1.0])

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(x.tanh().mT).amax(-1))

    model = Pooled()
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    assert [record.status for record in folded(model, (x,))[1].norms] == ["kept"]
    model.norm.weight.data.abs_()
    assert [record.status for record in folded(model, (x,))[1].norms] == ["folded"]


def test_a_number_that_is_read_from_a_tensor() -> None:
    """``item()`` looks at values although its result is no tensor."""
    folded(
        Net(
            lambda m, x: x * m.norm(m.linear(x)).amax(0)[2].item(),
            linear=nn.Linear(6, 6),
            norm=batch_norm(nn.BatchNorm1d, 6),
        ),
        (torch.randn(5, 6, dtype=torch.float64),),
    )


def test_channels_that_move_by_padding() -> None:
    """Padding by one on one side and by minus one on the other keeps the size and moves every channel."""
    folded(
        Net(
            lambda m, x: m.head(F.pad(m.norm(m.linear(x)), (1, -1))),
            linear=nn.Linear(6, 6),
            norm=batch_norm(nn.BatchNorm1d, 6),
            head=nn.Linear(6, 4),
        ),
        (torch.randn(5, 6, dtype=torch.float64),),
    )


def test_a_shift_that_one_reader_carries_only_when_it_is_equal_everywhere() -> None:
    """Cancelling a shift in front of one reader must not hand the other one what it cannot arrange."""

    def chosen(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        y = m.linear(x)
        return F.gelu(y + m.constant), m.head(y.index_select(-1, torch.tensor([0, 2, 3, 5])))

    folded(
        Net(chosen, linear=nn.Linear(6, 6), constant=nn.Parameter(torch.randn(6)), head=nn.Linear(4, 4)),
        (torch.randn(2, 5, 6, dtype=torch.float64),),
    )


def test_a_view_of_what_a_norm_made_contiguous() -> None:
    """Without the norm the view meets an expanded tensor, which has no such view."""
    _, report = folded(
        Net(
            lambda m, x: m.head(m.norm(m.linear(x)[:, :1].expand(-1, 4, -1)).view(-1, 24)),
            linear=nn.Linear(6, 6),
            norm=UnifiedNorm(6),
            head=nn.Linear(24, 2),
        ),
        (torch.randn(5, 3, 6, dtype=torch.float64),),
    )
    assert not report.remaining


def test_position_embeddings_behind_a_dropout() -> None:
    """In evaluation it is nothing, but no constant by itself: what stands behind it must read the folded parameter."""

    def dropped(m: nn.Module, x: Tensor) -> Tensor:
        y = m.norm(m.linear(x) + m.dropout(m.positions))
        return m.head(y + F.gelu(y))

    _, report = folded(
        look_trained(
            Net(
                dropped,
                positions=nn.Parameter(torch.randn(4, 6)),
                dropout=nn.Dropout(),
                linear=nn.Linear(6, 6),
                norm=UnifiedNorm(6),
                head=nn.Linear(6, 2),
            )
        ),
        (torch.randn(5, 4, 6, dtype=torch.float64),),
    )
    assert not report.remaining and "positions" in report.norms[0].absorbed_by


def test_a_shift_that_reaches_a_sum_on_two_ways() -> None:
    """What cancels it on one of them changes the other as well."""

    def twice(m: nn.Module, x: Tensor) -> Tensor:
        y = (m.mix(x.flatten(1)) + m.constant).unflatten(-1, (4, 6))
        return m.head(y + y[:, :1])

    folded(
        Net(twice, mix=nn.Linear(24, 24), constant=nn.Parameter(torch.randn(24)), head=nn.Linear(6, 6)),
        (torch.randn(3, 4, 6, dtype=torch.float64),),
    )


def test_a_zero_gain_in_front_of_a_shift_that_no_weight_takes() -> None:
    """Behind a scale of zero the shift cannot be written out: then the zero stays in the norm."""
    model = look_trained(
        Net(
            lambda m, x: m.last(m.norm(m.first(x) + (m.first(x) + m.position))),
            first=nn.Linear(6, 6),
            norm=UnifiedNorm(6),
            last=nn.Linear(6, 2),
            position=nn.Parameter(torch.randn(4, 1)),
        )
    ).double()
    model.norm.weight.data[2] = 0.0
    _, report = folded(model, (torch.randn(3, 4, 6, dtype=torch.float64),))
    (record,) = report.norms
    assert record.status == "kept" and "a scale is zero, and not only weights read the result" in record.reason
