"""Models with reparametrised weights, from training through a checkpoint to a verified file."""

import pytest
import torch
from torch import nn

import normfuse
from normfuse.nn import UnifiedNorm, sigma_reparam
from normfuse.onnx import export


class Reparametrised(nn.Module):
    """A convolution and a linear layer by σReparam, with a norm between."""

    def __init__(self, init: str = "one", again: bool = False) -> None:
        super().__init__()
        self.conv = sigma_reparam(nn.Conv1d(2, 6, 3), init=init, iterate_in_evaluation=again)
        self.norm = UnifiedNorm(6, channel_dim=1, warmup_iters=10)
        self.head = sigma_reparam(nn.Linear(6, 3), init=init, iterate_in_evaluation=again)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.conv(x)).mean(-1))


@pytest.mark.parametrize(("init", "again"), [("one", False), ("spectral", True)])
def test_a_trained_sigma_reparam_model_is_saved_loaded_and_exported(tmp_path, init, again):
    model = Reparametrised(init, again)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(8, 2, 7)).square().mean().backward()
        optimizer.step()
    model.eval()
    x = torch.randn(4, 2, 7)
    normfuse.save(model, tmp_path / "model.pt", example_inputs=x, dynamic_shapes={"x": {0: "batch"}})
    loaded = normfuse.load(tmp_path / "model.pt")
    assert torch.equal(loaded.expected_outputs[0], model(x))
    result = export(loaded, tmp_path / "model.onnx")
    assert result.graph.norms == [] and not result.report.remaining
    assert result.verification.worst("ONNX file") < 1e-5
    # Nothing of the iteration is in the file: a convolution, an average, a product.
    assert result.graph.node_count <= 4
