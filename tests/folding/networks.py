"""Networks that the folding tests rewrite, with norms whose statistics look trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normfuse.nn


class ChannelNorm(nn.Module):
    """BatchNorm over the last axis of [batch, sequence, channels]."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(num_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


NORMS = {
    "unified": normfuse.nn.UnifiedNorm,
    "power": lambda c: normfuse.nn.PowerNorm(c, group_num=None),
    "power-grouped": lambda c: normfuse.nn.PowerNorm(c, group_num=1),
    "batch": ChannelNorm,
    "layer": nn.LayerNorm,
    "rms": nn.RMSNorm,
}
PLACEMENTS = ("pre", "post", "peri", "mix")


class Block(nn.Module):
    """Attention and feed-forward with pre-, post- or peri-norm."""

    def __init__(self, width: int, heads: int, norm, placement: str, causal: bool) -> None:
        super().__init__()
        self.heads, self.placement, self.causal = heads, placement, causal
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm1, self.norm2 = norm(width), norm(width)
        if placement == "peri":
            self.norm1_out, self.norm2_out = norm(width), norm(width)
        self.drop = nn.Dropout(0.1)

    def attention(self, x: Tensor) -> Tensor:
        b, s, c = x.shape
        q, k, v = self.qkv(x).reshape(b, s, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.drop(self.out(y.transpose(1, 2).reshape(b, s, c)))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.drop(self.down(F.gelu(self.up(x))))

    def forward(self, x: Tensor) -> Tensor:
        if self.placement == "post":
            x = self.norm1(x + self.attention(x))
            return self.norm2(x + self.feed_forward(x))
        if self.placement == "peri":
            x = x + self.norm1_out(self.attention(self.norm1(x)))
            return x + self.norm2_out(self.feed_forward(self.norm2(x)))
        x = x + self.attention(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))


class Transformer(nn.Module):
    """Token (or patch) encoder or decoder; ``mix`` starts with post-norm blocks and goes on with pre-norm."""

    def __init__(
        self,
        norm: str,
        placement: str,
        *,
        depth: int = 3,
        width: int = 16,
        heads: int = 2,
        vocabulary: int | None = 11,
        causal: bool = False,
        classes: int | None = None,
        final_norm: bool | None = None,
    ) -> None:
        super().__init__()
        make = NORMS[norm]
        self.embed = nn.Embedding(vocabulary, width) if vocabulary else nn.Linear(6, width)
        self.position = nn.Parameter(torch.randn(1, 32, width) * 0.5)
        self.cls = nn.Parameter(torch.randn(1, 1, width)) if classes else None
        per_block = [
            ("post" if i < depth // 2 + 1 else "pre") if placement == "mix" else placement for i in range(depth)
        ]
        self.blocks = nn.ModuleList(Block(width, heads, make, p, causal) for p in per_block)
        self.embed_norm = make(width) if placement in ("post", "peri") else nn.Identity()
        final_norm = placement != "post" if final_norm is None else final_norm
        self.norm = make(width) if final_norm else nn.Identity()
        self.head = nn.Linear(width, classes) if classes else nn.Linear(width, vocabulary or 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.position[:, : x.shape[1]]
        if self.cls is not None:
            x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.embed_norm(x)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x[:, 0] if self.cls is not None else x)


class ConvNet(nn.Module):
    """A plain residual CNN with BatchNorm (or another channel norm) and every kind of padding."""

    def __init__(self, norm=nn.BatchNorm2d) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), norm(8)
        self.conv1, self.norm1 = nn.Conv2d(8, 8, 3, padding=1, groups=2), norm(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 1), norm(8)
        self.depthwise, self.norm3 = nn.Conv2d(8, 8, 3, padding=1, groups=8), norm(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm0(self.stem(x))), 2)
        x = F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))
        x = F.relu(self.norm3(self.depthwise(x)))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def look_trained(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random gains, a fifth of them negative, random shifts and statistics near those of the activations."""
    generator = torch.Generator().manual_seed(seed)

    def rand(like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=generator, dtype=torch.float64).to(like)

    for module in model.modules():
        if "Norm" not in type(module).__name__ or getattr(module, "weight", None) is None:
            continue
        with torch.no_grad():
            sign = torch.where(rand(module.weight) < 0.2, -1.0, 1.0)
            module.weight.copy_(sign * torch.exp((rand(module.weight) - 0.5) * 2.0))
            if getattr(module, "bias", None) is not None:
                module.bias.copy_(rand(module.bias) - 0.5)
            for name in ("running_var", "running_phi"):
                if hasattr(module, name):
                    getattr(module, name).copy_(torch.exp((rand(getattr(module, name)) - 0.5) * 2.0))
            if hasattr(module, "running_mean"):
                module.running_mean.copy_(rand(module.running_mean) - 0.5)
    return model.eval()
