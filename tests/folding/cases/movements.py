"""Operations that move elements: shapes, axes, parts, several values in one."""

from __future__ import annotations

import operator

import torch

from .base import COUNTS, IMAGE, SEQUENCE, Case, unary

aten = torch.ops.aten


def pieces() -> list[Case]:
    return [Case(lambda x: operator.getitem(aten.split.Tensor(x, 2, -1), 1), (SEQUENCE,))]


STACKED = (*(((2, 4, 6),) * n for n in (1, 2)), ((2, 4, 6), (1, 4, 6)))


CASES: dict[object, list[Case]] = {
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
}
