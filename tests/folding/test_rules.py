"""Every transfer rule: numerically right, what passes and what stops."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normfuse.folding import fold

from .checks import folded, operations
from .maps import BehindAnInput, C, Map, MapNorm, Net, Sandwich, sequence, status

CARRIED: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "transpose": lambda x: x.transpose(0, 1).transpose(0, 1),
    "permute": lambda x: x.permute(2, 0, 1).permute(1, 2, 0),
    "movedim": lambda x: x.movedim(-1, 0).movedim(0, -1),
    "mT": lambda x: x.mT.mT,
    "view": lambda x: x.reshape(-1, C).view(3, 5, C),
    "heads": lambda x: x.view(3, 5, 2, 3).transpose(1, 2).transpose(1, 2).flatten(2),
    "unflatten": lambda x: x.unflatten(-1, (3, 2)).flatten(-2),
    "unsqueeze": lambda x: x.unsqueeze(1).squeeze(1),
    "expand": lambda x: x.unsqueeze(1).expand(-1, 4, -1, -1),
    "repeat": lambda x: x.repeat(1, 2, 1),
    "repeat channels": lambda x: x.repeat(1, 1, 2)[..., 3:9],
    "slice": lambda x: x[:, 1:4],
    "slice channels": lambda x: torch.cat([x[..., 3:], x[..., :3]], -1),
    "select": lambda x: x[:, 2],
    "split": lambda x: torch.cat(list(reversed(x.split([1, 2, 3], -1))), -1),
    "chunk": lambda x: torch.cat(list(reversed(x.chunk(3, -1))), -1),
    "chunk positions": lambda x: x.chunk(2, 1)[0],
    "unbind": lambda x: torch.stack(x.view(3, 5, 2, 3).unbind(2), 2).flatten(2),
    "mean": lambda x: x.mean(1),
    "mean keepdim": lambda x: x.mean((0, 1), keepdim=True),
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "contiguous": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "to": lambda x: x.to(torch.float64),
    "neg": lambda x: -x,
    "residual": lambda x: x + x,
    "difference": lambda x: x - x.mean(1, keepdim=True),
    "scalar": lambda x: x / 4.0,
    "constant": lambda x: x + 2.0,
    "roll": lambda x: x.roll((1, 2), (1, 2)).roll(-2, 2),
    "reshape as": lambda x: x.reshape(-1, C).reshape_as(x),
    "average pool": lambda x: F.avg_pool1d(x.mT, 2).mT,
    "average pool, padding not counted": lambda x: F.avg_pool1d(x.mT, 3, padding=1, count_include_pad=False).mT,
    "pad by nothing": lambda x: F.pad(x, (0, 0, 0, 0)),
    "replicate pad": lambda x: F.pad(x.mT, (1, 1), mode="replicate").mT,
    "pooled": lambda x: F.adaptive_avg_pool1d(x.mT, 1).mT,
    "interpolate": lambda x: F.interpolate(x.mT, scale_factor=2.0).mT,
    "interpolate linearly": lambda x: F.interpolate(x.mT, scale_factor=2.0, mode="linear").mT,
    "index select": lambda x: x.index_select(1, torch.tensor([3, 0, 0])),
    "stack": lambda x: torch.stack([x[..., 3:], x[..., :3]], -1).flatten(-2),
    "stack positions": lambda x: torch.stack([x[:, 1], x[:, 0]], 1),
    "maximum pool": lambda x: F.max_pool1d(x.mT, 3, padding=1).mT,
    "maximum": lambda x: x.amax(1),
    "positions": lambda x: torch.cat([x[:, 2:], x[:, :2]], 1),
    "positions, again": lambda x: torch.cat([x, x.flip(1)], 1),
    "overwritten": lambda x: torch.slice_scatter(x, x[:, 3:], 1, 0, 2),
    "letters in another order": lambda x: torch.einsum("bsi->ibs", x).movedim(0, -1),
    "sum in letters": lambda x: torch.einsum("bsi->bi", x),
    "choice": lambda x: torch.where(torch.arange(5).view(5, 1) > 2, x, x.flip(1)),
    "one minus": lambda x: 1 - x,
    "minus, in a vector": lambda x: torch.rsub(x, torch.arange(1.0, C + 1.0).double(), alpha=2),
    "plus itself, with a factor": lambda x: torch.add(x, x, alpha=3),
    "plus, with a factor": lambda x: torch.add(x, x.flip(1), alpha=0.5),
    "interpolation with a constant": lambda x: torch.lerp(x, torch.arange(1.0, C + 1.0).double(), 0.3),
    "interpolation": lambda x: torch.lerp(x, x.flip(1), 0.3),
    "division by constants": lambda x: torch.addcdiv(torch.ones(1).double(), x, torch.tensor([3.0]).double()),
    "true division": lambda x: torch.true_divide(x, 3.0),
    "averages with softmax": lambda x: torch.einsum("bqk,bkd->bqd", torch.tanh(x @ x.mT).softmax(-1), x),
    "product with softmax": lambda x: (
        torch.dropout(torch.tanh(x.sum(-1))[:, None].expand(-1, 5, -1).softmax(-1), 0.5, False) @ x
    ),
    "grouped queries": lambda x: F.scaled_dot_product_attention(
        torch.tanh(x).view(3, 5, 2, 3).mT.mT.transpose(1, 2), torch.tanh(x[:, None, :, :3]), x[:, None], enable_gqa=True
    ).mean(1),
    "flip": lambda x: x.flip(1, 2).fliplr(),
    "narrow": lambda x: torch.cat([x.narrow(2, -3, 3), x.narrow(1, 0, 5).narrow(2, 0, 3)], -1),
    "repeat each": lambda x: x.repeat_interleave(2, 1),
    "repeat each channel": lambda x: x.repeat_interleave(2, -1)[..., 3:9],
    "tile": lambda x: x.tile(2, 1),
    "swapaxes": lambda x: x.swapaxes(0, 1).moveaxis(0, 1),
    "index": lambda x: x[:, torch.tensor([4, 0, 0])],
    "index of channels": lambda x: x[..., torch.tensor([4, 0, 0, 1, 5, 2])],
    "index of pairs": lambda x: x[torch.tensor([[0], [2]]), torch.tensor([1, 3])],
    "mask of positions": lambda x: x[:, torch.tensor([True, False, True, True, False])],
    "gather": lambda x: x.gather(1, torch.tensor([2, 0]).view(1, 2, 1).expand(3, 2, C)),
    "take along": lambda x: torch.take_along_dim(x, torch.tensor([2, 0]).view(1, 2, 1), 1),
    "windows": lambda x: x.unfold(1, 3, 2).mT,
    "windows of channels": lambda x: x.unfold(2, 3, 1).flatten(2)[..., 2:8],
    "patches": lambda x: F.unfold(x.mT[..., None], (2, 1)).mT[..., ::2],
    "channel shuffle": lambda x: F.channel_shuffle(x.mT, 3).mT,
    "diagonal": lambda x: x[:, :3].diagonal(0, 0, 1).mT,
    "ravel": lambda x: x.ravel().view(3, 5, C),
    "hstack": lambda x: torch.hstack([x.mT[:, 3:], x.mT[:, :3]]).mT,
    "dropout of channels": lambda x: F.dropout1d(x.mT, 0.5, training=False).mT,
    "sum": lambda x: x.sum(1),
    "sum keepdim": lambda x: x.sum((0, 1), keepdim=True),
    "minimum": lambda x: x.amin(1),
    "largest": lambda x: x.max(1).values,
    "median": lambda x: x.median(1).values,
    "smallest and largest": lambda x: torch.stack(list(x.aminmax(dim=1)), 1),
    "k-th": lambda x: x.kthvalue(2, 1)[0],
    "top": lambda x: x.topk(2, 1)[0],
    "sort": lambda x: x.sort(1)[0],
    "cumulative maximum": lambda x: x.cummax(1)[0],
    "pool with places": lambda x: F.max_pool1d(x.mT, 2, return_indices=True)[0].mT,
    "adaptive maximum": lambda x: F.adaptive_max_pool1d(x.mT, 2).mT,
    "nearest exact": lambda x: F.interpolate(x.mT, size=7, mode="nearest-exact").mT,
    "bicubic, antialiased": lambda x: (
        F.interpolate(x.mT[..., None].expand(-1, -1, -1, 5), size=(3, 4), mode="bicubic", antialias=True)[..., 0].mT
    ),
    "grid with borders": lambda x: (
        F.grid_sample(x.mT[..., None].expand(-1, -1, -1, 5), torch.zeros(3, 2, 2, 2).double(), padding_mode="border")[
            ..., 0
        ].mT
    ),
    "attention": lambda x: F.scaled_dot_product_attention(torch.tanh(x), torch.tanh(x), x, is_causal=True),
    "quarter turn": lambda x: x.rot90(1, (0, 1)).rot90(-1, (0, 1)),
    "half a turn": lambda x: x.rot90(2, (0, 1)),
    "hsplit": lambda x: x.hsplit([2, 4])[1],
    "dsplit": lambda x: torch.cat(x.dsplit(2)[::-1], -1),
    "radians": lambda x: torch.rad2deg(torch.deg2rad(x)),
    "quantile": lambda x: x.quantile(0.3, 1),
    "repeat by counts": lambda x: x.repeat_interleave(torch.tensor([1, 2, 0, 1, 1]), 1),
    "repeat channels by counts": lambda x: x.repeat_interleave(torch.tensor([1, 2, 0, 1, 1, 1]), -1),
    "averages in a product from the right": lambda x: (x.mT @ torch.tanh(x @ x.mT).softmax(-1).mT).mT,
    "averages with one head": lambda x: torch.einsum(
        "bhqk,bkhd->bqhd", torch.tanh(x @ x.mT).softmax(-1)[:, None], x[:, :, None]
    ).flatten(2),
    "deviation": lambda x: x.std(1),
    "deviation of all positions": lambda x: x.std((0, 1), correction=0, keepdim=True),
    "put at places": lambda x: torch.ops.aten.index_put(x, (None, torch.tensor([0, 2])), x[:, 3:]),
    "times a power of two": lambda x: torch.ldexp(x, torch.tensor([3])),
    "three operands": lambda x: torch.einsum(
        "bqk,bkd,b->bqd", torch.tanh(x @ x.mT).softmax(-1), x, torch.ones(3).double()
    ),
}
SCALE_ONLY: dict[str, Callable[[Tensor], Tensor]] = {
    "average pool, padding counted": lambda x: F.avg_pool1d(x.mT, 3, padding=1).mT,
    "zero fill": lambda x: x.masked_fill(torch.ones(x.shape[1], 1, dtype=torch.bool).tril(-1), 0.0),
    "relu": F.relu,
    "leaky relu": lambda x: F.leaky_relu(x, 0.2),
    "absolute": torch.abs,
    "gated operands": lambda x: torch.einsum("bsi,bs,i->bsi", x, torch.tanh(x.sum(-1)), torch.ones(C).double()),
    "clamp": lambda x: x.clamp(min=0),
    "clip": lambda x: x.clip(max=0),
    "clamp_min": lambda x: x.clamp_min(0.0),
    "clamp by a tensor": lambda x: x.clamp(min=torch.zeros(C, dtype=x.dtype)),
    "maximum with zeros": lambda x: torch.maximum(x, torch.zeros((), dtype=x.dtype)),
    "threshold": lambda x: F.threshold(x, 0.0, 0.0),
    "half-open hardtanh": lambda x: F.hardtanh(x, 0.0, float("inf")),
    "relu in place": lambda x: torch.relu_(x + 0.0),
    "prelu": lambda x: F.prelu(x.mT, torch.arange(1.0, C + 1.0).double()).mT,
    "rrelu": lambda x: F.rrelu(x),
    "cumulative sum": lambda x: x.cumsum(1),
    "sum of numbers": lambda x: x.nansum(1),
    "added at places": lambda x: x.index_add(1, torch.tensor([0, 0]), x[:, 3:], alpha=2),
    "scattered": lambda x: x.scatter_add(1, torch.tensor([2, 0]).view(1, 2, 1).expand(3, 2, C), x[:, 3:]),
    "accumulated": lambda x: torch.ops.aten.index_put(x, (None, torch.tensor([0, 0])), x[:, 3:], accumulate=True),
    "zeros at indices": lambda x: x.index_fill(1, torch.tensor([0, 2]), 0.0),
    "scattered zeros": lambda x: x.scatter(1, torch.zeros(3, 2, C, dtype=torch.int64), 0.0),
    "triangle": lambda x: x.tril() + x.triu(1),
    "bilinear": lambda x: F.bilinear(x, x.flip(1), torch.arange(216.0).view(6, 6, 6).double().sin()),
    "overlapping patches": lambda x: F.fold(F.unfold(x.mT[..., None], (2, 1)), (x.shape[1], 1), (2, 1))[..., 0].mT,
    "padded patches": lambda x: F.unfold(x.mT[..., None], (2, 1), padding=(1, 0)).mT[..., ::2],
    "grid with zeros": lambda x: (
        F.grid_sample(x.mT[..., None].expand(-1, -1, -1, 5), torch.ones(3, 2, 2, 2).double())[..., 0].mT
    ),
    "zero pad": lambda x: F.pad(x, (0, 0, 1, 1)),
    "gate": lambda x: x * torch.sigmoid(x.detach().sum(-1, keepdim=True).tanh()),
    "divided": lambda x: x / (1 + torch.sigmoid(x.detach()).mean(-1, keepdim=True)),
    "mixture": lambda x: torch.ones(x.shape[0], 5, 5).to(x).cumsum(-1) @ x,
    "masked attention": lambda x: F.scaled_dot_product_attention(
        torch.tanh(x), torch.tanh(x), x, attn_mask=torch.ones(5, 5, dtype=torch.bool).tril()
    ),
    "positive ones": lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
    "negative ones dropped": lambda x: torch.where(x < 0, 0.0, x),
    "zeros at other places": lambda x: torch.where(x.mT.mT > 0, x, 0.0),
    "lower triangle": lambda x: torch.where(torch.ones(5, 1, dtype=torch.bool), torch.zeros_like(x), x),
    "gated unit": lambda x: F.glu(torch.cat([x, torch.tanh(x)], -1)),
    "square": lambda x: x.square(),
    "cube": lambda x: x**3,
    "product with itself": lambda x: x * x,
}
STOPPED: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "softmax": lambda x: x.softmax(-1),
    "rms": lambda x: F.rms_norm(x, (C,)),
    "relu6": F.relu6,
    "roll flat": lambda x: x.roll(1),
    "channel mean": lambda x: x - x.mean(-1, keepdim=True),
}


@pytest.mark.parametrize("name", CARRIED)
def test_scale_and_shift_pass(name: str) -> None:
    """The norm reaches both linears through the operation; its shift is paid by whichever bias is right."""
    program, report = folded(Sandwich(CARRIED[name]), sequence())
    assert set(status(report)) == {"folded"}  # constants of the operation have rows of their own
    assert not {"aten.mul.Tensor", "aten.div.Tensor"} & set(operations(program))


@pytest.mark.parametrize("name", [*SCALE_ONLY, *STOPPED])
def test_what_does_not_pass_goes_into_the_weight_in_front(name: str) -> None:
    _, report = folded(Sandwich((SCALE_ONLY | STOPPED)[name]), sequence())
    assert set(status(report)) == {"folded"}
    assert "first.bias" in report.norms[0].absorbed_by


# Those that also compute what is fixed from the same value.
FIXES = {
    *("averages in a product from the right", "averages with one head", "three operands", "gated operands"),
    "attention",
    "averages with softmax",
    "product with softmax",
    "grouped queries",
    "masked attention",
    "mixture",
} | {
    *("gate", "divided", "gated unit"),
}


def test_numbers_divided_by_their_sum_average_as_a_softmax_does() -> None:
    def averages(x: Tensor) -> Tensor:
        weights = torch.exp(torch.tanh(x @ x.mT))
        return weights / weights.sum(-1, keepdim=True) @ x

    _, report = folded(Sandwich(averages), sequence())
    assert status(report) == ["folded"]


@pytest.mark.parametrize("name", [name for name in CARRIED if name not in FIXES])
def test_scale_and_shift_pass_to_the_weight_behind(name: str) -> None:
    model = BehindAnInput(CARRIED[name], shift=True)
    model.norm.scale.data.abs_()  # what keeps order takes positive scales only
    _, report = folded(model, sequence())
    assert status(report) == ["folded"], report.norms[0].reason
    assert {"last.weight", "last.bias"} == set(report.norms[0].absorbed_by)


@pytest.mark.parametrize("name", [name for name in SCALE_ONLY if name not in FIXES])
def test_a_scale_passes_to_the_weight_behind(name: str) -> None:
    model = BehindAnInput(SCALE_ONLY[name], shift=False)
    model.norm.scale.data.abs_()
    _, report = folded(model, sequence())
    assert status(report) == ["folded"], report.norms[0].reason
    assert report.norms[0].absorbed_by


@pytest.mark.parametrize("name", ["zero pad", "zero fill", "cumulative sum", "average pool, padding counted"])
def test_a_scale_passes_where_a_shift_stops(name: str) -> None:
    _, report = folded(BehindAnInput(SCALE_ONLY[name], shift=False), sequence())
    assert status(report) == ["folded"]
    program, report = folded(BehindAnInput(SCALE_ONLY[name], shift=True), sequence())
    assert status(report) == ["partly folded"]
    assert "shift" in report.norms[0].reason
    assert "aten.mul.Tensor" not in operations(program)


@pytest.mark.parametrize("name", ["gelu", "relu6", "softmax", "rms", "roll flat"])
def test_a_norm_between_fixed_points_stays_with_the_reason(name: str) -> None:
    program, report = folded(BehindAnInput(STOPPED[name], shift=True), sequence())
    assert status(report) == ["kept"]
    assert "no weight between" in report.norms[0].reason
    assert ("the model's input" in report.norms[0].reason) is (name != "roll flat")
    assert "aten.mul.Tensor" in operations(program)


@pytest.mark.parametrize("operation", [F.relu, lambda x: F.leaky_relu(x, 0.1), torch.abs, lambda x: x.amax(1)])
def test_only_positive_scales_pass_what_is_homogeneous(operation: Callable[[Tensor], Tensor]) -> None:
    model = BehindAnInput(operation, shift=False)
    _, report = folded(model, sequence())
    assert status(report) == ["kept"]  # the first scale is negative
    model.norm.scale.data.abs_()
    _, report = folded(model, sequence())
    assert status(report) == ["folded"]


def test_a_negative_scale_behind_relu_needs_a_weight_behind_it() -> None:
    """The stream's sign is free: two norms around a ReLU agree on one where they can."""
    model = nn.Sequential(nn.Linear(C, C), nn.ReLU(), MapNorm(), nn.Linear(C, C), nn.ReLU())
    _, report = folded(model, sequence())
    assert status(report) == ["folded"] and set(report.norms[0].absorbed_by) == {"3.weight", "3.bias"}


@pytest.mark.parametrize("module", [nn.PixelShuffle(2), nn.PixelUnshuffle(2)], ids=str)
def test_pixel_shuffles(module: nn.Module) -> None:
    norm = nn.BatchNorm2d(8)
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    channels = {nn.PixelShuffle: 2, nn.PixelUnshuffle: 32}[type(module)]
    model = nn.Sequential(nn.Conv2d(3, 8, 1), norm, module, nn.Conv2d(channels, 4, 1), nn.GELU())
    _, report = folded(model, (torch.randn(2, 3, 4, 4, dtype=torch.float64),))
    assert status(report) == ["folded"]


@pytest.mark.parametrize(
    "relu", [F.relu, lambda x: x.clamp(min=0), lambda x: torch.where(x > 0, x, 0.0), lambda x: F.threshold(x, 0.0, 0.0)]
)
def test_the_bound_of_a_relu_takes_a_shift_that_nothing_else_takes(relu: Callable[[Tensor], Tensor]) -> None:
    model = BehindAnInput(relu, shift=True)
    model.norm.scale.data.abs_()
    program, report = folded(model, sequence())
    assert status(report) == ["folded"]
    assert operations(program) == ["aten.maximum.default", "aten.linear.default"]


SQUARES: dict[str, tuple[Callable[[Tensor], Tensor], list[str]]] = {
    "square": (torch.square, ["mse_loss"]),
    "power": (lambda x: x**2, ["mse_loss"]),
    "of a difference": (lambda x: (x - 3.0) * (x - 3.0), ["mse_loss"]),
    "of a square": (lambda x: x.square().square(), ["mse_loss", "square"]),
    "of a square and a number": (lambda x: (x.square() - 1.0).square(), ["mse_loss", "mse_loss"]),
    "of a relu": (lambda x: F.relu(x).square(), ["maximum", "mse_loss"]),
    "of a relu, computed twice": (lambda x: F.relu(x) * F.relu(x), ["maximum", "mse_loss"]),
    "of a part": (lambda x: F.relu(x[:, :3]) ** 2, ["slice", "maximum", "mse_loss"]),
    "of heads": (
        lambda x: x.view(3, 5, 2, 3).clamp(min=0).pow(2.0).flatten(2),
        ["view", "maximum", "mse_loss", "flatten"],
    ),
    "averaged": (lambda x: F.relu(x).square().mean(1), ["maximum", "mse_loss", "mean"]),
}


@pytest.mark.parametrize(
    ("name", "negative"), [*((name, False) for name in SQUARES), ("of a relu", True), ("square", True)]
)
def test_a_square_takes_a_shift_that_nothing_else_takes(name: str, negative: bool) -> None:
    """A negative scale keeps the factor in front of a ReLU, but not the summand."""
    square, left = SQUARES[name]
    model = BehindAnInput(square, shift=True)
    if not negative:
        model.norm.scale.data.abs_()
    program, report = folded(model, sequence())
    kept = negative and "maximum" in left
    assert status(report) == ["kept" if kept else "folded"]
    found = [operation.split(".")[1].replace("reshape", "view") for operation in operations(program)]
    assert found == ["mul"] * kept + left + ["linear"]
    assert operations(fold(program)[0]) == operations(program)


def test_a_square_of_what_a_weight_writes_stays() -> None:
    program, report = folded(Sandwich(lambda x: F.relu(x).square()), sequence())
    assert status(report) == ["folded"]
    assert operations(program) == [f"aten.{o}.default" for o in ("linear", "relu", "square", "linear")]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_square_takes_a_shift_in_few_digits(dtype: torch.dtype) -> None:
    model = BehindAnInput(lambda x: F.relu(x).square(), shift=True).to(dtype).eval()
    model.norm.scale.data.abs_()
    program, report = fold(torch.export.export(model, (sequence()[0].to(dtype),)))  # compares with the model's rounding
    assert report.verified is not None and "aten.add.Tensor" not in operations(program)
    assert all(v.dtype == dtype for v in program.state_dict.values())


def test_a_power_that_cannot_have_its_scale_is_fixed() -> None:
    """Both sides of the square are fixed: the norm in front stays, the others fold."""
    model = nn.Sequential(Map(shift=False), MapNorm(shift=False), nn.Linear(C, C))
    model.forward = lambda x: F.softmax(model[1](x).square(), -1) + model[2](model[0](x)).square()
    _, report = folded(model, sequence())
    assert [record.status for record in report.norms if record.name == "1"] == ["kept"]


def test_a_norm_beside_the_input_times_a_number_folds() -> None:
    """Behind a concatenation, as of pixels / 255 and features: the number is the same for all channels of its part."""
    norm, outer = MapNorm(), nn.Linear(2 * C, C)
    model = nn.ModuleList([norm, outer])
    model.forward = lambda x: outer(torch.cat([norm(torch.tanh(x)), x / 255], -1))
    program, report = folded(model, sequence())
    assert status(report) == ["folded"]
    assert operations(program) == ["aten.tanh.default", "aten.cat.default", "aten.linear.default"]


def test_vectors_are_stacked_as_rows() -> None:
    """`vstack` gives vectors an axis, which a concatenation would not."""
    program, _ = folded(BehindAnInput(lambda x: torch.vstack([x[0, 0], x[1, 2]]), shift=True), sequence())
    assert "aten.vstack.default" in operations(program)
    _, report = folded(BehindAnInput(lambda x: torch.vstack([x[0], x[1]]), shift=True), sequence())
    assert status(report) == ["folded"]


def test_product_with_two_computed_factors_fixes_both() -> None:
    _, report = folded(BehindAnInput(lambda x: x @ x.mT @ x, shift=True), sequence())
    assert status(report) == ["kept"]


PRODUCTS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "gate": lambda m, x: m.first(x) * m.second(x),
    "quotient": lambda m, x: m.first(x) / m.second(x),
    "matrices": lambda m, x: ((x @ x.mT) / 4.0) @ (x / 3.0),
    "einsum": lambda m, x: torch.einsum("bsi,bti->bst", x * 3.0, x / 2.0) @ m.second(x),
    "several": lambda m, x: m.first(x) * (m.second(x) * (m.first(x) * x)),
    "local response": lambda m, x: nn.LocalResponseNorm(3)(m.weight(m.first(x)).mT).mT,
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_both_factors_of_a_product_lose_their_scales(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Module()
    model.first, model.second, model.weight = MapNorm(shift=False), MapNorm(shift=False, seed=1), nn.Linear(C, C)
    model.last = nn.Linear(C, 4)
    model.forward = lambda x: model.last(PRODUCTS[name](model, x))
    program, _ = folded(model, sequence())
    constants = {spec.arg.name for spec in program.graph_signature.input_specs if spec.target}
    for node in program.graph.nodes:
        if node.target in (torch.ops.aten.mul.Tensor, torch.ops.aten.div.Tensor):
            assert all(isinstance(x, torch.fx.Node) and x.name not in constants for x in node.args)
    assert operations(fold(program)[0]) == operations(program)


def test_a_product_that_cannot_have_its_scale_keeps_the_norm_of_one_factor() -> None:
    model = BehindAnInput(lambda x: x, shift=False)
    other = MapNorm(shift=False, seed=1)
    model.add_module("other", other)
    model.forward = lambda x: model.last(model.norm(x) * other(x) + x)
    _, report = folded(model, sequence())
    assert status(report) == ["kept", "kept"]


@pytest.mark.parametrize("pair", [torch.var_mean, torch.std_mean])
@pytest.mark.parametrize("axes", [{"dim": 1}, {"dim": (0, 1), "correction": 0, "keepdim": True}])
def test_statistics_that_come_in_pairs_pass_scale_and_shift(pair: Callable, axes: dict[str, object]) -> None:
    norm = MapNorm()
    norm.scale.data.abs_()
    model = Net(lambda m, x: sum(map(m.last, pair(m.norm(x), **axes))), norm=norm, last=nn.Linear(C, 4))
    _, report = folded(model, sequence())
    assert status(report) == ["folded"]
