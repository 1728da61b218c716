"""Norms vanish whatever their placement, and what remains is the network with its norms deleted."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.export import Dim

import normfuse

from .checks import assert_nothing_left, difference, folded, operations
from .networks import NORMS, PLACEMENTS, ConvNet, Transformer, look_trained

DYNAMIC = ({0: Dim("batch"), 1: Dim("sequence", max=30)},)
STATIC_NORMS = ("unified", "power", "batch")


def network(norm: str, placement: str, kind: str, **options: object) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    torch.manual_seed(1)
    if kind == "patches":
        return Transformer(norm, placement, vocabulary=None, classes=5, **options), (torch.randn(3, 7, 6).double(),)
    return Transformer(norm, placement, causal=kind == "decoder", **options), (torch.randint(0, 11, (3, 7)),)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("norm", STATIC_NORMS)
def test_every_norm_vanishes(norm: str, placement: str) -> None:
    model, inputs = network(norm, placement, "encoder")
    program, report = folded(look_trained(model), inputs, DYNAMIC)
    assert_nothing_left(program, report)
    assert len(report.norms) == sum(
        type(m).__name__ in ("UnifiedNorm", "PowerNorm", "BatchNorm1d") for m in model.modules()
    )


@pytest.mark.parametrize("kind", ["decoder", "patches"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_folded_graph_is_the_graph_without_norms(placement: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for other sizes than those of the example."""
    model, inputs = network("unified", placement, kind)
    program, report = folded(look_trained(model), inputs, DYNAMIC)
    assert_nothing_left(program, report)
    monkeypatch.setitem(NORMS, "none", lambda width: nn.Identity())
    bare, _ = network("none", placement, kind)
    reference, _ = folded(bare, inputs, DYNAMIC)
    assert operations(program) == operations(reference)
    for batch, sequence in ((2, 2), (5, 30), (4, 13)):
        others = (
            torch.randn(batch, sequence, 6).double() if kind == "patches" else torch.randint(0, 11, (batch, sequence))
        )
        with torch.no_grad():
            assert difference(model(others), program.module()(others)) <= 1e-12


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("norm", ["unified", "batch"])
def test_carried_biases_leave_the_branches(norm: str, placement: str) -> None:
    """Every branch's last linear loses its bias; the weights that read the stream take it."""
    model, inputs = network(norm, placement, "patches")
    program, report = folded(look_trained(model), inputs, DYNAMIC, carry_biases=True)
    assert_nothing_left(program, report)
    linears = [node for node in program.graph.nodes if "linear" in str(node.target)]
    without = [node for node in linears if len(node.args) < 3 or node.args[2] is None]
    assert len(without) == 6  # two branches in each of three blocks


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_a_final_norm_before_the_output_is_written_into_the_last_weights(placement: str) -> None:
    """With the norm's result as the model's output its scale and shift go backwards."""
    model, inputs = network("unified", placement, "encoder", final_norm=False)
    model.head = NORMS["unified"](16)
    program, report = folded(look_trained(model), inputs, DYNAMIC)
    assert_nothing_left(program, report)


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_grouped_power_norm_keeps_only_the_rms(placement: str) -> None:
    model, inputs = network("power-grouped", placement, "encoder")
    program, report = folded(look_trained(model), inputs, DYNAMIC)
    assert_nothing_left(program, report)
    assert any("rms_norm" in name for name in operations(program))


def test_grouped_power_norm_in_a_stream_that_is_measured_again_keeps_its_shift() -> None:
    model, inputs = network("power-grouped", "peri", "encoder")
    program, report = folded(look_trained(model), inputs, DYNAMIC)
    left = {record.name: record for record in report.remaining}
    assert "blocks.0.norm1_out" in left and left["blocks.0.norm1_out"].status == "partly folded"
    assert "shift" in left["blocks.0.norm1_out"].reason
    assert "aten.mul.Tensor" not in operations(program)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("norm", ["unified", "batch"])
def test_float32_is_as_accurate_as_before(norm: str, placement: str) -> None:
    """Against float64, the folded network may round a few times as much as the unfolded one (its scales differ)."""
    model, inputs = network(norm, placement, "patches", depth=6)
    model = look_trained(model)
    with torch.no_grad():
        exact = model.double()(*inputs).float()
        model, inputs = model.float(), tuple(x.float() for x in inputs)
        plain = difference(exact, model(*inputs))
        fused = difference(exact, normfuse.fuse(model, inputs, DYNAMIC)(*inputs))
    assert fused <= 8 * plain + 8 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, lambda c: NORMS["unified"](c, channel_dim=1)])
def test_convolutions(norm: object) -> None:
    torch.manual_seed(0)
    inputs = (torch.randn(3, 3, 16, 16).double(),)
    program, report = folded(look_trained(ConvNet(norm)), inputs, ({0: Dim("batch")},))
    assert_nothing_left(program, report)
    assert len(report.norms) == 4
