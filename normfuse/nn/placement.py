"""Where norms stand around a residual branch: before it, behind the sum, or on both sides of the branch."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from ._running_norm import ChannelNorm, check_choice, check_count

PLACEMENTS = ("pre", "post", "peri")


def layer_placements(depth: int, placement: str, *, fraction: float = 0.25, count: int | None = None) -> list[str]:
    """The placement of each of ``depth`` layers.

    Args:
        depth: number of layers.
        placement: "pre", "post", "peri", or "mix": the first layers "post", the others "pre" (Mix-LN, Li et al.,
            2024, arXiv 2412.13795).
        fraction: for "mix", the share of "post" layers, rounded down: none of fewer than 4 layers by default.
        count: for "mix", their number, instead of ``fraction``.

    Returns:
        One of "pre", "post" and "peri" for each layer.

    Raises:
        TypeError, ValueError: an option is not allowed.

    Example:
        >>> from normfuse.nn import layer_placements
        >>> layer_placements(4, "mix")
        ['post', 'pre', 'pre', 'pre']
    """
    check_count("depth", depth, 0)
    check_choice("placement", placement, (*PLACEMENTS, "mix"))
    if placement != "mix":
        return [placement] * depth
    if count is None:
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction={fraction} is not allowed; give a number from 0 to 1, or a count")
        # 0.3 * 10 is a little less than 3
        count = math.floor(fraction * depth + 1e-9)
    check_count("count", count, 0)
    if count > depth:
        raise ValueError(f"count={count} is more than the {depth} layers there are")
    return ["post"] * count + ["pre"] * (depth - count)


class NormedBranch(nn.Module):
    """A residual branch with its norms: pre ``x + f(N(x))``, post ``N(x + f(x))``, peri ``x + N_out(f(N(x)))``.

    Args:
        function: the branch f, from [..., C] to [..., C]. The same module may serve several branches, which then have
            individual norms over shared weights (WideNet, Xue et al., 2021, arXiv 2107.11817).
        norm: N.
        placement: "pre", "post" or "peri". The attribute can be changed later: "peri" adds ``norm_out``, a fresh copy
            of ``norm``, and the others remove it.

    Shape:
        x: [..., C], output like x. Further arguments go to ``function``; ``pad_mask`` [...] to norms that take one.

    Example:
        >>> from normfuse.nn import NormedBranch, UnifiedNorm
        >>> branch = NormedBranch(nn.Linear(64, 64), UnifiedNorm(64), placement="pre")
        >>> branch(torch.randn(2, 5, 64)).shape
        torch.Size([2, 5, 64])
    """

    def __init__(self, function: nn.Module, norm: nn.Module, placement: str = "pre") -> None:
        super().__init__()
        self.function = function
        self.norm = norm
        self.norm_out: nn.Module | None = None
        self.placement = placement

    @property
    def placement(self) -> str:
        return self._placement

    @placement.setter
    def placement(self, placement: str) -> None:
        check_choice("placement", placement, PLACEMENTS)
        if placement != "peri":
            self.norm_out = None
        elif self.norm_out is None:
            self.norm_out = fresh_copy(self.norm)
        self._placement = placement

    def forward(self, x: Tensor, *others: object, pad_mask: Tensor | None = None) -> Tensor:
        if self.placement == "post":
            return normalise(self.norm, x + self.function(x, *others), pad_mask)
        y = self.function(normalise(self.norm, x, pad_mask), *others)
        return x + (y if self.norm_out is None else normalise(self.norm_out, y, pad_mask))

    def extra_repr(self) -> str:
        return f"placement={self.placement!r}"


def normalise(norm: nn.Module, x: Tensor, pad_mask: Tensor | None) -> Tensor:
    """``norm(x)``, with the mask where the norm takes one."""
    return norm(x, pad_mask) if pad_mask is not None and isinstance(norm, ChannelNorm) else norm(x)


@torch.no_grad()
def fresh_copy(norm: nn.Module) -> nn.Module:
    """A copy of a norm as it was before training, where the norm can say how that is."""
    twin = copy.deepcopy(norm)
    for module in twin.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return twin
