"""σReparam: weights of a learned spectral norm, as a parametrisation of torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from ..ops._recompute import statistics_of_this_run
from ._running_norm import check_choice
from .weight_standardization import output_axis

INITS = ("one", "spectral")


class SigmaReparam(nn.Module):
    """``gain * W / σ(W)``; see :func:`sigma_reparam`.

    Attributes:
        gain: the learned spectral norm, a scalar parameter.
        u, v: buffers, the current left [out] and right [in·kernel] singular vector.
    """

    def __init__(self, weight: Tensor, dim: int, init: str, iterate_in_evaluation: bool) -> None:
        super().__init__()
        self.dim = dim
        self.iterate_in_evaluation = iterate_in_evaluation
        matrix = self._matrix(weight.detach())
        left, lengths, right = torch.linalg.svd(
            matrix.float() if matrix.dtype.itemsize < 4 else matrix, full_matrices=False
        )
        self.register_buffer("u", left[:, 0].to(weight.dtype).clone())
        self.register_buffer("v", right[0].to(weight.dtype).clone())
        gain = lengths[0] if init == "spectral" else torch.ones_like(lengths[0])
        self.gain = nn.Parameter(gain.to(weight.dtype))

    def _matrix(self, weight: Tensor) -> Tensor:
        return (weight if self.dim == 0 else weight.movedim(self.dim, 0)).flatten(1)

    def forward(self, weight: Tensor) -> Tensor:
        matrix, u, v = self._matrix(weight), self.u, self.v
        if self.training or self.iterate_in_evaluation:
            if self.training and not torch.compiler.is_compiling():
                u, v = statistics_of_this_run((u, v))
            fixed = matrix.detach()
            new_v = F.normalize(fixed.t() @ u, dim=0)
            new_u = F.normalize(fixed @ new_v, dim=0)
            if self.training:
                u.copy_(new_u)
                v.copy_(new_v)
            u, v = new_u, new_v
        return weight * (self.gain / torch.dot(u, matrix @ v))

    def extra_repr(self) -> str:
        return f"iterate_in_evaluation={self.iterate_in_evaluation}"


def sigma_reparam(
    module: nn.Module, name: str = "weight", *, init: str = "one", iterate_in_evaluation: bool = False
) -> nn.Module:
    """Let ``module`` compute with ``gain * W / σ(W)`` (Zhai et al., 2023, arXiv 2303.06296).

    ``gain`` is learned; σ(W), the largest singular value, follows W by one power iteration per training forward and has
    a gradient in W, but not in the singular vectors. A convolution's weight counts as [out, in·kernel].

    Args:
        module: a linear layer or a convolution; changed in place.
        name: of the weight.
        init: gain at first: "one" (speech, and the paper), or "spectral", σ of the weight as it is, which leaves the
            function as it was (vision).
        iterate_in_evaluation: iterate once more in every evaluation forward, without keeping the result, as the
            authors' program does. Otherwise evaluation uses the vectors of the last training step.

    Returns:
        ``module``. An exported program holds the weight as evaluation computes it, a constant into which norms fold.

    Raises:
        ValueError: an option is unknown, or ``name`` is no such weight.
    """
    check_choice("init", init, INITS)
    axis = output_axis(module, name)
    reparam = SigmaReparam(getattr(module, name), axis, init, iterate_in_evaluation)
    parametrize.register_parametrization(module, name, reparam)
    return module
