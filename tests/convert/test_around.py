"""Norms per domain and reparametrised layers in a live model."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from normfuse.convert import reparametrize, split_domains
from normfuse.folding import fold
from normfuse.nn import UnifiedNorm, choose_domain, sigma_reparam, weight_standardization


def net():
    shared = nn.LayerNorm(4)
    return nn.Sequential(nn.Linear(4, 4), UnifiedNorm(4), nn.Linear(4, 4), shared, nn.GELU(), shared, nn.Linear(4, 2))


def test_every_domain_gets_norms_of_its_own():
    model = net().double()
    single = copy.deepcopy(model).eval()
    report = split_domains(model, 3, where=lambda name, norm: name != "none")
    assert [swap.name for swap in report.swaps] == ["1", "3", "5"] and model[3] is model[5]
    x = torch.randn(6, 4).double()
    torch.testing.assert_close(model.eval()(x), single(x))
    model.train()
    for _ in range(3):
        model(torch.cat([x, 3 * x, 9 * x])).sum().backward()
    choose_domain(model, 2)
    folded, folds = fold(torch.export.export(model.eval(), (x,)))
    torch.testing.assert_close(folded.module()(x), model(x), rtol=1e-11, atol=1e-11)
    assert [record.name for record in folds.norms] == ["1.norms.2"] and not folds.remaining
    before = model(x)
    choose_domain(model, 0)
    assert not torch.allclose(model(x), before)
    with pytest.raises(ValueError, match="several domains already"):
        split_domains(model)


def test_layers_are_reparametrised():
    model = net().double().eval()
    x = torch.randn(3, 4).double()
    expected = model(x)
    assert reparametrize(model, sigma_reparam, where=r"^[02]$", init="spectral") == ["0", "2"]
    assert parametrize.is_parametrized(model[0]) and not parametrize.is_parametrized(model[6])
    torch.testing.assert_close(model(x), expected)
    convolutions = nn.Sequential(nn.Conv1d(3, 4, 2), nn.ReLU(), nn.ConvTranspose1d(4, 4, 2, groups=2))
    with pytest.raises(ValueError, match="2: ConvTranspose1d has groups=2"):
        reparametrize(convolutions, weight_standardization)
    with pytest.raises(ValueError, match="where='head' selects no linear layer"):
        reparametrize(model, sigma_reparam, where="head")


def test_refusals():
    with pytest.raises(ValueError, match="the model has no norms"):
        split_domains(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="num_domains=0 is not allowed"):
        split_domains(nn.Sequential(nn.LayerNorm(2)), 0)
