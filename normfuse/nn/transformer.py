"""Transformer blocks with any norm in any placement, individual norms over shared weights included."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from ._running_norm import check_count
from .placement import NormedBranch, fresh_copy, layer_placements, normalise

MakeNorm = Callable[[int], nn.Module]


class SelfAttention(nn.Module):
    """Multi-head self-attention over [batch, sequence, dim]; ``pad_mask`` [batch, sequence], True = padding.

    Args:
        dim: width of input and output.
        num_heads: a divisor of it.
        causal: whether tokens see earlier ones only.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``.

    Example:
        >>> from normfuse.nn import SelfAttention
        >>> SelfAttention(64, 4)(torch.randn(2, 5, 64)).shape
        torch.Size([2, 5, 64])
    """

    def __init__(self, dim: int, num_heads: int, *, causal: bool = False) -> None:
        super().__init__()
        check_count("num_heads", num_heads, 1)
        if dim % num_heads:
            raise ValueError(f"num_heads={num_heads} is not allowed with dim={dim}; give a divisor of it")
        self.num_heads = num_heads
        self.causal = causal
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        visible = None if pad_mask is None else ~pad_mask[:, None, None, :]
        if visible is not None and self.causal:
            visible = visible & visible.new_ones(x.shape[1], x.shape[1]).tril()
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=self.causal and visible is None)
        return self.out(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Sequential):
    """The feed-forward part of a transformer: linear, GELU, linear.

    Args:
        dim: width of input and output.
        hidden: width in between.

    Shape:
        x: [..., dim]. Output: like x.

    Example:
        >>> from normfuse.nn import FeedForward
        >>> FeedForward(64, 256)(torch.randn(2, 5, 64)).shape
        torch.Size([2, 5, 64])
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


class TransformerBlock(nn.Module):
    """Self-attention and feed-forward, each a :class:`NormedBranch`.

    Args:
        dim: width.
        num_heads: of the attention, a divisor of the width.
        norm: makes a norm for a width, such as ``normfuse.nn.UnifiedNorm``.
        placement: "pre", "post" or "peri"; can be set later.
        mlp_ratio: width of the feed-forward's middle as a multiple of ``dim``.
        causal: whether tokens see earlier ones only.
        share_with: a block whose attention and feed-forward this one uses too, with norms of its own.

    Shape:
        x: [batch, sequence, dim]. pad_mask: bool [batch, sequence], True = padding. Output like x.

    Example:
        >>> from normfuse.nn import TransformerBlock, UnifiedNorm
        >>> TransformerBlock(64, 4, norm=UnifiedNorm)(torch.randn(2, 5, 64)).shape
        torch.Size([2, 5, 64])
    """

    attention: NormedBranch
    mlp: NormedBranch

    def __init__(
        self,
        dim: int,
        num_heads: int,
        norm: MakeNorm = nn.LayerNorm,
        placement: str = "pre",
        *,
        mlp_ratio: float = 4.0,
        causal: bool = False,
        share_with: TransformerBlock | None = None,
    ) -> None:
        super().__init__()
        if share_with is None:
            functions: tuple[nn.Module, nn.Module] = (
                SelfAttention(dim, num_heads, causal=causal),
                FeedForward(dim, int(mlp_ratio * dim)),
            )
        else:
            functions = share_with.attention.function, share_with.mlp.function
        self.attention = NormedBranch(functions[0], norm(dim), placement)
        self.mlp = NormedBranch(functions[1], norm(dim), placement)

    @property
    def placement(self) -> str:
        return self.attention.placement

    @placement.setter
    def placement(self, placement: str) -> None:
        self.attention.placement = self.mlp.placement = placement

    def forward(self, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        return self.mlp(self.attention(x, pad_mask, pad_mask=pad_mask), pad_mask=pad_mask)


class TransformerStack(nn.Module):
    """A stack of :class:`TransformerBlock`, with the outer norms of its placement.

    "peri" has a norm on the embeddings and a final one (Kim et al., 2025, arXiv 2502.02732), "post" the one on the
    embeddings, "pre" and "mix" the final one.

    Args:
        dim: see :class:`TransformerBlock`.
        depth: number of blocks.
        num_heads: see :class:`TransformerBlock`.
        norm: see :class:`TransformerBlock`.
        placement: "pre", "post", "peri" or "mix", see :func:`layer_placements`.
        fraction: for "mix", see :func:`layer_placements`.
        count: for "mix", see :func:`layer_placements`.
        mlp_ratio: see :class:`TransformerBlock`.
        causal: see :class:`TransformerBlock`.
        share_weights: one attention and one feed-forward for all blocks, with individual norms (WideNet). Folding
            copies a shared weight where norms need different ones, or leaves norms (``copy_shared=False``).

    Shape:
        x: [batch, sequence, dim]. pad_mask: bool [batch, sequence], True = padding. Output like x.

    Raises:
        TypeError, ValueError: an option is not allowed.

    Example:
        >>> from normfuse.nn import TransformerStack, UnifiedNorm
        >>> stack = TransformerStack(64, depth=2, num_heads=4, norm=UnifiedNorm)
        >>> stack(torch.randn(2, 5, 64)).shape
        torch.Size([2, 5, 64])
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int,
        norm: MakeNorm = nn.LayerNorm,
        placement: str = "pre",
        *,
        fraction: float = 0.25,
        count: int | None = None,
        mlp_ratio: float = 4.0,
        causal: bool = False,
        share_weights: bool = False,
    ) -> None:
        super().__init__()
        check_count("depth", depth, 1)
        self.embedding_norm: nn.Module | None = None
        self.final_norm: nn.Module | None = None
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            shared = self.blocks[0] if share_weights and self.blocks else None
            self.blocks.append(
                TransformerBlock(dim, num_heads, norm, mlp_ratio=mlp_ratio, causal=causal, share_with=shared)
            )
        self.place(placement, fraction=fraction, count=count)

    def place(self, placement: str, *, fraction: float = 0.25, count: int | None = None) -> None:
        """Set the placement of every block, and make or drop the norms around them.

        Args:
            placement: "pre", "post", "peri" or "mix".
            fraction: for "mix", see :func:`layer_placements`.
            count: for "mix", see :func:`layer_placements`.
        """
        placements = layer_placements(len(self.blocks), placement, fraction=fraction, count=count)
        for block, own in zip(self.blocks, placements, strict=True):
            block.placement = own
        for name, wanted in (("embedding_norm", ("post", "peri")), ("final_norm", ("pre", "mix", "peri"))):
            if placement not in wanted:
                setattr(self, name, None)
            elif getattr(self, name) is None:
                setattr(self, name, fresh_copy(self.blocks[0].attention.norm))

    def forward(self, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        if self.embedding_norm is not None:
            x = normalise(self.embedding_norm, x, pad_mask)
        for block in self.blocks:
            x = block(x, pad_mask)
        return x if self.final_norm is None else normalise(self.final_norm, x, pad_mask)
