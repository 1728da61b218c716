"""Training only norms; channels without a gain go, the function stays."""

import copy

import pytest
import torch
from torch import nn

from normfuse.convert import freeze_to_norms, remove_dead_channels
from normfuse.folding import fold
from normfuse.nn import (
    BatchChannelNorm,
    DyT,
    MaskedBatchNorm,
    MovingAverageBatchNorm,
    PowerNorm,
    RegionNorm,
    RepBatchNorm,
    RMSNorm,
    TimeDependentLayerNorm,
    UnifiedNorm,
)

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


@pytest.mark.parametrize("norm", [nn.LayerNorm(4), nn.RMSNorm(4), nn.GroupNorm(2, 4), MaskedBatchNorm(4), DyT(4)])
def test_every_kind_of_norm_counts(norm):
    nn.init.constant_(norm.weight, 3.0)
    model = nn.Sequential(nn.Linear(4, 4), norm)
    learning = ["1.weight"] if isinstance(norm, nn.RMSNorm) else ["1.weight", "1.bias"]
    assert [n for n in freeze_to_norms(model) if "alpha" not in n] == learning
    assert (norm.weight == 3).all()
    freeze_to_norms(model, init="one")
    assert (norm.weight == 1).all() and all((p == 0).all() for n, p in norm.named_parameters() if n == "bias")


def test_gains_and_shifts_of_every_shape_learn():
    model = nn.ModuleList(
        [
            BatchChannelNorm(4, 2),
            RegionNorm(4),
            TimeDependentLayerNorm(4),
            RMSNorm(4, unit_offset=True),
            nn.Linear(4, 4),
        ]
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(3.0)
    names = freeze_to_norms(model)
    assert set(names) == {n for n, _ in model.named_parameters() if not n.startswith("4.")}
    freeze_to_norms(model, init="one")
    x, image = torch.randn(2, 4, dtype=torch.float32), torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(model[3](x), nn.functional.rms_norm(x, (4,)))
    torch.testing.assert_close(model[2](x, torch.zeros(2)), nn.functional.layer_norm(x, (4,)))
    torch.testing.assert_close(model[1](image, torch.ones(2, 1, 3, 3)), nn.functional.instance_norm(image))
    assert (model[0].group_weight == 1).all() and (model[0].group_bias == 0).all() and (model[4].weight == 3).all()
    freeze_to_norms(model, init="uniform", generator=torch.Generator().manual_seed(0))
    for gain in (1 + model[1].weight, 1 + model[3].weight, model[2].gain.start, model[0].group_weight):
        assert ((gain >= 0) & (gain < 1)).all()
    assert (model[2].shift.start == 0).all()


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
        "1": ("0", ("3",), [0, 3]),
        "4": ("3", ("6",), [1, 2, 5]),
        "10": ("8", ("11",), [4]),
    }
    assert not report.kept and model[3].weight.shape == (3, 4, 3, 3) and model[6].bias is not None
    assert model[10].buffer_x2.shape == (4, 5) and model[10].num_features == 5
    assert report.parameters_after == sum(p.numel() for p in model.parameters()) < report.parameters_before
    folded, folds = fold(torch.export.export(model, (x,)))
    torch.testing.assert_close(folded.module()(x), expected, rtol=1e-11, atol=1e-11)
    assert not folds.remaining
    assert "4: 3 channels between 3 and 6 removed" in str(report)
    model.train()(x).sum().backward()


@pytest.mark.parametrize("make", [MaskedBatchNorm, lambda c: PowerNorm(c, group_num=None),
                                  lambda c: MovingAverageBatchNorm(c, channel_dim=-1)])  # fmt: skip
def test_every_static_norm_can_lose_channels(make):
    model = trained(nn.Sequential(nn.Linear(3, C), nn.SiLU(), make(C), nn.Linear(C, 2, bias=False)))
    with torch.no_grad():
        model[2].weight[1] = 0.0
    x = torch.randn(4, 5, 3).double()
    expected = model(x)
    report = remove_dead_channels(model, x, threshold=1e-12)
    assert report.removed == {"2": ("0", ("3",), [1])}
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


def test_channels_that_stay_beside_removed_ones_are_told():
    """Behind a ReLU one constant is 0 and goes; the other is 1, which a padded convolution sees as 0 at borders."""
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1)).eval()
    with torch.no_grad():
        model[1].weight[:2] = 0
        model[1].bias[:2] = torch.tensor([-1.0, 1.0])
    x = torch.randn(2, 1, 5, 5)
    expected = model(x)
    report = remove_dead_channels(model, x)
    torch.testing.assert_close(model(x), expected)
    assert report.removed["1"][2] == [0] and report.kept["1"].startswith("1 of them: a padded convolution")


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


def test_modes_of_modules_stay_what_they_were():
    model = trained(nn.Sequential(nn.Linear(3, C), nn.BatchNorm1d(C), nn.Linear(C, 2))).train()
    model[1].eval()  # frozen
    remove_dead_channels(model, (torch.randn(9, 3).double(),))
    assert [module.training for module in model.modules()] == [True, True, False, True]


def test_two_norms_between_the_same_layers_both_lose_theirs():
    model = trained(nn.Sequential(nn.Linear(3, C), nn.BatchNorm1d(C), nn.Tanh(), UnifiedNorm(C), nn.Linear(C, 2)))
    with torch.no_grad():
        model[1].weight[[1, 2]] = 0.0
        model[3].weight[[2, 4]] = 0.0
    x = torch.randn(4, 3).double()
    expected = model(x)
    report = remove_dead_channels(model, (x,))
    assert report.removed == {"1": ("0", ("4",), [1, 2, 4])} and not report.kept and model[4].in_features == 3
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


class Images(nn.Module):
    """A channel that two layers read, and one behind pooling."""

    def __init__(self):
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, C, 3), nn.BatchNorm2d(C)
        self.left, self.right = nn.Conv2d(C, C, 1), nn.Conv2d(C, C, 1)
        self.wide, self.norm2, self.head = nn.Conv2d(C, 8, 1), nn.BatchNorm2d(8), nn.Linear(8, 2)

    def forward(self, x):
        x = torch.relu(self.norm1(self.first(x)))
        x = self.left(x) + self.right(torch.sigmoid(x))
        return self.head(torch.flatten(nn.functional.adaptive_avg_pool2d(self.norm2(self.wide(x)).tanh(), 1), 1))


def test_channels_go_from_every_reader_and_through_pooling():
    model = trained(Images())
    with torch.no_grad():
        model.norm1.weight[[2, 3]] = 0.0
        model.norm2.weight[:5] = 0.0
    x = torch.randn(2, 3, 8, 8).double()
    expected = model(x)
    report = remove_dead_channels(model, (x,))
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert report.removed == {
        "norm1": ("first", ("left", "right"), [2, 3]),
        "norm2": ("wide", ("head",), [0, 1, 2, 3, 4]),
    }
    assert model.left.in_channels == model.right.in_channels == 4 and model.head.in_features == 3 and not report.kept


class Between(nn.Module):
    """A dead channel between two layers, which are used in some way."""

    def __init__(self, function):
        super().__init__()
        self.write, self.norm, self.read, self.function = nn.Linear(C, C), nn.BatchNorm1d(C), nn.Linear(C, C), function

    def forward(self, x):
        return self.function(self, x)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda m, x: m.read(m.read(m.norm(m.write(x)))), "the weight of linear in read is read at another place, too"),
        (
            lambda m, x: m.read(m.norm(m.write(m.write(x)))),
            "the weight of linear in write is read at another place, too",
        ),
        (lambda m, x: m.read(m.norm(m.write(x))) + m.write.weight.sum(), "the weight of linear in write is read at"),
        (lambda m, x: m.read(m.norm(m.write(x))) + m.write.bias, "write.bias is read at another place, too"),
        (lambda m, x: m.read(m.norm(m.write(x))) + m.norm.bias, "norm.bias is read at another place, too"),
        (lambda m, x: m.read(m.norm(m.write(x))) + m.norm(x), "norm.weight is read at another place, too"),
        (lambda m, x: m.read(m.norm(m.write(x)) * m.read.bias), "mul has constants of its own for these channels"),
        (
            lambda m, x: nn.functional.linear(m.norm(m.write(x)), m.read.weight),
            "linear is not a call of a plain linear",
        ),
        (lambda m, x: m.read(x + m.norm(m.write(x))), "add is among its readers"),
        (lambda m, x: m.norm(m.write(x)), "the model's output is among its readers"),
        (lambda m, x: m.read(m.norm(x)), "it does not stand between linear layers or ungrouped convolutions alone"),
    ],
)
def test_channels_that_cannot_go_are_named_with_the_reason(function, reason):
    model = trained(Between(function))
    with torch.no_grad():
        model.norm.weight[1] = 1e-4
    before, x = copy.deepcopy(model.state_dict()), torch.randn(4, C).double()
    report = remove_dead_channels(model, (x,), threshold=1e-3)
    assert not report.removed and report.parameters_after == report.parameters_before
    assert report.kept["norm"].startswith(reason)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_padded_convolution_behind_a_constant_and_a_shortcut_keep_their_channels():
    model = trained(nn.Sequential(nn.Conv1d(C, C, 1), nn.BatchNorm1d(C), nn.Conv1d(C, C, 3, padding=1)))
    with torch.no_grad():
        model[1].weight[[1, 2]] = 0.0
        model[1].bias[1] = 0.0
    x = torch.randn(2, C, 4).double()
    expected = model(x)
    assert remove_dead_channels(model, (x,)).removed == {"1": ("0", ("2",), [1])}
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert "a padded convolution shows" in remove_dead_channels(model, (x,)).kept["1"]
    shortcut = trained(nn.Sequential(nn.Linear(3, C), RepBatchNorm(C), nn.Linear(C, 2)))
    with torch.no_grad():
        shortcut[1].weight.zero_()
    report = remove_dead_channels(shortcut, (torch.randn(2, 3).double(),))
    assert not report.removed and not report.kept


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: freeze_to_norms(nn.Linear(1, 1)), "Linear has no norm with a gain"),
        (lambda: freeze_to_norms(net(), also="head"), "also='head' is not a module"),
        (lambda: freeze_to_norms(net(), init="zero"), "init='zero' is unknown"),
        (lambda: remove_dead_channels(net(), (), threshold=-1), "threshold=-1 is not allowed"),
    ],
)
def test_refusals(build, message):
    with pytest.raises(ValueError, match=message):
        build()
