"""Transformer blocks with a choice of norm and of where the norms stand."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from normfuse.nn import PowerNorm, UnifiedNorm

NORMS = ("unified", "power", "batch", "layer")
PLACEMENTS = ("pre", "post", "peri")


class ChannelsLastBatchNorm(nn.BatchNorm1d):
    """BatchNorm over all positions of [batch, sequence, channels]; torch's own wants the channels second."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


def make_norm(kind: str, dim: int, warmup_iters: int) -> nn.Module:
    """A norm over the last axis of [batch, sequence, dim].

    Args:
        kind: one of ``NORMS``. "power" goes without the group scaling, which cannot be folded.
        dim: number of channels.
        warmup_iters: training steps in which Unified and Power Norm use the statistics of the batch alone.

    Raises:
        ValueError: ``kind`` is none of ``NORMS``.
    """
    if kind == "unified":
        return UnifiedNorm(dim, warmup_iters=warmup_iters)
    if kind == "power":
        return PowerNorm(dim, group_num=None, warmup_iters=warmup_iters)
    if kind == "batch":
        return ChannelsLastBatchNorm(dim)
    if kind == "layer":
        return nn.LayerNorm(dim)
    raise ValueError(f"norm={kind!r} is not allowed; give one of {', '.join(NORMS)}")


class Attention(nn.Module):
    """Multi-head self-attention over [batch, sequence, dim]."""

    def __init__(self, dim: int, heads: int, causal: bool, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, dim))


class Block(nn.Module):
    """Attention and MLP, each in a residual branch ``f`` of the stream ``x``.

    ==========  =========================
    placement   branch
    ==========  =========================
    ``pre``     ``x + f(norm(x))``
    ``post``    ``norm(x + f(x))``
    ``peri``    ``x + norm(f(norm(x)))``
    ==========  =========================
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        norm: str,
        placement: str,
        dropout: float,
        warmup_iters: int,
        causal: bool = False,
    ) -> None:
        super().__init__()
        if placement not in PLACEMENTS:
            raise ValueError(f"placement={placement!r} is not allowed; give one of {', '.join(PLACEMENTS)}")
        self.placement = placement
        self.attention = Attention(dim, heads, causal, dropout)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.dropout = nn.Dropout(dropout)
        norms = 4 if placement == "peri" else 2
        self.norms = nn.ModuleList(make_norm(norm, dim, warmup_iters) for _ in range(norms))

    def forward(self, x: Tensor) -> Tensor:
        for number, branch in enumerate((self.attention, self.mlp)):
            if self.placement == "pre":
                x = x + self.dropout(branch(self.norms[number](x)))
            elif self.placement == "post":
                x = self.norms[number](x + self.dropout(branch(x)))
            else:
                before, after = self.norms[2 * number : 2 * number + 2]
                x = x + after(self.dropout(branch(before(x))))
        return x


def initialise(module: nn.Module) -> None:
    """Xavier for linears; for ``model.apply``. Torch's own start is too small for trainings this short."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def final_norm(norm: str, placement: str, dim: int, warmup_iters: int) -> nn.Module:
    """The norm between the last block and the head; post-norm blocks already end with one."""
    return nn.Identity() if placement == "post" else make_norm(norm, dim, warmup_iters)
