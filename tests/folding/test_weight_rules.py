"""Rules of weights and of norms: which scales and shifts they take, and how they are written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .checks import folded, operations
from .maps import BehindAnInput, C, MapNorm, Net, sequence, status


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv1d(C, C, 3),
        nn.Conv1d(C, C, 3, bias=False),
        nn.Conv1d(C, C, 3, groups=3),
        nn.Conv1d(C, C, 3, groups=C),
        nn.Conv1d(C, C, 2, stride=2, dilation=2),
        nn.Conv1d(C, C, 3, padding="valid"),
        nn.ConvTranspose1d(C, C, 1),
        nn.ConvTranspose1d(C, C, 1, groups=2, bias=False),
        nn.ConvTranspose1d(C, C, 3, groups=2, padding=2),
        nn.ConvTranspose1d(C, C, 2, groups=C, dilation=2, padding=3),
    ],
    ids=str,
)
def test_convolution_without_padding_takes_scale_and_shift(conv: nn.Module) -> None:
    model = BehindAnInput(lambda x: conv(x.mT).mT, shift=True)
    model.conv = conv
    _, report = folded(model, sequence())
    assert status(report) == ["folded"]


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv1d(C, C, 3, padding=1),
        nn.Conv1d(C, C, 3, padding="same"),
        nn.ConvTranspose1d(C, C, 3),
        nn.ConvTranspose1d(C, C, 3, groups=2, padding=1),
        nn.ConvTranspose1d(C, C, 1, stride=2),
        nn.ConvTranspose1d(C, C, 1, dilation=2, output_padding=1),
    ],
    ids=str,
)
def test_padded_and_transposed_convolutions_take_the_scale_only(conv: nn.Module) -> None:
    for shift, expected in ((False, "folded"), (True, "partly folded")):
        model = BehindAnInput(lambda x: conv(x.mT).mT, shift=shift)
        model.conv = conv
        _, report = folded(model, sequence())
        assert status(report) == [expected]


def test_a_constant_may_be_expanded_to_a_size_known_at_run_time_only() -> None:
    def operation(model: Net, x: Tensor) -> Tensor:
        y = model.first(x)
        y = y * model.gain.expand_as(y) / model.gain.expand(y.shape[0], 1, C)
        return model.last(y - model.gain.broadcast_to(y.shape))

    model = Net(operation, first=nn.Linear(C, C), last=nn.Linear(C, C), gain=nn.Parameter(torch.rand(C) + 0.5))
    program, report = folded(model, sequence(), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert len(operations(program)) == 2 and set(status(report)) == {"folded"}


@pytest.mark.parametrize("dims", [2, 3])
def test_convolutions_of_more_dimensions_write_their_norm(dims: int) -> None:
    conv, batch_norm = ((nn.Conv2d, nn.BatchNorm2d), (nn.Conv3d, nn.BatchNorm3d))[dims - 2]
    norm = batch_norm(8)
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    model = nn.Sequential(conv(4, 8, 3, padding=1, groups=2), norm, nn.ReLU())
    _, report = folded(model, (torch.randn(2, 4, *(5,) * dims, dtype=torch.float64),))
    assert status(report) == ["folded"] and report.norms[0].absorbed_by == ["0.weight", "0.bias"]


@pytest.mark.parametrize(
    "product",
    [
        lambda x, w, b: x @ w,
        lambda x, w, b: torch.addmm(b, x.reshape(-1, C), w),
        lambda x, w, b: torch.mm(x.reshape(-1, C), w),
        lambda x, w, b: F.linear(x, w.t(), b),
        lambda x, w, b: F.linear(x, w.t()),
        lambda x, w, b: torch.matmul(x, w) + b,
        lambda x, w, b: (w.t() @ x.mT).mT + b,
        lambda x, w, b: torch.einsum("bsi,io->bso", x, w),
        lambda x, w, b: torch.einsum("...i,oi->...o", x, w.t()),
        lambda x, w, b: torch.einsum("bsi,io,op->bsp", x, w, w.t() @ w),
        lambda x, w, b: torch.linalg.multi_dot([x.reshape(-1, C), w, w.t() @ w]),
    ],
)
def test_every_way_to_write_a_projection(product: Callable[..., Tensor]) -> None:
    class Projection(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.norm, self.w, self.b = MapNorm(), nn.Parameter(torch.randn(C, 4)), nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            return product(self.norm(x), self.w, self.b)

    _, report = folded(Projection(), sequence())
    assert status(report) == ["folded"] and "w" in report.norms[0].absorbed_by


def test_a_product_that_needs_its_bias_keeps_it_when_it_is_zero() -> None:
    _, report = folded(
        Net(
            lambda m, x: torch.addmm(m.b, m.norm(x), m.w),
            norm=MapNorm(shift=False),
            w=nn.Parameter(torch.randn(C, 4)),
            b=nn.Parameter(torch.zeros(4)),
        ),
        (torch.randn(3, C, dtype=torch.float64),),
    )
    assert status(report) == ["folded"]


@pytest.mark.parametrize("equation", ["bsi,bo->bso", "bsi,oi->bsi"])
def test_other_contractions_are_left_alone(equation: str) -> None:
    weight = nn.Parameter(torch.randn(3 if "bsi,bo" in equation else C, C, dtype=torch.float64))
    model = BehindAnInput(lambda x: torch.einsum(equation, x, weight), shift=True)
    model.last, model.weight = nn.Identity(), weight
    _, report = folded(model, sequence())
    assert status(report) == ["kept"]


def test_embedding_takes_scale_and_shift() -> None:
    model = nn.Sequential(nn.Embedding(7, C, padding_idx=0), MapNorm(), nn.GELU())
    _, report = folded(model, (torch.randint(0, 7, (3, 5)),))
    assert report.norms[0].absorbed_by == ["0.weight"]


def test_flattened_maps_reach_a_linear() -> None:
    """Each channel's numbers repeat over the positions that are flattened with it."""
    norm = nn.BatchNorm2d(3)
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    model = nn.Sequential(nn.MaxPool2d(2), norm, nn.Flatten(), nn.Linear(12, 4))
    _, report = folded(model, (torch.randn(2, 3, 4, 4, dtype=torch.float64),))
    assert status(report) == ["folded"] and report.norms[0].absorbed_by == ["3.weight", "3.bias"]


def test_layer_norm_takes_a_scale_and_a_shift_behind_it() -> None:
    model = nn.Sequential(nn.LayerNorm(C), MapNorm(), nn.GELU())
    _, report = folded(model, sequence())
    assert "folded" in status(report) and {"0.weight", "0.bias"} <= set(report.norms[0].absorbed_by)


def test_layer_norm_without_affine_gets_one() -> None:
    model = nn.Sequential(nn.LayerNorm(C, elementwise_affine=False), MapNorm(), nn.GELU())
    program, report = folded(model, sequence())
    assert status(report) == ["folded"] and "aten.mul.Tensor" not in operations(program)


def test_batch_norm_without_affine() -> None:
    norm = nn.BatchNorm1d(C, affine=False)
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    _, report = folded(nn.Sequential(norm, nn.Linear(C, 3)), (torch.randn(4, C, dtype=torch.float64),))
    assert status(report) == ["folded"]


def test_position_and_class_token_go_along() -> None:
    class Stem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.norm = nn.Embedding(9, C), MapNorm()
            self.position, self.token = nn.Parameter(torch.randn(1, 6, C)), nn.Parameter(torch.randn(1, 1, C))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.cat([self.token.expand(x.shape[0], -1, -1), self.embed(x)], 1)
            return F.gelu(self.norm(x + self.position))

    _program, report = folded(Stem(), (torch.randint(0, 9, (3, 5)),))
    assert status(report) == ["folded"]
    assert {"position", "token"} <= set(report.norms[0].absorbed_by)


def test_bias_add_disappears_into_the_next_weight() -> None:
    program, _ = folded(BehindAnInput(lambda x: x + 1.5, shift=True), sequence())
    assert operations(program) == ["aten.linear.default"]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_take_scale_and_shift(kind: type[nn.RNNBase]) -> None:
    """What they return is fixed: a norm behind them goes into the weights behind it."""
    layer = kind(C, C // 2, 2, bidirectional=True, batch_first=True)
    model = BehindAnInput(lambda x: F.layer_norm(model.second(layer(x)[0]), (C,)), shift=True)
    model.layer, model.second = layer, MapNorm(seed=1)
    _, report = folded(model, sequence())
    assert [record.reason.partition(":")[0] for record in report.norms if record.name == "norm"] == [""]
    assert status(report) == ["folded", "kept"]


def test_recurrent_cells_take_a_shift_only_with_biases() -> None:
    for cell, expected in ((nn.GRUCell(C, C), "folded"), (nn.LSTMCell(C, C, bias=False), "partly folded")):
        model = BehindAnInput(lambda x, cell=cell: cell(x.flatten(0, 1))[:4], shift=True)
        model.last, model.cell = nn.Identity(), cell
        _, report = folded(model, sequence())
        assert status(report) == [expected]
