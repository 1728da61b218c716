"""LayerNorm, RMSNorm and CRMSNorm as modules: torch's parameters, what evaluation exports, and what folds."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

import normfuse
from normfuse.nn import CRMSNorm, DyT, LayerNorm, RMSNorm

C = 8
PAIRS = [(LayerNorm, nn.LayerNorm), (RMSNorm, nn.RMSNorm)]


def trained(norm):
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return norm


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_in_place_of_torchs_own(ours, theirs, training):
    """The same arguments, state_dict, results and gradients; and it is one, for code that asks."""
    a, b = ours(C, 1e-3), trained(theirs(C, 1e-3))
    a.load_state_dict(b.state_dict())
    b.load_state_dict(a.state_dict())
    assert isinstance(a, theirs) and repr(a).startswith(type(a).__name__) and f"({C},), eps=0.001" in repr(a)
    x, dy = torch.randn(2, 3, 5, C)
    for norm in (a, b):
        norm.train(training)
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    a(mine).backward(dy)
    b(other).backward(dy)
    torch.testing.assert_close(a(x), b(x))
    torch.testing.assert_close(mine.grad, other.grad)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("make", [LayerNorm, RMSNorm, CRMSNorm, DyT])
def test_sequences_that_are_spread_over_processes(make, mesh):
    norm = trained(make(C))
    x = torch.randn(2, 3, C)
    expected = norm(x)
    spread = copy.deepcopy(norm)
    y = parallelize_module(spread, mesh, SequenceParallel())(x).full_tensor()
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    for one, other in zip(spread.parameters(), norm.parameters(), strict=True):
        torch.testing.assert_close(one.grad.full_tensor(), other.grad)


def test_crms_norm_is_the_rms_norm_of_one_more_channel():
    norm, whole = trained(CRMSNorm(C)), nn.RMSNorm(C + 1, eps=1e-5)
    whole.weight.data[:C] = norm.weight
    x = torch.randn(4, C)
    expected = whole(torch.cat([x, -x.sum(-1, keepdim=True)], dim=-1))[:, :C]
    for mode in (True, False):
        torch.testing.assert_close(norm.train(mode)(x), expected)


@pytest.mark.parametrize("make", [LayerNorm, RMSNorm, CRMSNorm])
def test_options(make):
    plain, offset = make(C, elementwise_affine=False), make(C, unit_offset=True)
    assert plain.weight is None and "unit_offset" not in repr(plain)
    assert offset.weight.eq(0).all() and "unit_offset=True" in repr(offset)
    x = torch.randn(3, C)
    torch.testing.assert_close(offset(x), plain(x))
    offset.weight.data.fill_(0.5)
    for mode in (True, False):
        torch.testing.assert_close(offset.train(mode)(x), 1.5 * plain(x))
    offset.reset_parameters()
    assert offset.weight.eq(0).all()
    assert make(C, dtype=torch.float64, device="meta").weight.dtype == torch.float64


class Block(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(C, C), trained(make(C)), nn.Linear(C, C)

    def forward(self, x):
        y, s = self.norm(self.first(x), x)
        return self.last(y) + s


@pytest.mark.parametrize(("make", "operation"), [(LayerNorm, "layer_norm"), (RMSNorm, "rms_norm"), (CRMSNorm, "rsqrt")])
def test_evaluation_exports_and_folds(make, operation):
    """Plain ATen: an add, and the norm as torch knows it. Folding keeps it, and the numbers."""
    model, x = Block(make).eval(), torch.randn(5, C)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    names = [node.target.__name__ for node in program.graph.nodes if node.op == "call_function"]
    assert f"{operation}.default" in names and not any("normfuse" in str(n.target) for n in program.graph.nodes)
    if operation != "rsqrt":
        assert names == ["linear.default", "add.Tensor", f"{operation}.default", "linear.default", "add.Tensor"]
    folded, _ = normfuse.fold(program)
    torch.testing.assert_close(folded.module()(x), model(x), rtol=1e-5, atol=1e-5)


def test_the_mean_over_channels_last_only():
    for bad in ((3, C), 0, ()):
        with pytest.raises(ValueError, match=r"normalized_shape=.*one positive int"):
            LayerNorm(bad)
    for make in (LayerNorm, RMSNorm, CRMSNorm):
        with pytest.raises(ValueError, match=r"must have 8 channels in its last dimension.*movedim"):
            make(C)(torch.randn(2, C, 5))
