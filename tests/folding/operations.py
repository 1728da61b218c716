"""At least one use of every operation that a folding rule is registered for; see test_every_operand.py.

Keys are overloads. A case says what shapes its floating-point operands have and what constants it reads; all else is
written out. Sizes differ from axis to axis, so that a number along a wrong axis is noticed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

aten = torch.ops.aten
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """``apply(*operands, *constants)``; operands are computed, constants are parameters."""

    apply: Callable[..., Tensor | list[Tensor]]
    shapes: tuple[Shape, ...]
    constants: tuple[Shape, ...] = ()


SEQUENCE: Shape = (2, 4, 6)
IMAGE: Shape = (2, 6, 4, 8)
# Operands of an operation with broadcasting: equal ranks, a size of one on either side, fewer axes on either side.
BROADCAST: tuple[tuple[Shape, Shape], ...] = (
    ((2, 4, 6), (2, 4, 6)),
    ((2, 4, 6), (2, 1, 6)),
    ((2, 4, 6), (2, 4, 1)),
    ((2, 4, 1), (2, 1, 6)),
    ((1, 4, 6), (2, 4, 1)),
    ((2, 4, 6), (6,)),
    ((2, 4, 6), (1,)),
    ((4, 6), (2, 4, 6)),
    ((4, 1), (2, 1, 6)),
)
COUNTS = {0: 2, 1: 4, 2: 6}
MASK = torch.ones(4, 6, dtype=torch.bool).triu()
CONSTANTS: tuple[Shape, ...] = ((6,), (1,), (4, 1), (4, 6), (2, 1, 1), (2, 4, 6), (3, 2, 4, 6), (3, 1, 1, 1))


def unary(function: Callable[..., Tensor | list[Tensor]], *arguments: tuple, shape: Shape = SEQUENCE) -> list[Case]:
    """One case for every tuple of further arguments."""
    return [Case(lambda x, a=a: function(x, *a), (shape,)) for a in arguments or ((),)]


def binary(function: Callable[..., Tensor], step: int = 1) -> list[Case]:
    """Two computed operands of every pair of shapes, and one with every constant, on both sides; one with itself.

    A step of two takes half of the shapes.
    """
    return [
        *(Case(function, shapes) for shapes in BROADCAST[::step]),
        *(Case(function, (SEQUENCE,), (shape,)) for shape in CONSTANTS[::step]),
        *(Case(lambda x, c: function(c, x), (SEQUENCE,), (shape,)) for shape in CONSTANTS[::3]),
        Case(lambda x: function(x, x), (SEQUENCE,)),
        Case(lambda x: function(x, 1.5), (SEQUENCE,)),
    ]


def convolutions(function: Callable[..., Tensor], axes: int, *, transposed: bool = False) -> list[Case]:
    """Plain, grouped, depthwise, padded, strided, with and without a bias; the kernel is given, or computed too."""
    image, kernel = (2, 6, *(5, 7, 3)[:axes]), (2, 3, 2)[:axes]
    ones, zeros = [1] * axes, [0] * axes

    def apply(
        x: Tensor, w: Tensor, b: Tensor | None = None, *, groups: int = 1, padding: int = 0, stride: int = 1
    ) -> Tensor:
        strides, paddings = [stride] * axes, [padding] * axes
        if transposed:
            return function(x, w, b, strides, paddings, zeros, groups, ones)
        return function(x, w, b, strides, paddings, ones, groups)

    def weight(groups: int, outputs: int = 12) -> Shape:
        return (6, outputs // groups, *kernel) if transposed else (outputs, 6 // groups, *kernel)

    return [
        *(Case(lambda x, w, g=g: apply(x, w, groups=g), (image,), (weight(g),)) for g in (1, 2, 6)),
        *(Case(lambda x, w, b, g=g: apply(x, w, b, groups=g), (image,), (weight(g), (12,))) for g in (1, 3)),
        Case(lambda x, w, b: apply(x, w, b, padding=1, stride=2), (image,), (weight(1), (12,))),
        Case(lambda x, w, b: apply(x, w, b, groups=2, padding=1), (image,), (weight(2), (12,))),
        Case(lambda x, w: apply(x, w), (image, weight(1, 4))),
        Case(lambda x, b, w: apply(x, w, b), (image, (12,)), (weight(1),)),
        Case(lambda x, w: apply(x, w), (image[1:],), (weight(1),)),
    ]


def named_padding(function: Callable[..., Tensor], axes: int) -> list[Case]:
    image, weight = (2, 6, *(5, 7, 3)[:axes]), (4, 6, *(3, 3, 3)[:axes])
    return [
        Case(lambda x, w, p=p: function(x, w, None, [1] * axes, p, [1] * axes, 1), (image,), (weight,))
        for p in ("valid", "same")
    ]


def attention() -> list[Case]:
    function, heads, keys = aten.scaled_dot_product_attention.default, (3, 4, 6), (3, 5, 6)
    seen = torch.ones(4, 5, dtype=torch.bool).tril()
    hidden = torch.ones(4, 5, dtype=torch.bool).tril(-1)  # the first row sees nothing
    return [
        Case(lambda q, k, v: function(q, k, v), ((2, 3, 4, 6), (2, 3, 5, 6), (2, 3, 5, 7))),
        Case(lambda q, k, v: function(q, k, v, None, 0.0, True), (heads, heads, heads)),
        Case(lambda q, k, v: function(q, k, v, hidden), (heads, keys, keys)),
        Case(lambda q, k, v, m: function(q, k, v, m), (heads, keys, keys, (1, 4, 5))),
        Case(lambda q, k, v, m: function(q, k, v, m), (heads, keys, keys), ((4, 5),)),
        Case(lambda x: function(x, x, x), (heads,)),
        Case(lambda q, x: function(q, x, x, scale=0.3), (heads, keys)),
        Case(lambda q, k, v: function(q, k, v, seen), (heads, keys, keys)),
        Case(lambda q, k, v: function(q, k, v, enable_gqa=True), ((2, 4, 4, 6), (2, 2, 5, 6), (2, 2, 5, 7))),
        Case(lambda q, k, v: function(q, k, v, enable_gqa=True), ((2, 4, 4, 6), (2, 1, 5, 6), (2, 1, 5, 7))),
    ]


def batch_norms() -> list[Case]:
    def apply(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        return aten.batch_norm.default(x, weight, bias, mean, variance.exp(), False, 0.1, 1e-5, False)

    vectors = ((6,),) * 4
    return [
        Case(apply, ((2, 6, 4),), vectors),
        Case(apply, ((2, 6),), vectors),
        Case(apply, (IMAGE,), vectors),
        Case(lambda x, m, v: apply(x, None, None, m, v), (IMAGE,), vectors[:2]),
        # A computed gain, a computed statistic.
        Case(lambda x, w, b, m, v: apply(x, w, b, m, v), ((2, 6, 4), (6,)), vectors[:3]),
        Case(lambda x, m, w, b, v: apply(x, w, b, m, v), ((2, 6, 4), (6,)), vectors[:3]),
        # Statistics of the batch.
        Case(
            lambda x, w, b: aten.batch_norm.default(x, w, b, None, None, True, 0.1, 1e-5, False), (IMAGE,), vectors[:2]
        ),
        Case(lambda x: aten.batch_norm.default(x, None, None, None, None, True, 0.1, 1e-5, False), ((5, 6),)),
    ]


def pieces() -> list[Case]:
    return [Case(lambda x: operator.getitem(aten.split.Tensor(x, 2, -1), 1), (SEQUENCE,))]


def _upsample(function: Callable[..., Tensor], axes: int, *flags: object) -> list[Case]:
    shape, size = (2, 6, 4, 8, 3)[: axes + 2], [7, 5, 2][:axes]
    return [Case(lambda x: function(x, size, *flags, None), (shape,))]


SCATTERED = ((1, (2, 2, 6)), (-1, (2, 4, 2)))
STACKED = (*(((2, 4, 6),) * n for n in (1, 2)), ((2, 4, 6), (1, 4, 6)))
WINDOWS = {1: (2, 6, 9), 2: (2, 6, 9, 7), 3: (2, 6, 5, 7, 4)}


def pools(function: Callable[..., Tensor], axes: int, *extra: tuple) -> list[Case]:
    """With and without padding, and what each operation has besides; also without a batch."""
    threes, ones, zeros = [3] * axes, [1] * axes, [0] * axes
    cases = [(threes, [2] * axes, zeros), (threes, ones, ones), (threes, [2] * axes, ones, *extra)]
    return unary(function, *cases, (threes, threes), shape=WINDOWS[axes]) + unary(
        function, cases[0], shape=WINDOWS[axes][1:]
    )


CASES: dict[object, list[Case]] = {
    # affine maps, sums and gates
    aten.batch_norm.default: batch_norms(),
    aten.addcmul.default: [
        Case(lambda x, s, c: aten.addcmul.default(s, x, c), (SEQUENCE,), ((6,), (6,))),
        Case(lambda x, s, c: aten.addcmul.default(s, c, x), (SEQUENCE,), ((4, 1), (1,))),
        Case(lambda x, s, c: aten.addcmul.default(s, x, c, value=2), (SEQUENCE,), ((6,), (6,))),
        Case(lambda x, s, c: aten.addcmul.default(s, x, c), (SEQUENCE, (6,)), ((6,),)),
        Case(lambda s, x, c: aten.addcmul.default(s, x, c), (SEQUENCE, SEQUENCE), ((6,),)),
        Case(lambda s, x, c: aten.addcmul.default(s, x, c), (SEQUENCE, SEQUENCE, SEQUENCE)),
    ],
    aten.mul.Tensor: binary(aten.mul.Tensor),
    aten.div.Tensor: binary(aten.div.Tensor, 2),
    aten.add.Tensor: [*binary(aten.add.Tensor), Case(lambda x, y: aten.add.Tensor(x, y, alpha=2), (SEQUENCE,) * 2)],
    aten.sub.Tensor: [
        *binary(aten.sub.Tensor, 2),
        Case(lambda x, c: aten.sub.Tensor(x, c, alpha=2), (SEQUENCE,), ((6,),)),
    ],
    aten.rsub.Tensor: [
        *binary(aten.rsub.Tensor, 3)[:-1],
        Case(lambda x, c: aten.rsub.Tensor(x, c, alpha=2), (SEQUENCE,), ((6,),)),
        Case(lambda x, y: aten.rsub.Tensor(x, y, alpha=0.5), (SEQUENCE, SEQUENCE)),
    ],
    aten.rsub.Scalar: unary(aten.rsub.Scalar, (1,), (2.5, 3)),
    aten.lerp.Scalar: [
        *(Case(lambda x, y: aten.lerp.Scalar(x, y, 0.3), shapes) for shapes in BROADCAST[:5]),
        Case(lambda x, c: aten.lerp.Scalar(x, c, 0.3), (SEQUENCE,), ((6,),)),
        Case(lambda x, c: aten.lerp.Scalar(c, x, 0.3), (SEQUENCE,), ((6,),)),
        Case(lambda x: aten.lerp.Scalar(x, x, 0.3), (SEQUENCE,)),
    ],
    aten.lerp.Tensor: [
        Case(lambda x, c, w: aten.lerp.Tensor(x, c, w), (SEQUENCE,), ((6,), (6,))),
        Case(lambda x, c, w: aten.lerp.Tensor(c, x, w), (SEQUENCE,), ((6,), (4, 1))),
        Case(lambda x, y, w: aten.lerp.Tensor(x, y, w), (SEQUENCE, SEQUENCE), ((6,),)),
    ],
    aten.addcdiv.default: [
        Case(lambda x, s, c: aten.addcdiv.default(s, x, c, value=2), (SEQUENCE,), ((6,), (6,))),
        Case(lambda x, s, c: aten.addcdiv.default(x, s, c), (SEQUENCE,), ((6,), (1,))),
        Case(lambda x, s, c: aten.addcdiv.default(s, c, x), (SEQUENCE,), ((6,), (6,))),
    ],
    aten.instance_norm.default: [
        Case(
            lambda x, w, b, m, v: aten.instance_norm.default(x, w, b, m, v.exp(), False, 0.1, 1e-5, False),
            (IMAGE,),
            ((6,),) * 4,
        ),
        Case(
            lambda x, m, v: aten.instance_norm.default(x, None, None, m, v.exp(), False, 0.1, 1e-5, False),
            (IMAGE,),
            ((6,),) * 2,
        ),
        Case(
            lambda x, w, b: aten.instance_norm.default(x, w, b, None, None, True, 0.1, 1e-5, False),
            (IMAGE,),
            ((6,),) * 2,
        ),
        Case(lambda x: aten.instance_norm.default(x, None, None, None, None, True, 0.1, 1e-5, False), (IMAGE,)),
    ],
    aten.neg.default: unary(aten.neg.default),
    # the same elements
    aten.dropout.default: [
        *unary(aten.dropout.default, (0.5, False)),
        Case(lambda x, c: x + aten.dropout.default(c, 0.5, False), (SEQUENCE,), ((4, 6),)),
    ],
    aten.feature_dropout.default: unary(aten.feature_dropout.default, (0.5, False)),
    aten.alpha_dropout.default: unary(aten.alpha_dropout.default, (0.5, False)),
    aten.feature_alpha_dropout.default: unary(aten.feature_alpha_dropout.default, (0.5, False)),
    aten.contiguous.default: unary(aten.contiguous.default),
    aten.clone.default: unary(aten.clone.default),
    aten.detach.default: unary(aten.detach.default),
    aten.alias.default: unary(aten.alias.default),
    aten.lift_fresh_copy.default: unary(aten.lift_fresh_copy.default),
    aten.to.dtype: unary(aten.to.dtype, (torch.float64,), (torch.int64,)),
    aten.to.dtype_layout: [Case(lambda x: aten.to.dtype_layout(x, dtype=torch.float64), (SEQUENCE,))],
    aten._to_copy.default: [Case(lambda x: aten._to_copy.default(x, dtype=torch.float64), (SEQUENCE,))],
    aten.view.default: unary(aten.view.default, ([8, 6],), ([2, 24],), ([2, 4, 2, 3],), ([2, 4, 6, 1],), ([-1],)),
    aten.reshape.default: unary(aten.reshape.default, ([4, 2, 6],), ([2, 6, 4],), ([8, 2, 3],)),
    aten._unsafe_view.default: unary(aten._unsafe_view.default, ([8, 6],)),
    aten.reshape_as.default: [
        Case(lambda x, y: aten.reshape_as.default(x, y), (SEQUENCE, (8, 6))),
        Case(lambda x, c: aten.reshape_as.default(c, x) + x, (SEQUENCE,), ((8, 6),)),
    ],
    aten.view_as.default: [
        Case(lambda x, y: aten.view_as.default(x, y), (SEQUENCE, (2, 2, 2, 6))),
        Case(lambda x, c: aten.view_as.default(c, x) + x, (SEQUENCE,), ((8, 6),)),
    ],
    aten.flatten.using_ints: unary(aten.flatten.using_ints, (), (1,), (0, 1), (-2, -1)),
    aten.ravel.default: unary(aten.ravel.default),
    aten.unflatten.int: unary(aten.unflatten.int, (2, [3, 2]), (-2, [2, 2])),
    aten.unsqueeze.default: unary(aten.unsqueeze.default, (0,), (-1,), (2,)),
    aten.squeeze.default: unary(aten.squeeze.default, shape=(2, 1, 4, 6, 1)),
    aten.squeeze.dim: unary(aten.squeeze.dim, (1,), (-1,), (0,), shape=(2, 1, 4, 6, 1)),
    aten.squeeze.dims: unary(aten.squeeze.dims, ([1, -1],), shape=(2, 1, 4, 6, 1)),
    # axes
    aten.permute.default: unary(aten.permute.default, ([2, 0, 1],), ([0, -1, 1],)),
    aten.transpose.int: unary(aten.transpose.int, (0, 1), (-1, 1)),
    aten.t.default: unary(aten.t.default, shape=(4, 6)) + unary(aten.t.default, shape=(6,)),
    aten.numpy_T.default: unary(aten.numpy_T.default),
    aten.mT.default: unary(aten.mT.default),
    aten.adjoint.default: unary(aten.adjoint.default),
    aten.mH.default: unary(aten.mH.default, shape=(4, 6)),
    aten.movedim.int: unary(aten.movedim.int, (0, 2), (-1, 0)),
    aten.movedim.intlist: unary(aten.movedim.intlist, ([0, 1], [1, -1])),
    aten.expand.default: unary(aten.expand.default, ([3, 2, 4, 6],), ([-1, 4, -1],), shape=(2, 1, 6))[1:]
    + unary(aten.expand.default, ([3, 2, 4, 6],)),
    aten.expand_as.default: [Case(lambda x, y: aten.expand_as.default(x, y), ((4, 1), SEQUENCE))],
    aten.broadcast_to.default: unary(aten.broadcast_to.default, ([2, 4, 6],), shape=(4, 1)),
    aten.repeat.default: unary(aten.repeat.default, ([1, 2, 3],), ([3, 1, 1, 2],)),
    # parts
    aten.slice.Tensor: unary(aten.slice.Tensor, (2, 1, 5, 2), (-1, -4), (1, 0, 2), (2,)),
    aten.select.int: unary(aten.select.int, (2, 1), (-1, -2), (1, 3)),
    aten.split.Tensor: unary(aten.split.Tensor, (4, 2), (3, -2)),
    aten.split.sizes: unary(aten.split.sizes, ([1, 2, 3], 2), ([1, 3], -2)),
    aten.split_with_sizes.default: unary(aten.split_with_sizes.default, ([1, 2, 3], -1)),
    aten.chunk.default: unary(aten.chunk.default, (4, 2), (2,)),
    aten.unbind.int: unary(aten.unbind.int, (2,), (-2,), ()),
    aten.tensor_split.sections: unary(aten.tensor_split.sections, (4, 2), (3, -2)),
    aten.tensor_split.indices: unary(aten.tensor_split.indices, ([1, 4], 2), ([3], -2)),
    operator.getitem: pieces(),
    aten.roll.default: unary(
        aten.roll.default, ([1], [2]), ([1, -2], [-1, 1]), ([5],), ([7, 1], [2, 2]), shape=SEQUENCE
    ),
    aten.index_select.default: [
        Case(lambda x, d=d: aten.index_select.default(x, d, torch.tensor([1, 0, 1])), (SEQUENCE,)) for d in (2, -2)
    ]
    + [Case(lambda x: aten.index_select.default(x, 2, x[0, 0].argsort()), (SEQUENCE,))],
    aten.index.Tensor: [
        *unary(
            lambda x, *indices: aten.index.Tensor(x, list(indices)),
            (None, torch.tensor([2, 0, 1])),
            (None, None, torch.tensor([[2, -1], [0, 5]])),
            (torch.tensor([1, 0]), torch.tensor([[3], [0]])),
            (torch.tensor([1, 0]), None, torch.tensor([3, 5])),
            (None, torch.tensor([True, False, True, True])),
            (torch.ones(2, 4, dtype=torch.bool).triu(),),
            (None, torch.ones(4, 6, dtype=torch.bool).triu()),
        ),
        Case(lambda x: aten.index.Tensor(x, [None, x[0, :, 0].argsort()]), (SEQUENCE,)),
        Case(lambda x: aten.index.Tensor(x, [None, None, x[0, 0].argsort()]), (SEQUENCE,)),
    ],
    aten.gather.default: [
        Case(lambda x, d=d: aten.gather.default(x, d, torch.ones(2, 3, 2, dtype=torch.int64)), (SEQUENCE,))
        for d in (1, -1)
    ],
    aten.take_along_dim.default: [
        Case(lambda x, d=d: aten.take_along_dim.default(x, torch.ones(1, 1, 1, dtype=torch.int64), d), (SEQUENCE,))
        for d in (1, -1, None)
    ],
    aten.flip.default: unary(aten.flip.default, ([2],), ([0, -2],)),
    aten.narrow.default: unary(aten.narrow.default, (2, 1, 3), (-2, -2, 2), (2, 4, 2)),
    aten.repeat_interleave.self_Tensor: [
        Case(lambda x, d=d: aten.repeat_interleave.self_Tensor(x, torch.arange(1, 1 + COUNTS[d]), d), (SEQUENCE,))
        for d in COUNTS
    ]
    + [
        Case(
            lambda x: aten.repeat_interleave.self_Tensor(
                x, (x[0, 0] > 9).to(torch.int64) + 1, 2, output_size=x.shape[2]
            ),
            (SEQUENCE,),
        )
    ],
    aten.diff.default: unary(aten.diff.default, (), (1, 1), (2, -1), (0, 1)),
    aten.quantile.scalar: unary(aten.quantile.scalar, (0.3, 1), (0.5, -1, True), (0.2,)),
    aten.nanquantile.scalar: unary(aten.nanquantile.scalar, (0.3, 1), (0.5, -1, True)),
    aten.repeat_interleave.self_int: unary(aten.repeat_interleave.self_int, (2, 2), (3, -2), (2,)),
    aten.unfold.default: unary(aten.unfold.default, (2, 3, 2), (1, 2, 1)),
    aten.diagonal.default: unary(aten.diagonal.default, (0, 1, 2), (1, 1, 2), (-1, 0, 2)),
    aten.channel_shuffle.default: unary(aten.channel_shuffle.default, (3,), shape=IMAGE)
    + unary(aten.channel_shuffle.default, (2,)),
    aten.im2col.default: unary(
        aten.im2col.default, ([2, 3], [1, 1], [0, 0], [1, 1]), ([2, 2], [1, 1], [1, 0], [2, 1]), shape=IMAGE
    )
    + unary(aten.im2col.default, ([2, 3], [1, 1], [0, 0], [1, 1]), shape=IMAGE[1:]),
    aten.col2im.default: unary(aten.col2im.default, ([3, 4], [2, 2], [1, 1], [0, 0], [1, 1]), shape=(2, 12, 6)),
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
    # pointwise
    aten.relu.default: unary(aten.relu.default),
    aten.leaky_relu.default: unary(aten.leaky_relu.default, (0.2,), (-0.3,)),
    aten.abs.default: unary(aten.abs.default),
    aten.rrelu.default: unary(aten.rrelu.default),
    aten.prelu.default: [
        Case(aten.prelu.default, (SEQUENCE,), ((4,),)),
        Case(aten.prelu.default, (IMAGE,), ((1,),)),
        Case(aten.prelu.default, (SEQUENCE, (4,))),
    ],
    aten.clamp.default: unary(aten.clamp.default, (0,), (None, 0.0), (-math.inf, 0), (0, 6), (-1.0,)),
    aten.clamp_min.default: unary(aten.clamp_min.default, (0,), (0.5,)),
    aten.clamp_max.default: unary(aten.clamp_max.default, (0,), (0.5,)),
    aten.clamp.Tensor: [
        Case(lambda x, c: aten.clamp.Tensor(x, c * 0.0), (SEQUENCE,), ((6,),)),
        Case(lambda x, c: aten.clamp.Tensor(x, None, c), (SEQUENCE,), ((6,),)),
        Case(lambda x, y: aten.clamp.Tensor(x, y), (SEQUENCE, SEQUENCE)),
    ],
    aten.clamp_min.Tensor: [
        Case(lambda x, c, f=f: aten.clamp_min.Tensor(x, c * f), (SEQUENCE,), ((6,),)) for f in (0.0, 1.0)
    ],
    aten.clamp_max.Tensor: [
        Case(lambda x, c, f=f: aten.clamp_max.Tensor(x, c * f), (SEQUENCE,), ((6,),)) for f in (0.0, 1.0)
    ],
    aten.hardtanh.default: unary(aten.hardtanh.default, (0.0, math.inf), (0.0, 6.0), ()),
    aten.threshold.default: unary(aten.threshold.default, (0, 0), (1, 0), (0, 1)),
    **{
        target: [
            Case(lambda x, c, t=target: t(x, c * 0.0), (SEQUENCE,), ((6,),)),
            Case(lambda x, c, t=target: t(c * 0.0, x), (SEQUENCE,), ((6,),)),
            *binary(target)[:-1:3],
        ]
        for target in (aten.maximum.default, aten.minimum.default)
    },
    **{
        target: [
            Case(lambda x, t=target: x + t(x, 0.0), (SEQUENCE,)),
            Case(lambda x, t=target: t(x, 0.0).to(torch.float64), (SEQUENCE,)),
            Case(lambda x, t=target: t(x, 0.5).to(torch.float64), (SEQUENCE,)),
        ]
        for target in (aten.gt.Scalar, aten.ge.Scalar, aten.lt.Scalar, aten.le.Scalar)
    },
    aten.masked_fill.Scalar: [
        Case(lambda x, v=v, m=m: aten.masked_fill.Scalar(x, m.to(x.device), v), (shape,))
        for m in (torch.tensor([True, False, False] * 2), torch.ones(2, 4, 6, dtype=torch.bool).triu())
        for v, shape in ((0, SEQUENCE), (0.0, (2, 1, 6)), (-1.0, SEQUENCE), (0, (6,)))
    ],
    aten.masked_fill.Tensor: [
        Case(
            lambda x, v=v: aten.masked_fill.Tensor(x, torch.ones(4, 6, dtype=torch.bool).triu(), torch.tensor(v)),
            (SEQUENCE,),
        )
        for v in (0.0, -1.0)
    ],
    aten.where.self: [
        *(
            Case(lambda x, y, m=m: aten.where.self(m, x, y), shapes)
            for m, shapes in zip((MASK, MASK[:, :1]) * 3, BROADCAST[:5], strict=False)
        ),
        Case(lambda x: aten.where.self(MASK, x, x), (SEQUENCE,)),
        Case(lambda x: aten.where.self(MASK, x, aten.zeros_like.default(x)), (SEQUENCE,)),
        Case(lambda x: aten.where.self(x > 0, aten.zeros_like.default(x), x), (SEQUENCE,)),
        Case(lambda x, y: aten.where.self(x > 0, x, aten.zeros_like.default(y)), ((2, 1, 6), SEQUENCE)),
        Case(lambda x: aten.where.self(MASK, x, torch.flip(x, [1])), (SEQUENCE,)),
        Case(lambda x, c: aten.where.self(MASK, c, x), (SEQUENCE,), ((6,),)),
        Case(lambda x, c: aten.where.self(MASK, c * 0.0, x), (SEQUENCE,), ((6,),)),
    ],
    aten.where.ScalarOther: unary(lambda x, v: aten.where.ScalarOther(x > 0, x, v), (0,), (0.5,))
    + unary(lambda x: aten.where.ScalarOther(MASK, x, 0)),
    aten.slice_scatter.default: [
        *(Case(lambda x, y, d=d: aten.slice_scatter.default(x, y, d, 1, 3), (SEQUENCE, s)) for d, s in SCATTERED),
        Case(lambda x: aten.slice_scatter.default(x, x[:, 2:], 1, 0, 2), (SEQUENCE,)),
        Case(lambda x, c: aten.slice_scatter.default(x, c, 1, 1, 3), (SEQUENCE,), ((2, 2, 6),)),
    ],
    aten.select_scatter.default: [
        Case(lambda x, y: aten.select_scatter.default(x, y, 1, 2), (SEQUENCE, (2, 6))),
        Case(lambda x, y: aten.select_scatter.default(x, y, -1, 2), (SEQUENCE, (2, 4))),
    ],
    aten.index_copy.default: [
        Case(lambda x, y, d=d: aten.index_copy.default(x, d, torch.tensor([2, 0]), y), (SEQUENCE, s))
        for d, s in SCATTERED
    ],
    aten.scatter.src: [
        Case(lambda x, y, d=d, s=s: aten.scatter.src(x, d, torch.zeros(s, dtype=torch.int64), y), (SEQUENCE, s))
        for d, s in SCATTERED
    ],
    aten.where.ScalarSelf: unary(lambda x, v: aten.where.ScalarSelf(MASK, v, x), (0,), (0.5,)),
    aten.square.default: unary(aten.square.default),
    aten.sqrt.default: unary(lambda x: aten.sqrt.default(x.abs())),
    aten.rsqrt.default: unary(lambda x: aten.rsqrt.default(x.abs())),
    aten.reciprocal.default: unary(aten.reciprocal.default),
    aten.pow.Tensor_Scalar: [
        *unary(aten.pow.Tensor_Scalar, (2,), (3,), (0,), (-2,)),
        Case(lambda x: aten.pow.Tensor_Scalar(x.relu(), 1.5), (SEQUENCE,)),
        Case(lambda x: aten.pow.Tensor_Scalar(x, 2) + x.relu(), (SEQUENCE,)),
    ],
    aten.glu.default: unary(aten.glu.default, (), (1,), shape=(2, 4, 6)),
    # several values
    aten.cat.default: [
        *(Case(lambda *xs, d=d: aten.cat.default(list(xs), d), (SEQUENCE, SEQUENCE)) for d in (0, 1, -1)),
        Case(lambda *xs: aten.cat.default(list(xs), 2), (SEQUENCE, (2, 4, 1), (2, 4, 3))),
        Case(lambda *xs: aten.cat.default(list(xs), 1), (SEQUENCE, (2, 1, 6)), ((2, 3, 6),)),
        Case(lambda x, c: aten.cat.default([c, x], -1), (SEQUENCE,), ((2, 4, 5),)),
        *(Case(lambda x, d=d: aten.cat.default([x, x], d), (SEQUENCE,)) for d in (1, -1)),
        Case(lambda x: aten.cat.default([x[:, 2:], x[:, :2]], 1), (SEQUENCE,)),
        Case(lambda x: aten.cat.default([x, x.flip(1), x.tanh()], 1), (SEQUENCE,)),
    ],
    aten.stack.default: [
        *(Case(lambda *xs, d=d: aten.stack.default(list(xs), d), (SEQUENCE, SEQUENCE)) for d in (0, 2, -1)),
        Case(lambda x, c: aten.stack.default([c, x], 1), (SEQUENCE,), (SEQUENCE,)),
    ],
    # products
    aten.linear.default: [
        Case(lambda x, w: aten.linear.default(x, w), (SEQUENCE,), ((5, 6),)),
        Case(lambda x, w, b: aten.linear.default(x, w, b), (SEQUENCE,), ((5, 6), (5,))),
        Case(lambda x, w, b: aten.linear.default(x, w, b), ((6,),), ((5, 6), (5,))),
        Case(lambda x, w: aten.linear.default(x, w), (SEQUENCE,), ((6,),)),
        Case(lambda x, w, b: aten.linear.default(x, w, b), ((4, 6),), ((5, 6), (1,))),
        Case(lambda x, w, b: aten.linear.default(x, w, b), ((4, 6),), ((5, 6), (4, 5))),
        Case(lambda x, w: aten.linear.default(x, w), (SEQUENCE, (5, 6))),
        Case(lambda x, b, w: aten.linear.default(x, w, b), (SEQUENCE, (5,)), ((5, 6),)),
        Case(lambda w, x, b: aten.linear.default(x, w, b), ((5, 6),), (SEQUENCE, (5,))),
    ],
    aten.addmm.default: [
        Case(lambda x, w, b: aten.addmm.default(b, x, w), ((4, 6),), ((6, 5), (5,))),
        Case(lambda x, w, b: aten.addmm.default(b, x, w), ((4, 6),), ((6, 5), (1,))),
        Case(lambda x, w, b: aten.addmm.default(b, x, w), ((4, 6),), ((6, 5), (4, 5))),
        Case(lambda x, w, b: aten.addmm.default(b, x, w, beta=2, alpha=3), ((4, 6),), ((6, 5), (5,))),
        Case(lambda w, x, b: aten.addmm.default(b, x, w), ((6, 5),), ((4, 6), (5,))),
        Case(lambda b, x, w: aten.addmm.default(b, x, w), ((5,), (4, 6)), ((6, 5),)),
        Case(lambda b, x, w: aten.addmm.default(b, x, w), ((5,), (4, 6), (6, 5))),
    ],
    aten.matmul.default: [
        Case(aten.matmul.default, (SEQUENCE,), ((6, 5),)),
        Case(aten.matmul.default, (SEQUENCE,), ((2, 6, 5),)),
        Case(aten.matmul.default, (SEQUENCE,), ((6,),)),
        Case(aten.matmul.default, ((6,),), ((6, 5),)),
        Case(lambda x, w: aten.matmul.default(w, x), (SEQUENCE,), ((5, 4),)),
        Case(lambda x, w: aten.matmul.default(w, x), (SEQUENCE,), ((2, 5, 4),)),
        Case(lambda x, w: aten.matmul.default(w, x), ((4, 6),), ((5, 4),)),
        Case(lambda x, w: aten.matmul.default(w, x), ((4,),), ((5, 4),)),
        Case(aten.matmul.default, (SEQUENCE,), ((1, 6, 5),)),
        Case(aten.matmul.default, ((1, 4, 6),), ((3, 6, 5),)),
        Case(aten.matmul.default, ((4, 6),), ((3, 2, 6, 5),)),
        Case(aten.matmul.default, ((6,),), ((2, 6, 5),)),
        Case(aten.matmul.default, ((2, 3, 4, 5), (2, 3, 5, 6))),
        Case(aten.matmul.default, ((3, 4, 5), (2, 3, 5, 6))),
        Case(aten.matmul.default, ((2, 3, 4, 5), (5, 6))),
        Case(aten.matmul.default, ((4, 5), (2, 5, 6))),
        Case(aten.matmul.default, ((5,), (2, 5, 6))),
        Case(lambda x: aten.matmul.default(x, x), ((2, 4, 4),)),
        Case(lambda x, y: aten.matmul.default(x.softmax(-1), y), ((2, 3, 4, 5), (2, 3, 5, 6))),
        Case(lambda x, y: aten.matmul.default(x.softmax(-1).view(6, 4, 5), y), ((2, 3, 4, 5), (6, 5, 6))),
        Case(lambda x, y: aten.matmul.default(y, x.softmax(-1).mT.transpose(1, 2)), ((2, 4, 5), (2, 3, 4))),
        Case(lambda x, y: aten.matmul.default(x.softmax(-2), y), ((2, 4, 5), (2, 5, 6))),
        Case(lambda x, y: aten.matmul.default(y, x.softmax(-1).transpose(1, 2)), ((2, 4, 5), (2, 3, 5))),
    ],
    aten.mm.default: [
        Case(aten.mm.default, ((4, 6),), ((6, 5),)),
        Case(lambda x, w: aten.mm.default(w, x), ((4, 6),), ((5, 4),)),
        Case(aten.mm.default, ((4, 6), (6, 5))),
    ],
    aten.bmm.default: [
        Case(aten.bmm.default, ((2, 4, 5), (2, 5, 6))),
        Case(aten.bmm.default, ((2, 4, 5),), ((2, 5, 6),)),
        Case(lambda x, w: aten.bmm.default(w, x), ((2, 5, 6),), ((2, 4, 5),)),
    ],
    aten.baddbmm.default: [
        Case(lambda x, w, b: aten.baddbmm.default(b, x, w), ((2, 4, 6),), ((2, 6, 5), (5,))),
        Case(lambda x, w, b: aten.baddbmm.default(b, x, w, beta=2, alpha=3), ((2, 4, 6),), ((2, 6, 5), (2, 1, 5))),
        Case(lambda x, w, b: aten.baddbmm.default(b, w, x, alpha=3), ((2, 6, 5),), ((2, 4, 6), (2, 4, 5))),
        Case(lambda x, w, b: aten.baddbmm.default(b, x, w, beta=0), ((2, 4, 6),), ((2, 6, 5), (5,))),
        Case(lambda x, y, b: aten.baddbmm.default(b, x, y), ((2, 4, 6), (2, 6, 5)), ((5,),)),
    ],
    aten.addbmm.default: [
        Case(lambda x, w, b: aten.addbmm.default(b, x, w), ((2, 4, 6),), ((2, 6, 5), (5,))),
        Case(lambda x, w, b: aten.addbmm.default(b, w, x, beta=2, alpha=3), ((2, 6, 5),), ((2, 4, 6), (4, 5))),
    ],
    aten.addmv.default: [
        Case(lambda x, w, b: aten.addmv.default(b, x, w, alpha=2), ((4, 6),), ((6,), (4,))),
        Case(lambda x, w, b: aten.addmv.default(b, w, x, beta=3), ((6,),), ((4, 6), (4,))),
    ],
    aten.mv.default: [
        Case(aten.mv.default, ((4, 6),), ((6,),)),
        Case(lambda x, w: aten.mv.default(w, x), ((6,),), ((4, 6),)),
    ],
    aten.outer.default: [
        Case(aten.outer.default, ((4,),), ((6,),)),
        Case(lambda x, w: aten.outer.default(w, x), ((6,),), ((4,),)),
    ],
    aten.inner.default: [
        Case(aten.inner.default, (SEQUENCE,), ((3, 6),)),
        Case(lambda x, w: aten.inner.default(w, x), (SEQUENCE,), ((3, 5, 6),)),
        Case(aten.inner.default, (SEQUENCE,), ((6,),)),
    ],
    aten.tensordot.default: [
        Case(lambda x, w, d=d: aten.tensordot.default(x, w, *d), (SEQUENCE,), (w,))
        for w, d in (((6, 5), ([2], [0])), ((5, 6, 4), ([-1, 1], [1, 2])), ((5, 4), ([1], [-1])))
    ]
    + [Case(lambda x, w: aten.tensordot.default(w, x, [1], [2]), (SEQUENCE,), ((5, 6),))],
    aten.einsum.default: [
        Case(lambda x, w, e=e: aten.einsum.default(e, [x, w]), (x,), (w,))
        for e, x, w in (
            ("bsi,io->bso", SEQUENCE, (6, 5)),
            ("...i,oi->...o", SEQUENCE, (5, 6)),
            ("... i, i o -> ... o", SEQUENCE, (6, 5)),
            ("i...,io->o...", (6, 4, 2), (6, 6)),
            ("...i,...io->...o", SEQUENCE, (4, 6, 5)),
            ("b...i,b...io->b...o", SEQUENCE, (2, 4, 6, 5)),
            ("bsi,io->bos", SEQUENCE, (6, 5)),
            ("bsi,io->bo", SEQUENCE, (6, 5)),
            ("bsi,so->bio", SEQUENCE, (4, 5)),
            ("bsi,ii->bsi", SEQUENCE, (6, 6)),
            ("...i,io->o", SEQUENCE, (6, 5)),
            ("bsi,eio->beso", SEQUENCE, (3, 6, 5)),
            ("bsi,sio->bso", SEQUENCE, (4, 6, 5)),
            ("bsi,sio->ob", SEQUENCE, (4, 6, 5)),
            ("bsi,i->bs", SEQUENCE, (6,)),
            ("bsi,i->bsi", SEQUENCE, (6,)),
            ("bsi,si", SEQUENCE, (4, 6)),
            ("b...,...o->b...o", SEQUENCE, (1, 6, 3)),
            ("bsi,sio->bso", SEQUENCE, (1, 6, 5)),
            ("bsi,so->bo", SEQUENCE, (4, 5)),
        )
    ]
    + [
        Case(lambda x, e=e: aten.einsum.default(e, [x]), (SEQUENCE,))
        for e in ("bsi->bi", "bsi->ibs", "bsi->", "bsi -> bs", "bsi")
    ]
    + [Case(lambda x: aten.einsum.default("bii->bi", [x]), ((2, 4, 4),))]
    + [
        Case(lambda x, y: aten.einsum.default("bij,bjk->bik", [x, y]), ((2, 4, 6), (2, 6, 5))),
        Case(lambda x, y: aten.einsum.default("bij,bjk->kbi", [x.softmax(2), y]), ((2, 4, 6), (2, 6, 5))),
        Case(lambda x, y: aten.einsum.default("bij,bik->bkj", [x.softmax(1), y]), ((2, 4, 6), (2, 4, 5))),
        Case(lambda x, y: aten.einsum.default("bij,bjk->bk", [x.softmax(2), y]), ((2, 4, 6), (2, 6, 5))),
        Case(lambda x, y: aten.einsum.default("bjk,bij->bik", [y, x.softmax(1)]), ((2, 4, 6), (2, 6, 5))),
        Case(lambda x: aten.einsum.default("bij,bik->bjk", [x, x]), (SEQUENCE,)),
        Case(lambda w, x: aten.einsum.default("bsi,io->bso", [x, w]), ((6, 5),), (SEQUENCE,)),
        Case(lambda x, w: aten.einsum.default("oi,bsi->bso", [w, x]), (SEQUENCE,), ((5, 6),)),
    ],
    aten.conv1d.default: convolutions(aten.conv1d.default, 1)[::3],
    aten.conv2d.default: convolutions(aten.conv2d.default, 2),
    aten.conv3d.default: convolutions(aten.conv3d.default, 3)[::3],
    aten.conv1d.padding: named_padding(aten.conv1d.padding, 1),
    aten.conv2d.padding: named_padding(aten.conv2d.padding, 2),
    aten.conv3d.padding: named_padding(aten.conv3d.padding, 3),
    aten.conv_transpose1d.default: convolutions(aten.conv_transpose1d.default, 1, transposed=True)[::3],
    aten.conv_transpose2d.input: convolutions(aten.conv_transpose2d.input, 2, transposed=True),
    aten.conv_transpose3d.input: convolutions(aten.conv_transpose3d.input, 3, transposed=True)[::3],
    # the rest
    aten.embedding.default: [
        Case(lambda x, w: aten.embedding.default(w, x.round().abs().to(torch.int64) % 7), (SEQUENCE,), ((7, 5),)),
        Case(lambda w: aten.embedding.default(w, torch.tensor([[1, 3], [0, 1]])), ((4, 6),)),
    ],
    aten.layer_norm.default: [
        Case(lambda x, w, b: aten.layer_norm.default(x, [6], w, b), (SEQUENCE,), ((6,), (6,))),
        Case(lambda x: aten.layer_norm.default(x, [6]), (SEQUENCE,)),
        Case(lambda x, w: aten.layer_norm.default(x, [6], w, w), (SEQUENCE,), ((6,),)),
        Case(lambda x: aten.layer_norm.default(x, [4, 6]), (SEQUENCE,)),
        Case(lambda x, w, b: aten.layer_norm.default(x, [4, 6], w, b), (SEQUENCE,), ((4, 6), (4, 6))),
        Case(lambda x, w, b: aten.layer_norm.default(x, [6], w, b), (SEQUENCE, (6,)), ((6,),)),
    ],
    aten.group_norm.default: [
        Case(lambda x, w, b: aten.group_norm.default(x, 2, w, b), (IMAGE,), ((6,), (6,))),
        Case(lambda x: aten.group_norm.default(x, 2), (IMAGE,)),
        Case(lambda x, w: aten.group_norm.default(x, 1, w), (IMAGE, (6,))),
    ],
    aten.rms_norm.default: [
        Case(lambda x, w: aten.rms_norm.default(x, [6], w), (SEQUENCE,), ((6,),)),
        Case(lambda x: aten.rms_norm.default(x, [6]), (SEQUENCE,)),
        Case(lambda x, w: aten.rms_norm.default(x, [4, 6], w), (SEQUENCE,), ((4, 6),)),
        Case(lambda w, x: aten.rms_norm.default(x, [6], w), ((6,), SEQUENCE)),
    ],
    aten.scaled_dot_product_attention.default: attention(),
}
