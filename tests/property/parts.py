"""Layers as people write them: norms, attention, feed-forward parts, blocks of convolutional networks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normfuse.nn import RepBatchNorm, UnifiedNorm


class Draw(random.Random):
    """Random choices, each with a name that a finding is told with."""

    def __init__(self, seed: object) -> None:
        super().__init__(str(seed))
        self.made: list[str] = []

    def pick(self, name: str, options: Sequence[Any]) -> Any:
        chosen = self.choice(options)
        self.made.append(f"{name}={chosen}")
        return chosen

    def chance(self, name: str, probability: float = 0.5) -> bool:
        happens = self.random() < probability
        self.made += [name] if happens else []
        return happens


class ChannelNorm(nn.Module):
    """BatchNorm over the last axis of [batch, tokens, channels]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


class Gain(nn.Module):
    """LayerScale, or an affine map in one of its spellings."""

    def __init__(self, width: int, spelling: str) -> None:
        super().__init__()
        self.weight, self.bias, self.spelling = (
            nn.Parameter(torch.ones(width)),
            nn.Parameter(torch.zeros(width)),
            spelling,
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.spelling == "scale":
            return x * self.weight
        if self.spelling == "addcmul":
            return torch.addcmul(self.bias, x, self.weight)
        if self.spelling == "rsub":
            return self.bias - x * self.weight
        return torch.lerp(x, self.bias, 0.3)


class SpelledRMSNorm(nn.Module):
    """RMSNorm in arithmetic, computed in another dtype as in Llama."""

    def __init__(self, width: int, wide: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight, self.wide = nn.Parameter(torch.ones(width)), wide

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(self.wide or x.dtype)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        return self.weight * wide.to(x.dtype)


TOKEN_NORMS = {
    "unified": UnifiedNorm,
    "batch": ChannelNorm,
    "repbn": RepBatchNorm,
    "layer": nn.LayerNorm,
    "rms": nn.RMSNorm,
    "spelled rms": SpelledRMSNorm,
    "spelled rms, wide": lambda width: SpelledRMSNorm(width, torch.float64),
    "affine": lambda width: Gain(width, "addcmul"),
}
IMAGE_NORMS = {
    "batch": nn.BatchNorm2d,
    "instance": lambda width: nn.InstanceNorm2d(width, affine=True, track_running_stats=True),
    "group": lambda width: nn.GroupNorm(2, width),
    "unified": lambda width: UnifiedNorm(width, channel_dim=1),
}


class Attention(nn.Module):
    """Attention with one of many ways to make queries, keys and values, and to mix values."""

    def __init__(self, width: int, heads: int, draw: Draw, *, cross: bool = False) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.kind = draw.pick("attention", ("module", "fused", "grouped", "einsum", "product"))
        self.groups = draw.pick("key heads", (1, heads)) if self.kind == "grouped" else heads
        self.repeats = draw.pick("repeats", ("interleave", "expand", "flag"))
        self.causal = draw.chance("causal") and not cross
        self.rotary = draw.chance("rotary", 0.3)
        self.cross = cross
        if self.kind == "module":
            self.attention = nn.MultiheadAttention(width, heads, batch_first=True, bias=draw.chance("bias", 0.8))
            return
        bias = draw.chance("bias", 0.7)
        if self.kind == "fused" and not cross:
            self.qkv = nn.Linear(width, 3 * width, bias=bias)
        else:
            self.q = nn.Linear(width, width, bias=bias)
            self.k, self.v = (nn.Linear(width, self.groups * self.size, bias=bias) for _ in range(2))
        norm = TOKEN_NORMS[draw.pick("qk norm", ("layer", "rms", "unified"))] if draw.chance("qk norm", 0.3) else None
        self.q_norm, self.k_norm = (norm(self.size) if norm else nn.Identity() for _ in range(2))
        self.v_norm = norm(self.size) if norm and draw.chance("v norm", 0.5) else nn.Identity()
        self.out = nn.Linear(width, width, bias=draw.chance("out bias", 0.7))

    def forward(self, x: Tensor, memory: Tensor | None = None, past: tuple[Tensor, Tensor] | None = None) -> Any:
        memory = x if memory is None else memory
        if self.kind == "module":
            mask = torch.ones(x.shape[1], memory.shape[1], dtype=torch.bool).triu(1) if self.causal else None
            return self.attention(x, memory, memory, attn_mask=mask, need_weights=False)[0]
        q, k, v = self._project(x, memory)
        if past is not None:
            k, v = (torch.cat([before, now], 2) for before, now in zip(past, (k, v), strict=True))
        y = self._mix(self.q_norm(q), self.k_norm(k), self.v_norm(v))
        y = self.out(y.transpose(1, 2).reshape(*x.shape[:2], -1))
        return y if past is None else (y, k, v)

    def _project(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        together = hasattr(self, "qkv")
        parts = self.qkv(x).chunk(3, -1) if together else (self.q(x), self.k(memory), self.v(memory))
        q, k, v = (part.unflatten(-1, (-1, self.size)).transpose(1, 2) for part in parts)
        return (_rotate(q), _rotate(k), v) if self.rotary else (q, k, v)

    def _mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        copies = self.heads // k.shape[1]
        flag = copies > 1 and self.repeats == "flag" and self.kind == "grouped"
        if copies > 1 and not flag:
            if self.repeats == "interleave":
                k, v = (part.repeat_interleave(copies, 1) for part in (k, v))
            else:
                k, v = (part[:, :, None].expand(-1, -1, copies, -1, -1).flatten(1, 2) for part in (k, v))
        if self.kind in ("fused", "grouped"):
            return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=flag)
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) if self.kind == "einsum" else q @ k.mT
        scores = scores / self.size**0.5
        if self.causal:
            seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
            scores = scores.masked_fill(~seen, float("-inf"))
        weights = scores.softmax(-1)
        return torch.einsum("bhqk,bhkd->bhqd", weights, v) if self.kind == "einsum" else weights @ v


def _rotate(x: Tensor) -> Tensor:
    angles = torch.arange(x.shape[-2], device=x.device).to(x.dtype)[:, None] * 0.3
    first, second = x.chunk(2, -1)
    return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()


class FeedForward(nn.Module):
    """Two linear layers with an activation, a gate, or experts between."""

    def __init__(self, width: int, draw: Draw) -> None:
        super().__init__()
        self.kind = draw.pick(
            "feed-forward",
            (
                "gelu",
                "relu",
                "relu2",
                "relu6",
                "clamp",
                "silu gate",
                "relu gate",
                "glu",
                "experts",
                "inner norm",
                "linear",
            ),
        )
        bias, inner = draw.chance("bias", 0.7), 2 * width
        self.up, self.down = nn.Linear(width, inner, bias=bias), nn.Linear(inner, width, bias=bias)
        if self.kind in ("silu gate", "relu gate"):
            self.gate = nn.Linear(width, inner, bias=bias)
        if self.kind == "glu":
            self.up = nn.Linear(width, 2 * inner, bias=bias)
        if self.kind == "inner norm":
            self.norm = TOKEN_NORMS[draw.pick("inner norm", list(TOKEN_NORMS))](inner)
        if self.kind == "experts":
            self.router = nn.Linear(width, 3)
            self.first, self.second = (
                nn.Parameter(torch.randn(3, width, inner)),
                nn.Parameter(torch.randn(3, inner, width)),
            )
            self.hard = draw.chance("one expert", 0.5)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "experts":
            return self._experts(x)
        y = self.up(x)
        if self.kind in ("silu gate", "relu gate"):
            y = y * (F.silu if self.kind == "silu gate" else F.relu)(self.gate(x))
        elif self.kind == "glu":
            y = F.glu(y, -1)
        elif self.kind == "inner norm":
            y = self.norm(F.relu(y))
        elif self.kind == "clamp":
            y = y.clamp(min=0)
        elif self.kind == "relu2":
            y = F.relu(y).square()
        elif self.kind != "linear":
            y = getattr(F, self.kind)(y)
        return self.drop(self.down(y))

    def _experts(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        if self.hard:
            weights = weights * (weights == weights.amax(-1, keepdim=True)).to(weights.dtype)
        y = F.relu(torch.einsum("bsi,eio->beso", x, self.first))
        return torch.einsum("besi,eio,bse->bso", y, self.second, weights)


class TokenMixer(nn.Module):
    """Mixing over tokens as in MLP-Mixer: weights along the token axis, or pooling."""

    def __init__(self, tokens: int, draw: Draw) -> None:
        super().__init__()
        self.kind = draw.pick("mixer", ("linear", "matrix", "pool"))
        self.first, self.second = nn.Linear(tokens, 2 * tokens), nn.Linear(2 * tokens, tokens)
        self.matrix = nn.Parameter(torch.randn(tokens, tokens))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "linear":
            return self.second(F.gelu(self.first(x.mT))).mT
        if self.kind == "matrix":
            return self.matrix @ x
        return F.avg_pool1d(x.mT, 3, 1, 1, count_include_pad=False).mT - x


class ConvBlock(nn.Module):
    """A block of a convolutional family, residual where sizes allow it."""

    def __init__(self, width: int, norm: Any, draw: Draw) -> None:
        super().__init__()
        self.kind = draw.pick(
            "block", ("basic", "pre-activation", "inverted", "dense", "shuffle", "convnext", "branches")
        )
        self.act = draw.pick("activation", ("relu", "relu_", "relu6", "hardswish", "leaky_relu", "prelu"))
        bias = draw.chance("conv bias", 0.3)
        inner = 2 * width if self.kind == "inverted" else width
        kernel = 1 if self.kind == "inverted" else 3
        self.first, self.norm1 = nn.Conv2d(width, inner, kernel, padding=kernel // 2, bias=bias), norm(inner)
        depthwise = self.kind in ("inverted", "convnext", "shuffle")
        self.mid = nn.Conv2d(inner, inner, 3, padding=1, groups=inner if depthwise else 1, bias=bias)
        self.norm2 = norm(inner)
        self.last, self.norm3 = nn.Conv2d(inner, width, 1, bias=bias), norm(width)
        self.slope = nn.PReLU(inner)
        self.squeeze = draw.chance("squeeze and excitation", 0.3)
        self.narrow, self.widen = nn.Conv2d(inner, 2, 1), nn.Conv2d(2, inner, 1)
        self.layer = nn.LayerNorm(width)
        self.up, self.down, self.gamma = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), Gain(width, "scale")
        self.join = nn.Conv2d(3 * width, width, 1)

    def _activate(self, x: Tensor) -> Tensor:
        if self.act == "relu_":
            return F.relu(x, inplace=True)
        return (
            self.slope(x)
            if self.act == "prelu" and x.shape[1] == self.slope.num_parameters
            else getattr(F, self.act if self.act != "prelu" else "relu")(x)
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "convnext":
            y = self.layer(self.mid(x).permute(0, 2, 3, 1))
            return x + self.gamma(self.down(F.gelu(self.up(y)))).permute(0, 3, 1, 2)
        if self.kind == "pre-activation":
            return x + self.last(self._activate(self.norm2(self.mid(self._activate(self.norm1(x))))))
        if self.kind == "branches":
            pooled = F.max_pool2d(x, 3, 1, 1), F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
            return self.norm3(self.join(torch.cat([self.first(x), *pooled], 1)))
        y = self._activate(self.norm1(self.first(x)))
        y = self._activate(self.norm2(self.mid(y)))
        if self.squeeze:
            y = y * torch.sigmoid(self.widen(F.relu(self.narrow(y.mean((2, 3), keepdim=True)))))
        if self.kind == "dense":
            return self.join(torch.cat([x, y, self.norm3(self.last(y))], 1))
        if self.kind == "shuffle":
            left, right = x.chunk(2, 1)
            return F.channel_shuffle(torch.cat([left, self.norm3(self.last(y))[:, : right.shape[1]]], 1), 2)
        y = self.norm3(self.last(y))
        return F.relu(x + y) if self.kind == "basic" else x + y
