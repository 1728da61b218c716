"""Windows, pools, sums and extremes over positions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .base import IMAGE, SEQUENCE, Case, unary

aten = torch.ops.aten


def _upsample(function: Callable[..., Tensor], axes: int, *flags: object) -> list[Case]:
    shape, size = (2, 6, 4, 8, 3)[: axes + 2], [7, 5, 2][:axes]
    return [Case(lambda x: function(x, size, *flags, None), (shape,))]


WINDOWS = {1: (2, 6, 9), 2: (2, 6, 9, 7), 3: (2, 6, 5, 7, 4)}


def pools(function: Callable[..., Tensor], axes: int, *extra: tuple) -> list[Case]:
    """With and without padding, and what each operation has besides; also without a batch."""
    threes, ones, zeros = [3] * axes, [1] * axes, [0] * axes
    cases = [(threes, [2] * axes, zeros), (threes, ones, ones), (threes, [2] * axes, ones, *extra)]
    return unary(function, *cases, (threes, threes), shape=WINDOWS[axes]) + unary(
        function, cases[0], shape=WINDOWS[axes][1:]
    )


CASES: dict[object, list[Case]] = {
    # neighbourhoods
    aten.avg_pool1d.default: pools(aten.avg_pool1d.default, 1, True, False),
    aten.avg_pool2d.default: pools(aten.avg_pool2d.default, 2, True, False)
    + unary(aten.avg_pool2d.default, ([2, 2], [2, 2], [0, 0], False, True, 3), shape=IMAGE),
    aten.avg_pool3d.default: pools(aten.avg_pool3d.default, 3, True, False),
    aten.max_pool1d.default: pools(aten.max_pool1d.default, 1, [1], True),
    aten.max_pool2d.default: pools(aten.max_pool2d.default, 2, [1, 1], True),
    aten.max_pool3d.default: pools(aten.max_pool3d.default, 3, [1, 1, 1], True),
    aten.max_pool1d_with_indices.default: pools(aten.max_pool1d_with_indices.default, 1, [1], True),
    aten.max_pool2d_with_indices.default: pools(aten.max_pool2d_with_indices.default, 2, [1, 1], True),
    aten.max_pool3d_with_indices.default: pools(aten.max_pool3d_with_indices.default, 3, [1, 1, 1], True),
    aten.adaptive_max_pool1d.default: unary(aten.adaptive_max_pool1d.default, ([3],), shape=(2, 6, 8)),
    aten.adaptive_max_pool2d.default: unary(aten.adaptive_max_pool2d.default, ([3, 5],), shape=IMAGE),
    aten.adaptive_max_pool3d.default: unary(aten.adaptive_max_pool3d.default, ([3, 2, 2],), shape=WINDOWS[3]),
    aten.adaptive_avg_pool3d.default: unary(aten.adaptive_avg_pool3d.default, ([3, 2, 2],), shape=WINDOWS[3]),
    aten.adaptive_avg_pool1d.default: unary(aten.adaptive_avg_pool1d.default, ([3],), shape=(2, 6, 8)),
    aten.adaptive_avg_pool2d.default: unary(aten.adaptive_avg_pool2d.default, ([1, 1],), ([3, 5],), shape=IMAGE),
    aten.mean.dim: unary(aten.mean.dim, ([1],), ([-1], True), ([0, 2],), (None,), ([],)),
    aten.amin.default: unary(aten.amin.default, ([1],), ([-1], True), ()),
    aten.max.default: unary(aten.max.default),
    aten.min.default: unary(aten.min.default),
    aten.max.dim: unary(aten.max.dim, (1,), (-1, True)),
    aten.min.dim: unary(aten.min.dim, (0,), (-1, True)),
    aten.median.dim: unary(aten.median.dim, (1,), (-1, True)),
    aten.nanmedian.dim: unary(aten.nanmedian.dim, (1,), (-1, True)),
    aten.kthvalue.default: unary(aten.kthvalue.default, (2, 1), (3, -1, True)),
    aten.aminmax.default: [Case(lambda x, d=d: aten.aminmax.default(x, dim=d), (SEQUENCE,)) for d in (None, 1, -1)],
    aten.topk.default: unary(aten.topk.default, (2, 1), (2,)),
    aten.sort.default: unary(aten.sort.default, (1,), ()),
    aten.sort.stable: [Case(lambda x: aten.sort.stable(x, stable=True, dim=1), (SEQUENCE,))],
    aten.cummax.default: unary(aten.cummax.default, (1,), (-1,)),
    aten.cummin.default: unary(aten.cummin.default, (1,), (-1,)),
    aten.sum.dim_IntList: unary(aten.sum.dim_IntList, ([1],), ([-1], True), ([0, 2],), (None,), ([],)),
    aten.sum.default: unary(aten.sum.default),
    aten.mean.default: unary(aten.mean.default),
    aten.nansum.default: unary(aten.nansum.default, ([1],), ([-1], True), (None,)),
    aten.std.dim: unary(aten.std.dim, ([1],), ([0, 1], True, True), ([-1],)),
    aten.std.correction: unary(lambda x, d: aten.std.correction(x, d, correction=0), ([1],), ([-1],), (None,)),
    aten.var.dim: unary(aten.var.dim, ([1],), ([0, 1], True, True), ([-1],)),
    aten.var.correction: unary(lambda x, d: aten.var.correction(x, d, correction=0), ([1],), ([-1],), (None,)),
    aten.var.default: unary(aten.var.default, (), (False,)),
    aten.std.default: unary(aten.std.default, (), (False,)),
    aten.cumsum.default: unary(aten.cumsum.default, (1,), (-1,)),
    aten.amax.default: unary(aten.amax.default, ([1],), ([-1], True), ([0, 2],), ()),
    aten.upsample_nearest1d.vec: _upsample(aten.upsample_nearest1d.vec, 1),
    aten.upsample_nearest2d.vec: _upsample(aten.upsample_nearest2d.vec, 2),
    aten.upsample_nearest3d.vec: _upsample(aten.upsample_nearest3d.vec, 3),
    aten._upsample_nearest_exact1d.vec: _upsample(aten._upsample_nearest_exact1d.vec, 1),
    aten._upsample_nearest_exact2d.vec: _upsample(aten._upsample_nearest_exact2d.vec, 2),
    aten._upsample_nearest_exact3d.vec: _upsample(aten._upsample_nearest_exact3d.vec, 3),
    aten.upsample_trilinear3d.vec: _upsample(aten.upsample_trilinear3d.vec, 3, True),
    aten._upsample_bilinear2d_aa.vec: _upsample(aten._upsample_bilinear2d_aa.vec, 2, False),
    aten._upsample_bicubic2d_aa.vec: _upsample(aten._upsample_bicubic2d_aa.vec, 2, True),
    aten.grid_sampler.default: [
        Case(lambda x, g, p=p: aten.grid_sampler.default(x, g, 0, p, False), (IMAGE, (2, 3, 3, 2))) for p in (0, 1)
    ]
    + [
        Case(lambda x, g: aten.grid_sampler.default(x, g, 2, 2, True), (IMAGE,), ((2, 3, 3, 2),)),
        Case(lambda x: aten.grid_sampler.default(x, x, 0, 1, False), ((2, 2, 3, 2),)),
    ],
    aten.upsample_linear1d.vec: _upsample(aten.upsample_linear1d.vec, 1, False),
    aten.upsample_bilinear2d.vec: _upsample(aten.upsample_bilinear2d.vec, 2, True),
    aten.upsample_bicubic2d.vec: _upsample(aten.upsample_bicubic2d.vec, 2, False),
    aten.pixel_shuffle.default: unary(aten.pixel_shuffle.default, (2,), shape=(2, 8, 3, 5))
    + unary(aten.pixel_shuffle.default, (2,), shape=(8, 3, 5)),
    aten.pixel_unshuffle.default: unary(aten.pixel_unshuffle.default, (2,), shape=(2, 3, 4, 6)),
    aten.constant_pad_nd.default: unary(
        aten.constant_pad_nd.default, ([1, 2],), ([0, 0, 1, -1],), ([1, -1],), ([-1, -1],), ([0, 0, 0, 1], 2.0)
    ),
    aten.pad.default: unary(
        aten.pad.default, ([1, 0],), ([1, 2], "reflect"), ([1, 2], "replicate"), ([1, 2], "circular"), ([1, -1],)
    ),
}
