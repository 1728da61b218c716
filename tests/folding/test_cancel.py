"""Dynamic norms whose division later norms undo."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import export
from torch.nn import functional as F

from normfuse.folding import FoldReport, fold

from .checks import difference, operations

C, H = 8, 2
D = C // H


class Attention(nn.Module):
    """Pre-norm attention with norms on queries, keys and, if asked for, values, head by head."""

    def __init__(
        self, *, values: bool = True, bias: bool = False, rotary: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.norm, self.rotary = nn.RMSNorm(C, eps=1e-12), rotary or (lambda x: x)
        self.q, self.k, self.v = (nn.Linear(C, C, bias=bias) for _ in range(3))
        self.q_norm, self.k_norm = (nn.RMSNorm(D, eps=1e-12) for _ in range(2))
        self.v_norm = nn.RMSNorm(D, eps=1e-12) if values else nn.Identity()
        self.out = nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (layer(y).view(*y.shape[:2], H, D).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q, k = self.q_norm(self.rotary(q)), self.k_norm(self.rotary(k))
        y = F.scaled_dot_product_attention(q, k, self.v_norm(v), is_causal=True)
        return x + self.out(y.transpose(1, 2).flatten(2))


class Branch(nn.Module):
    """norm - anything - norm, on a stream of its own."""

    def __init__(self, between: Callable[[Branch, Tensor], Tensor], last: nn.Module | None = None) -> None:
        super().__init__()
        self.norm, self.between = nn.RMSNorm(C, eps=1e-12), between
        self.up, self.gate, self.down = (nn.Linear(C, C, bias=False) for _ in range(3))
        self.biased = nn.Linear(C, C)
        self.last, self.out = last or nn.RMSNorm(C, eps=1e-12), nn.Linear(C, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.last(self.between(self, self.norm(x))))


def cancelled(model: nn.Module, x: Tensor | None = None, **options: bool) -> FoldReport:
    """Fold with norms that cancel; what is computed stays but for eps and rounding."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -1, 1) if parameter.dim() > 1 else nn.init.uniform_(parameter, 0.5, 2)
    model = model.double().eval()
    x = torch.randn(3, 5, C, dtype=torch.float64) if x is None else x
    program = export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},))
    result, report = fold(program, cancel_norms=True, **options)
    gone = sum(record.core == "none" for record in report.dynamic)
    norms = [name for name in operations(result) if "norm" in name and "vector" not in name]
    assert len(norms) == len(report.dynamic) - gone
    wide = 50.0 * torch.randn(2, 7, C, dtype=torch.float64)
    for inputs in (x, wide):
        assert difference(model(inputs), result.module()(inputs)) <= 1e-8
    assert (report.cancel_difference is None) is (gone == 0)
    assert report.cancel_difference is None or report.cancel_difference <= 1e-8
    assert difference(fold(program)[0].module()(x), model(x)) <= 1e-12  # off by default
    return report


def cores(report: FoldReport) -> list[str]:
    return [record.core for record in report.dynamic]


def rotate(x: Tensor) -> Tensor:
    """Rotary embedding on all channels of a head."""
    angles = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1], dtype=x.dtype)
    first, second = x.chunk(2, -1)
    return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()


def rotate_partly(x: Tensor) -> Tensor:
    return torch.cat([rotate(torch.cat([x[..., :2], x[..., :2]], -1))[..., :2], x[..., 2:]], -1)


@pytest.mark.parametrize("rotary", [None, rotate, rotate_partly])
def test_norms_in_front_of_normalised_queries_keys_and_values_go(rotary: Callable[[Tensor], Tensor] | None) -> None:
    report = cancelled(Attention(rotary=rotary))
    assert cores(report) == ["none", "RMSNorm", "RMSNorm", "RMSNorm"]
    assert report.dynamic[0].measured_by == ["q_norm", "k_norm", "v_norm"]


def test_values_without_a_norm_keep_it() -> None:
    report = cancelled(Attention(values=False))
    assert cores(report) == ["RMSNorm"] * 3
    assert "scaled_dot_product_attention" in report.dynamic[0].reasons["cancel"]


def test_a_bias_keeps_it() -> None:
    report = cancelled(Attention(bias=True))
    assert cores(report) == ["RMSNorm"] * 4 and "adds a bias" in report.dynamic[0].reasons["cancel"]


def test_a_norm_of_a_rotary_slice_only_keeps_it() -> None:
    """The channels of a head that are not rotated reach attention without a norm."""

    def between(m: Branch, x: Tensor) -> Tensor:
        x = m.up(x)
        return torch.cat([F.rms_norm(x[..., :4], (4,)), torch.tanh(x[..., 4:])], -1)

    assert cores(cancelled(Branch(between)))[0] == "RMSNorm"


CANCELS: dict[str, Callable[[Branch, Tensor], Tensor]] = {
    "linear": lambda m, x: m.down(m.up(x)),
    "relu": lambda m, x: m.down(torch.relu(m.up(x))),
    "squared relu": lambda m, x: m.down(torch.relu(m.up(x)).square()),
    "gated by a relu": lambda m, x: m.down(torch.relu(m.gate(x)) * m.up(x)),
    "quotient": lambda m, x: m.down(m.up(x).pow(3) / m.gate(x).abs()),
    "residual inside": lambda m, x: m.up(x) + m.down(m.gate(x)),
    "mask and factors": lambda m, x: m.up(x) * torch.arange(1.0, C + 1).double() * 2.0,
    "clamp": lambda m, x: m.up(x).clamp(min=0),
    "zeros": lambda m, x: torch.where(x > 0, m.up(x), 0.0),
    "flattened tokens": lambda m, x: (
        m.up(x.flatten(0, 1)).unflatten(0, x.shape[:2]) + m.gate(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    ),
    "transposed tokens": lambda m, x: m.up(x.transpose(0, 1)).transpose(0, 1) + x,
    "shifted tokens": lambda m, x: m.up(x.roll(1, 1)),
    "one token": lambda m, x: m.up(x[:, 0]),
    "heads": lambda m, x: m.up(x).unflatten(-1, (H, D)).flip(-2).flatten(-2),
    "einsum": lambda m, x: torch.einsum("bsi,oi->bso", x, m.up.weight),
    "matmul": lambda m, x: x @ m.up.weight,
    "convolution": lambda m, x: F.conv1d(x.mT, m.up.weight[..., None]).mT,
    "mean over channels": lambda m, x: m.up(x) * m.gate(x).mean(-1, keepdim=True),
    "deviation over channels": lambda m, x: m.up(x) * m.gate(x).std(-1, keepdim=True),
    "length": lambda m, x: F.normalize(m.up(x), dim=-1),
    "padded channels": lambda m, x: torch.cat([m.up(x)[..., 1:], torch.zeros_like(x[..., :1])], -1),
}
STAYS: dict[str, tuple[Callable[[Branch, Tensor], Tensor], str]] = {
    "bias": (lambda m, x: m.biased(x), "adds a bias"),
    "gelu": (lambda m, x: m.down(F.gelu(m.up(x))), "gelu"),
    "sigmoid gate": (lambda m, x: torch.sigmoid(m.gate(x)) * m.up(x), "sigmoid"),
    "constant": (lambda m, x: m.up(x) + 1.0, "add"),
    "another stream": (lambda m, x: m.up(x) + torch.ones(C).double(), "add"),
    "different degrees": (lambda m, x: m.up(x) + m.gate(x).square(), "different scales"),
    "tokens that mix": (lambda m, x: m.up(x).mean(1, keepdim=True) + 0 * x, "mixes tokens"),
    "running sum": (lambda m, x: m.up(x).cumsum(1), "mixes tokens"),
    "neighbours": (lambda m, x: m.up(x) + m.gate(x).roll(1, 1), "different scales"),
    "neighbours, sliced": (lambda m, x: m.up(x)[:, 1:] + m.gate(x)[:, :-1], "different scales"),
    "product of neighbours": (lambda m, x: m.up(x) * m.gate(x).flip(1), "different tokens"),
    "attention": (lambda m, x: (m.up(x) @ m.gate(x).mT).softmax(-1) @ x, "matmul"),
    "order of tokens": (
        lambda m, x: (m.up(x).flatten(0, 1) + m.gate(x).transpose(0, 1).flatten(0, 1)).unflatten(0, x.shape[:2]),
        "different scales",
    ),
    "convolution over tokens": (
        lambda m, x: F.conv1d(x.mT, m.up.weight[..., None].expand(-1, -1, 3), padding=1).mT,
        "mixes tokens",
    ),
    "six": (lambda m, x: F.relu6(m.up(x)), "relu6"),
    "softmax": (lambda m, x: m.up(x).softmax(-1), "softmax"),
}


@pytest.mark.parametrize("name", CANCELS)
def test_homogeneous_operations_pass_the_factor_on(name: str) -> None:
    report = cancelled(Branch(CANCELS[name]))
    assert cores(report)[0] == "none", report.dynamic[0].reasons


@pytest.mark.parametrize("name", STAYS)
def test_what_sees_the_scale_keeps_the_norm(name: str) -> None:
    between, reason = STAYS[name]
    report = cancelled(Branch(between))
    assert cores(report) == ["RMSNorm", "RMSNorm"] and reason in report.dynamic[0].reasons["cancel"]


def test_gains_of_zero_and_gains_that_stay_go_with_the_norm_or_into_a_product() -> None:
    model = Branch(lambda m, x: m.up(x))
    with torch.no_grad():
        model.norm.weight[0] = 0.0
    x = torch.randn(3, 5, C, dtype=torch.float64)
    program = export(model.double().eval(), (x,))
    result, _ = fold(program, cancel_norms=True)
    assert operations(result)[0] == "aten.linear.default" and difference(model(x), result.module()(x)) <= 1e-8
    model = Branch(lambda m, x: x.square() * m.norm.weight)  # its gain has no weight behind it
    program = export(model.double().eval(), (x,))
    result, _ = fold(program, cancel_norms=True, copy_shared=False)
    assert difference(model(x), result.module()(x)) <= 1e-8


def test_the_output_keeps_the_norm() -> None:
    class Output(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.last = nn.RMSNorm(C), nn.RMSNorm(C)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.norm(x)
            return x, self.last(x)

    assert "the model's output" in cancelled(Output()).dynamic[0].reasons["cancel"]


def test_norms_one_after_another_leave_the_last() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.RMSNorm(C, eps=1e-12), nn.Linear(C, C, bias=False)) for _ in range(3)))
    assert cores(cancelled(model)) == ["none", "none", "RMSNorm"]


def test_layer_norm_goes_where_its_input_has_no_mean() -> None:
    class Centred(nn.Module):
        def __init__(self, bias: bool) -> None:
            super().__init__()
            self.write, self.norm = nn.Linear(C, C), nn.LayerNorm(C, eps=1e-12, bias=bias)
            self.up, self.last, self.out = nn.Linear(C, C, bias=False), nn.LayerNorm(C, eps=1e-12), nn.Linear(C, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.last(self.up(self.norm(self.write(x)))))

    assert cores(cancelled(Centred(bias=False))) == ["none", "RMSNorm"]
    assert cores(cancelled(Centred(bias=True)))[0] == "RMSNorm"


def test_group_norm_measures_several_tokens_together() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.last = nn.RMSNorm(C), nn.Linear(C, C, bias=False), nn.GroupNorm(2, C)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.up(self.norm(x)).mT)

    assert "group_norm" in cancelled(Grouped()).dynamic[0].reasons["cancel"]


def test_the_difference_that_eps_makes_is_measured() -> None:
    """An eps that counts against small values: without the first norm it counts less, and the report says so."""
    model = Branch(lambda m, x: 1e-3 * m.up(x), nn.RMSNorm(C, eps=1e-6))
    nn.init.uniform_(model.up.weight, -1, 1)
    x = 10.0 * torch.randn(3, 5, C)
    _, report = fold(export(model.eval(), (x,)), cancel_norms=True)
    assert report.dynamic[0].core == "none" and 1e-2 < report.cancel_difference < 1
