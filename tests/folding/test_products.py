"""Products with weights of any shape, pieces of weights, and attention on several inputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .checks import any_gauge, assert_nothing_left, folded, operations
from .maps import C, MapNorm, Net, sequence, status
from .networks import look_trained


class Weights(nn.Module):
    """A norm between a function that takes no scale and products with parameters."""

    def __init__(self, product: Callable[[Weights, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.product = MapNorm(), product
        self.matrix, self.heads = nn.Parameter(torch.randn(3 * C, C)), nn.Parameter(torch.randn(3, C, 4))
        self.square = nn.Parameter(torch.randn(C, C))

    def forward(self, x: Tensor) -> Tensor:
        return self.product(self, self.norm(torch.tanh(x)))


PRODUCTS: dict[str, Callable[[Weights, Tensor], Tensor]] = {
    "chunk": lambda m, x: F.linear(x, m.matrix.chunk(3)[0]) - F.linear(x, m.matrix.chunk(3)[2]),
    "split": lambda m, x: F.linear(x, m.matrix.split([C, 2 * C])[1]),
    "unbind": lambda m, x: x @ m.heads.unbind(0)[1],
    "select": lambda m, x: x @ m.heads[2],
    "narrow": lambda m, x: F.linear(x, m.matrix.narrow(0, 2, 5)),
    "stack": lambda m, x: x @ torch.stack([m.heads[1], m.heads[0]]).sum(0),
    "cat": lambda m, x: F.linear(x, torch.cat([m.matrix[:2], m.matrix[5:7]])),
    "experts": lambda m, x: torch.einsum("bsi,eio->beso", x, m.heads),
    "experts on the left": lambda m, x: torch.einsum("eio,bsi->beso", m.heads, x),
    "batches": lambda m, x: torch.bmm(x, m.heads),
    "broadcast batches": lambda m, x: x[:, None] @ m.heads,
    "tensordot": lambda m, x: torch.tensordot(x, m.heads, dims=([2], [1])),
    "baddbmm": lambda m, x: torch.baddbmm(m.heads[:, :1], x, m.heads, beta=2, alpha=0.5),
    "implicit einsum": lambda m, x: torch.einsum("bsi,io", x, m.square),
    "heads of their own": lambda m, x: torch.einsum(
        "bshi,hio->bsho", F.linear(x, m.matrix).unflatten(-1, (3, C)), m.heads
    ),
}


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_products_take_scale_and_shift(product: Callable[[Weights, Tensor], Tensor]) -> None:
    _, report = folded(Weights(product), sequence())
    assert status(report) == ["folded"], report.norms[0].reason
    with any_gauge(0):
        folded(Weights(product), sequence(), carry_biases=True)


FACTORS: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "einsum": lambda m, x: torch.einsum("bsc,c->bsc", x, m.gain),
    "einsum with the gain on the left": lambda m, x: torch.einsum("c, bsc -> bsc", m.gain, x),
    "einsum of three": lambda m, x: torch.einsum("bsc,c,c->bsc", x, m.gain, m.gain),
    "repeated": lambda m, x: x * m.gain.repeat(*x.shape[:2], 1) + m.gain.repeat(x.shape[1], 1),
}


@pytest.mark.parametrize("multiply", FACTORS.values(), ids=FACTORS)
def test_gains_vanish_however_they_are_laid_against_a_value(multiply: Callable[[Net, Tensor], Tensor]) -> None:
    model = Net(
        lambda m, x: torch.tanh(multiply(m, m.first(x))), gain=nn.Parameter(torch.rand(C) + 0.5), first=nn.Linear(C, C)
    )
    program, _ = folded(model, sequence())
    assert operations(program) == ["aten.linear.default", "aten.tanh.default"]


MIXTURES: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "matmul": lambda m, x: m.mix @ x,
    "linear": lambda m, x: F.linear(x.mT, m.mix).mT,
    "einsum": lambda m, x: torch.einsum("vw,bwc->bvc", m.mix, x),
    "tensordot": lambda m, x: torch.tensordot(x, m.mix, dims=([1], [0])).mT,
    "adjacency of several kinds": lambda m, x: torch.einsum(
        "bwkc,kwv->bvc", m.first(x).unflatten(-1, (2, C // 2)), torch.stack([m.mix, -m.mix])
    ).repeat(1, 1, 2),
}


@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
def test_scales_of_channels_pass_constants_that_mix_positions(mixture: Callable[[Net, Tensor], Tensor]) -> None:
    mix = nn.Parameter(torch.randn(5, 5, generator=torch.Generator().manual_seed(0)))
    model = Net(
        lambda m, x: m.last(m.behind(mixture(m, m.front(torch.tanh(x))))),
        front=MapNorm(shift=False), behind=MapNorm(seed=1), mix=mix, first=nn.Linear(C, C), last=nn.Linear(C, 4),
    )  # fmt: skip
    _, report = folded(model, sequence())
    assert status(report) == ["folded", "folded"], report
    with any_gauge(0):
        folded(model, sequence())


@pytest.mark.parametrize("chosen", ["bec,becd->bed", "bdc,bdce->bde"])
def test_weights_that_are_chosen_by_an_index_take_scales(chosen: str) -> None:
    """As in a mixture of experts that gathers the weights of each token's experts."""
    model = Net(
        lambda m, x: torch.einsum(chosen, m.norm(torch.tanh(x)), m.experts[m.router(x).argmax(-1)]),
        norm=MapNorm(shift=False), router=nn.Linear(C, 3), experts=nn.Parameter(torch.randn(3, C, 4)),
    )  # fmt: skip
    _, report = folded(model, sequence())
    assert status(report) == ["folded"], report
    with any_gauge(0):
        folded(model, sequence())


def test_a_norm_behind_a_constant_that_mixes_positions_goes_into_the_weight_in_front() -> None:
    mix = nn.Parameter(torch.randn(5, 5, generator=torch.Generator().manual_seed(0)))
    model = Net(
        lambda m, x: torch.relu(m.norm(m.mix @ m.first(x))), mix=mix, norm=MapNorm(shift=False), first=nn.Linear(C, C)
    )
    _, report = folded(model, sequence())
    assert status(report) == ["folded"], report
    assert report.norms[0].absorbed_by == ["first.weight", "first.bias"]


def test_a_constant_that_mixes_positions_takes_norms_along_them() -> None:
    mix = nn.Parameter(torch.randn(5, 5, generator=torch.Generator().manual_seed(0)))
    model = Net(
        lambda m, x: torch.relu(m.mix @ m.norm(m.first(torch.tanh(x)))),
        mix=mix, norm=MapNorm(5, -2, shift=False), first=nn.Linear(C, C),
    )  # fmt: skip
    _, report = folded(model, sequence())
    assert status(report) == ["folded"], report


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("alone", [True, False])
def test_a_shift_goes_into_a_bias_in_front_rather_than_into_an_add_behind(bias: bool, alone: bool) -> None:
    """The product has no bias. Where another one reads what is in front, a bias there would be an Add behind that."""

    def product(m: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        x = m.first(x)
        return m.norm(x) @ m.matrix, x.new_zeros(()) if alone else x @ m.matrix.T

    generator = torch.Generator().manual_seed(0)
    matrix = nn.Parameter(torch.randn(C, C, generator=generator))
    model = Net(product, first=nn.Linear(C, C, bias=bias), norm=MapNorm(), matrix=matrix)
    program, report = folded(model, sequence())
    assert status(report) == ["folded"]
    assert operations(program).count("aten.add.Tensor") == (not alone)


def test_a_bias_is_stored_beside_a_parameter_that_is_called_otherwise() -> None:
    program, report = folded(Weights(PRODUCTS["experts"]), sequence())
    assert report.norms[0].absorbed_by == ["heads", "heads_bias"]
    assert "heads_bias_folded" in program.state_dict


class Heads(nn.Module):
    """Norms on what each head's own weights write, and read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.write, self.read = nn.Parameter(torch.randn(3, C, 4)), nn.Parameter(torch.randn(3, 4, 2))
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.einsum("bsi,hio->bhso", x, self.write)
        return torch.einsum("bhsi,hio->bhso", self.norm(x), self.read)


def test_layer_norm_over_heads_that_weights_of_three_axes_write() -> None:
    program, report = folded(Heads(), sequence())
    assert report.dynamic[0].core == "RMSNorm" and report.centred == ["write"]
    assert operations(program) == ["aten.einsum.default", "aten.rms_norm.default", "aten.einsum.default"]


class Cross(nn.Module):
    """nn.MultiheadAttention on two or three inputs takes the weights of queries, keys and values from one parameter."""

    def __init__(self, inputs: int, *, bias: bool = True, kdim: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norms = nn.ModuleList(nn.BatchNorm1d(4) for _ in range(inputs))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, bias=bias, kdim=kdim, vdim=kdim)
        nn.init.uniform_(self.attention.in_proj_bias) if bias else None

    def forward(self, *inputs: Tensor) -> Tensor:
        inputs = [norm(x.mT).mT for norm, x in zip(self.norms, inputs, strict=True)]
        query, key, value = (*inputs, *inputs[-1:] * (3 - len(inputs)))
        return self.attention(query, key, value, need_weights=False)[0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("inputs", [1, 2, 3])
def test_multihead_attention_on_several_inputs(inputs: int, bias: bool) -> None:
    tensors = tuple(torch.randn(2, length, 4, dtype=torch.float64) for length in (3, 5, 5)[:inputs])
    program, report = folded(look_trained(Cross(inputs, bias=bias)), tensors)
    assert_nothing_left(program, report)
    assert report.bytes_copied == 0


def test_a_product_that_sums_over_positions_stays() -> None:
    _, report = folded(Weights(lambda m, x: torch.einsum("bsi,io->bo", x, m.square)), sequence())
    assert status(report) == ["kept"]


def test_a_diagonal_is_no_product() -> None:
    _, report = folded(Weights(lambda m, x: torch.einsum("bsi,ii->bsi", x, m.square)), sequence())
    assert status(report) == ["kept"]
