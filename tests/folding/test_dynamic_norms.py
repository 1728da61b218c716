"""The gain and shift of norms that measure each input go into the weights behind them, or stay inside the norm."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export
from torch.nn import functional as F

import normfuse
from normfuse.folding import DynamicNormRecord, fold

from .checks import difference, folded, operations
from .maps import C, MapNorm, Net, sequence, status
from .networks import PLACEMENTS, Transformer, look_trained

aten = torch.ops.aten
DYNAMIC = ({0: Dim("batch"), 1: Dim("sequence", max=30)},)


class Behind(nn.Module):
    """linear - a dynamic norm - the operation under test - linear; all in one, so that reasons can name them."""

    def __init__(self, norm: nn.Module, operation: Callable[[Tensor], Tensor] = lambda x: x, **options: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.operation = nn.Linear(C, C), trained(norm), operation
        self.last = nn.Linear(C, 4, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.operation(self.norm(torch.tanh(self.first(x)))))


def trained(norm: nn.Module) -> nn.Module:
    for parameter in norm.parameters():
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) + 0.3
    return norm


def only(records: list[DynamicNormRecord]) -> DynamicNormRecord:
    (record,) = records
    return record


def arguments(program: torch.export.ExportedProgram, target: object) -> list[tuple]:
    return [node.args for node in program.graph.nodes if node.target is target]


@pytest.mark.parametrize("norm", [nn.LayerNorm(C), nn.RMSNorm(C, eps=1e-5)], ids=["layer", "rms"])
def test_gain_and_shift_go_into_the_weights_behind(norm: nn.Module) -> None:
    program, report = folded(Behind(norm), sequence())
    record = only(report.dynamic)
    assert record.gain == "folded" and record.shift == ("folded" if isinstance(norm, nn.LayerNorm) else "none")
    assert record.name == "norm" and record.kind == type(norm).__name__ == record.core
    assert set(record.absorbed_by) >= {"last.weight"} and "gain" not in record.reasons
    (args,) = arguments(program, aten.layer_norm.default if record.core == "LayerNorm" else aten.rms_norm.default)
    assert args[2] is None and len(operations(program)) == 4


@pytest.mark.parametrize("norm", [nn.LayerNorm(C, elementwise_affine=False), nn.RMSNorm(C, elementwise_affine=False)])
def test_a_norm_without_gain_has_none_to_fold(norm: nn.Module) -> None:
    _, report = folded(Behind(norm), sequence())
    assert (only(report.dynamic).gain, only(report.dynamic).shift) == ("none", "none")


def test_a_missing_bias_is_created_for_the_shift() -> None:
    program, report = folded(Behind(nn.LayerNorm(C), bias=False), sequence())
    assert only(report.dynamic).absorbed_by == ["last.weight", "last.bias"]
    assert operations(program)[-1] == "aten.linear.default"


def test_a_weight_without_a_bias_of_its_own_leaves_the_shift_in_the_norm() -> None:
    """A product x W would need an Add behind it, which costs more than the shift inside the norm."""
    program, report = folded(
        Net(lambda m, x: m.norm(x) @ m.weight, norm=trained(nn.LayerNorm(C)), weight=nn.Parameter(torch.randn(C, 4))),
        sequence(),
    )
    record = only(report.dynamic)
    assert (record.gain, record.shift) == ("folded", "kept") and "has no bias to take it" in record.reasons["shift"]
    assert operations(program) == ["aten.layer_norm.default", "aten.matmul.default"]


REFUSALS = {
    "gelu": (F.gelu, "gelu"),
    "softmax": (lambda x: x.softmax(-1), "softmax"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_stops_a_gain_leaves_it_inside_the_norm(name: str) -> None:
    operation, reason = REFUSALS[name]
    before = len(operations(export(Behind(nn.LayerNorm(C), operation).double().eval(), sequence())))
    program, report = folded(Behind(nn.LayerNorm(C), operation), sequence())
    record = only(report.dynamic)
    assert (record.gain, record.shift) == ("kept", "kept") and reason in record.reasons["shift"]
    assert reason in record.reasons["gain"] and len(operations(program)) == before


def test_a_gain_passes_casts() -> None:
    """As in Gemma, which computes its norms in float32 and returns to the dtype of the input."""

    class Cast(nn.RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            y = x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + 1e-5)
            return (y * (1.0 + self.weight.double())).type_as(x)

    program, report = folded(Behind(Cast(C)), sequence())
    assert only(report.dynamic).gain == "folded"
    assert operations(program) == [f"aten.{name}.default" for name in ("linear", "tanh", "rms_norm", "linear")]


def test_an_output_keeps_gain_and_shift() -> None:
    program, report = folded(nn.Sequential(nn.Linear(C, C), trained(nn.LayerNorm(C))), sequence())
    record = only(report.dynamic)
    assert (record.gain, record.shift) == ("kept", "kept") and "the model's output" in record.reasons["gain"]
    assert "the model's output cannot take a shift" in record.reasons["shift"]
    assert operations(program) == ["aten.linear.default", "aten.layer_norm.default"]


def test_norms_of_queries_and_keys_keep_what_the_softmax_sees() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_norm, self.k_norm, self.v_norm = (trained(nn.RMSNorm(C)) for _ in range(3))
            self.last = nn.Linear(C, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.scaled_dot_product_attention(self.q_norm(x), self.k_norm(x), self.v_norm(x)))

    program, report = folded(Attention(), sequence())
    fates = {record.name: record.gain for record in report.dynamic}
    assert fates == {"q_norm": "kept", "k_norm": "kept", "v_norm": "folded"}
    assert "queries with keys" in report.dynamic[0].reasons["gain"]
    assert operations(program).count("aten.rms_norm.default") == 3 and "aten.mul.Tensor" not in operations(program)


class Convolved(nn.Module):
    def __init__(self, padding: int, groups: int = 2) -> None:
        super().__init__()
        self.norm, self.conv = trained(nn.GroupNorm(groups, C)), nn.Conv2d(C, 4, 3, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(x))


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("groups", [1, 2, C])
def test_group_norm_before_a_convolution(padding: int, groups: int) -> None:
    """Zero padding does not see a shift: only the gain goes."""
    inputs = (torch.randn(2, C, 5, 5, dtype=torch.float64),)
    program, report = folded(Convolved(padding, groups), inputs, ({0: Dim("batch")},))
    record = only(report.dynamic)
    assert (record.gain, record.shift) == ("folded", "kept" if padding else "folded")
    assert operations(program) == ["aten.group_norm.default", "aten.conv2d.default"]
    if padding:
        assert "conv2d in conv cannot take a shift" in record.reasons["shift"]


def test_group_norm_takes_a_static_map_behind_it() -> None:
    model = nn.Sequential(trained(nn.GroupNorm(2, C)), MapNorm(axis=-3), nn.GELU())
    program, report = folded(model, (torch.randn(2, C, 5, 5, dtype=torch.float64),))
    assert not report.remaining and operations(program) == ["aten.group_norm.default", "aten.gelu.default"]


def test_zero_gains_go_where_only_weights_read_them() -> None:
    norm = nn.LayerNorm(C)
    model = Behind(norm)
    norm.weight.data[2] = 0.0
    program, report = folded(model, sequence())
    assert only(report.dynamic).gain == "folded" and arguments(program, aten.layer_norm.default)[0][2] is None


def test_zero_gains_stay_where_the_result_is_added() -> None:
    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear, self.last = trained(nn.LayerNorm(C)), nn.Linear(C, C), nn.Linear(C, 2)
            self.norm.weight.data[1] = 0.0

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return self.last(y + F.gelu(self.linear(y)))

    _, report = folded(Added(), sequence())
    assert only(report.dynamic).gain == "kept" and "zero in places" in only(report.dynamic).reasons["gain"]


def test_a_shift_that_varies_between_the_inputs_of_a_weight_stays() -> None:
    """It varies along an axis that the linear does not keep apart."""
    program, report = folded(
        Net(lambda m, x: m.linear(m.norm(x).mT), norm=trained(nn.LayerNorm(C)), linear=nn.Linear(5, 4)), sequence()
    )
    record = only(report.dynamic)
    assert (record.gain, record.shift) == ("kept", "kept") and "linear in linear cannot" in record.reasons["shift"]
    assert "aten.add.Tensor" not in operations(program)


def test_gains_that_are_not_finite_stay() -> None:
    model = Behind(nn.LayerNorm(C)).double().eval()
    model.norm.weight.data[1], model.norm.bias.data[2] = float("nan"), float("inf")
    _, report = fold(export(model, sequence()))
    assert only(report.dynamic).reasons == {
        "gain": "it is not finite",
        "shift": "it is not finite",
        "mean": "its shift stays in it (it is not finite)",
    }


def test_a_shared_gain_stays_where_weights_may_not_be_copied() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.first, self.last = trained(nn.LayerNorm(C)), nn.Linear(C, C), nn.Linear(C, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.norm(torch.tanh(self.first(self.norm(x)))))

    _, report = folded(Shared(), sequence())
    assert [record.gain for record in report.dynamic] == ["folded", "folded"] and report.bytes_copied == 0
    _, report = folded(Shared(), sequence(), copy_shared=False)
    assert {why for record in report.dynamic for why in record.reasons.values()} == {
        "its gain or shift is shared and may not be copied"
    }


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_transformers_gain_no_operation(placement: str) -> None:
    """Pre-norm: every gain goes. Elsewhere what adds to a stream that is measured again keeps its own, inside."""
    model = look_trained(Transformer("layer", placement, causal=True))
    program, report = folded(model, (torch.randint(0, 11, (3, 7)),), DYNAMIC)
    written = [name for name in operations(program) if name in ("aten.mul.Tensor", "aten.addcmul.default")]
    assert not written and report.nodes_after <= report.nodes_before
    kept = [record.name for record in report.dynamic if record.gain == "kept"]
    if placement == "pre":
        assert not kept
    elif placement == "peri":
        assert kept == ["embed_norm"] + [f"blocks.{i}.norm{j}_out" for i in range(3) for j in (1, 2)]
    assert all(("gain" in record.reasons) == (record.gain == "kept") for record in report.dynamic)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_keeping_dynamic_norms_leaves_them_bit_for_bit(norm: str) -> None:
    model = look_trained(Transformer(norm, "pre", depth=1)).double()
    inputs = (torch.randint(0, 11, (3, 7)),)
    program, report = fold(export(model, inputs, dynamic_shapes=DYNAMIC), keep_dynamic_norms=True)
    assert report.norms == [] and report.centred == [] and {r.gain for r in report.dynamic} == {"kept"}
    with torch.no_grad():
        assert torch.equal(model(*inputs), program.module()(*inputs))
        kept = normfuse.fuse(model, inputs, DYNAMIC, keep_dynamic_norms=True)
        assert torch.equal(model(*inputs), kept(*inputs))
        assert difference(model(*inputs), normfuse.fuse(model, inputs, DYNAMIC)(*inputs)) <= 1e-12


def test_a_gain_of_zero_in_front_of_a_factor_of_zero() -> None:
    """The factor builds on the gain's scale, whatever order they are taken in."""
    model = nn.Sequential(nn.Linear(C, C), nn.LayerNorm(C), MapNorm(), nn.Linear(C, 3))
    with torch.no_grad():
        nn.init.uniform_(model[1].weight, 0.5, 2.0)
        model[1].weight[1] = model[2].scale[2] = 0.0
    _, report = folded(model, sequence())
    assert status(report) == ["folded"] and report.dynamic[0].gain == "folded"


class WrittenOut(nn.Module):
    """A linear layer as many write it themselves, behind a LayerNorm."""

    def __init__(self, product: str, *, bias: bool) -> None:
        super().__init__()
        self.product, self.first, self.norm = product, nn.Linear(C, C), nn.LayerNorm(C)
        self.weight = nn.Parameter(torch.randn(C, 6))
        self.bias = nn.Parameter(torch.randn(6)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x))
        if self.product == "bmm":
            y = torch.bmm(y, self.weight.expand(y.shape[0], *self.weight.shape))
        else:
            y = y @ self.weight if self.product == "matmul" else torch.einsum("bnc,cd->bnd", y, self.weight)
        return F.gelu(y if self.bias is None else y + self.bias)


@pytest.mark.parametrize("product", ["matmul", "bmm", "einsum"])
def test_an_addition_that_is_there_takes_the_shift(product: str) -> None:
    model, x = look_trained(WrittenOut(product, bias=True)).double(), torch.randn(2, 5, C).double()
    program, report = folded(model, (x,))
    (record,) = report.dynamic
    assert (record.core, record.gain, record.shift) == ("RMSNorm", "folded", "folded")
    assert operations(program).count("aten.add.Tensor") == 1
    assert difference(model(x), program.module()(x)) <= 1e-12


@pytest.mark.parametrize("product", ["matmul", "bmm", "einsum"])
def test_a_shift_stays_where_it_would_be_an_addition_of_its_own(product: str) -> None:
    model, x = look_trained(WrittenOut(product, bias=False)).double(), torch.randn(2, 5, C).double()
    program, report = folded(model, (x,))
    (record,) = report.dynamic
    assert (record.gain, record.shift, record.reasons["shift"]) == (
        "folded",
        "kept",
        f"{product} has no bias to take it",
    )
    assert "aten.add.Tensor" not in operations(program)
