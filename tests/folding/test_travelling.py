"""Shifts that ride along a residual stream must not grow large against the values they ride on."""

import copy
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import normfuse.nn
from normfuse.folding import fold, opposites

from .checks import any_gauge, assert_nothing_left, difference, folded
from .networks import ChannelNorm, Transformer, look_trained

WIDTH, DEPTH = 32, 8


class Block(nn.Module):
    """Post-norm around a branch that takes most of its stream away."""

    def __init__(self, norm, bias: bool) -> None:
        super().__init__()
        self.inner, self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=bias), norm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.linear(self.inner(x)))


class Cancelling(nn.Sequential):
    """``x + W x`` is about a tenth of x, and a norm multiplies it by ten.

    Values stay as large as they are, but a constant that travels with the stream alone becomes ten times larger in each
    layer.
    """

    def __init__(self, norm=normfuse.nn.UnifiedNorm, bias: bool = True) -> None:
        torch.manual_seed(0)
        blocks = (Block(norm, bias) for _ in range(DEPTH))
        super().__init__(nn.Linear(6, WIDTH), nn.Sequential(*blocks).requires_grad_(False), nn.Linear(WIDTH, 5))
        for block in self[1]:
            block.inner.weight.copy_(torch.eye(WIDTH))
            block.linear.weight.mul_(0.2).sub_(0.9 * torch.eye(WIDTH))
            for module in block.norm.modules():
                if hasattr(module, "bias"):
                    module.bias.normal_()
                    getattr(module, "running_phi", getattr(module, "running_var", None)).fill_(0.01)
        self.eval()


def errors(model: nn.Module, **options: bool) -> tuple[float, float, object]:
    """What float32 costs the model and the folded program, against the model in float64."""
    x = torch.randn(64, 9, 6)
    result, report = fold(torch.export.export(model, (x,)), verify=False, **options)  # which is what is measured
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        pair = [difference(exact, run(x).double()) for run in (model, result.module())]
    assert_nothing_left(result, report)
    return *pair, report


@pytest.mark.parametrize("norm", [normfuse.nn.UnifiedNorm, ChannelNorm])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("carry_biases", [True, False])
def test_float32_stays_as_accurate_as_the_model(norm, bias, carry_biases):
    own, after, _ = errors(Cancelling(norm, bias), carry_biases=carry_biases)
    assert own < 1e-5 and after < opposites.GROWTH * own


@pytest.mark.parametrize("carry_biases", [True, False])
def test_without_the_bound_digits_are_lost_and_with_it_no_operation_is_added(carry_biases):
    with patch.object(opposites, "GROWTH", float("inf")):
        own, lost, unbounded = errors(Cancelling(), carry_biases=carry_biases)
    _, kept, report = errors(Cancelling(), carry_biases=carry_biases)
    assert lost > 1000 * own > 100 * kept / opposites.GROWTH
    assert report.settled_early and not unbounded.settled_early
    assert set(report.settled_early) <= {f"1.{layer}.norm" for layer in range(DEPTH)}
    assert report.nodes_after == unbounded.nodes_after


@pytest.mark.parametrize("carry_biases", [True, False])
def test_settling_early_is_exact_for_any_choice_of_the_free_numbers(carry_biases):
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    with any_gauge(3):
        folded(Cancelling(), (x,), carry_biases=carry_biases)


@pytest.mark.parametrize("placement", ["pre", "post", "peri"])
def test_biases_of_trained_looking_networks_still_travel(placement):
    model = look_trained(Transformer("unified", placement, depth=6))
    _, report = folded(model, (torch.randint(11, (2, 8)),), carry_biases=True)
    if placement == "pre":
        assert not report.settled_early
    assert len(report.settled_early) <= 2


class OneProjection(nn.Module):
    """Attention with static norms on q and k, all three made by one linear, and taken apart in various ways."""

    def __init__(self, parts: str, bias: bool = True) -> None:
        super().__init__()
        self.parts = parts
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=bias), nn.Linear(WIDTH, WIDTH)
        self.q_norm, self.k_norm = (normfuse.nn.UnifiedNorm(WIDTH // 2) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x)
        if self.parts in ("unbind", "select"):
            qkv = qkv.reshape(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
            q, k, v = qkv.unbind(0) if self.parts == "unbind" else (qkv[0], qkv[1], qkv[2])
        else:
            parts = qkv.chunk(3, -1) if self.parts == "chunk" else (qkv[..., i * c : (i + 1) * c] for i in range(3))
            q, k, v = (part.view(b, n, 2, c // 2).transpose(1, 2) for part in parts)
        y = nn.functional.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.out(y.transpose(1, 2).reshape(b, n, c))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("parts", ["unbind", "select", "chunk", "slice"])
def test_one_projection_takes_the_shifts_of_all_its_parts(parts, bias):
    torch.manual_seed(0)
    assert_nothing_left(
        *folded(look_trained(OneProjection(parts, bias)), (torch.randn(2, 5, WIDTH, dtype=torch.float64),))
    )


class Overlapping(nn.Module):
    """A normed part that must lose its shift shares channels with a part that must not change."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 6), normfuse.nn.UnifiedNorm(4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.linear(x)
        return self.norm(y[..., :4]).exp(), y[..., 3:].exp()


def test_parts_that_overlap_are_not_given_a_shift_that_the_other_minds():
    _, report = folded(look_trained(Overlapping()), (torch.randn(2, 6, dtype=torch.float64),))
    assert [record.status for record in report.norms] != ["folded"]


class MixedPrecision(nn.Module):
    """Weights and streams in bfloat16, norms in float32: their results are rounded before a weight reads them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(7)).bfloat16()
        self.norms = nn.ModuleList(normfuse.nn.UnifiedNorm(WIDTH) for _ in range(3))
        self.last = nn.Linear(WIDTH, 5).bfloat16()
        look_trained(self).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        for i, norm in enumerate(self.norms):
            branch = self.layers[2 * i + 2](torch.tanh(self.layers[2 * i + 1](x)))
            x = norm((x + branch).to(norm.weight.dtype)).type_as(x)
        return self.last(x)


def test_scales_and_shifts_pass_a_cast_that_rounds():
    model, x = MixedPrecision(), torch.randn(256, WIDTH)
    result, report = fold(torch.export.export(model, (x.bfloat16(),)))
    assert_nothing_left(result, report)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.bfloat16().double())
        own, after = (difference(exact, run(x.bfloat16()).double()) for run in (model, result.module()))
    assert own > 2**-9 and after < opposites.GROWTH * own, (own, after)


class Small(nn.Module):
    """A stream that two small gains divide.

    A constant behind them would be large in front of them, where the branch would subtract it again. The last weight
    before the constant has no bias, the others have.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.inner = nn.Linear(6, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.branch, self.norms = nn.Linear(WIDTH, WIDTH, bias=False), nn.ModuleList()
        for _ in range(2):
            norm = normfuse.nn.UnifiedNorm(WIDTH)
            nn.init.normal_(norm.bias)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            norm.weight.data[::4] = 1e-3
            self.norms.append(norm)
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](self.first(x))
        return self.norms[1](x + self.branch(torch.tanh(self.inner(x))))


def test_small_gains_do_not_make_shifts_large_in_front_of_them() -> None:
    own, after, report = errors(Small())
    assert after <= 4 * own
    assert "branch.bias" in report.norms[1].absorbed_by


class Table(nn.Module):
    """A table that a norm with a small gain reads, and a weight without bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.norm = nn.Embedding(9, WIDTH), normfuse.nn.UnifiedNorm(WIDTH)
        self.last = nn.Linear(WIDTH, 5, bias=False)
        nn.init.normal_(self.norm.bias)
        self.norm.weight.data[::4] = 1e-3
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.table(x)
        return self.norm(y), self.last(y)


def test_a_shift_is_written_out_rather_than_subtracted_from_what_others_read() -> None:
    model, x = Table(), torch.arange(9)[None]
    result, report = fold(torch.export.export(model, (x,)), verify=False)
    exact = copy.deepcopy(model).double()(x)
    own, after = (difference(exact, [y.double() for y in run(x)]) for run in (model, result.module()))
    assert after <= 4 * own and report.norms[0].status == "partly folded"


class CoarseBranch(nn.Module):
    """A bfloat16 weight before a norm with a small gain, whose shift it would round to its few digits."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16), normfuse.nn.UnifiedNorm(WIDTH)
        nn.init.normal_(self.norm.bias)
        self.norm.weight.data.fill_(gain)
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.first(x.bfloat16()).float())


@pytest.mark.parametrize(("gain", "status"), [(1.0, "folded"), (1e-3, "partly folded")])
def test_a_shift_much_larger_than_values_is_not_rounded_to_fewer_digits_than_it_had(gain: float, status: str) -> None:
    model, x = CoarseBranch(gain), torch.randn(64, WIDTH)
    result, report = fold(torch.export.export(model, (x,)))
    exact = copy.deepcopy(model).float()
    exact.first.to(torch.float32)
    with torch.no_grad():
        want = exact.norm(exact.first(x.bfloat16().float()))
        own, after = difference(want, model(x)), difference(want, result.module()(x))
    assert report.norms[0].status == status and after <= opposites.GROWTH * own
