"""Parts of a model in bfloat16, which ONNX Runtime's CPU cannot compute."""

import numpy as np
import onnxruntime
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
    "a computed result": lambda x: torch.relu(x.bfloat16()),
}


def test_operations_in_bfloat16_compute_in_float32_and_round(tmp_path):
    class Net(nn.Module):
        def forward(self, x):
            return {name: part(x) for name, part in PARTS.items()}

    x = torch.randn(3, 8)
    (path,) = write(torch.export.export(Net(), (x,)), tmp_path / "m.onnx", opset=20)
    session = onnxruntime.InferenceSession(str(path))
    assert [output.name for output in session.get_outputs()] == [name.replace(" ", "_") for name in PARTS]
    got = session.run(None, {"x": x.numpy()})
    for value, (name, want) in zip(got, Net()(x).items(), strict=True):
        assert value.dtype == np.float32, name
        torch.testing.assert_close(torch.from_numpy(value), want.float(), rtol=2**-7, atol=1e-6, msg=name)
