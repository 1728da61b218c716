"""Arguments that PyTorch allows and few models give: numbers without axes, sizes as factors, infinite bounds."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normfuse.folding import fold
from normfuse.nn import UnifiedNorm

from .checks import difference, folded

BATCH = ({0: torch.export.Dim("batch", min=2)},)
Tail = Callable[[Tensor, Tensor], Tensor]


class Behind(nn.Module):
    """A weight, a norm with gains of both signs, and what is tried; `weight` is another weight of 6 x 6."""

    def __init__(self, tail: Tail, gain: tuple[float, ...] = (0.5, -1.5)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tail, self.first, self.norm = tail, nn.Linear(6, 6), UnifiedNorm(6)
        self.norm.weight.data = torch.tensor(gain).repeat(6 // len(gain))
        nn.init.uniform_(self.norm.bias, 0.5, 1.0)
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.norm(torch.tanh(self.first(x))), self.weight)


NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: x.sum(0),
    "mean": lambda x: x.mean(-1),
    "amax": lambda x: x.amax(0),
    "max": lambda x: x.max(-1).values,
    "topk": lambda x: x.topk(1, 0).values,
    "sort": lambda x: x.sort(0).values,
    "median": lambda x: x.median(0).values,
    "kthvalue": lambda x: x.kthvalue(1, 0).values,
    "aminmax": lambda x: torch.aminmax(x, dim=0).max,
    "quantile": lambda x: x.quantile(0.5, 0),
    "cummax": lambda x: x.cummax(0).values,
    "cumsum": lambda x: x.cumsum(0),
    "nansum": lambda x: x.nansum(0),
    "std": lambda x: x.std(0, correction=0) + x,
    "flip": lambda x: x.flip(0),
    "transpose": lambda x: x.transpose(0, -1),
    "movedim": lambda x: x.movedim(0, 0),
    "unfold": lambda x: x.unfold(0, 1, 1),
    "inner": lambda x: torch.inner(torch.ones(3, dtype=x.dtype), x),
    "inner, the number first": lambda x: torch.inner(x, torch.ones(3, dtype=x.dtype)),
    "softmax": lambda x: x.softmax(0).reshape(1, 1) @ x.reshape(1, 1),
    "root mean square": lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_whose_axis_is_named(name: str) -> None:
    """PyTorch counts a tensor without axes as one with one axis."""
    folded(Behind(lambda h, w: NUMBERS[name](h[0]) * w.sum()), (torch.randn(6, dtype=torch.float64),))


def test_a_number_of_tokens_behind_a_norm_that_may_cancel() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.RMSNorm(6)).double().eval()

    class Number(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return F.rms_norm(self.model(x)[0].sum(0).expand(6), (6,))

    x = torch.randn(6, dtype=torch.float64)
    with torch.no_grad():
        result, _ = fold(torch.export.export(Number(), (x,)), cancel_norms=True)
        assert difference(Number()(x), result.module()(x)) <= 1e-6


SIZES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "add": lambda x, n: torch.add(x, x.tanh(), alpha=n),
    "sub": lambda x, n: torch.sub(x, x.tanh(), alpha=n),
    "sub of a constant": lambda x, n: torch.sub(x, torch.ones(6, dtype=x.dtype), alpha=n),
    "rsub": lambda x, n: torch.rsub(x, x.tanh(), alpha=n),
    "lerp": lambda x, n: torch.lerp(x, x.tanh(), n * 0.1),
    "addcmul": lambda x, n: torch.addcmul(x, x, x, value=n),
    "power": lambda x, n: torch.pow(x, n),
    "clamp": lambda x, n: x.clamp(min=n * 0.0),
    "leaky relu": lambda x, n: F.leaky_relu(x, n * 0.1),
    "product": lambda x, n: x * n / n**0.5,
    "masked": lambda x, n: x.masked_fill(x > 0, n),
}


@pytest.mark.parametrize("name", [*SIZES, "addmm"])
def test_a_number_that_is_a_size(name: str) -> None:
    """Factors and exponents that a dynamic dimension gives are no constants."""
    model = Behind(lambda h, w: SIZES[name](h, h.shape[0]) @ w)
    if name == "addmm":
        model.tail = lambda h, w: torch.addmm(w[0], h, w, beta=h.shape[0], alpha=h.shape[0])
    folded(model, (torch.randn(4, 6, dtype=torch.float64),), dynamic_shapes=BATCH)


def test_a_power_that_is_a_size_stops_a_norm_that_would_cancel() -> None:
    class Powers(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.rms_norm(torch.pow(F.rms_norm(x, (6,)), x.shape[0]), (6,))

    x = torch.randn(3, 6, dtype=torch.float64)
    program = torch.export.export(Powers(), (x,), dynamic_shapes=BATCH)
    result, report = fold(program, cancel_norms=True)
    assert [record.core for record in report.dynamic] == ["RMSNorm", "RMSNorm"]
    assert difference(Powers()(x), result.module()(x)) <= 1e-12


@pytest.mark.parametrize(("threshold", "value"), [(0.0, 0.0), (math.inf, 0.0), (-math.inf, 0.0), (0.0, math.inf)])
def test_thresholds_without_an_end(threshold: float, value: float) -> None:
    """Only zero in the place of what is not above zero is a ReLU, whose bound can take a shift."""
    tail = lambda h, w: 1 / (1 + F.threshold(h, threshold, value) @ w.abs())  # noqa: E731
    folded(Behind(tail, gain=(0.5, 1.5)), (torch.randn(4, 6, dtype=torch.float64),))


@pytest.mark.parametrize(
    ("dtype", "status"), [(torch.int32, "partly folded"), (torch.bool, "partly folded"), (torch.float64, "folded")]
)
def test_probabilities_that_are_cast(dtype: torch.dtype, status: str) -> None:
    """As integers they add up to one no more."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.behind = Behind(lambda h, w: h)

        def forward(self, x: Tensor, scores: Tensor) -> Tensor:
            return scores.softmax(-1).to(dtype).to(x.dtype) @ self.behind(x) @ self.behind.weight

    x = torch.randn(4, 6, dtype=torch.float64)
    _, report = folded(Mixed(), (x, torch.randn(4, 4, dtype=torch.float64)))
    assert [record.status for record in report.norms] == [status]


def test_a_mean_of_complex_numbers() -> None:
    folded(Behind(lambda h, w: h.mean(0, dtype=torch.complex128).real), (torch.randn(4, 6, dtype=torch.float64),))


@pytest.mark.parametrize("size", [1e-300, 1e200])
def test_a_shift_whose_square_leaves_float64(size: float) -> None:
    folded(Behind(lambda h, w: (h * size * (1 / size)) @ w), (torch.randn(4, 6, dtype=torch.float64),))


EMPTY: dict[str, Tail] = {  # models with options switched off: no register tokens, no prefix, no features to add
    "no tokens in front": lambda x, w: torch.cat([w[None, :0].expand(x.shape[0], -1, -1), x], 1) @ w,
    "no channels behind": lambda x, w: torch.cat([x, x[..., :0]], -1) @ w,
    "a slice of none": lambda x, w: torch.cat([x[:, :0] @ w, x @ w], 1),
    "parts of which one is none": lambda x, w: torch.cat([*x.split([0, 4], 1)], 1) @ w,
    "a product that gives none": lambda x, w: x @ w + F.linear(x, w[:0]).sum(-1, keepdim=True),
    "a product of none": lambda x, w: x @ w + F.linear(F.linear(x, w[:0]), w[:, :0]),
}


@pytest.mark.parametrize("name", EMPTY)
def test_values_without_entries_are_in_nobodys_way(name: str) -> None:
    model = Behind(EMPTY[name]).double().eval()
    x, more = torch.randn(2, 4, 6).double(), torch.randn(3, 4, 6).double()
    program, report = fold(torch.export.export(model, (x,), dynamic_shapes=BATCH))
    torch.testing.assert_close(program.module()(more), model(more), rtol=1e-12, atol=1e-12)
    assert report.norms[0].status == "folded" or "product" in name
