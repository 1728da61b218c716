"""LayerNorm becomes RMSNorm where every writer of its input can subtract the mean, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

from normfuse.folding import FoldReport
from normfuse.folding.arrays import subtract_means

from .checks import folded, operations
from .maps import C, MapNorm, sequence
from .networks import PLACEMENTS, Transformer, look_trained
from .test_dynamic_norms import trained

DYNAMIC = ({0: Dim("batch"), 1: Dim("sequence", max=30)},)


class Stream(nn.Module):
    """A stream made by `write` from a linear's result, normalised, and read by a linear."""

    def __init__(self, write: Callable[[nn.Module, Tensor], Tensor], width: int = C) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(C, C), nn.Linear(C, C), nn.Linear(width, 4)
        self.norm, self.write = trained(nn.LayerNorm(width)), write
        self.token, self.position = nn.Parameter(torch.randn(1, 1, C)), nn.Parameter(torch.randn(1, 5, C))
        self.scale, self.map = nn.Parameter(torch.rand(C) + 0.5), MapNorm()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.write(self, x)))


def cores(report: FoldReport) -> list[str]:
    return [record.core for record in report.dynamic]


def why(report: FoldReport) -> str:
    return report.dynamic[-1].reasons["mean"]


CENTRED: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "linear": lambda m, x: m.first(x),
    "sum": lambda m, x: m.first(x) + m.second(x),
    "difference": lambda m, x: m.first(x) - 2.0 * m.second(x),
    "negation": lambda m, x: -m.first(x),
    "parameter": lambda m, x: m.first(x) + m.position,
    "sliced parameter": lambda m, x: m.first(x)[:, :3] + m.position[:, 1:4],
    "token": lambda m, x: torch.cat([m.token.expand(x.shape[0], -1, -1), m.first(x)], 1),
    "token in front": lambda m, x: (torch.cat([m.token.expand(x.shape[0], -1, -1), m.first(x)], 1))[:, 0],
    "layer scale": lambda m, x: m.first(x) + m.second(torch.tanh(x)) * m.scale,
    "static norm": lambda m, x: m.map(m.first(x)),
    "transposed": lambda m, x: m.first(x).mT.contiguous().mT,
    "mean over positions": lambda m, x: m.first(x).mean(1),
    "zero padding": lambda m, x: F.pad(m.first(x), (0, 0, 1, 1)),
    "roll": lambda m, x: m.first(x).roll(1, 1),
    "permuted channels": lambda m, x: m.first(x).view(*x.shape[:2], 2, C // 2).mT.reshape(x.shape),
    "mask over positions": lambda m, x: m.first(x).masked_fill(x[..., :1] > 0, 0.0),
    "gate over positions": lambda m, x: m.first(x) * torch.sigmoid(x[..., :1]),
    "gate in front": lambda m, x: torch.sigmoid(x[..., :1]) * m.first(x),
    "two pieces of positions": lambda m, x: sum(p.mean(1) for p in m.first(x).split([2, 3], 1)),
    "channel of a split": lambda m, x: torch.cat([m.first(x), m.second(x)], 0).chunk(2, 0)[1],
}


@pytest.mark.parametrize("name", CENTRED)
def test_the_writers_subtract_the_mean(name: str) -> None:
    program, report = folded(Stream(CENTRED[name]), sequence())
    assert cores(report) == ["RMSNorm"], why(report)
    assert "aten.layer_norm.default" not in operations(program)
    assert set(report.centred) & {"first.weight", "second.weight", "token"}


REFUSED: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], str]] = {
    "input": (lambda m, x: x, "the model's input"),
    "input in a sum": (lambda m, x: m.first(x) + x, "the model's input"),
    "activation": (lambda m, x: F.gelu(m.first(x)), "gelu writes it"),
    "relu": (lambda m, x: F.relu(m.first(x)), "relu writes it"),
    "maximum": (lambda m, x: m.first(x).amax(1), "amax writes it"),
    "maximum and its place": (lambda m, x: m.first(x).max(1)[0], "max writes it"),
    "the largest": (lambda m, x: m.first(x).topk(2, 1)[0], "topk writes it"),
    "pooled maximum": (lambda m, x: F.adaptive_max_pool1d(m.first(x).mT, 2).mT, "adaptive_max_pool1d writes it"),
    "gate of channels": (lambda m, x: m.first(x) * torch.sigmoid(m.second(x)), "mul writes it"),
    "another reader": (lambda m, x: (y := m.first(x)) + F.gelu(y), "gelu reads it, mean included"),
    "a weight that reads it": (lambda m, x: (y := m.first(x)) + m.second(y), "linear in second reads it"),
    "post-norm": (lambda m, x: m.first(x) + F.rms_norm(x, (C,), m.scale), "post-norm"),
    "divisor": (lambda m, x: m.first(x) / (2 + torch.tanh(m.second(x))), "div writes it"),
    "positions": (lambda m, x: m.first(x).mT.softmax(-1).mT, "softmax writes it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_the_mean_refuses_with_the_reason(name: str) -> None:
    write, reason = REFUSED[name]
    _, report = folded(Stream(write), sequence())
    assert cores(report)[-1] == "LayerNorm" and reason in why(report), why(report)
    assert not report.centred


def test_channels_made_of_positions_are_refused() -> None:
    """Patch merging: four neighbours side by side are normalised together, each has a mean of its own."""
    _, report = folded(Stream(lambda m, x: m.first(x)[:, :4].reshape(-1, 2, 2 * C), 2 * C), sequence())
    assert cores(report) == ["LayerNorm"] and "are not the output channels of linear in first" in why(report)
    _, report = folded(
        Stream(
            lambda m, x: torch.cat([(y := m.first(x))[:, ::2], y[:, 1::2].mean(1, True).expand_as(y[:, ::2])], -1),
            2 * C,
        ),
        sequence(),
    )
    assert cores(report) == ["LayerNorm"] and "joins the channels" in why(report)
    _, report = folded(Stream(lambda m, x: torch.cat([m.first(x), m.second(x)], -1), 2 * C), sequence())
    assert cores(report) == ["LayerNorm"] and "joins the channels" in why(report)


def test_a_linear_over_positions_is_refused() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.norm, self.last = nn.Linear(5, 5), trained(nn.LayerNorm(C)), nn.Linear(C, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.norm(self.tokens(x.mT).mT))

    _, report = folded(Mixer(), sequence())
    assert "are not the output channels of linear in tokens" in why(report)


def test_a_stream_that_is_an_output_is_refused() -> None:
    class Shown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(C, C), trained(nn.LayerNorm(C)), nn.Linear(C, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.first(x)
            return self.last(self.norm(y)), y

    _, report = folded(Shown(), sequence())
    assert "output is the stream itself" in why(report)


def test_layer_norms_over_parts_of_the_channels_tolerate_what_the_whole_loses_but_not_conversely() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last, self.parts = nn.Linear(C, C), nn.Linear(C, 2), nn.Linear(3, 2)
            self.whole, self.part = trained(nn.LayerNorm(C)), trained(nn.LayerNorm(3))

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.last(self.whole(y)) + self.parts(self.part(y.view(*x.shape[:2], 2, 3))).sum(2)

    _, report = folded(Nested(), sequence())
    record = {record.name: record for record in report.dynamic}
    assert (record["whole"].core, record["part"].core) == ("RMSNorm", "LayerNorm")
    assert "layer_norm in whole normalises over other channels" in record["part"].reasons["mean"]


class Image(nn.Module):
    def __init__(self, **options: int) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(C, C, 3, **options), trained(nn.LayerNorm(C)), nn.Linear(C, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.conv(x).flatten(2).mT))


def test_a_convolution_can_subtract_the_mean_but_not_a_grouped_one() -> None:
    inputs = (torch.randn(2, C, 6, 6, dtype=torch.float64),)
    assert cores(folded(Image(padding=1), inputs)[1]) == ["RMSNorm"]
    model = Image()
    model.conv = nn.ConvTranspose2d(C, C, 3)
    assert cores(folded(model, inputs)[1]) == ["RMSNorm"]
    assert "grouped" in why(folded(Image(groups=2), inputs)[1])


@pytest.mark.parametrize("separate", [False, True])
def test_queries_and_keys_are_centred_head_by_head(separate: bool) -> None:
    """One projection writes queries, keys and values; only the rows of the former change, each head for itself."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.qkv = nn.Linear(C, 6 * C) if not separate else nn.ModuleList(nn.Linear(C, 2 * C) for _ in range(3))
            self.q_norm, self.k_norm = nn.LayerNorm(C, bias=False), nn.LayerNorm(C, bias=False)
            self.out = nn.Linear(2 * C, 4)

        def forward(self, x: Tensor) -> Tensor:
            b, n, _ = x.shape
            if separate:
                q, k, v = (f(x).view(b, n, 2, C).transpose(1, 2) for f in self.qkv)
            else:
                q, k, v = self.qkv(x).reshape(b, n, 3, 2, C).permute(2, 0, 3, 1, 4).unbind(0)
            y = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
            return self.out(y.transpose(1, 2).reshape(b, n, 2 * C))

    model = look_trained(Attention())
    program, report = folded(model, sequence(), ({0: Dim("batch"), 1: Dim("length")},))
    assert cores(report) == ["RMSNorm", "RMSNorm"], why(report)
    if not separate:
        weight = program.state_dict["qkv.weight_folded"].view(3, 2, C, C)
        torch.testing.assert_close(weight[:2].mean(2), torch.zeros(2, 2, C).double(), rtol=0, atol=1e-14)
        assert torch.equal(weight[2], model.qkv.weight.data.view(3, 2, C, C)[2])


def test_a_tied_table_is_copied_or_the_reason_names_it() -> None:
    model = look_trained(Transformer("layer", "pre", causal=True))
    model.head = nn.Linear(16, 11, bias=False)
    model.head.weight = model.embed.weight
    inputs = (torch.randint(0, 11, (3, 7)),)
    _, report = folded(model, inputs, DYNAMIC)
    assert set(cores(report)) == {"RMSNorm"} and report.bytes_copied == 11 * 16 * 8
    _, report = folded(model, inputs, DYNAMIC, copy_shared=False)
    assert set(cores(report)) == {"LayerNorm"} and report.bytes_copied == 0
    assert "weight' is shared and may not be copied" in report.dynamic[0].reasons["mean"]


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", ["decoder", "patches"])
def test_placements(placement: str, kind: str) -> None:
    """Pre-norm has RMSNorms only; where the stream is made of LayerNorms' results, they give it a mean."""
    if kind == "patches":
        model, inputs = Transformer("layer", placement, vocabulary=None, classes=5), (torch.randn(3, 7, 6).double(),)
    else:
        model, inputs = Transformer("layer", placement, causal=True), (torch.randint(0, 11, (3, 7)),)
    program, report = folded(look_trained(model), inputs, DYNAMIC)
    if placement == "pre":
        assert set(cores(report)) == {"RMSNorm"} and "aten.layer_norm.default" not in operations(program)
        assert {r.gain for r in report.dynamic} == {r.shift for r in report.dynamic} == {"folded"}
    else:
        assert set(cores(report)) == {"LayerNorm"} and not report.centred
        assert any("post-norm" in r.reasons["mean"] for r in report.dynamic)


def test_a_layer_norm_that_keeps_its_shift_stays_beside_others_that_become_rms_norms() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(C, C), nn.Linear(C, 2)
            self.norm1, self.norm2 = trained(nn.LayerNorm(C)), trained(nn.LayerNorm(C))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.first(x)
            return self.last(self.norm1(y)), self.norm2(y)

    _, report = folded(Two(), sequence())
    assert cores(report) == ["RMSNorm", "LayerNorm"] and "its shift stays in it" in why(report)


def test_equal_copies_of_shared_layers_are_stored_once() -> None:
    model = look_trained(Transformer("layer", "pre"))
    model.blocks = nn.ModuleList([model.blocks[0]] * 3)
    _, report = folded(model, (torch.randint(0, 11, (3, 7)),), DYNAMIC)
    assert set(cores(report)) == {"RMSNorm"} and report.bytes_copied == 0


@pytest.mark.parametrize("shape", [(7,), (5, 7), (3, 7, 2)])
def test_means_of_groups(shape: tuple[int, ...]) -> None:
    generator = np.random.default_rng(0)
    values, axis = generator.normal(size=shape), shape.index(7)
    numbers = np.array([1, -1, 0, 1, 0, 0, -1])
    groups = numbers.reshape([7 if a == axis else 1 for a in range(len(shape))])
    result = subtract_means(torch.from_numpy(values), groups).numpy()
    expected = np.moveaxis(values.copy(), axis, 0)
    for group in (0, 1):
        expected[numbers == group] -= expected[numbers == group].mean(0)
    np.testing.assert_allclose(result, np.moveaxis(expected, 0, axis), rtol=0, atol=1e-15)
