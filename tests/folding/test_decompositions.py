"""Programs that were decomposed before: norms in pieces, convolutions of any kind, operations with plain numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram, export

import normfuse
from normfuse.folding import FoldReport, fold

from .checks import difference, operations
from .networks import NORMS, PLACEMENTS, ConvNet, look_trained
from .test_placements import network

NETWORKS = {
    **{
        f"{norm} norms, {placement}-norm": lambda norm=norm, placement=placement: network(norm, placement, "encoder")
        for norm in ("batch", "layer", "rms")
        for placement in PLACEMENTS
    },
    "images": lambda: (ConvNet(nn.BatchNorm2d), (torch.randn(3, 3, 16, 16),)),
    "unified norms in images": lambda: (
        ConvNet(lambda c: NORMS["unified"](c, channel_dim=1)),
        (torch.randn(2, 3, 16, 16),),
    ),
    "one axis": lambda: (
        nn.Sequential(
            *(
                nn.Conv1d(4, 6, 3, padding="same", dilation=2),
                nn.BatchNorm1d(6),
                nn.GELU(),
                nn.ConvTranspose1d(6, 4, 3),
            ),
            *(nn.BatchNorm1d(4), nn.Conv1d(4, 4, 1)),
        ),
        (torch.randn(2, 4, 9),),
    ),
    "groups of transposed ones": lambda: (
        nn.Sequential(nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)),
        (torch.randn(2, 4, 5, 5),),
    ),
    "three axes": lambda: (
        nn.Sequential(
            *(nn.Conv3d(4, 6, 3, padding=1), nn.BatchNorm3d(6), nn.ReLU(), nn.ConvTranspose3d(6, 4, 3)),
            nn.BatchNorm3d(4),
        ),
        (torch.randn(2, 4, 5, 5, 5),),
    ),
    "groups of channels": lambda: (
        nn.Sequential(nn.Conv2d(4, 6, 3), nn.GroupNorm(2, 6), nn.Conv2d(6, 4, 1)),
        (torch.randn(2, 4, 5, 5),),
    ),
}


def rows(report: FoldReport) -> list[tuple[str, ...]]:
    static = [(record.name, record.status) for record in report.norms]
    return sorted([*static, *((record.name, record.core, record.gain, record.shift) for record in report.dynamic)])


def in_pieces(program: ExportedProgram) -> bool:
    pieces = ("native_layer_norm", "native_group_norm", "_native_batch_norm_legit_no_training", "convolution", "Scalar")
    return any(piece in str(node.target) for node in program.graph.nodes for piece in pieces)


@pytest.mark.parametrize("name", NETWORKS)
def test_norms_fold_as_they_do_in_a_program_that_is_whole(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = NETWORKS[name]()
    model = look_trained(model).double()
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    whole = export(model, inputs)
    decomposed = whole.run_decompositions()
    assert in_pieces(decomposed)
    expected, (folded, report) = fold(whole)[1], fold(decomposed)
    assert rows(report) == rows(expected) and (report.norms or report.dynamic)
    assert difference(model(*inputs), folded.module()(*inputs)) <= 1e-11
    assert in_pieces(decomposed)  # the program itself is left as it is


def test_fusing_and_writing_what_was_decomposed(tmp_path) -> None:
    model, inputs = look_trained(ConvNet(nn.BatchNorm2d)), (torch.randn(2, 3, 16, 16),)
    decomposed = export(model, inputs).run_decompositions()
    result = normfuse.onnx.export(decomposed.module(), tmp_path / "m.onnx", example_inputs=inputs)
    assert not result.graph.norms and not result.report.remaining
    assert "batch_norm" not in operations(fold(decomposed)[0])


class Pieces(nn.Module):
    """A norm of which the mean is read as well."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.linear = nn.Parameter(torch.full((8,), 2.0)), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, mean, _ = torch.ops.aten.native_layer_norm.default(x, [8], self.weight, None, 1e-5)
        return self.linear(y), mean


def test_a_norm_whose_other_results_are_read_is_not_computed_twice() -> None:
    model, x = Pieces().eval(), torch.randn(3, 8)
    folded, report = fold(export(model, (x,)))
    assert [(record.core, record.gain) for record in report.dynamic] == [("LayerNorm", "kept")]
    assert operations(folded) == ["aten.native_layer_norm.default", "aten.linear.default"]
    for got, want in zip(folded.module()(x), model(x), strict=True):
        assert difference(want, got) <= 1e-6
