"""Norms in torch.nn.TransformerEncoder, whose fast path in evaluation would compute LayerNorms in their place."""

import copy

import pytest
import torch
from registry_cases import C, every
from torch import nn

from normfuse.convert import progressive, swap_norms
from normfuse.nn import UnifiedNorm
from normfuse.nn.registry import NORMS

ALONE = [entry for entry in NORMS if entry.layout == "sequence" and entry.name != "TimeDependentLayerNorm"]
PADDING = torch.arange(6) >= torch.tensor([6, 4, 5, 6])[:, None]


def layer():
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(C, 2, 16, dropout=0.0, batch_first=True)


def check(encoder):
    x = torch.randn(4, 6, C)
    encoder(x)
    encoder.eval()
    for options in ({}, {"src_key_padding_mask": PADDING}):
        expected = encoder(x, **options)
        with torch.no_grad():
            result = encoder(x, **options)
        valid = ~PADDING
        torch.testing.assert_close(result[valid], expected[valid])


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@every(ALONE)
def test_evaluation_calls_the_norms(entry):
    block = layer()
    block.norm1, block.norm2 = entry.make(C), entry.make(C)
    check(nn.TransformerEncoder(block, 2))


@pytest.mark.parametrize("to", ["unified", "batch", "rms", "dyt"])
def test_evaluation_calls_norms_that_were_exchanged(to):
    encoder = nn.TransformerEncoder(layer(), 2)
    swap_norms(encoder, to)
    check(encoder)


def test_evaluation_calls_norms_that_are_being_replaced():
    model = nn.Sequential(nn.TransformerEncoder(layer(), 2))
    progressive(model, schedule=10).step(5)
    check(model[0])


def test_a_norm_inside_of_another_module_is_called():
    class Wrapped(nn.Module):
        eps, weight, bias = 1e-5, torch.ones(C), torch.zeros(C)

        def __init__(self):
            super().__init__()
            self.norm = UnifiedNorm(C)

        def forward(self, x):
            return self.norm(x)

    block = layer()
    block.norm1 = block.norm2 = Wrapped()
    check(copy.deepcopy(nn.TransformerEncoder(block, 1, enable_nested_tensor=False)))


def test_layers_with_their_own_norms_keep_the_fast_path():
    encoder = nn.TransformerEncoder(layer(), 2)
    swap_norms(nn.Sequential(encoder, nn.LayerNorm(C)), "unified", where=r"^1$")
    assert encoder.layers[0].activation_relu_or_gelu == 1 and encoder.use_nested_tensor


def test_evaluation_compiles_without_a_break():
    encoder = nn.TransformerEncoder(layer(), 1)
    swap_norms(encoder, "unified")
    x = torch.randn(2, 5, C)
    with torch.no_grad():
        expected = encoder.eval()(x)
        torch.testing.assert_close(torch.compile(encoder, backend="eager", fullgraph=True)(x), expected)


def test_listing_modules_compiles_without_a_break():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = UnifiedNorm(C)

        def forward(self, x):
            return self.norm(x) * len(list(self.modules()))

    model, x = Model().eval(), torch.randn(3, C)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))


def test_a_compiled_backward_pass_meets_no_half_made_module():
    model, x = nn.Sequential(nn.Linear(C, C), nn.LayerNorm(C)), torch.randn(3, C, requires_grad=True)
    compiled = torch.compile(model, backend="eager")
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(lambda: compiled(x).square().sum().backward(), backend="eager")()
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    torch.testing.assert_close(x.grad, expected)
