"""Adapting BatchNorms: every method against its formula in NumPy, freezing and folding, what is refused."""

import copy
import re

import numpy as np
import pytest
import torch
from torch import nn

from normfuse import fold
from normfuse.convert import UnMixBatchNorm, adapt, freeze
from normfuse.nn import MaskedBatchNorm, RepBatchNorm

EXACT = {"rtol": 1e-11, "atol": 1e-12}  # float64, some hundred roundings
C = 5


class ActivatedBatchNorm(nn.BatchNorm2d):
    """As other libraries write them: a BatchNorm whose forward does more."""

    def forward(self, x):
        return super().forward(x).relu()


LAYOUTS = {
    "rows": (nn.BatchNorm1d, (6, C)),
    "sequence": (nn.BatchNorm1d, (6, C, 4)),
    "image": (nn.BatchNorm2d, (6, C, 3, 2)),
    "activated": (ActivatedBatchNorm, (6, C, 3, 2)),
    "channels last": (MaskedBatchNorm, (6, 4, C)),
}


def source(layout):
    """A model around one BatchNorm of random statistics, in evaluation mode."""
    norm = LAYOUTS[layout][0](C, eps=1e-3)
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean):
        tensor.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    return nn.Sequential(norm).double().eval()


def batches(layout, count=3):
    return [1.0 + 2.0 * torch.randn(LAYOUTS[layout][1], dtype=torch.float64) for _ in range(count)]


def samples(x, layout):
    """[samples, channels, positions] in NumPy."""
    x = x.movedim(-1, 1) if layout == "channels last" else x
    return x.reshape(*x.shape[:2], -1).numpy()


def normalised(x, norm, mean, var, layout):
    """What the norm gives with these statistics, [channels] or [samples, channels]."""
    mean, var = (np.atleast_2d(v)[:, :, None] for v in (mean, var))
    y = (samples(x, layout) - mean) / np.sqrt(var + norm.eps)
    y = y * norm.weight.detach().numpy()[:, None] + norm.bias.detach().numpy()[:, None]
    return np.maximum(y, 0) if layout == "activated" else y


def statistics(values):
    rows = values.transpose(0, 2, 1).reshape(-1, C)
    return rows.mean(0), rows.var(0, ddof=1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_alpha_mixes_each_batch_and_freezes_everything_seen(layout):
    model = source(layout)
    norm = model[0]
    mean, var = norm.running_mean.numpy().copy(), norm.running_var.numpy().copy()
    report = adapt(model, "alpha", test_weight=0.3)
    assert [(s.name, s.after) for s in report.swaps] == [("0", "AlphaBatchNorm")]
    data = batches(layout)
    for x in data:
        m, v = statistics(samples(x, layout))
        expected = normalised(x, norm, 0.7 * mean + 0.3 * m, 0.7 * var + 0.3 * v, layout)
        np.testing.assert_allclose(samples(model(x).detach(), layout), expected, **EXACT)
    np.testing.assert_array_equal(norm.running_mean, mean)
    report = freeze(model)
    assert model[0] is norm and report.swaps[0].after == type(norm).__name__
    m, v = statistics(np.concatenate([samples(x, layout) for x in data]))
    np.testing.assert_allclose(norm.running_mean, 0.7 * mean + 0.3 * m, **EXACT)
    np.testing.assert_allclose(norm.running_var, 0.7 * var + 0.3 * v, **EXACT)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_decaying_statistics_follow_ever_more_slowly(layout):
    model = source(layout)
    norm = model[0]
    mean, var = norm.running_mean.numpy().copy(), norm.running_var.numpy().copy()
    adapt(model, "decay", rate=0.4, decay=0.5)
    for k, x in enumerate(batches(layout)):
        share = 0.4 * np.exp(-0.5 * k)
        m, v = statistics(samples(x, layout))
        mean, var = (1 - share) * mean + share * m, (1 - share) * var + share * v
        np.testing.assert_allclose(samples(model(x).detach(), layout), normalised(x, norm, mean, var, layout), **EXACT)
    freeze(model)
    np.testing.assert_allclose(norm.running_mean, mean, **EXACT)
    np.testing.assert_allclose(norm.running_var, var, **EXACT)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "rows"])
def test_unmix_follows_the_formula_sample_by_sample(layout):
    model = source(layout)
    norm = model[0]
    adapt(model, "unmix", components=4, momentum=0.8, generator=torch.Generator().manual_seed(3))
    means, variances = model[0].means.numpy().copy(), model[0].vars.numpy().copy()
    noise = torch.randn(4, C, generator=torch.Generator().manual_seed(3), dtype=torch.float64).numpy()
    sd = np.sqrt(norm.running_var.numpy())
    np.testing.assert_allclose(means, norm.running_mean.numpy() + np.sqrt(0.5 * 4 / 3) * sd * noise, **EXACT)
    np.testing.assert_allclose(variances, np.tile(0.5 * sd**2, (4, 1)), **EXACT)
    for x in batches(layout):
        values = samples(x, layout)
        mixed, mixed_var, moved, moved_var = [], [], [], []
        for sample in values:
            m, v = sample.mean(1), sample.var(1)
            cosine = np.array([m @ k / np.linalg.norm(m) / np.linalg.norm(k) for k in means])
            p = np.exp(cosine / 0.07)
            p = (p / p.sum())[:, None]
            a, b = (1 - p) * means + p * m, (1 - p) * variances + p * v
            mixed.append(a.mean(0))
            mixed_var.append(b.mean(0) + (a**2).mean(0) - a.mean(0) ** 2)
            moved.append(p * (m - means))
            moved_var.append(p * (v - variances))
        expected = normalised(x, norm, np.array(mixed), np.array(mixed_var), layout)
        np.testing.assert_allclose(samples(model(x).detach(), layout), expected, **EXACT)
        rate = 1 - (1 - 0.8) ** (len(values) / 64)
        means = means + rate * np.mean(moved, 0)
        variances = variances + rate * np.mean(moved_var, 0)
        np.testing.assert_allclose(model[0].means, means, **EXACT)
        np.testing.assert_allclose(model[0].vars, variances, **EXACT)


def network():
    norms = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norms[0], nn.ReLU(), nn.Conv2d(4, 4, 3), norms[1], nn.Conv2d(4, 2, 1))
    for norm in norms:
        norm.weight.data.normal_()
        norm.bias.data.normal_()
    return model.double().eval()


@pytest.mark.parametrize("method", ["alpha", "decay"])
def test_frozen_norms_fold(method):
    model, x = network(), torch.randn(4, 3, 8, 8).double()
    names = list(model.state_dict())
    before = model(x)
    adapt(model, method)
    for _ in range(3):
        model(2 * torch.randn_like(x) + 1)
    freeze(model)
    assert list(model.state_dict()) == names and not any(m.training for m in model.modules())
    expected = model(x)
    assert (expected - before).abs().max() > 1e-3
    folded, report = fold(torch.export.export(model, (x,)))
    assert len(report.norms) == 2 and not report.remaining
    torch.testing.assert_close(folded.module()(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["alpha", "unmix"])
def test_an_unfrozen_model_is_exported_as_what_it_is(method):
    model, x = network(), torch.randn(4, 3, 8, 8).double()
    adapt(model, method)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    folded, _ = fold(program)
    before = copy.deepcopy(model.state_dict())
    for y in (x, 2 * torch.randn(7, 3, 8, 8).double()):
        expected = copy.deepcopy(model)(y)
        for _ in range(2):  # nothing moves
            torch.testing.assert_close(program.module()(y), expected, rtol=1e-11, atol=1e-11)
            torch.testing.assert_close(folded.module()(y), expected, rtol=1e-11, atol=1e-11)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("method", ["alpha", "decay", "unmix"])
def test_gradients_and_modes(method):
    model, x = network(), torch.randn(4, 3, 8, 8).double()
    adapt(model, method)
    model.train()
    a, b = model(x), model(x + 1)  # two forwards, then one backward
    (a.sum() + b.square().sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert not any(m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    if method != "unmix":
        freeze(model)
        assert all(m.training for m in model.modules())


def test_unmix_leaves_rows_to_the_sources_statistics():
    """[B, C] has no positions to take a sample's statistics over."""
    model = source("rows")
    norm = copy.deepcopy(model[0])
    adapt(model, "unmix", components=4)
    before = copy.deepcopy(model.state_dict())
    x = next(iter(batches("rows")))
    assert torch.equal(model(x), norm(x))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("method", ["alpha", "unmix"])
def test_gradients_through_the_statistics_are_exact(method, monkeypatch):
    model = source("image")
    adapt(model, method)
    x = torch.randn(3, C, 2, 2, dtype=torch.float64, requires_grad=True)
    if method == "unmix":  # no gradient goes through the mixing weights: they are held as they are at x
        fixed = []
        softmax = torch.softmax

        def remember(*arguments, **options):
            fixed.append(softmax(*arguments, **options).detach())
            return fixed[0]

        monkeypatch.setattr(torch, "softmax", remember)
    assert torch.autograd.gradcheck(lambda x: copy.deepcopy(model)(x), x)


def test_a_shared_norm_meets_all_its_data_and_where_leaves_others_alone():
    shared = nn.BatchNorm1d(C)
    model = nn.Sequential(shared, nn.Linear(C, C), shared, nn.BatchNorm1d(C)).double().eval()
    report = adapt(model, where="^[02]$")
    assert [s.name for s in report.swaps] == ["0", "2"] and report.kept == ["3"]
    assert model[0] is model[2] and type(model[3]) is nn.BatchNorm1d
    model(torch.randn(6, C).double())
    assert model[0].seen_rows == 12
    freeze(model)
    assert model[0] is shared and model[2] is shared


def test_an_empty_batch_and_a_single_row_leave_finite_statistics():
    model = source("rows")
    norm = model[0]
    for method in ("alpha", "decay"):
        adapt(model, method)
        assert model(torch.empty(0, C).double()).shape == (0, C)
        with pytest.raises(ValueError, match="no norm of the model met data"):
            freeze(model)
        assert model(torch.randn(1, C).double()).isfinite().all()
        freeze(model)
        assert norm.running_var.isfinite().all() and model[0] is norm


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (lambda: source("rows"), {"method": "beta"}, "method='beta' is unknown; give one of 'alpha', 'decay', 'unmix'"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), {}, "class Sequential has no BatchNorm to adapt"),
        (lambda: source("rows"), {"where": "x"}, "where='x' selects nothing; the BatchNorms are 0"),
        (lambda: nn.BatchNorm1d(2), {}, "model is itself a norm"),
        (lambda: nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False)), {}, "0, a BatchNorm1d, has no running"),
        (lambda: nn.Sequential(nn.LazyBatchNorm1d()), {}, "0, a LazyBatchNorm1d, has no running statistics"),
        (lambda: source("rows"), {"test_weight": 1.5}, r"test_weight=1\.5 is not allowed; give a number from 0 to 1"),
        (lambda: source("rows"), {"method": "decay", "rate": -1.0}, r"rate=-1\.0 is not allowed"),
        (lambda: source("rows"), {"method": "decay", "decay": 0.0}, r"decay=0\.0 is not allowed; give a positive"),
        (lambda: source("rows"), {"method": "unmix", "components": 1}, "components=1 is not allowed"),
        (lambda: source("rows"), {"method": "unmix", "momentum": 2.0}, r"momentum=2\.0 is not allowed"),
        (lambda: source("rows"), {"method": "unmix", "temperature": 0.0}, r"temperature=0\.0 is not allowed"),
    ],
)
def test_refusals_leave_the_model_as_it_was(model, arguments, message):
    model = model().train()
    before = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        adapt(model, **arguments)
    assert [type(m) for m in model.modules()] == before and all(m.training for m in model.modules())


def test_an_unknown_option_and_what_cannot_be_frozen():
    model = source("rows")
    with pytest.raises(TypeError, match="weight"):
        adapt(model, weight=0.1)
    with pytest.raises(ValueError, match="does not adapt; call adapt"):
        freeze(model)
    adapt(model, "unmix")
    with pytest.raises(ValueError, match="model adapts already"):
        adapt(model, "alpha")
    model(torch.randn(6, C).double())
    with pytest.raises(ValueError, match=re.escape("0: UnMix-TNS computes statistics from each sample")):
        freeze(model)
    assert isinstance(model[0], UnMixBatchNorm)


class Masked(nn.Module):
    """Sequences [batch, length, C] whose norm gets the mask, by name or by position."""

    def __init__(self):
        super().__init__()
        self.norm = source("channels last")[0]

    def forward(self, x, pad_mask=None):
        return self.norm(x) if pad_mask is None else self.norm(x, pad_mask=pad_mask)


@pytest.mark.parametrize("method", ["alpha", "decay", "unmix"])
def test_padding_is_left_out(method):
    """Whatever stands there, NaN included: as if the sequences were shorter; a batch of padding alone moves nothing."""
    masked = Masked()
    options = {"generator": torch.Generator().manual_seed(3)} if method == "unmix" else {}
    adapt(masked, method, **options)
    short = copy.deepcopy(masked)
    for _ in range(3):
        x = 1 + 2 * torch.randn(6, 4, C, dtype=torch.float64)
        expected = short(x[:, 1:])
        x[:, 0] = float("nan")
        pad_mask = torch.zeros(6, 4, dtype=torch.bool)
        pad_mask[:, 0] = True
        torch.testing.assert_close(masked(x, pad_mask)[:, 1:], expected, rtol=1e-11, atol=1e-12)
        before = copy.deepcopy(masked.state_dict())
        assert masked(torch.ones_like(x), torch.ones_like(pad_mask)).isfinite().all()
        for name, value in masked.state_dict().items():
            assert torch.equal(value, before[name]) and value.shape == short.state_dict()[name].shape, name
            torch.testing.assert_close(value, short.state_dict()[name], rtol=1e-11, atol=1e-12)
    with pytest.raises(ValueError, match=r"pad_mask has shape \(6, 3\); expected \(6, 4\)"):
        masked(x, pad_mask[:, 1:])
    if method != "unmix":
        freeze(masked), freeze(short)
        torch.testing.assert_close(masked.state_dict(), short.state_dict(), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("method", ["alpha", "decay"])
def test_masked_batch_norms_adapt_as_torchs_do(method):
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).eval()
    ours = copy.deepcopy(theirs)
    ours[1] = MaskedBatchNorm(4, channel_dim=1).eval()
    ours[1].load_state_dict(theirs[1].state_dict())
    for model in (theirs, ours):
        adapt(model, method)
        model(torch.arange(48.0).reshape(2, 2, 3, 4))
        freeze(model)
    assert type(ours[1]) is MaskedBatchNorm
    x = torch.randn(2, 2, 3, 4)
    torch.testing.assert_close(ours(x), theirs(x))
    with pytest.raises(ValueError, match="has no BatchNorm to adapt"):
        adapt(nn.Sequential(RepBatchNorm(4)))
