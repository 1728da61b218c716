"""Operations that torch.onnx refuses as a program has them."""

import onnxruntime
import torch
from torch import nn

from normfuse.onnx import write


def test_numbers_minus_tensors_of_any_dtype(tmp_path):
    class Differences(nn.Module):
        def forward(self, x):
            same = x.float()
            return 1.0 - x, 1 - x, 1.5 - x.to(torch.uint8), torch.rsub(same, 2.0, alpha=3), torch.rsub(x, 2, alpha=3)

    x = torch.tensor([[0, 1, 2], [5, 4, 200]])
    (path,) = write(torch.export.export(Differences(), (x,)), tmp_path / "m.onnx", opset=20)
    for got, wanted in zip(
        onnxruntime.InferenceSession(str(path)).run(None, {"x": x.numpy()}), Differences()(x), strict=True
    ):
        torch.testing.assert_close(torch.from_numpy(got), wanted)
