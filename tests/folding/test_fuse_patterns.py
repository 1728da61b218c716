"""RMSNorm and LayerNorm spelled out in arithmetic are the norms they are, in every spelling that models use."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import export
from torch.nn import functional as F

from normfuse.folding import fold

from .checks import folded, operations
from .maps import C, Net, sequence

EPS = 1e-5


class WrittenRMSNorm(nn.Module):
    """A norm whose forward is the spelling under test."""

    def __init__(self, spelling: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight, self.bias = (nn.Parameter(torch.rand(C, generator=generator) + 0.5) for _ in range(2))
        self.spelling = spelling

    def forward(self, x: Tensor) -> Tensor:
        return self.spelling(self, x)


class Model(nn.Module):
    def __init__(self, spelling: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(C, C), WrittenRMSNorm(spelling), nn.Linear(C, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)))


def mean_square(x: Tensor) -> Tensor:
    return x.pow(2).mean(-1, keepdim=True)


def llama(m: nn.Module, x: Tensor) -> Tensor:
    wide = x.to(torch.float64)
    return m.weight * (wide * torch.rsqrt(mean_square(wide) + EPS)).to(x.dtype)


def deberta(m: nn.Module, x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).pow(2).mean(-1, keepdim=True)
    return m.weight * ((x - mean) / torch.sqrt(variance + EPS)) + m.bias


def centred(m: nn.Module, x: Tensor) -> Tensor:
    y = x - x.mean(2, True)
    return y * (mean_square(y) + EPS).sqrt().reciprocal() * m.weight + m.bias


RMS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "llama": llama,
    "one more than the weight": lambda m, x: (x * torch.rsqrt(mean_square(x) + EPS)) * (1.0 + m.weight.double()),
    "power": lambda m, x: x * torch.pow(mean_square(x) + EPS, -0.5) * m.weight,
    "division": lambda m, x: x / torch.sqrt(mean_square(x) + EPS) * m.weight,
    "root by power": lambda m, x: x / (mean_square(x) + EPS).pow(0.5) * m.weight,
    "square": lambda m, x: m.weight * (torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * x),
    "product": lambda m, x: m.weight * (torch.rsqrt((x * x).mean(2, True) + EPS) * x),
    "one over the root": lambda m, x: x * (1 / torch.sqrt(mean_square(x) + EPS)) * m.weight,
    "one in a tensor": lambda m, x: x * (torch.ones((), dtype=x.dtype) / torch.sqrt(mean_square(x) + EPS)) * m.weight,
    "no gain": lambda m, x: x * torch.rsqrt(mean_square(x) + EPS),
    "eps in a tensor": lambda m, x: x * torch.rsqrt(mean_square(x) + torch.tensor(EPS, dtype=x.dtype)) * m.weight,
}


@pytest.mark.parametrize("name", RMS)
def test_rms_norm(name: str) -> None:
    program, report = folded(Model(RMS[name]), sequence())
    assert operations(program) == ["aten.linear.default", "aten.rms_norm.default", "aten.linear.default"]
    (record,) = report.dynamic
    assert record.core == "RMSNorm" and record.kind == "WrittenRMSNorm" and record.name == "norm" and not report.norms
    assert record.gain == ("none" if name == "no gain" else "folded")


@pytest.mark.parametrize("spelling", [deberta, centred])
def test_layer_norm(spelling: Callable[[nn.Module, Tensor], Tensor]) -> None:
    """Even that: a LayerNorm spelled out becomes an RMSNorm, because its input can be centred."""
    program, report = folded(Model(spelling), sequence())
    assert operations(program) == ["aten.linear.default", "aten.rms_norm.default", "aten.linear.default"]
    (record,) = report.dynamic
    assert (record.core, record.gain, record.shift) == ("RMSNorm", "folded", "folded")


def test_a_gain_in_front_of_an_activation_goes_into_the_operation() -> None:
    program, report = folded(Model(lambda m, x: F.gelu(llama(m, x))), sequence())
    assert operations(program)[1:3] == ["aten.rms_norm.default", "aten.gelu.default"]
    (record,) = report.dynamic
    assert record.gain == "kept" and "gelu" in record.reasons["gain"]


OTHERS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "other axis": lambda m, x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + EPS),
    "two axes": lambda m, x: x * torch.rsqrt(x.pow(2).mean((1, 2), keepdim=True) + EPS),
    "no eps": lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)),
    "another value": lambda m, x: x * torch.rsqrt(torch.tanh(x).pow(2).mean(-1, keepdim=True) + EPS),
    "cube": lambda m, x: x * torch.rsqrt(x.pow(2).pow(1.5).mean(-1, keepdim=True) + EPS),
    "inverse": lambda m, x: x * torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS),
    "eps per channel": lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + m.weight),
    "two over the root": lambda m, x: x * (torch.full((), 2.0) / torch.sqrt(mean_square(x) + EPS)),
    "two eps": lambda m, x: x * torch.rsqrt(torch.add(x.pow(2).mean(-1, keepdim=True), EPS, alpha=2)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_only_looks_like_a_norm_is_left(name: str) -> None:
    program, report = folded(Model(OTHERS[name]), sequence())
    assert not report.dynamic and "aten.rms_norm.default" not in operations(program)


def test_casts_that_change_the_dtype_stay_around_the_operation() -> None:
    model = (
        Net(lambda m, x: m.last(m.norm(x)), norm=WrittenRMSNorm(llama), last=nn.Linear(C, 4)).to(torch.bfloat16).eval()
    )
    program, report = fold(export(model, (torch.randn(3, 5, C, dtype=torch.bfloat16),)))
    assert operations(program) == [
        "aten.to.dtype",
        "aten.rms_norm.default",
        "aten.to.dtype",
        "aten.linear.default",
    ]
    assert report.norms[0].status == "folded"


def test_a_norm_that_is_read_in_between_keeps_its_gain_outside() -> None:
    """The value before the gain is an output as well: the gain is a factor of its own, and folds as one."""

    def both(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        x = m.first(x)
        y = x * torch.rsqrt(mean_square(x) + EPS)
        return y, m.last(y * m.weight)

    program, _ = folded(
        Net(both, first=nn.Linear(C, C), last=nn.Linear(C, 4), weight=nn.Parameter(torch.rand(C) + 0.5)), sequence()
    )
    assert operations(program) == ["aten.linear.default", "aten.rms_norm.default", "aten.linear.default"]
