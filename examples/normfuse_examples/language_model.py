"""A small causal language model over bytes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .blocks import Block, final_norm, initialise


class LanguageModel(nn.Module):
    """Predicts the next byte of a text.

    Args:
        context: longest sequence.
        dim, depth, heads: width, number of blocks, attention heads.
        norm, placement: which norm, and where it stands (``blocks.NORMS``, ``blocks.PLACEMENTS``).
        dropout: of the embedding, the attention weights and the branches.
        warmup_iters: steps before Unified and Power Norm use statistics of more than one batch.

    Shape:
        tokens: [batch, sequence], int64 in [0, 256), sequence <= context. Output: logits,
        [batch, sequence, 256].
    """

    def __init__(
        self,
        context: int = 128,
        dim: int = 128,
        depth: int = 4,
        heads: int = 4,
        norm: str = "unified",
        placement: str = "post",
        dropout: float = 0.0,
        warmup_iters: int = 100,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(256, dim)
        self.positions = nn.Parameter(torch.empty(1, context, dim))
        nn.init.normal_(self.tokens.weight, std=0.5)
        nn.init.normal_(self.positions, std=0.5)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(dim, heads, norm=norm, placement=placement, dropout=dropout, warmup_iters=warmup_iters, causal=True)
            for _ in range(depth)
        )
        self.norm = final_norm(norm, placement, dim, warmup_iters)
        self.head = nn.Linear(dim, 256)
        self.apply(initialise)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.dropout(self.tokens(tokens) + self.positions[:, : tokens.shape[1]])
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
