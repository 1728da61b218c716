"""Interval bounds: of a norm, of a program, and what folding does to them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from normfuse.folding import fold, interval_bounds
from normfuse.nn import (
    MaskedBatchNorm,
    NormedBranch,
    PowerNorm,
    RepBatchNorm,
    UnifiedNorm,
    norm_bounds,
)
from tests.norms import with_statistics

C = 5
NORMS = with_statistics(C, static=True, channel_dim=-1) | {"torch": lambda: nn.BatchNorm1d(C)}


def trained(module: nn.Module) -> nn.Module:
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point():
            values = torch.randn_like(tensor)
            tensor.data.copy_(values.exp() if "var" in name or "phi" in name else values)
    return module.double().eval()


def corners(lower: Tensor, upper: Tensor, count: int) -> list[Tensor]:
    """Both ends of every channel, and points between."""
    shares = [torch.zeros_like(lower), torch.ones_like(lower), *(torch.rand_like(lower).round() for _ in range(count))]
    return [torch.lerp(lower, upper, share) for share in shares] + [torch.lerp(lower, upper, torch.rand_like(lower))]


@pytest.mark.parametrize("kind", NORMS)
def test_bounds_of_a_norm_are_reached_and_never_left(kind: str) -> None:
    norm = trained(NORMS[kind]())
    lower = torch.randn(4, C).double()
    upper = lower + torch.rand(4, C).double()
    low, high = norm_bounds(norm, lower, upper)
    results = torch.stack([norm(lower), norm(upper)])
    torch.testing.assert_close(results.amin(0), low, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(results.amax(0), high, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", NORMS)
def test_in_training_the_clean_batch_decides(kind: str) -> None:
    """At no disturbance both bounds are the training forward (in its warm-up), and gradients reach everything."""
    norm = trained(NORMS[kind]()).train()
    before = copy.deepcopy(norm.state_dict())
    clean = torch.randn(6, C).double().requires_grad_()
    low, high = norm_bounds(norm, clean, clean, clean=clean)
    (2 * high - low).square().sum().backward()
    assert norm.weight.grad.isfinite().all() and clean.grad.isfinite().all()
    torch.testing.assert_close(norm.state_dict(), before, rtol=0, atol=0)
    expected = norm(clean.detach())
    if (
        kind != "MovingAverageBatchNorm"
    ):  # its forward has the ratio to the running statistic in it only after step 1000
        torch.testing.assert_close(low.detach(), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(low, high, rtol=0, atol=0)


def test_padding_is_left_out_of_the_clean_statistics() -> None:
    norm = trained(MaskedBatchNorm(C)).train()
    clean, pad_mask = torch.randn(2, 4, C).double(), torch.tensor([[False] * 4, [False, True, True, True]])
    low, _ = norm_bounds(norm, clean, clean, clean=clean, pad_mask=pad_mask)
    torch.testing.assert_close(low, norm(clean, pad_mask), rtol=1e-10, atol=1e-10)


class Net(nn.Module):
    """Norms before, behind and beside weights, on a residual stream, with every kind of activation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv1d(3, C, 3, padding=1), nn.BatchNorm1d(C), nn.ReLU(), nn.AvgPool1d(2))
        branches = [nn.Sequential(nn.Linear(C, C), act, nn.Linear(C, C)) for act in (nn.GELU(), nn.SiLU(), nn.Tanh())]
        norms = (UnifiedNorm(C), MaskedBatchNorm(C), RepBatchNorm(C))
        placements = ("pre", "post", "peri")
        self.blocks = nn.Sequential(*(NormedBranch(*p) for p in zip(branches, norms, placements, strict=True)))
        self.head = nn.Linear(C, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.conv(x).transpose(1, 2)).mean(1) / 2 - 1)


def test_bounds_of_a_program_hold_and_folding_does_not_widen_them() -> None:
    model = trained(Net())
    x = torch.randn(3, 3, 4).double()
    lower, upper = x - 0.01, x + 0.01
    program = torch.export.export(model, (x,))
    before, after = interval_bounds(program, lower, upper), interval_bounds(fold(program)[0], lower, upper)
    for bounds in (before, after):
        for point in corners(lower, upper, 20):
            y = model(point)
            assert (bounds.lower <= y + 1e-12).all() and (y - 1e-12 <= bounds.upper).all()
    widths = [(b.upper - b.lower) for b in (before, after)]
    assert (widths[1] <= widths[0] * (1 + 1e-12)).all()
    exact = interval_bounds(program, x, x)
    torch.testing.assert_close(exact.lower, model(x), rtol=1e-12, atol=1e-12)


class ByHand(nn.Module):
    """A RepBatchNorm written as two branches, which an interval takes for unrelated."""

    def __init__(self, norm: RepBatchNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        plain = nn.functional.batch_norm(
            x, self.norm.running_mean, self.norm.running_var, self.norm.weight, self.norm.bias, eps=self.norm.eps
        )
        return plain + self.norm.alpha * x


def test_one_map_is_tighter_than_two_branches() -> None:
    norm = trained(RepBatchNorm(C))
    x = torch.randn(4, C).double()
    one, two = (
        interval_bounds(torch.export.export(model, (x,)), x - 0.1, x + 0.1) for model in (norm, ByHand(norm).eval())
    )
    torch.testing.assert_close(one.lower + one.upper, two.lower + two.upper, rtol=1e-11, atol=1e-11)
    widths = one.upper - one.lower, two.upper - two.lower
    assert (widths[0] <= widths[1] + 1e-12).all() and (widths[0] < 0.9 * widths[1]).any()


def test_bounds_have_gradients() -> None:
    model = trained(nn.Sequential(nn.Linear(3, C), MaskedBatchNorm(C), nn.ReLU(), nn.Linear(C, 2)))
    x = torch.randn(4, 3).double()
    bounds = interval_bounds(torch.export.export(model, (x,)), x - 0.1, x + 0.1)
    bounds.upper.sum().backward()
    assert model[0].weight.grad.abs().sum() > 0 and model[1].weight.grad.abs().sum() > 0


def test_refusals() -> None:
    x = torch.randn(2, C)
    with pytest.raises(TypeError, match="LayerNorm computes more than an affine map"):
        norm_bounds(nn.LayerNorm(C), x, x)
    with pytest.raises(TypeError, match="PowerNorm computes more than an affine map"):
        norm_bounds(PowerNorm(C).eval(), x, x)
    with pytest.raises(ValueError, match="is in training: give clean"):
        norm_bounds(UnifiedNorm(C), x, x)
    program = torch.export.export(nn.Sequential(nn.Linear(C, C), nn.Softmax(-1)).eval(), (x,))
    with pytest.raises(ValueError, match=r"softmax.* of an interval has no bounds here"):
        interval_bounds(program, x, x)


class ActivatedBatchNorm(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def test_a_derived_norm_that_may_do_more_is_refused_and_channels_last_are_found() -> None:
    with pytest.raises(TypeError, match="ActivatedBatchNorm computes more than an affine map"):
        norm_bounds(ActivatedBatchNorm(C).eval(), torch.zeros(2, C), torch.ones(2, C))
    norm = trained(MaskedBatchNorm(C))
    x = torch.randn(2, C, C).double()  # as many positions as channels: nothing but the values tells them apart
    torch.testing.assert_close(norm_bounds(norm, x, x)[0], norm(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("function", [nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU(), nn.Hardswish()])
def test_the_lowest_value_of_a_valley_is_found(function: nn.Module) -> None:
    lower, upper = torch.tensor([[-2.0]]).double(), torch.tensor([[0.5]]).double()
    low, high = interval_bounds(torch.export.export(function, (lower,)), lower, upper)
    results = function(torch.linspace(-2.0, 0.5, 2_000_001, dtype=torch.float64))
    # Between two of the points the function is lower by at most half its curvature (below 1) times their distance².
    assert results.min() - 1e-12 <= low.item() <= results.min() and high.item() == results.max()


@pytest.mark.parametrize("function", [nn.LeakyReLU(-0.5), nn.ELU(-1.0)])
def test_a_function_that_falls_has_no_bounds(function: nn.Module) -> None:
    x = torch.zeros(1, C)
    with pytest.raises(ValueError, match="of an interval has no bounds here"):
        interval_bounds(torch.export.export(function, (x,)), x, x)


def test_a_bound_that_took_a_shift_has_bounds() -> None:
    """A norm on the input in front of a ReLU folds into its bound, per channel."""
    model = nn.Sequential(trained(UnifiedNorm(C)), nn.ReLU(), nn.Linear(C, 3)).double().eval()
    model[0].weight.data.abs_()
    lower, upper = -torch.ones(2, C).double(), torch.ones(2, C).double()
    program = torch.export.export(model, (lower,))
    folded, _ = fold(program)
    assert any(node.target is torch.ops.aten.maximum.default for node in folded.graph.nodes)
    for got, want in zip(interval_bounds(folded, lower, upper), interval_bounds(program, lower, upper), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
