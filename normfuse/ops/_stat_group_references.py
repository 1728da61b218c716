"""Batch normalisation and its kin on statistics groups: the operations that BatchNorm, instance and region norms share.

A statistics group is what shares statistics. ``x`` is [S, C, P]; every ``group_size`` consecutive samples make one of
K groups (a rest joins the last; 0: all make one), and a statistics group is a channel of a group. A ``mask`` [S, P]
either marks padding, which the statistics do not count, or parts two regions, which double the statistics groups: N =
2 sets of statistics in a group instead of 1. With n numbers, mean m and variance v = Σ(x − m)² / (n − correction) in
one,

    y = weight · (x − m) / sqrt(max(v, floor) + eps + eps_total / n) + bias + shortcut · x

where ``floor`` and ``eps_total`` are 0 unless said otherwise. The variance is a sum of squared deviations, never a
difference of large sums. Gradients are exact, also through the returned statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ._layout import accumulation_dtype


def group_count(samples: int, group_size: int) -> int:
    """Number of groups: one for ``group_size`` 0, else a rest smaller than ``group_size`` joins the last."""
    return max(samples // group_size, 1) if group_size else 1


def group_sizes(samples: int, group_size: int) -> list[int]:
    """Sizes of the groups."""
    count = group_count(samples, group_size)
    return [group_size] * (count - 1) + [samples - group_size * (count - 1)]


def _groups(x: Tensor, mask: Tensor | None, group_size: int) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """Number, rows in the dtype of sums and mask [S, 1, P] of every group."""
    sizes = group_sizes(x.shape[0], group_size)
    masks = [None] * len(sizes) if mask is None else mask[:, None].split(sizes)
    values = x.to(accumulation_dtype(x.dtype)).split(sizes)
    return zip(range(len(sizes)), values, masks, strict=True)


def _selections(mask: Tensor | None, regions: bool) -> list[Tensor | None]:
    """What the statistics of each set count; None: everything."""
    if mask is None:
        return [None]
    return [~mask, mask] if regions else [~mask]


def _moments(values: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and sum of squared deviations [C], and number of what ``keep`` selects."""
    if keep is None:
        count = torch.full((), values.shape[0] * values.shape[2], device=values.device)
        mean = values.sum((0, 2)) / count.clamp(min=1)
        return mean, (values - mean[:, None]).square().sum((0, 2)), count
    # Selecting instead of multiplying keeps a NaN elsewhere out of the sums.
    count = keep.sum()
    mean = torch.where(keep, values, 0.0).sum((0, 2)) / count.clamp(min=1)
    return mean, torch.where(keep, values - mean[:, None], 0.0).square().sum((0, 2)), count


def _forward_on_stat_groups(
    finish: Callable, x: Tensor, mask: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    shortcut: Tensor | None, group_size: int, regions: bool, eps: float, floor: float = 0.0, eps_total: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``finish`` makes the mean and variance of a statistics group from the group's number and moments."""
    results, found, counts = [], [], []
    for g, values, part in _groups(x, mask, group_size):
        of_sets = []
        for s, keep in enumerate(_selections(part, regions)):
            moments = _moments(values, keep)
            mean, var = finish(g, *moments)
            inv_std = _inv_std(var, moments[2], eps, floor, eps_total)
            found.append(torch.stack([mean, var, inv_std]))
            counts.append(moments[2])
            if weight is not None and bias is not None:
                gain, shift = (v[g % v.shape[0], s % v.shape[1]] for v in (weight, bias))
                y = (values - mean[:, None]) * (gain * inv_std)[:, None] + shift[:, None]
                of_sets.append(y if shortcut is None else y + shortcut * values)
        if of_sets:
            results.append(of_sets[0] if len(of_sets) == 1 else torch.where(part, of_sets[1], of_sets[0]))
    shape = group_count(x.shape[0], group_size), -1
    stats = torch.stack(found, 1).view(3, *shape, x.shape[1])
    y = torch.cat(results).to(x.dtype) if results else x.new_empty(0)
    return y, stats, torch.stack(counts).view(shape)


def _variance(squares: Tensor, count: Tensor, correction: int) -> Tensor:
    return torch.where(count > 0, squares / _divisor(count, correction), 0.0)


def _divisor(count: Tensor, correction: int) -> Tensor:
    """``count - correction``, and 1 where nothing was counted: what is not selected must not have NaN derivatives."""
    return torch.where(count > 0, count - correction, 1)


def _inv_std(var: Tensor, count: Tensor, eps: float, floor: float, eps_total: float) -> Tensor:
    root = var.clamp(min=floor) + eps if floor else var + eps
    return (root + eps_total / count.clamp(min=1).to(var.dtype) if eps_total else root).rsqrt()


def _by_correction(correction: int) -> Callable:
    """The own mean and variance of a statistics group, as :func:`_forward_on_stat_groups` asks for them."""
    return lambda _, mean, squares, count: (mean, _variance(squares, count, correction))


def stat_group_norm_forward_reference(
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shortcut: Tensor | None,
    group_size: int,
    correction: int,
    eps: float,
    eps_total: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise every statistics group by its own statistics, in plain PyTorch; a ``mask`` parts two regions.

    ``weight`` and ``bias`` are [K or 1, N or 1, C], ``shortcut`` [1], in the dtype of statistics. Returns ``y`` like x
    ([0] where ``weight`` and ``bias`` are None), ``stats`` [3, K, N, C]: mean, variance, and one over the root that
    divides, and ``count`` int64 [K, N].
    """
    own = _by_correction(correction)
    return _forward_on_stat_groups(own, x, mask, weight, bias, shortcut, group_size, True, eps, 0.0, eps_total)


def own_statistics(
    x: Tensor, mask: Tensor | None, group_size: int, regions: bool, correction: int, *root: float
) -> Tensor:
    """``stats`` of groups that are normalised by their own, for a backward pass that is differentiated in turn."""
    own = _by_correction(correction)
    return _forward_on_stat_groups(own, x, mask, None, None, None, group_size, regions, *root)[1]


def move_batch_statistics(
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    estimated: bool,
    momentum: float | None,
) -> None:
    """One update of the running statistics, in place, by those of ``count`` rows: mean and biased variance [C].

    Without a row there is none, and nothing moves, the counter included.
    """
    num_batches_tracked.add_((count > 0).view_as(num_batches_tracked))
    rate = 1.0 / num_batches_tracked.clamp(min=1).to(mean.dtype) if momentum is None else momentum
    moved = var + (mean - running_mean).square() if estimated else var * count / (count - 1).clamp(min=1)
    usable = (count > 0) & mean.isfinite() & moved.isfinite()
    for running, new in ((running_mean, mean), (running_var, moved)):
        running.copy_(torch.where(usable, running + rate * (new - running), running))


def _move_and_copy(mean: Tensor, var: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """:func:`move_batch_statistics`; returns copies of the running mean and variance."""
    move_batch_statistics(mean, var, *others)
    return others[1].clone(), others[2].clone()


class MoveBelowTransforms(torch.autograd.Function):
    """:func:`_move_and_copy` on tensors themselves, where transforms of torch.func show stand-ins for them."""

    @staticmethod
    def forward(*given: Any) -> Any:
        return _move_and_copy(*given)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> Any:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        return (None,) * 8

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        return None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *given: Any) -> Any:
        if None in in_dims[3:6]:
            raise RuntimeError(
                "torch.func.vmap cannot run a batch normalisation in training: all samples share its running "
                "statistics. Call norm.eval() first, or give each sample its own (torch.func.stack_module_state)"
            )
        results = [
            MoveBelowTransforms.apply(
                *(g if d is None else g.select(d, i) for g, d in zip(given, in_dims, strict=True))
            )
            for i in range(info.batch_size)
        ]
        return tuple(torch.stack(tensors) for tensors in zip(*results, strict=True)), (0, 0)


def batch_norm_on_stat_groups(
    move: Callable, x: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor, shortcut: Tensor | None,
    state: tuple[Tensor, Tensor, Tensor], group_size: int, estimated: bool, momentum: float | None, eps: float,
    floor: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    def step(_: int, mean: Tensor, squares: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        var = _variance(squares, count, 0)
        running = move(mean, var, count, *state, estimated, momentum)
        return running if estimated else (mean, var)

    return _forward_on_stat_groups(step, x, mask, weight, bias, shortcut, group_size, False, eps, floor)


def batch_norm_forward_reference(
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    shortcut: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    group_size: int,
    estimated: bool,
    momentum: float | None,
    eps: float,
    floor: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for batch normalisation: ``mask`` marks padding, and the running statistics move, in place.

    The groups move them one after another, by shares of ``momentum`` (None: of an average over all updates), the
    variance unbiased. Groups without numbers, and with a statistic that is not finite, move nothing. ``estimated``: the
    running statistics move first, the variance around the mean as it was, and are those that normalise.
    """
    state = running_mean, running_var, num_batches_tracked
    return batch_norm_on_stat_groups(
        _move_and_copy, x, mask, weight, bias, shortcut, state, group_size, estimated, momentum, eps, floor
    )


def batch_norm_backward_reference(
    grad_y: Tensor,
    grad_mean: Tensor | None,
    grad_var: Tensor | None,
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    shortcut: Tensor | None,
    stats: Tensor,
    count: Tensor,
    group_size: int,
    regions: bool,
    correction: int,
    estimated: bool,
    floor: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of both forwards, in plain PyTorch, from those of y and of mean and variance [K, N, C].

    Nothing comes through a variance below ``floor``. Returns ``grad_x`` like x, ``grad_weight`` and ``grad_bias``
    [K, N, C]; the shortcut's gradient follows from these.
    """
    results, along_weight, along_bias = [], torch.empty_like(stats[0]), torch.empty_like(stats[0])
    gradients = grad_y.to(stats.dtype).split(group_sizes(x.shape[0], group_size))
    for g, values, part in _groups(x, mask, group_size):
        of_sets = []
        for s, keep in enumerate(_selections(part, regions)):
            mean, var, inv_std = stats[:, g, s]
            dy, deviation = gradients[g], values - mean[:, None]
            own = dy if keep is None or not regions else torch.where(keep, dy, 0.0)
            sum_dy = own.sum((0, 2))
            # Selected again: a NaN of the other region times zero is one.
            along = own * deviation if own is dy else torch.where(keep, dy * deviation, 0.0)
            sum_dyd = along.sum((0, 2))
            along_weight[g, s], along_bias[g, s] = sum_dyd * inv_std, sum_dy
            scale, n = weight[g % weight.shape[0], s % weight.shape[1]] * inv_std, count[g, s]
            grad = dy * (scale if shortcut is None else scale + shortcut)[:, None]
            if not estimated:
                pull = -scale * inv_std.square() * sum_dyd
                pull = torch.where(var < floor, 0.0, pull) if floor else pull
                pull = pull if grad_var is None else pull + 2 * grad_var[g, s]
                offset = -scale * sum_dy if grad_mean is None else grad_mean[g, s] - scale * sum_dy
                pull, offset = pull / _divisor(n, correction), offset / _divisor(n, 0)
                through = torch.addcmul(offset[:, None], deviation, pull[:, None])
                grad = grad + torch.where((n > 0) if keep is None else keep, through, 0.0)
            of_sets.append(grad)
        results.append(of_sets[0] if len(of_sets) == 1 else torch.where(part, of_sets[1], of_sets[0]))
    return torch.cat(results).to(x.dtype), along_weight, along_bias
