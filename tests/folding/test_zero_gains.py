"""Gains of zero in front of what is no weight go into the weight behind which they stand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normfuse.folding import fold
from normfuse.nn import UnifiedNorm

from .checks import any_gauge, folded, operations
from .maps import C, MapNorm, sequence, status

IMAGE = torch.randn(2, C, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
MAPS = {f"aten.{name}" for name in ("mul.Tensor", "addcmul.default", "batch_norm.default", "instance_norm.default")}
Between = Callable[[Tensor], Tensor]


def trained(norm: nn.Module) -> nn.Module:
    """A norm with gains, shifts and statistics that differ."""
    for name, tensor in (*norm.named_parameters(), *norm.named_buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5) if "var" in name or "phi" in name else nn.init.uniform_(
                tensor, -1.0, 1.0
            )
    return norm


class Product(nn.Module):
    def __init__(self, product: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.product, self.weight = product, nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight)


class Residual(nn.Module):
    """A branch of a weight and a norm, added to its input; ``twice`` reads what the weight writes once more."""

    def __init__(
        self, weight: nn.Module, norm: nn.Module, between: Between = lambda x: x, *, twice: bool = False
    ) -> None:
        super().__init__()
        self.weight, self.norm, self.between, self.twice = weight, trained(norm), between, twice

    def forward(self, x: Tensor) -> Tensor:
        y = self.weight(x)
        stream = x + self.norm(self.between(y))
        return torch.tanh(stream + torch.tanh(y) if self.twice else stream)


NORMS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "BatchNorm2d": lambda: (Residual(nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C)), IMAGE),
    "BatchNorm1d": lambda: (Residual(nn.Conv1d(C, C, 1, bias=False), nn.BatchNorm1d(C)), IMAGE[:, :, 0]),
    "InstanceNorm2d": lambda: (
        Residual(nn.Conv2d(C, C, 1), nn.InstanceNorm2d(C, affine=True, track_running_stats=True)),
        IMAGE,
    ),
    "UnifiedNorm": lambda: (Residual(nn.Linear(C, C), UnifiedNorm(C)), *sequence()),
    "arithmetic": lambda: (Residual(nn.Linear(C, C), MapNorm()), *sequence()),
}
WEIGHTS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "grouped": lambda: (Residual(nn.Conv2d(C, C, 3, padding=1, groups=3), nn.BatchNorm2d(C)), IMAGE),
    "transposed": lambda: (Residual(nn.ConvTranspose2d(C, C, 3, padding=1, groups=2), nn.BatchNorm2d(C)), IMAGE),
    "matmul": lambda: (Residual(Product(torch.matmul, C, C), MapNorm()), *sequence()),
    "heads": lambda: (
        Residual(Product(lambda x, w: torch.einsum("bsi,hid->bshd", x, w).flatten(2), 2, C, 3), MapNorm()),
        *sequence(),
    ),
    "a part": lambda: (Residual(nn.Linear(C, 2 * C), MapNorm(), lambda x: x.chunk(2, -1)[1]), *sequence()),
    "pooled": lambda: (
        Residual(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)),
        IMAGE,
    ),
    "behind another norm": lambda: (
        Residual(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), trained(nn.BatchNorm2d(C)).double().eval()),
        IMAGE,
    ),
}


@pytest.mark.parametrize(
    ("name", "zero"),
    [
        *((name, [0, 3]) for name in (*NORMS, *WEIGHTS)),
        *((name, slice(None)) for name in ("BatchNorm2d", "UnifiedNorm", "heads")),
    ],
)
@torch.no_grad()
def test_a_residual_branch_folds_whose_norm_multiplies_by_zero(name: str, zero: object) -> None:
    torch.manual_seed(0)
    model, x = (NORMS | WEIGHTS)[name]()
    gain = model.norm.scale if isinstance(model.norm, MapNorm) else model.norm.weight
    gain[zero] = 0.0
    program, report = folded(model, (x,))
    assert set(status(report)) == {"folded"}, report.norms
    assert not MAPS & set(operations(program))
    assert operations(fold(program)[0]) == operations(program)
    with any_gauge(0):
        folded(model, (x,), carry_biases=True)


@pytest.mark.parametrize(
    "model",
    [
        Residual(nn.Linear(C, C), MapNorm(), twice=True),
        Residual(nn.Linear(C, C), MapNorm(), F.gelu),
        Residual(nn.Linear(C, 3), MapNorm(), lambda x: x.repeat(1, 1, 2)),
        Residual(Product(lambda x, w: w @ x, 5, 5), MapNorm()),
    ],
    ids=["read elsewhere", "behind an activation", "one channel at two places", "another axis"],
)
@torch.no_grad()
def test_it_stays_where_no_row_stands_for_the_gain(model: Residual) -> None:
    model.norm.scale[0] = 0.0
    _, report = folded(model, sequence())
    assert status(report) == ["kept"]


@torch.no_grad()
def test_what_a_constant_becomes_on_the_way_is_followed() -> None:
    """The shift of the first norm is gone behind differences, and twice as large behind sums of two positions."""
    first = MapNorm(seed=1).double()
    for between in (
        lambda x: first(x).cumsum(1),
        lambda x: F.pad(first(x), (0, 0, 1, 1))[:, :5],
        lambda x: first(first(x).cumsum(1)),
        lambda x: torch.diff(first(x), dim=1).sum(1, keepdim=True),
        lambda x: first(x)[:, :2].sum(1, keepdim=True),
    ):
        model = Residual(nn.Linear(C, C), MapNorm(), between)
        model.norm.scale[:2] = 0.0
        program, _ = folded(model, sequence())
        assert not {"aten.mul.Tensor", "aten.addcmul.default"} & set(operations(program))
        assert operations(fold(program)[0]) == operations(program)
