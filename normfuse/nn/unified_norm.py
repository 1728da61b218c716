"""Unified Normalization as a module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..ops import UnifiedNormState, unified_norm
from ._running_norm import RunningNorm, RunningOptions, check_count, check_fraction

if TYPE_CHECKING:
    from typing_extensions import Unpack


class UnifiedNorm(RunningNorm):
    """Unified Normalization (Yang et al., 2022, arXiv 2208.01313) with statistics over a window of steps.

    In evaluation it is ``y = weight * x / sqrt(running_var + eps) + bias``, which folds into nearby weights.

    Args:
        num_features: number of channels C.
        window_size: number of steps in the forward and the backward window, or a pair of both numbers; 1 switches the
            windows off.
        warmup_iters: training steps that use the statistic of the batch alone.
        outlier_filtration: skip the window in steps whose window holds an outlier (the authors: off for
            language, on for vision).
        momentum: share of the old value in each update of the running statistics.
        **options: the options below, by name.
        eps: added to the quadratic mean, inside the square root (default 1e-5).
        affine: whether to learn ``weight`` and ``bias``, both [C] (default True).
        channel_dim: dimension of the channels in the input: -1 (default) for [..., C], 1 for [N, C, L] and [N, C, H,
            W].
        ghost_size: samples (along the first dimension) per ghost batch: in training each is a separate step with its
            own statistics; a remainder joins the last one. ``warmup_iters`` then counts ghost batches. None (default):
            one batch.
        skip_nonfinite: whether to undo a training pass completely if its batch or gradient is not finite, and count it
            in the buffers ``skipped_forwards`` and ``skipped_backwards`` (not in ``state_dict``). With False (default)
            such a pass updates the channels that are finite. Statistics stay finite in both cases.
        device: of parameters and buffers; None (default): PyTorch's default.
        dtype: of the parameters; None (default): PyTorch's default. Statistics are float32, or float64 for dtype
            float64.

    Shape:
        x: any, with C channels along ``channel_dim``; float32, bfloat16 or float16
            (float64 in a float64 module).
        pad_mask: the shape of x without its channel dimension, bool, True = padding.
        residual: like x. ``y, s = norm(x, residual=r)`` computes s = x + r and normalises s in the same pass; s is
            returned for the next skip connection.
        Output: like x; two of them with ``residual``.

    Raises:
        TypeError, ValueError: an option has a type or value that is not allowed.

    Example:
        >>> from normfuse.nn import UnifiedNorm
        >>> norm = UnifiedNorm(64, warmup_iters=100)
        >>> y = norm(torch.randn(2, 5, 64))  # a training step: statistics move
        >>> y.shape, int(norm.iters)
        (torch.Size([2, 5, 64]), 1)
    """

    def __init__(
        self,
        num_features: int,
        *,
        window_size: int | tuple[int, int] = 4,
        warmup_iters: int = 4000,
        outlier_filtration: bool = False,
        momentum: float = 0.9,
        **options: Unpack[RunningOptions],
    ) -> None:
        super().__init__(num_features, **options)
        pair = isinstance(window_size, (tuple, list))
        windows: tuple[Any, ...] = tuple(window_size) if pair else (window_size, window_size)  # type: ignore[arg-type]
        if len(windows) != 2:
            raise ValueError(
                f"window_size={window_size!r} has {len(windows)} entries; give an int or a pair (forward, backward)"
            )
        for window in windows:
            check_count("window_size", window, 1)
        check_count("warmup_iters", warmup_iters, 0)
        check_fraction("momentum", momentum)
        self.window_size = windows
        self.warmup_iters = warmup_iters
        self.outlier_filtration = outlier_filtration
        self.momentum = momentum
        self._register_statistics(
            {
                "running_var": ((num_features,), 1.0),
                "ema_gz": ((num_features,), 0.0),
                "buffer_x2": ((windows[0], num_features), 0.0),
                "buffer_gz": ((windows[1], num_features), 0.0),
            },
            {"iters": (1,), "skip_counter": (1,)},
            **options,
        )

    def _normalise(self, x: Tensor, pad_mask: Tensor | None, residual: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
        return unified_norm(
            x,
            self.weight,
            self.bias,
            self._state(UnifiedNormState),
            training=self.training,
            pad_mask=pad_mask,
            warmup_iters=self.warmup_iters,
            outlier_filtration=self.outlier_filtration,
            eps=self.eps,
            momentum=self.momentum,
            channel_dim=self.channel_dim,
            process_group=self.group_to_share_with() if self.training else None,
            residual=residual,
        )

    def extra_repr(self) -> str:
        return self._describe("window_size", "warmup_iters", "outlier_filtration", "momentum")
