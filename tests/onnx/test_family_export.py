"""A model that mixes norms of the family becomes an ONNX file that ONNX Runtime agrees with."""

import pytest
import torch
from torch import nn

from normfuse.nn import (
    AdaptiveInstanceNorm,
    BatchChannelNorm,
    Derf,
    DomainSplitNorm,
    DyT,
    LearnableRegionNorm,
    MovingAverageBatchNorm,
    RegionNorm,
    RepBatchNorm,
    TimeDependentLayerNorm,
    UnifiedNorm,
    center_weight,
    sigma_reparam,
    weight_standardization,
)
from normfuse.onnx import export


class Mixed(nn.Module):
    """Images [B, 3, H, W] and log-SNR [B] to logits: convolutions, then tokens in a residual stream."""

    def __init__(self, width=8):
        super().__init__()
        self.patches = nn.Sequential(
            weight_standardization(nn.Conv2d(3, width, 3, padding=1)),
            BatchChannelNorm(width, 2),
            nn.GELU(),
            center_weight(nn.Conv2d(width, width, 2, stride=2)),
            MovingAverageBatchNorm(width),
        )
        self.norms = nn.ModuleList([RepBatchNorm(width), DomainSplitNorm(UnifiedNorm(width), domain=1), DyT(width)])
        self.linears = nn.ModuleList(sigma_reparam(nn.Linear(width, width)) for _ in self.norms)
        self.final, self.head = TimeDependentLayerNorm(width), nn.Linear(width, 3)

    def forward(self, image, log_snr):
        x = self.patches(image).flatten(2).transpose(1, 2)
        for norm, linear in zip(self.norms, self.linears, strict=True):
            x = x + linear(norm(x))
        return self.head(self.final(x, log_snr).mean(1))


@pytest.fixture
def trained():
    model = Mixed()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(8, 3, 6, 6), torch.randn(8)).square().mean().backward()
        optimizer.step()
    return model.eval()


def test_a_mixed_model_is_verified_and_only_what_is_computed_from_inputs_stays(trained, tmp_path):
    batch = torch.export.Dim("batch")
    result = export(
        trained,
        tmp_path / "mixed.onnx",
        example_inputs=(torch.randn(4, 3, 6, 6), torch.randn(4)),
        dynamic_shapes={"image": {0: batch}, "log_snr": {0: batch}},
    )
    assert result.verification.worst("ONNX file") < 1e-4
    status = {record.name: record.status for record in result.report.norms}
    folded = ["patches.1.batch_norm", "patches.4", "norms.0", "norms.1.norms.1"]
    assert {name: status[name] for name in folded} == dict.fromkeys(folded, "folded")
    stays = {kind: result.graph.nodes.get(kind, 0) for kind in ("InstanceNormalization", "LayerNormalization", "Tanh")}
    assert stays == dict.fromkeys(stays, 1)
    assert result.graph.nodes["Gemm"] + result.graph.nodes.get("MatMul", 0) == 4  # no σ is computed in the file


class Computed(nn.Module):
    """Every norm that is exported as what it is: regions of a mask and of the features, a style, erf."""

    def __init__(self, width=4):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(c, width, 1) for c in (3, width, width))
        self.region, self.learnable, self.style = RegionNorm(width), LearnableRegionNorm(), AdaptiveInstanceNorm()
        self.derf, self.head = Derf(width), nn.Linear(width, 2)

    def forward(self, image, hole, style):
        x = self.region(self.convs[0](image), hole)
        x = self.learnable(self.convs[1](x))
        x = self.style(self.convs[2](x), style)
        return self.head(self.derf(x.movedim(1, -1)))


def test_what_is_computed_from_inputs_is_exported_as_it_is(tmp_path):
    model = Computed()
    nn.init.normal_(model.region.weight), nn.init.normal_(model.region.bias)
    hole = torch.rand(2, 1, 5, 6) < 0.5
    example = (torch.randn(2, 3, 5, 6), hole, torch.randn(2, 4, 7, 3))
    result = export(model.eval(), tmp_path / "computed.onnx", example_inputs=example)
    assert result.verification.worst("ONNX file") < 1e-4 and result.graph.nodes["Erf"] == 1
