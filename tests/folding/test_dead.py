"""Dead channels: what goes, with the same function in float64, and what stays and why."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

from normfuse import fold
from normfuse.folding import remove_dead_channels
from normfuse.nn import UnifiedNorm

from .checks import difference
from .networks import ChannelNorm, look_trained


def killed(norm: nn.Module, *channels: int, shift: float | None = None) -> nn.Module:
    """Gains of zero; the shifts, if given, too."""
    with torch.no_grad():
        norm.weight[list(channels)] = 0.0
        if shift is not None:
            norm.bias[list(channels)] = shift
    return norm


def checked(model: nn.Module, x: Tensor, dynamic_shapes: object = None):
    """Remove, then fold, each time the same function to 1e-12; returns program and report."""
    model = model.double().eval()
    program = torch.export.export(model, (x,), dynamic_shapes=dynamic_shapes)
    smaller, records = remove_dead_channels(program)
    folded, report = fold(program, remove_dead=True)
    with torch.no_grad():
        assert difference(model(x), smaller.module()(x)) <= 1e-12
        assert difference(model(x), folded.module()(x)) <= 1e-12
    assert report.removed == records
    assert report.bytes_after <= report.bytes_before
    return folded, report


class Images(nn.Module):
    """Convolutions and what stands between them, down to a classifier."""

    def __init__(self, padding: int = 0) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second, self.norm2 = nn.Conv2d(8, 6, 3, padding=padding), nn.BatchNorm2d(6)
        self.third, self.norm3 = nn.Conv2d(6, 5, 1), nn.BatchNorm2d(5)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(F.max_pool2d(self.norm1(self.first(x)), 2))
        x = F.gelu(self.norm2(self.second(x))) * 0.5 + 0.25
        x = F.adaptive_avg_pool2d(F.hardtanh(self.norm3(self.third(x))), 1)
        return self.head(self.drop(torch.flatten(x, 1)))


def test_channels_leave_every_weight_of_a_convolutional_network():
    model = look_trained(Images())
    killed(model.norm1, 0, 3, 7)
    killed(model.norm2, 1)
    killed(model.norm3, 2, 4)
    folded, report = checked(model, torch.randn(2, 3, 12, 12).double(), ({0: Dim("batch")},))
    assert [(r.name, r.channels, r.num_features) for r in report.removed] == [
        ("norm1", 3, 8),
        ("norm2", 1, 6),
        ("norm3", 2, 5),
    ]
    assert report.removed[0].weights == ["first.weight", "second.weight"]
    shapes = sorted(tuple(p.shape) for p in folded.state_dict.values() if p.dim() > 1)
    assert shapes == sorted([(5, 3, 3, 3), (5, 5, 3, 3), (3, 5, 1, 1), (4, 3)])
    assert [r.name for r in report.norms] == ["norm1", "norm2", "norm3"] and not report.remaining


@pytest.mark.parametrize("norm", [UnifiedNorm, ChannelNorm])
def test_the_hidden_layer_of_a_transformer_shrinks(norm):
    model = nn.Sequential(nn.Linear(4, 8), norm(8), nn.GELU(), nn.Linear(8, 3, bias=False))
    look_trained(model)
    killed(model[1].norm if norm is ChannelNorm else model[1], 1, 2, 6)
    folded, report = checked(model, torch.randn(2, 5, 4).double(), ({0: Dim("batch"), 1: Dim("sequence")},))
    (record,) = report.removed
    assert (record.channels, record.num_features, record.weights) == (3, 8, ["0.weight", "3.weight"])
    assert {tuple(p.shape) for p in folded.state_dict.values()} == {(5, 4), (5,), (3, 5), (3,)}
    assert not report.remaining


def test_a_padded_convolution_loses_only_channels_that_hold_zero():
    model = look_trained(Images(padding=1))
    killed(model.norm1, 0, 3)
    killed(model.norm1, 5, shift=0.0)  # silu(0) is 0
    _, report = checked(model, torch.randn(2, 3, 12, 12).double())
    assert [(r.name, r.channels) for r in report.removed] == [("norm1", 1)]
    with torch.no_grad():
        model.norm1.bias[5] = 0.5
    _, report = checked(model, torch.randn(2, 3, 12, 12).double())
    assert [(r.channels, r.reason) for r in report.removed] == [
        (0, "a padded convolution shows its readers another number at the borders")
    ]


def test_columns_of_a_flattened_image_go_together():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sigmoid(), nn.Flatten(), nn.Linear(4 * 4, 3))
    look_trained(model)
    killed(model[1], 2)
    folded, report = checked(model, torch.randn(2, 3, 4, 4).double())
    assert report.removed[0].channels == 1
    assert (3, 12) in {tuple(p.shape) for p in folded.state_dict.values()}


def test_a_norm_behind_flattening_kills_a_channel_with_all_its_positions():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3))
    look_trained(model)
    killed(model[2], 0, 1, 2, 3, 4, 8, 9, 10, 11)  # channels 0 and 2; of channel 1 a single position
    folded, report = checked(model, torch.randn(2, 3, 4, 4).double())
    assert report.removed[0].channels == 2
    assert {(2, 3, 3, 3), (3, 8)} <= {tuple(p.shape) for p in folded.state_dict.values()}


def test_several_readers_lose_a_channel_only_together():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.write, self.norm1, self.norm2 = nn.Linear(3, 6), UnifiedNorm(6), UnifiedNorm(6)
            self.a, self.b = nn.Linear(6, 2), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.write(x)
            return self.a(self.norm1(x).relu()) + self.b(self.norm2(x).tanh())

    model = look_trained(Model())
    killed(model.norm1, 0, 1, 2)
    killed(model.norm2, 1, 2, 3)
    folded, report = checked(model, torch.randn(2, 3).double())
    assert (report.removed[0].channels, len(report.removed[0].weights)) == (2, 3)
    assert (4, 3) in {tuple(p.shape) for p in folded.state_dict.values()}


def test_one_channel_stays_when_all_are_dead():
    model = nn.Sequential(nn.Linear(3, 4), UnifiedNorm(4), nn.GELU(), nn.Linear(4, 2))
    look_trained(model)
    killed(model[1], 0, 1, 2, 3)
    _, report = checked(model, torch.randn(2, 3).double())
    assert report.removed[0].channels == 3


class Wrapped(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.write, self.norm, self.read = nn.Linear(6, 6), killed(UnifiedNorm(6), 1), nn.Linear(6, 6)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda m, x: m.norm(m.write(x)), "the model's output is among its readers"),
        (lambda m, x: m.read(x + m.norm(m.write(x))), "add is among its readers"),
        (lambda m, x: m.read(m.norm(m.write(x)).relu() * m.norm(m.write(x))), "mul is among its readers"),
        (
            lambda m, x: m.read(m.norm(m.write(x))) + m.write(x),
            "the weight of linear in write is read at another place, too",
        ),
        (lambda m, x: m.read((y := m.norm(m.write(x))).sigmoid() * y), "mul brings several values together"),
        (lambda m, x: m.read(m.norm(m.write(x)).view(-1, 2, 3).flatten(1)), "view is among its readers"),
        (lambda m, x: m.read(m.norm(m.write(x)).softmax(-1)), "softmax is among its readers"),
        (lambda m, x: m.read(m.read(m.norm(m.write(x)))), "the weight of linear in read is read at another place"),
        (lambda m, x: m.read(m.norm(m.write(x)).t()), "linear in read reads the channels along another axis"),
    ],
)
def test_what_stays_says_why(function, reason):
    model = Wrapped(function)
    model(torch.randn(6, 6))
    _, report = checked(model, torch.randn(6, 6).double())
    assert report.removed and all(record.channels == 0 for record in report.removed)
    assert reason in report.removed[0].reason


def test_nothing_happens_unasked_and_without_dead_channels():
    model = look_trained(Images()).double()
    x = torch.randn(2, 3, 12, 12).double()
    assert checked(model, x)[1].removed == []
    killed(model.norm1, 0)
    folded, report = fold(torch.export.export(model, (x,)))
    assert report.removed == [] and (8, 3, 3, 3) in {tuple(p.shape) for p in folded.state_dict.values()}


@pytest.mark.parametrize("seed", range(8))
def test_random_chains_compute_the_same(seed):
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    layers, width = [], 4
    for _ in range(4):
        new = pick(3, 5, 8)
        norm = look_trained(nn.BatchNorm2d(new), seed)
        norm.weight.data[torch.rand(new, generator=generator) < 0.4] = 0.0
        norm.bias.data[torch.rand(new, generator=generator) < 0.3] = 0.0
        layers += [nn.Conv2d(width, new, 3, padding=pick(0, 1), bias=pick(True, False)), norm]
        layers += [pick(nn.ReLU(), nn.GELU(), nn.Identity(), nn.LeakyReLU()), pick(nn.AvgPool2d(3, 1, 1), nn.Dropout())]
        width = new
    model = nn.Sequential(*layers, nn.Conv2d(width, 2, 1))
    checked(model, torch.randn(2, 4, 12, 12, generator=generator).double())


@pytest.mark.parametrize("step", [torch.floor, torch.ceil, torch.trunc, torch.frac])
def test_steps_fall_where_the_program_rounds(step):
    """0.7 · 10 is 7 in float32, and less in float64."""

    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
            self.norm = killed(nn.BatchNorm1d(6), 0, 1, shift=0.7)

        def forward(self, x):
            return self.last(step(self.norm(self.first(x)) * 10))

    model, x = Steps().eval(), torch.randn(5, 4)
    smaller, (removed,) = remove_dead_channels(torch.export.export(model, (x,)))
    assert removed.channels == 2
    torch.testing.assert_close(smaller.module()(x), model(x))
