"""Batch Normalization for sequences: masks, any layout, ghost batches; and its regularised form."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import BatchNormState, batch_norm
from ..ops.batch_norm import BatchStatistics, batch_norm_with_statistics
from ._running_norm import ChannelNorm, check_fraction


class MaskedBatchNorm(ChannelNorm):
    """Batch Normalization over [..., C] (or any layout) that leaves padding out of its statistics.

    ``state_dict`` is that of ``torch.nn.BatchNorm1d``; without padding the two are equal. In evaluation it is
    ``y = weight * (x - running_mean) / sqrt(running_var + eps) + bias``, which folds into nearby weights.

    Args:
        num_features: number of channels C.
        eps: added to the variance, inside the square root.
        momentum: share of the *new* value in each update of the running statistics, as in PyTorch; None: an average
            over all steps.
        affine: whether to learn ``weight`` and ``bias``, both [C].
        channel_dim: dimension of the channels in the input; -1 for [..., C], 1 for [N, C, L] and [N, C, H, W].
        ghost_size: samples (along the first dimension) per ghost batch (Hoffer et al., 2017, arXiv 1705.08741): in
            training each is normalised by its own statistics, and the running ones take one update after another; a
            rest joins the last. None: one batch.
        device, dtype: of the parameters. Statistics are float32, or float64 for dtype float64.

    Shape:
        x: any, with C channels along ``channel_dim``; float32, bfloat16 or float16 (float64 in a float64 module).
        pad_mask: the shape of x without its channel dimension, bool, True = padding.
        Output: like x. Padding is normalised like the rest. An empty batch moves no statistic.

    Raises:
        TypeError, ValueError: an option has a type or value that is not allowed.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        *,
        channel_dim: int = -1,
        ghost_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features,
            eps=eps,
            affine=affine,
            channel_dim=channel_dim,
            ghost_size=ghost_size,
            device=device,
            dtype=dtype,
        )
        if momentum is not None:
            check_fraction("momentum", momentum, "new")
        self.momentum = momentum
        statistics = {"running_mean": ((num_features,), 0.0), "running_var": ((num_features,), 1.0)}
        self._register_statistics(statistics, {"num_batches_tracked": ()}, device, dtype)

    @property
    def state(self) -> BatchNormState:
        """The statistics, as operations take them."""
        return BatchNormState(self.running_mean, self.running_var, self.num_batches_tracked)

    @torch.no_grad()
    def set_statistics(self, mean: Tensor, var: Tensor, rows: Tensor | None = None) -> None:
        self.running_mean.copy_(mean)
        self.running_var.copy_(var if rows is None else var * (rows / (rows - 1).clamp(min=1)))

    def forward(self, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        return self._normalise(x, pad_mask)

    def _normalise(self, x: Tensor, pad_mask: Tensor | None, **options: object) -> Tensor:
        return batch_norm(
            x,
            self.weight,
            self.bias,
            self.state,
            training=self.training,
            pad_mask=pad_mask,
            momentum=self.momentum,
            eps=self.eps,
            channel_dim=self.channel_dim,
            ghost_size=self.ghost_size,
            process_group=self.group_to_share_with() if self.training else None,
            **options,
        )

    def extra_repr(self) -> str:
        return self._describe(momentum=self.momentum)


class RegularizedBatchNorm(MaskedBatchNorm):
    """Batch Normalization that is pulled towards its running statistics (Wang et al., 2022, arXiv 2210.05153).

    Every training forward leaves the loss term

        mean_penalty * ‖running_mean − mean‖² + var_penalty * ‖running_var − var‖₁

    (sums over channels, running statistics after the update and without gradient, biased batch variance) in
    ``penalty``; add :func:`batch_norm_penalty` of the model to the loss. Evaluation is that of batch normalisation.

    The authors tune both weights for each task. The defaults are those of their translation model in pre-norm; in
    post-norm they take ``mean_penalty=60, var_penalty=0``, both with ``momentum=0.05``. Their program switches the
    terms off by default, which is ``mean_penalty=0, var_penalty=0`` here, and keeps the running variance biased.

    Args:
        mean_penalty, var_penalty: weights of the two terms, at least 0.
        num_features, options: see :class:`MaskedBatchNorm`.
    """

    def __init__(
        self, num_features: int, mean_penalty: float = 0.1, var_penalty: float = 0.01, **options: object
    ) -> None:
        super().__init__(num_features, **options)
        for name, value in (("mean_penalty", mean_penalty), ("var_penalty", var_penalty)):
            if not value >= 0:
                raise ValueError(f"{name}={value} is not allowed; give a number of at least 0")
        self.mean_penalty = mean_penalty
        self.var_penalty = var_penalty
        self.penalty: Tensor | None = None

    def forward(self, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        if not self.training:
            return super().forward(x, pad_mask)
        y, batch, state = batch_norm_with_statistics(
            x, self.weight, self.bias, self.state, pad_mask, self.momentum, self.eps, self.channel_dim, self.ghost_size,
            process_group=self.group_to_share_with(),
        )  # fmt: skip
        self.penalty = self._penalise(batch, state)
        return y

    def _penalise(self, batch: BatchStatistics, state: BatchNormState) -> Tensor:
        mean = (state.running_mean - batch.mean).square().sum(-1)
        var = (state.running_var - batch.var).abs().sum(-1)
        each = self.mean_penalty * mean + self.var_penalty * var
        seen = batch.count[:, 0] > 0
        return torch.where(seen, each, 0.0).sum() / seen.sum().clamp(min=1)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "penalty": None}  # it hangs on a graph, which can neither be copied nor stored

    def extra_repr(self) -> str:
        return self._describe(momentum=self.momentum, mean_penalty=self.mean_penalty, var_penalty=self.var_penalty)


def batch_norm_penalty(model: nn.Module) -> Tensor:
    """The sum of the loss terms that the last training forward left in every :class:`RegularizedBatchNorm`.

    Raises:
        ValueError: ``model`` has none, or none has run in training.
    """
    norms = [module for module in model.modules() if isinstance(module, RegularizedBatchNorm)]
    found = [norm.penalty for norm in norms if norm.penalty is not None]
    if not found:
        raise ValueError(
            f"model of class {type(model).__name__} has no RegularizedBatchNorm with a penalty; "
            "run a forward in training mode first"
        )
    return torch.stack(found).sum()
