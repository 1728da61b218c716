"""Operations that torch.onnx refuses as a program has them."""

import onnxruntime
import pytest
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


class Attentions(nn.Module):
    """Attention over operands of any number of axes; x is [batch, 2, 3, heads, 5, 4]."""

    def __init__(self):
        super().__init__()
        self.x = nn.Parameter(torch.randn(2, 5, 4))
        self.register_buffer("mask", torch.rand(1, 3, 2, 5, 5))

    def forward(self, x):
        windows, heads = x[:, 1], x[:, 1, 1].transpose(1, 2).sin().transpose(1, 2)  # in any order in memory

        def attention(q, k, **options):
            return nn.functional.scaled_dot_product_attention(q, k, k.cos(), **options)

        return {
            "six axes": attention(x, x.sin(), scale=0.3),
            "causal": attention(windows.transpose(1, 2), windows.sin().transpose(1, 2), is_causal=True),
            "a mask of two axes": attention(windows, windows.sin(), attn_mask=self.mask[0, 0, 0] > 0.5),
            "a mask of four axes": attention(windows, windows.sin(), attn_mask=self.mask[0, :, :1]),
            "a mask of five axes": attention(windows, windows.sin(), attn_mask=self.mask[..., :1, :]),
            "the same keys for all windows": attention(windows, windows[:, :1]),
            "groups of heads": attention(windows, windows[:, :, :1], enable_gqa=True),
            "keys without a batch": attention(heads, self.x),
            "queries without a batch": attention(self.x, heads),
            "one head": attention(heads[:, 0], heads[:, 1]),
            "one head, keys without a batch": attention(heads[:, 0], self.x[0]),
            "one batch of keys": attention(heads, heads[:1]),
            "no batch": attention(self.x[0], self.x[1]),
            "groups of one head": attention(heads, heads.sin(), enable_gqa=True),
        }


@pytest.mark.parametrize("opset", [20, 23])
def test_attention_of_any_number_of_axes(tmp_path, opset):
    model = Attentions()
    example, x = torch.randn(2, 2, 3, 2, 5, 4), torch.randn(3, 2, 3, 2, 5, 4)
    program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    (path,) = write(program, tmp_path / "m.onnx", opset=opset)
    got = onnxruntime.InferenceSession(str(path)).run(None, {"x": x.numpy()})
    for value, (case, wanted) in zip(got, model(x).items(), strict=True):
        torch.testing.assert_close(torch.from_numpy(value), wanted, msg=lambda text, case=case: f"{case}: {text}")


def test_whether_a_mask_is_true_throughout(tmp_path):
    class Fills(nn.Module):
        def forward(self, x):
            return torch.where(torch.ops.aten._is_all_true(x > 0), x, -x)

    (path,) = write(torch.export.export(Fills(), (torch.ones(2, 3),)), tmp_path / "m.onnx", opset=20)
    for x in (torch.ones(2, 3), torch.tensor([[1.0, 2, 3], [4, 0, 5]])):
        (got,) = onnxruntime.InferenceSession(str(path)).run(None, {"x": x.numpy()})
        assert torch.equal(torch.from_numpy(got), Fills()(x))
