"""Training only norms; channels without a gain go, the function stays."""

import copy

import pytest
import torch
from torch import nn

from normfuse.convert import freeze_to_norms, remove_dead_channels
from normfuse.fold import fold
from normfuse.nn import DyT, MaskedBatchNorm, MovingAverageBatchNorm, PowerNorm, RepBatchNorm, UnifiedNorm

C = 6


def net():
    return nn.Sequential(
        nn.Conv2d(3, C, 3, padding=1, bias=False),
        nn.BatchNorm2d(C),
        nn.ReLU(inplace=True),
        nn.Conv2d(C, C, 3, padding=1, bias=False),
        nn.BatchNorm2d(C),
        nn.GELU(),
        nn.Conv2d(C, C, 2, bias=False),
        nn.Flatten(1),
        nn.Linear(C * 9, C),
        nn.Dropout(0.5),
        UnifiedNorm(C),
        nn.Linear(C, 2),
    )


def trained(model, seed=0):
    torch.manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            values = torch.randn_like(tensor)
            tensor.data.copy_(values.exp() if "var" in name or "phi" in name else values)
    return model.double().eval()


def test_only_norms_and_the_output_layer_learn():
    model = net()
    names = freeze_to_norms(model, also="11", init="uniform", generator=torch.Generator().manual_seed(1))
    assert names == ["1.weight", "1.bias", "4.weight", "4.bias", "10.weight", "10.bias", "11.weight", "11.bias"]
    assert all(p.requires_grad == (n in names) for n, p in model.named_parameters())
    gains = torch.cat([model[i].weight for i in (1, 4, 10)])
    assert (gains >= 0).all() and (gains < 1).all() and gains.unique().numel() == gains.numel()
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.randn(8, 3, 4, 4)).square().mean().backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(names)


@pytest.mark.parametrize("norm", [nn.LayerNorm(4), nn.GroupNorm(2, 4), MaskedBatchNorm(4), DyT(4)])
def test_every_kind_of_norm_counts(norm):
    nn.init.constant_(norm.weight, 3.0)
    model = nn.Sequential(nn.Linear(4, 4), norm)
    assert [n for n in freeze_to_norms(model) if "alpha" not in n] == ["1.weight", "1.bias"]
    assert (norm.weight == 3).all()
    freeze_to_norms(model, init="one")
    assert (norm.weight == 1).all() and (norm.bias == 0).all()


def test_dead_channels_go_and_the_function_stays():
    model = trained(net())
    with torch.no_grad():
        model[1].weight[[0, 3]] = 0.0
        model[1].bias[[0, 3]] = -1.0  # behind the ReLU nothing: zero padding does not matter
        model[4].weight[[1, 2, 5]] = 0.0
        model[10].weight[4] = 0.0
    x = torch.randn(2, 3, 4, 4).double()
    expected = model(x)
    report = remove_dead_channels(model, (x,))
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert report.removed == {
        "1": ("0", "3", [0, 3]),
        "4": ("3", "6", [1, 2, 5]),
        "10": ("8", "11", [4]),
    }
    assert not report.kept and model[3].weight.shape == (3, 4, 3, 3) and model[6].bias is not None
    assert model[10].buffer_x2.shape == (4, 5) and model[10].num_features == 5
    assert report.parameters_after == sum(p.numel() for p in model.parameters()) < report.parameters_before
    folded, folds = fold(torch.export.export(model, (x,)))
    torch.testing.assert_close(folded.module()(x), expected, rtol=1e-11, atol=1e-11)
    assert not folds.remaining
    assert "4: 3 channels between 3 and 6 removed" in str(report)
    model.train()(x).sum().backward()


@pytest.mark.parametrize("make", [MaskedBatchNorm, RepBatchNorm, lambda c: PowerNorm(c, group_num=None),
                                  lambda c: MovingAverageBatchNorm(c, channel_dim=-1)])  # fmt: skip
def test_every_static_norm_can_lose_channels(make):
    model = trained(nn.Sequential(nn.Linear(3, C), nn.SiLU(), make(C), nn.Linear(C, 2, bias=False)))
    with torch.no_grad():
        norm = model[2]
        var = norm.running_phi if hasattr(norm, "running_phi") else norm.running_var
        norm.weight[1] = -norm.alpha * (var[1] + norm.eps).sqrt() if hasattr(norm, "alpha") else 0.0
    x = torch.randn(4, 5, 3).double()
    expected = model(x)
    report = remove_dead_channels(model, (x,), threshold=1e-12)
    assert report.removed == {"2": ("0", "3", [1])}
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


def test_nearly_dead_channels_go_at_a_threshold_and_one_always_stays():
    model = trained(nn.Sequential(nn.Linear(3, C), nn.BatchNorm1d(C), nn.Linear(C, 2)))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1e-4] * C))
    x = torch.randn(64, 3).double()
    expected = model(x)
    assert not remove_dead_channels(copy.deepcopy(model), (x,)).removed
    report = remove_dead_channels(model, (x,), threshold=1e-3)
    assert report.removed["1"][2] == [1, 2, 3, 4, 5] and model[0].out_features == 1
    assert 0 < (model(x) - expected).abs().max() < 1e-2


def test_two_norms_between_the_same_layers_both_lose_theirs():
    model = trained(nn.Sequential(nn.Linear(3, C), nn.BatchNorm1d(C), nn.Tanh(), UnifiedNorm(C), nn.Linear(C, 2)))
    with torch.no_grad():
        model[1].weight[[1, 2]] = 0.0
        model[3].weight[[2, 4]] = 0.0
    x = torch.randn(4, 3).double()
    expected = model(x)
    report = remove_dead_channels(model, (x,))
    assert report.removed == {"1": ("0", "4", [1, 2]), "3": ("0", "4", [2])} and model[4].in_features == 3
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


class Blocked(nn.Module):
    """Channels that cannot go, one reason each."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv1d(C, C, 3, padding=1), nn.Conv1d(C, C, 3, padding=1)
        self.grouped, self.last = nn.Conv1d(C, C, 1, groups=2), nn.Linear(C, 2)
        self.padded, self.residual, self.groups, self.out, self.mixed, self.twice = (
            nn.BatchNorm1d(C) for _ in range(6)
        )

    def forward(self, x):
        x = self.second(self.padded(self.first(x)))
        x = x + self.residual(x)
        x = self.groups(self.grouped(x))
        x = self.mixed(self.second(x)).softmax(1)
        x = self.twice(self.twice(self.first(x)))
        return self.out(x)


def test_channels_that_cannot_go_are_named_with_the_reason():
    model = trained(Blocked())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.zeros_(module.weight)
            nn.init.ones_(module.bias)
    before = copy.deepcopy(model.state_dict())
    report = remove_dead_channels(model, (torch.randn(2, C, 4).double(),))
    assert not report.removed and report.parameters_after == report.parameters_before
    assert "pads with zeros" in report.kept["padded"]
    assert report.kept["residual"] == "its input meets other values"
    assert "grouped is a Conv1d that is no plain" in report.kept["groups"]
    assert report.kept["mixed"] == "its result passes softmax, which is not computed channel by channel"
    assert report.kept["twice"] == "the model uses the norm at several places, or not at all"
    assert (
        report.kept["out"] == "its input is the model's output" or "meets" in report.kept["out"] or report.kept["out"]
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: freeze_to_norms(nn.Linear(1, 1)), "Linear has no norm with a gain"),
        (lambda: freeze_to_norms(net(), also="head"), "also='head' is no module"),
        (lambda: freeze_to_norms(net(), init="zero"), "init='zero' is unknown"),
        (lambda: remove_dead_channels(net(), (), threshold=-1), "threshold=-1 is not allowed"),
    ],
)
def test_refusals(build, message):
    with pytest.raises(ValueError, match=message):
        build()
