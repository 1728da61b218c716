"""Power Normalization as a module."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..ops import PowerNormState, power_norm
from ..ops.power_norm import check_options, group_scaling
from ._running_norm import RunningNorm, RunningOptions, check_count, check_fraction, check_positive

if TYPE_CHECKING:
    from typing_extensions import Unpack


class PowerNorm(RunningNorm):
    """Power Normalization (Shen et al., 2020, arXiv 2003.07845) with a running per-channel quadratic mean.

    In evaluation it is the group scaling (an RMS normalisation of each position, ``group_num``) followed by
    ``y = weight * x / sqrt(running_phi + eps) + bias``. The latter folds into neighbouring weights, the group
    scaling does not: with ``group_num=None`` nothing is left after folding.

    Args:
        num_features: number of channels C.
        group_num: number of channel groups of the group scaling, a divisor of C; None or 0 switches it off.
        alpha_fwd: share of the old value in each update of ``running_phi``.
        alpha_bkw: one minus the weight of ``ema_gz`` in the gradient.
        warmup_iters: training steps that normalise by the statistic of the batch.
        backward: "reference" divides the gradient by the statistic of the batch, as the authors' program
            does; "paper" by the statistic that the forward pass used, as their paper says.
        group_eps: added to the mean square of the group scaling. The authors' program keeps 1e-5 there whatever ``eps``
            is.
        **options: ``eps``, ``affine``, ``channel_dim``, ``ghost_size``, ``skip_nonfinite``, ``device`` and ``dtype`` of
            :class:`UnifiedNorm`. ``eps`` is added to ``running_phi`` and to the batch's quadratic mean.

    Shape:
        ``x``, ``pad_mask``, ``residual`` and the output are those of :class:`UnifiedNorm`.

    Raises:
        TypeError, ValueError: an option has a type or value that is not allowed.

    Example:
        >>> from normfuse.nn import PowerNorm
        >>> PowerNorm(64, group_num=None)(torch.randn(2, 5, 64)).shape  # nothing is left of it after folding
        torch.Size([2, 5, 64])
    """

    def __init__(
        self,
        num_features: int,
        *,
        group_num: int | None = 1,
        alpha_fwd: float = 0.9,
        alpha_bkw: float = 0.9,
        warmup_iters: int = 10000,
        backward: str = "reference",
        group_eps: float = 1e-5,
        **options: Unpack[RunningOptions],
    ) -> None:
        super().__init__(num_features, **options)
        if group_num is not None:
            check_count("group_num", group_num, 0)
        check_options(num_features, group_num, backward)
        check_fraction("alpha_fwd", alpha_fwd)
        check_fraction("alpha_bkw", alpha_bkw)
        check_count("warmup_iters", warmup_iters, 0)
        check_positive("group_eps", group_eps)
        self.group_num = group_num
        self.group_eps = group_eps
        self.alpha_fwd = alpha_fwd
        self.alpha_bkw = alpha_bkw
        self.warmup_iters = warmup_iters
        self.backward_form = backward
        self._register_statistics(
            {"running_phi": ((num_features,), 1.0), "ema_gz": ((num_features,), 0.0)},
            {"iters": (1,)},
            **options,
        )

    def _normalise(self, x: Tensor, pad_mask: Tensor | None, residual: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
        return power_norm(
            x,
            self.weight,
            self.bias,
            self._state(PowerNormState),
            training=self.training,
            pad_mask=pad_mask,
            group_num=self.group_num,
            alpha_fwd=self.alpha_fwd,
            alpha_bkw=self.alpha_bkw,
            warmup_iters=self.warmup_iters,
            eps=self.eps,
            backward=self.backward_form,
            channel_dim=self.channel_dim,
            process_group=self.group_to_share_with() if self.training else None,
            residual=residual,
            group_eps=self.group_eps,
        )

    def rows_to_measure(self, x: Tensor) -> Tensor:
        return group_scaling(super().rows_to_measure(x), self.group_num or 0, self.group_eps)[0]

    def extra_repr(self) -> str:
        names = ("group_num", "group_eps", "alpha_fwd", "alpha_bkw", "warmup_iters")
        return self._describe(*names, backward=self.backward_form)
