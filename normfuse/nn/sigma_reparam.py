"""σReparam: weights of a learned spectral norm, as a parametrisation of torch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from ..ops._derivatives import copy_into
from ..ops._layout import accumulation_dtype, cast
from ..ops._recompute import statistics_of_this_run
from ..ops._registry import register_forward
from ._running_norm import check_choice
from ._traced_as_one import refuse_script
from .weight_standardization import output_axis

INITS = ("one", "spectral")
PROGRAMS = ("speech", "vision")


def _iterate(matrix: Tensor, u: Tensor, v: Tensor, vision: bool) -> tuple[Tensor, Tensor]:
    if vision:
        u = F.normalize(matrix @ v, dim=0)
        return u, F.normalize(matrix.t() @ u, dim=0)
    v = F.normalize(matrix.t() @ u, dim=0)
    return F.normalize(matrix @ v, dim=0), v


def _step(matrix: Tensor, u: Tensor, v: Tensor, vision: bool) -> tuple[Tensor, Tensor]:
    """One iteration, which ``u`` and ``v`` keep; and its vectors."""
    new_u, new_v = _iterate(matrix, u, v, vision)
    copy_into(u, new_u)
    copy_into(v, new_v)
    return new_u, new_v


_, _step_recompute_safe = register_forward(
    "sigma_reparam_step",
    _step,
    lambda matrix, u, v, vision: (torch.empty_like(u), torch.empty_like(v)),
    statistics=("u", "v"),
    in_library=False,
)


class SigmaReparam(nn.Module):
    """``gain * W / σ(W)``; see :func:`sigma_reparam`.

    Attributes:
        gain: the learned spectral norm, a scalar parameter.
        u, v: buffers, the current left [out] and right [in·kernel] singular vector, in float32 or wider.
    """

    __prepare_scriptable__ = refuse_script

    def __init__(self, weight: Tensor, dim: int, init: str, iterate_in_evaluation: bool, program: str) -> None:
        super().__init__()
        self.dim = dim
        self.iterate_in_evaluation = iterate_in_evaluation
        self.program = program
        matrix = self._matrix(weight.detach())
        left, lengths, right = torch.linalg.svd(cast(matrix, accumulation_dtype(matrix.dtype)), full_matrices=False)
        self.register_buffer("u", left[:, 0].clone())
        self.register_buffer("v", right[0].clone())
        gain = lengths[0] if init == "spectral" else torch.ones_like(lengths[0])
        self.gain = nn.Parameter(gain.to(weight.dtype))

    def _matrix(self, weight: Tensor) -> Tensor:
        return (weight if self.dim == 0 else weight.movedim(self.dim, 0)).flatten(1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SigmaReparam:
        before = {name: self._buffers[name] for name in ("u", "v")}
        super()._apply(fn, recurse)
        # A conversion to bfloat16 or float16 is for parameters: the vectors keep their digits.
        for name, old in before.items():
            new = self._buffers[name]
            if new.dtype != accumulation_dtype(new.dtype):
                self._buffers[name] = old.to(new.device, accumulation_dtype(new.dtype))
        return self

    def forward(self, weight: Tensor) -> Tensor:
        with _without_autocast(weight.device.type):
            matrix, u, v = cast(self._matrix(weight), self.u.dtype), self.u, self.v
            vision = self.program == "vision"
            if self.training and torch.compiler.is_compiling():
                u, v = _step_recompute_safe(matrix.detach(), u, v, vision)
            elif self.training:
                u, v = statistics_of_this_run((u, v))
                u, v = _step(matrix.detach(), u, v, vision)
            elif self.iterate_in_evaluation:
                u, v = _iterate(matrix.detach(), u, v, vision)
            factor = cast(self.gain, matrix.dtype) / torch.dot(u, matrix @ v)
            return weight * cast(factor, weight.dtype)

    def extra_repr(self) -> str:
        return f"program={self.program!r}, iterate_in_evaluation={self.iterate_in_evaluation}"


def _without_autocast(device_type: str) -> AbstractContextManager:
    """The iteration and σ keep their digits. A context of its own would be a region in exported programs."""
    # Dynamo of torch 2.11 cannot ask which devices have autocast; it compiles for none that has not.
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device_type)
    active = known and torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if active else nullcontext()


def sigma_reparam(
    module: nn.Module,
    name: str = "weight",
    *,
    init: str | None = None,
    iterate_in_evaluation: bool = False,
    program: str = "speech",
) -> nn.Module:
    """Replace the weight W of ``module`` by ``gain * W / σ(W)`` (σReparam, Zhai et al., 2023, arXiv 2303.06296).

    ``gain`` is learned; σ(W), the largest singular value, follows W by one power iteration per training forward and has
    a gradient in W, but not in the singular vectors. Both are computed in float32 or wider, under autocast too. A
    convolution's weight counts as [out, in·kernel].

    Args:
        module: a linear layer or a convolution; changed in place.
        name: of the weight.
        init: gain at first: "one" (the paper), or "spectral", σ of the weight as it is, which leaves the function as it
            was. None: that of ``program``, "one" for speech, "spectral" for vision.
        iterate_in_evaluation: iterate once more in every evaluation forward, without keeping the result, as the
            authors' programs do. Otherwise evaluation uses the vectors of the last training step.
        program: which of the authors' two programs to follow in the iteration: "speech" starts from the left vector,
            v ← Wᵀu and then u ← Wv; "vision" from the right one, u ← Wv and then v ← Wᵀu.

    Returns:
        ``module``. An exported program holds the weight as evaluation computes it, a constant into which norms fold.

    Raises:
        ValueError: an option is unknown, or ``name`` is no such weight.

    Example:
        >>> from normfuse.nn import sigma_reparam
        >>> layer = sigma_reparam(nn.Linear(8, 8), program="vision")
    """
    check_choice("program", program, PROGRAMS)
    init = ("spectral" if program == "vision" else "one") if init is None else init
    check_choice("init", init, INITS)
    axis = output_axis(module, name)
    reparam = SigmaReparam(getattr(module, name), axis, init, iterate_in_evaluation, program)
    parametrize.register_parametrization(module, name, reparam)
    return module
