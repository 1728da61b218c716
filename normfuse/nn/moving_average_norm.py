"""Moving Average Batch Normalization as a module."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..ops import MovingAverageNormState, moving_average_norm
from ._running_norm import ChannelNorm, ChannelOptions, check_count, check_fraction
from ._traced_as_one import Proxy, traced_as_one

if TYPE_CHECKING:
    from typing_extensions import Unpack


class MovingAverageBatchNorm(ChannelNorm):
    """MABN (Yan et al., 2020, arXiv 2001.06838): moving average batch normalisation for small batches.

    It subtracts no mean; centre the weights in front of it instead (:func:`center_weight`). In evaluation it is
    ``y = weight * x / sqrt(running_var + eps) + bias``, which folds into nearby weights. In training the result is
    multiplied by the ratio of the window's to the running statistic (as in batch renormalisation), so that training and
    evaluation agree. The ratio is clamped to [1/5, 5], and is 1 in the first 1000 steps.

    Of the authors' programs this is the one that they publish as the norm's definition (``MABN.py``) and use for
    detection. Their program for ImageNet differs: its ratio is 1 for 99 steps only, ``running_var`` starts from the
    first step's statistic instead of 1, and its window slides over parts of two samples inside a batch.

    Args:
        num_features: number of channels C.
        window_size: number of steps that the forward and the backward window hold.
        warmup_iters: training steps that use the statistics of the batch alone.
        momentum: share of the old value in each update of ``running_var``.
        channel_dim: dimension of the channels; 1 for [N, C, H, W], -1 for [..., C].
        **options: ``eps``, ``affine``, ``device`` and ``dtype`` of :class:`UnifiedNorm`.

    Shape:
        x: any, with C channels along ``channel_dim``; float32, bfloat16 or float16 (float64 in a float64 module).
        pad_mask: the shape of x without its channel dimension, bool, True = padding.
        Output: like x.

    Raises:
        TypeError, ValueError: an option has a type or value that is not allowed.

    Example:
        >>> from normfuse.nn import MovingAverageBatchNorm, center_weight
        >>> model = nn.Sequential(center_weight(nn.Conv2d(3, 8, 3)), MovingAverageBatchNorm(8))
        >>> model(torch.randn(2, 3, 9, 9)).shape
        torch.Size([2, 8, 7, 7])
    """

    def __init__(  # type: ignore[misc]  # some options have another default here
        self,
        num_features: int,
        *,
        window_size: int = 16,
        warmup_iters: int = 100,
        momentum: float = 0.98,
        channel_dim: int = 1,
        **options: Unpack[ChannelOptions],
    ) -> None:
        if options.get("ghost_size") is not None:
            raise ValueError("ghost_size is not an option of MovingAverageBatchNorm, whose windows hold several steps")
        super().__init__(num_features, channel_dim=channel_dim, **options)
        check_count("window_size", window_size, 1)
        check_count("warmup_iters", warmup_iters, 0)
        check_fraction("momentum", momentum)
        self.window_size = window_size
        self.warmup_iters = warmup_iters
        self.momentum = momentum
        window = (window_size, num_features)
        statistics = {"running_var": ((num_features,), 1.0), "buffer_x2": (window, 0.0), "buffer_gz": (window, 0.0)}
        self._register_statistics(statistics, {"iters": (1,)}, **options)

    def forward(self, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        if isinstance(x, Proxy):
            return traced_as_one(self, x, pad_mask)
        return moving_average_norm(
            x,
            self.weight,
            self.bias,
            MovingAverageNormState(self.running_var, self.buffer_x2, self.buffer_gz, self.iters),
            training=self.training,
            pad_mask=pad_mask,
            warmup_iters=self.warmup_iters,
            eps=self.eps,
            momentum=self.momentum,
            channel_dim=self.channel_dim,
            process_group=self.group_to_share_with() if self.training else None,
        )

    def extra_repr(self) -> str:
        return self._describe("window_size", "warmup_iters", "momentum")
