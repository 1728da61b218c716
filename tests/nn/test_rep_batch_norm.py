"""RepBatchNorm: BatchNorm(x) + alpha * x in training, one affine map in evaluation, nothing after folding."""

import pytest
import torch
from torch import nn

from normfuse.folding import fold
from normfuse.nn import MaskedBatchNorm, RepBatchNorm

C = 6
DOUBLE = {"dtype": torch.float64}
# A handful of operations on numbers of size one in float64.
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def trained(**options):
    """A norm whose parameters and statistics are all unlike their start values."""
    norm = RepBatchNorm(C, **DOUBLE, **options)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(parameter.shape) + 0.1)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return norm


@pytest.mark.parametrize("masked", [False, True])
def test_training_is_batch_norm_plus_the_shortcut(masked):
    norm = trained()
    plain = MaskedBatchNorm(C, **DOUBLE)
    plain.load_state_dict({name: value for name, value in norm.state_dict().items() if name != "alpha"})
    x = torch.randn(4, 7, C, **DOUBLE, requires_grad=True)
    mask = torch.rand(4, 7) < 0.3 if masked else None
    y = norm(x, pad_mask=mask)
    torch.testing.assert_close(y, plain(x, pad_mask=mask) + norm.alpha * x, **EXACT)
    for name, value in plain.named_buffers():
        assert torch.equal(norm.get_buffer(name), value), name
    (slope,) = torch.autograd.grad(y.sum(), norm.alpha)
    torch.testing.assert_close(slope, x.sum(), **EXACT)


def test_padding_moves_no_statistic():
    x, mask = torch.randn(3, 5, C), torch.rand(3, 5) < 0.4
    spoiled = torch.where(mask[..., None], torch.full_like(x, float("nan")), x)
    norms = [RepBatchNorm(C), RepBatchNorm(C)]
    results = [norm(values, pad_mask=mask) for norm, values in zip(norms, (x, spoiled), strict=True)]
    assert torch.equal(results[0][~mask], results[1][~mask])
    assert torch.equal(norms[0].running_var, norms[1].running_var)


@pytest.mark.parametrize("options", [{}, {"channel_dim": 1}, {"affine": False}])
def test_evaluation_is_the_affine_map_of_the_paper(options):
    norm = trained(**options).eval()
    x = torch.randn(4, C, C, **DOUBLE)
    weight, bias = (1, 0) if norm.weight is None else (norm.weight, norm.bias)
    inv_std = 1 / torch.sqrt(norm.running_var + norm.eps)
    a, b = weight * inv_std + norm.alpha, bias - weight * norm.running_mean * inv_std
    turn = (lambda t: t.movedim(1, -1)) if norm.channel_dim == 1 else (lambda t: t)
    torch.testing.assert_close(turn(norm(x)), turn(x) * a + b, **EXACT)


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_it_folds_away_shortcut_included(placement):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm = nn.Linear(3, C), trained()
            self.up, self.down, self.head = nn.Linear(C, 9), nn.Linear(9, C), nn.Linear(C, 2)

        def branch(self, x):
            return self.down(torch.relu(self.up(x)))

        def forward(self, x):
            x = self.embed(x)
            x = x + self.branch(self.norm(x)) if placement == "pre" else self.norm(x + self.branch(x))
            return self.head(x)

    model = Block().double().eval()
    x = torch.randn(5, 4, 3, **DOUBLE)
    program, report = fold(torch.export.export(model, (x,)))
    (record,) = report.norms
    assert record.status == "folded" and record.kind == "RepBatchNorm", record.reason
    left = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not left & {"aten.addcmul.default", "aten.mul.Tensor", "aten.batch_norm.default"}, left
    torch.testing.assert_close(program.module()(x), model(x), **EXACT)


def test_half_precision_keeps_statistics_and_dtype():
    norm = RepBatchNorm(C).bfloat16()
    x = torch.randn(8, C, dtype=torch.bfloat16)
    assert norm(x).dtype == torch.bfloat16 and norm.eval()(x).dtype == torch.bfloat16
    assert norm.running_mean.dtype == torch.float32 and norm.alpha.dtype == torch.bfloat16


def test_reset_parameters():
    norm = trained()
    norm.reset_parameters()
    fresh = RepBatchNorm(C, **DOUBLE).state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in norm.state_dict().items())


def test_refusals():
    with pytest.raises(ValueError, match="num_features=0"):
        RepBatchNorm(0)
    with pytest.raises(ValueError, match="has 5 channels"):
        RepBatchNorm(C).eval()(torch.randn(2, 5))
