"""Checkpoints with the names and shapes of the authors' programs: they load, and compute what those compute."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from normfuse.convert import load_original
from normfuse.nn import (
    BatchChannelNorm,
    DomainSplitNorm,
    EstimatedBatchNorm,
    LearnableRegionNorm,
    MaskedBatchNorm,
    ProgressiveNorm,
    RegionNorm,
    RepBatchNorm,
    TimeDependentLayerNorm,
    sigma_reparam,
)

C = 6


def batch_state(channels=C):
    return {
        "weight": torch.randn(channels),
        "bias": torch.randn(channels),
        "running_mean": torch.randn(channels),
        "running_var": torch.rand(channels) + 0.5,
        "num_batches_tracked": torch.tensor(7),
    }


def below(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def normalised(x, state, eps=1e-5):
    return F.batch_norm(x, *(state[n] for n in ("running_mean", "running_var", "weight", "bias")), eps=eps)


def test_rep_batch_norm_below_a_module_of_its_own():
    bn, linear = batch_state(), nn.Linear(C, C)
    state = {**below("0.", linear.state_dict()), "1.alpha": torch.tensor([0.3]), **below("1.bn.", bn)}
    before = dict(state)
    model = nn.Sequential(nn.Linear(C, C), RepBatchNorm(C)).eval()
    result = load_original(model, state)
    assert not result.missing_keys and not result.unexpected_keys and state.keys() == before.keys()
    x = torch.randn(5, C)
    torch.testing.assert_close(model(x), normalised(linear(x), bn) + 0.3 * linear(x))
    again = copy.deepcopy(model)
    load_original(again, model.state_dict())  # our own names are left alone
    assert torch.equal(again(x), model(x))


def test_a_schedule_goes_on_where_it_was():
    bn, layer = batch_state(), nn.LayerNorm(C).state_dict()
    state = {
        **below("norm1.", layer), **below("norm2.bn.", bn), "norm2.alpha": torch.ones(1),
        "warm": torch.tensor(0), "iter": torch.tensor(75), "total_step": torch.tensor(100),
    }  # fmt: skip
    norm = ProgressiveNorm(nn.LayerNorm(C), RepBatchNorm(C), begin=10, end=110)
    load_original(norm, state)
    assert norm.step == 35 and norm.share == 0.75
    torch.testing.assert_close(norm.static.running_mean, bn["running_mean"])
    load_original(norm, {**state, "warm": torch.tensor(4), "iter": torch.tensor(100)})
    assert norm.step == 6 and norm.share == 1
    with pytest.raises(ValueError, match="has 100 steps and 0 of warm-up left, this one falls from step 0 to 50"):
        load_original(ProgressiveNorm(nn.LayerNorm(C), RepBatchNorm(C), end=50), state)


@pytest.mark.parametrize("estimated", [False, True])
def test_batch_channel_norm(estimated):
    bn, weight, bias = batch_state(), torch.randn(1, 2, 1), torch.randn(1, 2, 1)
    state = {"weight": weight, "bias": bias, **below("bn.", bn)}
    if estimated:
        state["bn.estbn_moving_speed"] = torch.tensor([0.02])
    norm = BatchChannelNorm(C, 2, estimated=estimated, eps=1e-3).eval()
    load_original(nn.Sequential(norm), below("0.", state))
    x = torch.randn(4, C, 3, 3)
    groups = F.group_norm(normalised(x, bn), 2, eps=1e-3).view(4, 2, -1)
    torch.testing.assert_close(norm(x), (weight * groups + bias).view_as(x))
    if estimated:
        assert norm.batch_norm.momentum == pytest.approx(0.02)
        alone = EstimatedBatchNorm(C)
        load_original(alone, {**bn, "estbn_moving_speed": torch.tensor([0.5])})
        assert alone.momentum == 0.5


def test_region_norms():
    parts = {f"{r}_{p}": torch.randn(4) for r in ("foreground", "background") for p in ("gamma", "beta")}
    norm = RegionNorm(4, pool="batch", shift_everywhere=True)
    load_original(norm, parts)
    assert torch.equal(norm.weight, torch.stack([parts["background_gamma"], parts["foreground_gamma"]]))
    assert torch.equal(norm.bias, torch.stack([parts["background_beta"], parts["foreground_beta"]]))
    learnable = LearnableRegionNorm()
    state = {
        "sa.conv1.weight": torch.randn(1, 2, 7, 7), "sa.gamma_conv.weight": torch.randn(1, 1, 7, 7),
        "sa.gamma_conv.bias": torch.randn(1), "sa.beta_conv.weight": torch.randn(1, 1, 7, 7),
        "sa.beta_conv.bias": torch.randn(1),
    }  # fmt: skip
    load_original(learnable, state)
    assert torch.equal(learnable.attention.weight, state["sa.conv1.weight"])
    assert torch.equal(learnable.shift.bias, state["sa.beta_conv.bias"])


@pytest.mark.parametrize("rms", [False, True])
def test_time_dependent_norms(rms):
    names = ("scale",) if rms else ("weight", "bias")
    state = {f"{n}.{p}": torch.randn(C) for n in names for p in ("param0", "param1", "nodecay_weight", "nodecay_bias")}
    norm = TimeDependentLayerNorm(C, rms=rms)
    load_original(nn.ModuleDict({"norm": norm}), below("norm.", state))
    x, t = torch.randn(3, C), torch.randn(3)

    def at(name):
        p0, p1, w, b = (state[f"{name}.{part}"] for part in ("param0", "param1", "nodecay_weight", "nodecay_bias"))
        return p1 + torch.sigmoid(t[:, None] * (w + 1) + b) * (p0 - p1)

    plain = F.rms_norm(x, (C,), eps=0.0) if rms else F.layer_norm(x, (C,))
    expected = plain * at(names[0]) + (0 if rms else at("bias"))
    torch.testing.assert_close(norm(x, 4 * t), expected, rtol=1e-5, atol=1e-6)


def test_spectral_weights_of_the_vision_program():
    weight, sigma = torch.randn(5, 3), torch.tensor([1.7])
    v = F.normalize(torch.randn(3), dim=0)
    state = {
        "0.weight": weight, "0.bias": torch.randn(5), "0.sigma": sigma, "0.spectral_normed_weight.weight": weight,
        "0.spectral_normed_weight.u": v, "0.spectral_normed_weight.spectral_norm": torch.ones(1),
        "0.effective_spectral_norm": torch.ones(1),
    }  # fmt: skip
    model = nn.Sequential(sigma_reparam(nn.Linear(3, 5), program="vision", iterate_in_evaluation=True)).eval()
    load_original(model, state)
    # Their evaluation iterates once, from the right vector: u = W v, v = W' u, and the norm is u' W v.
    u = F.normalize(weight @ v, dim=0)
    norm = u @ weight @ F.normalize(weight.t() @ u, dim=0)
    x = torch.randn(2, 3)
    torch.testing.assert_close(model(x), F.linear(x, weight * (sigma / norm), state["0.bias"]))


def test_domains_and_names_that_do_not_fit():
    states = [batch_state(), batch_state()]
    norm = DomainSplitNorm(MaskedBatchNorm(C), 2, domain=1).eval()
    load_original(norm, {**below("bns.0.", states[0]), **below("bns.1.", states[1])})
    x = torch.randn(4, C)
    torch.testing.assert_close(norm(x), normalised(x, states[1]))
    with pytest.raises(RuntimeError, match="Unexpected"):
        load_original(norm, {**below("bns.0.", states[0]), **below("bns.1.", states[1]), "other": torch.ones(1)})
    left = load_original(norm, below("bns.0.", states[0]), strict=False)
    assert left.missing_keys == [name for name in norm.state_dict() if name.startswith("norms.1.")]
