"""Batch Normalization for sequences: masks, any layout, ghost batches; and its regularised form."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..ops import BatchNormState, batch_norm
from ..ops._layout import gain_and_shift
from ..ops._recompute import in_reentrant_checkpoint, is_second_run, refuse_reentrant
from ..ops.batch_norm import BatchStatistics, affine_by_statistics, batch_norm_with_statistics
from ._running_norm import ChannelNorm, ChannelOptions, check_count, check_fraction
from ._traced_as_one import Proxy, traced_as_one

if TYPE_CHECKING:
    from typing_extensions import Unpack

#: Tokens whose losses the authors of :class:`RegularizedBatchNorm` add up in a step.
AUTHORS_TOKENS = 4096
# So many penalties in a row that nobody asked for are a loss term that somebody forgot.
FORGOTTEN = 1000


class BatchOptions(ChannelOptions, total=False):
    """Options of :class:`MaskedBatchNorm`."""

    momentum: float | None


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
        **options: the options below, by name.
        channel_dim: dimension of the channels in the input: -1 (default) for [..., C], 1 for [N, C, L] and [N, C, H,
            W].
        ghost_size: samples (along the first dimension) per ghost batch (Hoffer et al., 2017, arXiv 1705.08741): in
            training each is normalised by its own statistics, and the running statistics are updated once for each; a
            remainder joins the last one. None (default): one batch.
        device: of parameters and buffers; None (default): PyTorch's default.
        dtype: of the parameters; None (default): PyTorch's default. Statistics are float32, or float64 for dtype
            float64.

    Shape:
        x: any, with C channels along ``channel_dim``; float32, bfloat16 or float16 (float64 in a float64 module).
        pad_mask: the shape of x without its channel dimension, bool, True = padding.
        Output: like x. Padding is normalised like the rest. An empty batch moves no statistic.

    Raises:
        TypeError, ValueError: an option has a type or value that is not allowed.

    Example:
        >>> from normfuse.nn import MaskedBatchNorm
        >>> x, padding = torch.randn(4, 10, 64), torch.zeros(4, 10, dtype=torch.bool)
        >>> padding[:, 7:] = True
        >>> norm = MaskedBatchNorm(64)
        >>> norm(x, pad_mask=padding).shape, int(norm.num_batches_tracked)
        (torch.Size([4, 10, 64]), 1)
    """

    def __init__(  # type: ignore[misc]  # some options have another default here
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        **options: Unpack[ChannelOptions],
    ) -> None:
        super().__init__(num_features, eps=eps, affine=affine, **options)
        if momentum is not None:
            check_fraction("momentum", momentum, "new")
        self.momentum = momentum
        statistics: dict[str, tuple[tuple[int, ...], float]] = {
            "running_mean": ((num_features,), 0.0),
            "running_var": ((num_features,), 1.0),
        }
        self._register_statistics(statistics, {"num_batches_tracked": ()}, **options)

    def _load_from_state_dict(self, state_dict: Any, prefix: Any, *args: Any, **kwargs: Any) -> None:
        # BatchNorms of old, and other programs', have no counter; torch.nn.BatchNorm1d takes their state as well.
        counter = prefix + "num_batches_tracked"
        if prefix + "running_mean" in state_dict and counter not in state_dict:
            known = not self.num_batches_tracked.is_meta
            state_dict[counter] = self.num_batches_tracked if known else torch.tensor(0)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @property
    def state(self) -> BatchNormState:
        """The statistics, as operations take them."""
        return BatchNormState(self.running_mean, self.running_var, self.num_batches_tracked)

    @torch.no_grad()
    def set_statistics(self, mean: Tensor, var: Tensor, rows: Tensor | None = None) -> None:
        self.running_mean.copy_(mean)
        self.running_var.copy_(var if rows is None else var * (rows / (rows - 1).clamp(min=1)))

    def forward(self, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        if isinstance(x, Proxy):
            return traced_as_one(self, x, pad_mask)
        return self._normalise(x, pad_mask)

    def _normalise(self, x: Tensor, pad_mask: Tensor | None, **options: Any) -> Tensor:
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
        return self._describe("momentum")


class RegularizedBatchNorm(MaskedBatchNorm):
    """Batch Normalization that is pulled towards its running statistics (Wang et al., 2022, arXiv 2210.05153).

    Every training forward leaves the loss term

        mean_penalty * ‖running_mean − mean‖² + var_penalty * ‖running_var − var‖₁

    in ``penalty``: sums over channels, with the running statistics after the update and without gradient, and the
    biased variance of the batch. The terms of several forwards are summed until :func:`batch_norm_penalty` is called.
    Add its result to the loss in every step, because a backward pass frees the graph of these terms.

    As in the authors' program the norm divides by ``sqrt(max(var, eps))`` instead of ``sqrt(var + eps)``, in training
    and in evaluation, and padding comes out as zeros:

        y = weight * (x - running_mean) / sqrt(max(running_var, eps)) + bias

    The authors tune both weights for each task, for a loss that is *summed* over up to 4096 tokens;
    :func:`batch_norm_penalty` divides by that number. The defaults are those of their translation model in pre-norm; in
    post-norm they take ``mean_penalty=60, var_penalty=0``, both with ``momentum=0.05``. Their program switches the
    terms off by default, which is ``mean_penalty=0, var_penalty=0`` here, and keeps the running variance biased.

    Args:
        num_features: number of channels C.
        mean_penalty: weight of the term of the means, at least 0.
        var_penalty: weight of the term of the variances, at least 0.
        **options: further ones of :class:`MaskedBatchNorm`.

    Raises:
        ValueError: a weight is negative, or another option is not allowed.

    Example:
        >>> from normfuse.nn import RegularizedBatchNorm, batch_norm_penalty
        >>> model = nn.Sequential(RegularizedBatchNorm(8), nn.Linear(8, 2))
        >>> loss = model(torch.randn(4, 8)).square().mean() + batch_norm_penalty(model)
    """

    def __init__(
        self, num_features: int, mean_penalty: float = 0.1, var_penalty: float = 0.01, **options: Unpack[BatchOptions]
    ) -> None:
        super().__init__(num_features, **options)
        for name, value in (("mean_penalty", mean_penalty), ("var_penalty", var_penalty)):
            if not value >= 0:
                raise ValueError(f"{name}={value} is not allowed; give a number of at least 0")
        self.mean_penalty = mean_penalty
        self.var_penalty = var_penalty
        self.forget_penalty()

    def forget_penalty(self) -> None:
        """Start the sum of penalties anew."""
        self.penalty: Tensor | None = None
        self._summed = 0
        self._without_gradient = False

    def forward(self, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        if isinstance(x, Proxy):
            return traced_as_one(self, x, pad_mask)
        if self.training:
            y, batch, state = batch_norm_with_statistics(
                x, self.weight, self.bias, self.state, pad_mask, self.momentum, self.eps, self.channel_dim,
                self.ghost_size, process_group=self.group_to_share_with(), floor=True,
            )  # fmt: skip
            self._add_penalty(self._penalise(batch, state))
        else:
            self.check_input(x, pad_mask)
            weight, bias = gain_and_shift(self.weight, self.bias, self.running_mean)
            y = affine_by_statistics(
                x, weight, bias, self.running_mean, self.running_var, self.eps, self.channel_dim, floor=True
            )
        return y if pad_mask is None else y.masked_fill(pad_mask.unsqueeze(self.channel_dim), 0.0)

    def _add_penalty(self, penalty: Tensor) -> None:
        if is_second_run():  # the first run's term is in the loss
            return
        if self._summed >= FORGOTTEN:
            warnings.warn(
                f"{FORGOTTEN} penalties of a RegularizedBatchNorm were not used and are dropped: add "
                "normfuse.nn.batch_norm_penalty(model) to the loss, or give mean_penalty=0, var_penalty=0",
                RuntimeWarning,
                stacklevel=3,
            )
            self.forget_penalty()
        if self.mean_penalty or self.var_penalty:
            self._without_gradient |= in_reentrant_checkpoint()
            self.penalty = penalty if self.penalty is None else self.penalty + penalty
            self._summed += 1

    def _penalise(self, batch: BatchStatistics, state: BatchNormState) -> Tensor:
        mean = (state.running_mean - batch.mean).square().sum(-1)
        var = (state.running_var - batch.var).abs().sum(-1)
        each = self.mean_penalty * mean + self.var_penalty * var
        seen = batch.count[:, 0] > 0
        return torch.where(seen, each, 0.0).sum() / seen.sum().clamp(min=1)

    def __getstate__(self) -> dict[str, object]:
        # It hangs on a graph, which can neither be copied nor stored.
        return {**super().__getstate__(), "penalty": None, "_summed": 0, "_without_gradient": False}

    def extra_repr(self) -> str:
        return self._describe("momentum", "mean_penalty", "var_penalty")


def deviation_of(norm: nn.Module, var: Tensor) -> Tensor:
    """What ``norm``, with running statistics of ours or of PyTorch, divides by where its variance is ``var``."""
    floor = isinstance(norm, RegularizedBatchNorm)
    return torch.sqrt(var.clamp(min=norm.eps) if floor else var + norm.eps)


def batch_norm_penalty(model: nn.Module, tokens: int = AUTHORS_TOKENS) -> Tensor:
    """The loss term of every :class:`RegularizedBatchNorm` in ``model``, for a loss that is a *mean* over tokens.

    It is the sum of the terms of all training forwards since the last call, divided by ``tokens``. The call resets the
    sums.

    Args:
        model: contains the norms. With shared layers or several forwards before one backward all terms count.
        tokens: number of tokens in the summed loss for which the weights were chosen; 4096 for the authors'. Give 1 if
            your loss is a sum.

    Returns:
        A scalar tensor with gradient; zero where the weights of all terms are 0.

    Raises:
        TypeError, ValueError: ``tokens`` is not a positive int; ``model`` has no such norm, or none has run in training
            since the last call.
        RuntimeError: one has run inside a reentrant checkpoint, where its term has no gradient.

    Example:
        >>> from normfuse.nn import RegularizedBatchNorm, batch_norm_penalty
        >>> norm = RegularizedBatchNorm(4)
        >>> loss = norm(torch.randn(8, 4)).square().mean() + batch_norm_penalty(norm)
    """
    check_count("tokens", tokens, 1)
    norms = [module for module in model.modules() if isinstance(module, RegularizedBatchNorm)]
    found = [norm.penalty for norm in norms if norm.penalty is not None]
    weighted = [norm for norm in norms if norm.mean_penalty or norm.var_penalty]
    if norms and not weighted:
        return norms[0].running_mean.new_zeros(())
    if not found:
        raise ValueError(
            f"model of class {type(model).__name__} has no RegularizedBatchNorm with a penalty; "
            "run a forward in training mode first"
        )
    without_gradient = any(norm._without_gradient for norm in norms)
    for norm in norms:
        norm.forget_penalty()
    if without_gradient:
        refuse_reentrant("the penalty of a RegularizedBatchNorm")
    return torch.stack(found).sum() / tokens
