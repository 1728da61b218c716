"""Parts of a model in bfloat16, which ONNX Runtime's CPU cannot compute."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from normfuse.onnx import write

PARTS = {
    "a product": lambda x: (x.bfloat16() * x.bfloat16()).float(),
    "several": lambda x: torch.cat(
        [x.bfloat16().softmax(-1).sum(-1, keepdim=True), x[:, 1:].bfloat16().exp()], 1
    ).float(),
    "with integers": lambda x: x + (torch.arange(8).bfloat16() / 3).float(),
    "the result": lambda x: torch.relu(x).bfloat16(),
}


@pytest.mark.parametrize("part", PARTS)
def test_operations_in_bfloat16_compute_in_float32_and_round(part, tmp_path):
    class Net(nn.Module):
        def forward(self, x):
            return PARTS[part](x)

    x = torch.randn(3, 8)
    program = torch.export.export(Net(), (x,))
    (path,) = write(program, tmp_path / "m.onnx", opset=20)
    (got,) = onnxruntime.InferenceSession(str(path)).run(None, {"x": x.numpy()})
    assert got.dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(got), Net()(x).float(), rtol=2**-7, atol=1e-6)
