"""calibrate: the statistics of the data, and nothing else touched. Resuming: bit for bit."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from normfuse.convert import adapt
from normfuse.nn import (
    BatchChannelNorm,
    DomainSplitNorm,
    EstimatedBatchNorm,
    MaskedBatchNorm,
    ProgressiveNorm,
    RegularizedBatchNorm,
    RepBatchNorm,
    UnifiedNorm,
    calibrate,
    choose_domain,
)
from normfuse.nn.batch_norm import deviation_of
from tests.norms import with_statistics

C = 6
NORMS = with_statistics(C, channel_dim=-1, warmup_iters=0, window_size=2)
STATISTIC = {"running_mean", "running_var", "running_phi", "buffer_x2"}


@pytest.fixture(params=NORMS)
def make(request):
    return NORMS[request.param]


def train(model, steps, seed, optimizer=None):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(9, 4, generator=generator)
        loss = model(x.to(next(model.parameters()).dtype)).square().sum()
        model.zero_grad()
        loss.backward()
        if optimizer is not None:
            optimizer.step()
    return model


def network(make):
    return nn.Sequential(nn.Linear(4, C), make(), nn.Dropout(0.5), nn.Linear(C, C), make())


def scaled(norm, x):
    if getattr(norm, "group_num", None):
        groups = x.unflatten(-1, (norm.group_num, -1))
        return nn.functional.rms_norm(groups, groups.shape[-1:], eps=norm.eps).flatten(-2)
    return x


def has_mean(norm):
    return isinstance(norm, MaskedBatchNorm)


def expected_statistics(model, batches):
    """By hand: the first norm sees the linear layer's rows, the second what the first gives batch by batch."""
    first, second = [], []
    for x in batches:
        hidden = scaled(model[1], model[0](x))
        mean = hidden.mean(0) if has_mean(model[1]) else 0
        z = (hidden - mean) / deviation_of(model[1], (hidden - mean).square().mean(0))
        first.append(hidden)
        y = model[1].weight * z + model[1].bias + getattr(model[1], "alpha", 0) * hidden
        second.append(scaled(model[4], model[3](y)))
    wanted = []
    for norm, rows in ((model[1], torch.cat(first)), (model[4], torch.cat(second))):
        if not has_mean(norm):
            wanted.append(dict.fromkeys(STATISTIC, rows.square().mean(0)))
        else:
            var = rows.var(0, correction=0 if isinstance(norm, EstimatedBatchNorm) else 1)
            wanted.append({"running_mean": rows.mean(0), "running_var": var})
    return wanted


def test_calibrate_takes_the_statistics_of_all_rows(make):
    torch.manual_seed(3)
    model = train(network(make).double(), 5, seed=1)
    model.train()
    model[3].eval()
    untouched = copy.deepcopy(model)
    batches = [5 + torch.randn(rows, 4, dtype=torch.float64) for rows in (8, 3, 1)]
    assert calibrate(model, batches, progress=False) == 3
    with torch.no_grad():
        wanted = expected_statistics(untouched, batches)
    for norm, statistics in zip((model[1], model[4]), wanted, strict=True):
        for name in STATISTIC & dict(norm.named_buffers()).keys():
            value = norm.get_buffer(name)
            torch.testing.assert_close(value, statistics[name].expand_as(value), rtol=1e-10, atol=1e-10)
    for name, value in untouched.state_dict().items():
        if name.split(".")[-1] not in STATISTIC:
            assert torch.equal(value, model.state_dict()[name]), name
    assert [module.training for module in model] == [True, True, True, False, True]
    assert not model[1]._forward_pre_hooks


INSIDE = {
    "regularized": lambda: RegularizedBatchNorm(C),
    "rep batch": lambda: RepBatchNorm(C),
    "progressive": lambda: ProgressiveNorm(nn.LayerNorm(C), MaskedBatchNorm(C), end=5),
    "batch-channel": lambda: BatchChannelNorm(C, 2),
}


@pytest.mark.parametrize("kind", INSIDE)
def test_norms_inside_of_others_are_calibrated(kind):
    norm = INSIDE[kind]()
    rows = 3 + 2 * torch.randn(4, 16, C)
    calibrate(norm, list(rows), progress=False)
    (inner,) = (module for module in norm.modules() if isinstance(module, MaskedBatchNorm))
    torch.testing.assert_close(inner.running_mean, rows.flatten(0, 1).mean(0))
    torch.testing.assert_close(inner.running_var, rows.flatten(0, 1).var(0))
    assert getattr(norm, "penalty", None) is None, "a calibration is no training step"


def test_domains_are_calibrated_one_by_one():
    norm = DomainSplitNorm(MaskedBatchNorm(C))
    means = []
    for domain in (0, 1):
        choose_domain(norm, domain)
        batch = 4 * domain + torch.randn(32, C)
        calibrate(norm, [batch], progress=False)
        means.append(batch.mean(0))
    for inner, mean in zip(norm.norms, means, strict=True):
        torch.testing.assert_close(inner.running_mean, mean)


def test_padding_of_a_progressive_norm_is_left_out_also_at_its_end():
    norm = ProgressiveNorm(nn.LayerNorm(C), MaskedBatchNorm(C), end=5)
    norm.pad_mask = torch.arange(8) > 4
    for share in (1.0, 0.0):
        norm.advance(0 if share else 5)
        x = torch.randn(8, C)
        calibrate(norm, [x], progress=False)
        torch.testing.assert_close(norm.static.running_mean, x[:5].mean(0))


def test_a_model_that_adapts_is_refused():
    model = nn.Sequential(nn.Linear(4, C), MaskedBatchNorm(C), nn.Sequential(UnifiedNorm(C)))
    adapt(model)
    with pytest.raises(ValueError, match=r"1 \(AlphaBatchNorm\) follows the data .*freeze\(model\) first"):
        calibrate(model, [torch.randn(3, 4)])


def test_evaluation_after_calibration_is_normalised(make):
    model = network(make)
    batches = [3 + 5 * torch.randn(64, 4) for _ in range(20)]
    calibrate(model, batches, progress=False)
    x = torch.cat(batches)
    y = model.eval()[:2](x) - getattr(model[1], "alpha", 0) * model[0](x)
    torch.testing.assert_close(y.square().mean(0), torch.ones(C), rtol=1e-3, atol=1e-3)
    if has_mean(model[1]):
        torch.testing.assert_close(y.mean(0), torch.zeros(C), rtol=0, atol=1e-3)


def test_kinds_of_batches_and_the_bar(make, capsys):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = make()

        def forward(self, x, pad_mask=None):
            return self.norm(x, pad_mask)

    x = torch.randn(8, C)
    pad_mask = torch.arange(8) > 4
    results = []
    named = {"x": x, "pad_mask": pad_mask}
    loaders = [x[:5]], [(x[:5], "label")], ({"x": x[:5]} for _ in range(1)), [named], [(named, "label")]
    for loader in loaders:
        model = Named()
        assert calibrate(model, loader, device="cpu") == 1
        results.append(model.norm.state_dict())
    assert "calibrating" in capsys.readouterr().out
    for result in results[1:]:
        for name, value in result.items():
            torch.testing.assert_close(value, results[0][name])
    assert calibrate(Named(), [x] * 5, max_batches=2, progress=False) == 2


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "loader gave no batch"),
        ([torch.randn(0, 4)], "no norm of the model saw a valid row"),
        ([torch.full((3, 4), float("nan"))], "the statistic of 1 is not finite"),
    ],
)
def test_a_refusal_leaves_the_model_as_it_was(make, loader, message):
    model = train(network(make), 2, seed=1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        calibrate(model, loader, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="class Linear has no norm with running statistics to calibrate"):
        calibrate(nn.Linear(2, 2), loader)
    with pytest.raises(ValueError, match=r"are BatchNorms of PyTorch; use torch\.optim\.swa_utils\.update_bn"):
        calibrate(nn.Sequential(nn.BatchNorm1d(4)), loader)


def test_update_bn_says_what_it_leaves_to_calibrate(make):
    """Beside BatchNorms of PyTorch it does its part."""
    model, loader = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), network(make)), [torch.randn(16, 4)]
    with pytest.warns(
        RuntimeWarning, match=r"update_bn sets .* call normfuse\.nn\.calibrate\(model, loader\) after it"
    ):
        update_bn(loader, model)
    torch.testing.assert_close(model[1].running_mean, model[0](loader[0]).mean(0))
    calibrate(model, loader, progress=False)


def test_an_interrupted_calibration_leaves_the_model_as_it_was(make):
    model = train(network(make), 2, seed=1)
    before = copy.deepcopy(model.state_dict())

    def breaking():
        yield torch.randn(3, 4)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, breaking(), progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_training_resumes_bit_for_bit(make):
    """Model, optimiser and random numbers stored in between: the same as never having stopped."""

    def start():
        torch.manual_seed(0)
        model = network(make)
        return model, torch.optim.AdamW(model.parameters(), lr=0.01)

    model, optimizer = start()
    train(model, 6, 1, optimizer)
    file = io.BytesIO()
    stored = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}
    torch.save(stored, file)
    train(model, 6, 2, optimizer)

    resumed, other = start()
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    resumed.load_state_dict(loaded["model"])
    other.load_state_dict(loaded["optimizer"])
    torch.set_rng_state(loaded["random"])
    train(resumed, 6, 2, other)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in model.state_dict().items())
