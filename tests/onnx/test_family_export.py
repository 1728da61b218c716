"""A model that mixes norms of the family becomes an ONNX file that ONNX Runtime agrees with."""

import pytest
import torch
from torch import nn

from normfuse.nn import (
    BatchChannelNorm,
    DomainSplitNorm,
    DyT,
    MovingAverageBatchNorm,
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
    assert result.proof.worst("ONNX file") < 1e-4
    status = {record.name: record.status for record in result.report.norms}
    folded = ["patches.1.batch_norm", "patches.4", "norms.0", "norms.1.norms.1"]
    assert {name: status[name] for name in folded} == dict.fromkeys(folded, "folded")
    stays = {kind: result.graph.nodes.get(kind, 0) for kind in ("GroupNormalization", "LayerNormalization", "Tanh")}
    assert stays == dict.fromkeys(stays, 1)
    assert result.graph.nodes["Gemm"] + result.graph.nodes.get("MatMul", 0) == 4  # no σ is computed in the file
