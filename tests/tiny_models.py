"""Small networks that tests save, export and serve: quick to build, with every placement of a norm."""

import torch
from torch import nn
from torch.nn import functional as F

from normfuse.nn import PowerNorm, UnifiedNorm

NORMS = {
    "unified": UnifiedNorm,
    "power": lambda width: PowerNorm(width, group_num=0),
    "power_grouped": lambda width: PowerNorm(width, group_num=1),
    "layer": nn.LayerNorm,
    "none": lambda width: nn.Identity(),
}


class Attention(nn.Module):
    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x, pad_mask=None):
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        visible = None if pad_mask is None else ~pad_mask[:, None, None, :]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, norm: str, placement: str) -> None:
        super().__init__()
        self.placement = placement
        self.attention = Attention(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        count = 4 if placement == "peri" else 2
        self.norms = nn.ModuleList(NORMS[norm](width) for _ in range(count))

    def forward(self, x, pad_mask=None):
        if self.placement == "pre":
            x = x + self.attention(self.norms[0](x), pad_mask)
            return x + self.mlp(self.norms[1](x))
        if self.placement == "post":
            x = self.norms[0](x + self.attention(x, pad_mask))
            return self.norms[1](x + self.mlp(x))
        x = x + self.norms[1](self.attention(self.norms[0](x), pad_mask))
        return x + self.norms[3](self.mlp(self.norms[2](x)))


class Encoder(nn.Module):
    """Tokens [B, N] to logits [B, N, classes]."""

    def __init__(self, width=8, depth=1, norm="unified", placement="pre", vocabulary=11, positions=16, classes=3):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.1 * torch.randn(1, positions, width))
        self.blocks = nn.ModuleList(Block(width, norm, placement) for _ in range(depth))
        self.norm = NORMS[norm](width)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens, pad_mask=None):
        x = self.embedding(tokens) + self.positions[:, : tokens.shape[1]]
        for block in self.blocks:
            x = block(x, pad_mask)
        return self.head(self.norm(x))


class Normalised(nn.Sequential):
    """The second norm undoes what the first one divides by."""

    def __init__(self) -> None:
        super().__init__(nn.RMSNorm(4), nn.Linear(4, 4, bias=False), nn.ReLU(), nn.RMSNorm(4), nn.Linear(4, 2))


class Perceptron(nn.Module):
    """Features [B, width] to [B, classes]: the quickest thing with a norm in it."""

    def __init__(self, width: int = 4, classes: int = 3, norm: str = "unified") -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.norm = NORMS[norm](width)
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.norm(self.inner(x)))


class ConvNet(nn.Module):
    """Images [B, 3, H, W] to [B, classes], with BatchNorm."""

    def __init__(self, width: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, classes)

    def forward(self, image):
        return self.head(torch.relu(self.norm(self.conv(image))).mean((2, 3)))


def trained(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model as training might leave it.

    Weights, gains, shifts and statistics are not their start values.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if name.endswith(("running_var", "running_phi")) or ("norm" in name and name.endswith("weight")):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
        elif tensor.is_floating_point():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return model.eval()


def not_a_module(**kwargs):
    return {"built with": kwargs}


class MaskedAttention(nn.Module):
    """Heads of four channels; `see` makes what attention takes of the mask that is given."""

    def __init__(self, see=lambda mask: mask):
        super().__init__()
        self.see, self.qkv, self.out = see, nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x, mask):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.see(mask))
        return self.out(y.transpose(1, 2).flatten(2))
