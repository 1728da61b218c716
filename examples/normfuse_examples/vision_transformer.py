"""A small vision transformer for small grey pictures."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .blocks import Block, final_norm, initialise


class VisionTransformer(nn.Module):
    """Classifies grey pictures.

    Args:
        image_size, patch_size: edge of the square pictures and of the square patches, in pixels.
        classes: number of classes.
        dim, depth, heads: width, number of blocks, attention heads.
        norm, placement: which norm, and where it stands (``blocks.NORMS``, ``blocks.PLACEMENTS``).
        dropout: of the embedding, the attention weights and the branches.
        warmup_iters: steps before Unified and Power Norm use statistics of more than one batch.

    Shape:
        images: [batch, 1, image_size, image_size], float. Output: logits, [batch, classes].
    """

    def __init__(
        self,
        image_size: int = 8,
        patch_size: int = 2,
        classes: int = 10,
        dim: int = 64,
        depth: int = 4,
        heads: int = 4,
        norm: str = "unified",
        placement: str = "pre",
        dropout: float = 0.05,
        warmup_iters: int = 100,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, dim, patch_size, stride=patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(torch.empty(1, 1 + (image_size // patch_size) ** 2, dim))
        nn.init.trunc_normal_(self.class_token, std=0.5)
        nn.init.trunc_normal_(self.positions, std=0.5)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(dim, heads, norm=norm, placement=placement, dropout=dropout, warmup_iters=warmup_iters)
            for _ in range(depth)
        )
        self.norm = final_norm(norm, placement, dim, warmup_iters)
        self.head = nn.Linear(dim, classes)
        self.apply(initialise)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.class_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = self.dropout(x + self.positions)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])
