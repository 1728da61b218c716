"""A shift in front of an operation that cannot take one, behind a value that is put together from several."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from .checks import aten, folded, operations
from .maps import MapNorm, Net


def parts(norm: MapNorm, bias: bool = False) -> dict[str, nn.Module]:
    """Three convolutions of two channels, and a norm behind them."""
    torch.manual_seed(0)
    return {name: nn.Conv1d(4, 2, 1, bias=bias) for name in "abc"} | {"norm": norm}


def cat(*values: Tensor) -> Tensor:
    return torch.cat(values, 1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "function",
    [
        lambda net, x: silu(net.norm(cat(net.a(x), net.b(x), net.c(x)))),
        lambda net, x: silu(net.norm(cat(net.a(x), cat(net.b(x), net.c(x))))),
        lambda net, x: silu(net.norm(cat(net.a(x), 2 * net.b(x) + 1, net.c(x).flip(-1)))),
        lambda net, x: silu(net.norm(torch.stack([net.a(x), net.b(x), net.c(x)], 1).flatten(1, 2))),
    ],
    ids=["side by side", "nested", "behind maps", "stacked"],
)
def test_every_part_pays_for_its_own(function, bias):
    program, report = folded(Net(function, **parts(MapNorm(axis=-2), bias)), (torch.randn(3, 4, 5).double(),))
    assert report.norms[0].status == "folded" and not {"aten.add.Tensor", "aten.mul.Tensor"} & {*operations(program)}
    assert all(
        node.args[2] is not None for node in program.graph.find_nodes(op="call_function", target=aten.conv1d.default)
    )


@pytest.mark.parametrize(
    "function",
    [
        lambda net, x: silu(net.norm(cat(net.a(x), y := net.b(x), y))),
        lambda net, x: (silu(net.norm(cat(net.a(x), net.b(x), y := net.c(x)))), silu(y)),
        lambda net, x: silu(net.norm(cat(net.a(x), net.b(x), x[:, :2]))),
        lambda net, x: silu(net.norm(cat(net.a(x), net.b(x), silu(net.c(x))))),
    ],
    ids=["one part twice", "read elsewhere", "of the input", "of an activation"],
)
def test_a_part_that_cannot_pay_costs_an_add_and_changes_no_other(function):
    norm = MapNorm(axis=-2)
    norm.scale.data.fill_(1)
    program, _ = folded(Net(function, **parts(norm)), (torch.randn(3, 4, 5).double(),))
    found = program.graph.find_nodes(op="call_function", target=aten.conv1d.default)
    assert operations(program).count("aten.add.Tensor") == 1
    assert all(len(node.args) < 3 or node.args[2] is None for node in found)
