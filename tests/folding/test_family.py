"""What is left of every norm of the family between two weights, and as a final norm behind a residual stream."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from normfuse.nn import (
    AdaptiveInstanceNorm,
    BatchChannelNorm,
    Derf,
    DomainSplitNorm,
    DyT,
    LearnableRegionNorm,
    MaskedBatchNorm,
    MovingAverageBatchNorm,
    PowerNorm,
    RegionNorm,
    TimeDependentLayerNorm,
    UnifiedNorm,
    center_weight,
    choose_domain,
    sigma_reparam,
    weight_standardization,
)
from tests.norms import with_statistics

from .checks import assert_nothing_left, folded, operations

C = 6
SEQUENCE = with_statistics(C, static=True, channel_dim=-1) | {
    "ghosts": lambda: PowerNorm(C, group_num=None, ghost_size=2),
    "domain split": lambda: DomainSplitNorm(MaskedBatchNorm(C), domain=1),
}
IMAGE = with_statistics(C, static=True, channel_dim=1)


def trained(module: nn.Module, seed: int = 0) -> nn.Module:
    """Parameters and statistics as training might leave them, in float64 and evaluation."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if not tensor.is_floating_point():
            continue
        values = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        tensor.data.copy_(torch.exp(0.5 * values) if name.endswith(("var", "phi", "std")) else values)
    return module.eval()


class Image(nn.Module):
    """Padded convolution, norm (with what else it reads), convolution without padding."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, C, 3, padding=1), norm, nn.Conv2d(C, 4, 3)

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x), *others))


def image(*others: Tensor) -> tuple[Tensor, ...]:
    return torch.randn(2, 3, 5, 7).double(), *others


def kinds(program) -> list[str]:
    return [name.removeprefix("aten.").partition(".")[0] for name in operations(program)]


@pytest.mark.parametrize("kind", SEQUENCE)
def test_static_norms_vanish_between_linears(kind: str) -> None:
    model = trained(nn.Sequential(nn.Linear(5, C), SEQUENCE[kind](), nn.Linear(C, 4)))
    program, report = folded(model, (torch.randn(2, 3, 5).double(),))
    assert_nothing_left(program, report)
    assert kinds(program) == ["linear", "linear"]


@pytest.mark.parametrize("kind", IMAGE)
def test_static_norms_vanish_between_convolutions(kind: str) -> None:
    program, report = folded(trained(Image(IMAGE[kind]())), image())
    assert_nothing_left(program, report)
    assert kinds(program) == ["conv2d", "conv2d"]


def test_centred_and_standardised_weights_are_plain_weights_that_take_norms() -> None:
    model = nn.Sequential(
        weight_standardization(nn.Conv2d(3, C, 3)),
        MaskedBatchNorm(C, channel_dim=1),
        nn.GELU(),
        center_weight(nn.Conv2d(C, C, 1)),
        MovingAverageBatchNorm(C),
        weight_standardization(nn.Conv2d(C, 4, 1), form="variance"),
    )
    program, report = folded(trained(model), image())
    assert_nothing_left(program, report)
    assert kinds(program) == ["conv2d", "gelu", "conv2d", "conv2d"]


@pytest.mark.parametrize("again", [False, True])
def test_sigma_reparam_is_baked_and_takes_norms(again: bool) -> None:
    options = {"iterate_in_evaluation": again}
    model = nn.Sequential(
        sigma_reparam(nn.Conv1d(3, 4, 1), **options),
        MaskedBatchNorm(4, channel_dim=1),
        nn.GELU(),
        nn.Flatten(1),
        UnifiedNorm(20),
        sigma_reparam(nn.Linear(20, 2), init="spectral", **options),
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand_like(parameter))
    x = torch.randn(6, 3, 5).double()
    for _ in range(3):
        model(x).sum().backward()
    program, report = folded(model, (x,))
    assert_nothing_left(program, report)


def test_a_reparametrised_weight_is_stored_as_it_is_also_where_nothing_folds() -> None:
    model = nn.Sequential(sigma_reparam(nn.Linear(5, C)), nn.GELU(), weight_standardization(nn.Linear(C, 4)))
    program, _ = folded(trained(model), (torch.randn(2, 5).double(),))
    assert kinds(program) == ["linear", "gelu", "linear"]


@pytest.mark.parametrize("estimated", [False, True])
def test_of_batch_channel_norm_the_group_half_stays(estimated: bool) -> None:
    model = Image(BatchChannelNorm(C, 3, estimated=estimated))
    program, report = folded(trained(model), image())
    assert [record.status for record in report.norms] == ["folded"]
    of_data = [kind for kind in kinds(program) if kind != "repeat_interleave"]  # of the group's gains: constants
    assert of_data == ["conv2d", "group_norm", "conv2d"]


def test_the_chosen_domain_is_the_one_that_folds() -> None:
    model = trained(nn.Sequential(nn.Linear(5, C), DomainSplitNorm(MaskedBatchNorm(C)), nn.Linear(C, 4)))
    x = torch.randn(2, 3, 5).double()
    results = []
    for domain in (0, 1):
        choose_domain(model, domain)
        program, report = folded(model, (x,))
        assert_nothing_left(program, report)
        results.append(program.module()(x))
    assert not torch.allclose(*results)


@pytest.mark.parametrize(("kind", "function"), [(DyT, "tanh"), (Derf, "erf")])
def test_of_norms_without_statistics_the_function_stays(kind: type[nn.Module], function: str) -> None:
    model = trained(nn.Sequential(nn.Linear(5, C), kind(C), nn.Linear(C, 4)))
    program, report = folded(model, (torch.randn(2, 3, 5).double(),))
    assert not report.remaining
    assert kinds(program) == ["linear", function, "linear"]


class Stream(nn.Module):
    """Two branches with DyT on one residual stream: only one alpha can go into the stream's scale."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norms = nn.Embedding(9, C), nn.ModuleList(DyT(C) for _ in range(2))
        self.linears, self.head = nn.ModuleList(nn.Linear(C, C) for _ in range(2)), nn.Linear(C, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for norm, linear in zip(self.norms, self.linears, strict=True):
            x = x + linear(norm(x))
        return self.head(x)


def test_on_a_residual_stream_one_alpha_folds_and_the_others_stay() -> None:
    program, _ = folded(trained(Stream()), (torch.randint(9, (2, 4)),))
    assert kinds(program).count("mul") == 1 and kinds(program).count("addcmul") == 0


def test_a_fixed_style_folds_and_a_given_one_does_not() -> None:
    norm = AdaptiveInstanceNorm().fix(torch.randn(1, C, 4, 4))
    program, report = folded(trained(Image(norm)), image())
    assert report.norms[0].absorbed_by == ["second.weight", "second.bias"]
    assert "addcmul" not in kinds(program) and "linalg_vector_norm" in kinds(program)
    program, _ = folded(trained(Image(AdaptiveInstanceNorm())), image(torch.randn(2, C, 3, 3).double()))
    assert "addcmul" in kinds(program)


class TimedNorm(nn.Module):
    """A linear layer behind a time-dependent LayerNorm."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.linear = norm, nn.Linear(C, 4)

    def forward(self, x: Tensor, *log_snr: Tensor) -> Tensor:
        return self.linear(self.norm(x, *log_snr))


@pytest.mark.parametrize("rms", [False, True])
def test_a_time_dependent_norm_folds_at_a_fixed_time(rms: bool) -> None:
    model = trained(TimedNorm(TimeDependentLayerNorm(C, rms=rms)))
    x = torch.randn(2, 3, C).double()
    name = "linalg_vector_norm" if rms else "layer_norm"
    program, _ = folded(model, (x, torch.tensor([0.5, -1.0]).double()))
    assert name in kinds(program) and "sigmoid" in kinds(program)
    fixed = TimedNorm(model.norm.at(0.5))
    fixed.linear = model.linear
    program, _ = folded(fixed, (x,))
    assert kinds(program) == [name, *(["mul", "add", "div"] if rms else []), "linear"]  # no gain


@pytest.mark.parametrize("learnable", [False, True])
def test_region_norms_are_exported_as_they_are(learnable: bool) -> None:
    norm = LearnableRegionNorm(kernel_size=3) if learnable else RegionNorm(C)
    mask = () if learnable else ((torch.rand(2, 1, 5, 7) < 0.5),)
    model = trained(Image(norm))
    program, _ = folded(model, image(*mask))
    assert kinds(program).count("rsqrt") == 1 and kinds(program).count("matmul") >= 3
