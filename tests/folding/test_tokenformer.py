"""TokenFormer (Wang et al., 2024, arXiv 2410.23168): attention over learned tokens goes through export as it is."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normfuse.folding import fold
from normfuse.nn import UnifiedNorm
from normfuse.onnx import export

from .checks import folded, operations
from .networks import look_trained


class TokenAttention(nn.Module):
    """``gelu(sqrt(n) * s / ‖s‖) V``, ``s = x Kᵀ``, over n learned keys K and values V: in place of a linear layer."""

    def __init__(self, inputs: int, outputs: int, tokens: int) -> None:
        super().__init__()
        self.keys, self.values = (nn.Parameter(torch.randn(tokens, size)) for size in (inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        scores = x @ self.keys.t()
        scores = scores / torch.linalg.vector_norm(scores, dim=-1, keepdim=True) * self.keys.shape[0] ** 0.5
        return F.gelu(scores) @ self.values


class TokenFormer(nn.Module):
    """Pre-norm blocks in which every projection is an attention over learned tokens."""

    def __init__(self, norm, depth: int = 2, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.norms = nn.ModuleList(norm(width) for _ in range(2 * depth + 1))
        self.qkv = nn.ModuleList(TokenAttention(width, 3 * width, 6) for _ in range(depth))
        self.out = nn.ModuleList(TokenAttention(width, width, 6) for _ in range(depth))
        self.mlp = nn.ModuleList(TokenAttention(width, width, 12) for _ in range(depth))
        self.head = nn.Linear(width, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for i, (qkv, out, mlp) in enumerate(zip(self.qkv, self.out, self.mlp, strict=True)):
            q, k, v = qkv(self.norms[2 * i](x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            x = x + out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
            x = x + mlp(self.norms[2 * i + 1](x))
        return self.head(self.norms[-1](x))


def plain_norm(width: int) -> nn.Module:
    return nn.LayerNorm(width, elementwise_affine=False)


def test_its_attention_is_left_untouched() -> None:
    model = TokenFormer(plain_norm).eval()
    tokens = torch.randint(11, (2, 5))
    program = torch.export.export(model, (tokens,))
    result, _ = fold(program, keep_dynamic_norms=True)
    assert [op for op in operations(result) if "aten.t." not in op] == [
        op for op in operations(program) if "aten.t." not in op
    ]
    assert torch.equal(result.module()(tokens), model(tokens))
    for name, value in result.state_dict.items():
        assert torch.equal(value, program.state_dict[name])


def test_static_norms_go_into_the_keys() -> None:
    model = look_trained(TokenFormer(UnifiedNorm))
    program, report = folded(model, (torch.randint(11, (2, 5)),))
    assert not report.remaining and len(report.norms) == 5
    assert report.norms[0].absorbed_by[0] == "qkv.0.keys"
    kinds = [op.removeprefix("aten.").partition(".")[0] for op in operations(program)]
    assert kinds.count("linalg_vector_norm") == kinds.count("gelu") == 6 and "addcmul" not in kinds


def test_it_is_exported_and_verified(tmp_path) -> None:
    model = TokenFormer(plain_norm, depth=1).eval()
    batch = torch.export.Dim("batch")
    example = (torch.randint(11, (3, 5)),)
    result = export(model, tmp_path / "m.onnx", example_inputs=example, dynamic_shapes={"tokens": {0: batch}})
    assert result.verification.worst("ONNX file") < 1e-4
    assert len(result.graph.norms) == 3
