"""Affine maps, sums, gates, and functions of single numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .base import BROADCAST, CONSTANTS, IMAGE, MASK, SEQUENCE, Case, binary, unary

aten = torch.ops.aten


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


SCATTERED = ((1, (2, 2, 6)), (-1, (2, 4, 2)))


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
    aten.mul.Tensor: [
        *binary(aten.mul.Tensor),
        *unary(aten.mul.Tensor, (MASK,)),
        *unary(lambda x: aten.mul.Tensor(x > 0, x)),
        *unary(lambda x: aten.mul.Tensor(x, aten.full_like.default(x, 0.3))),
    ],
    aten.div.Tensor: [
        *binary(aten.div.Tensor, 2),
        *unary(lambda x: aten.div.Tensor(x, (x > 0).sum(1, keepdim=True) + 1)),
        *unary(lambda x: aten.div.Tensor((x > 0).long(), x)),
    ],
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
    ]
    + [Case(lambda x: aten.masked_fill.Scalar(x, ~MASK, -math.inf).amax(1), (SEQUENCE,))],
    aten.masked_fill.Tensor: [
        Case(
            lambda x, v=v: aten.masked_fill.Tensor(x, torch.ones(4, 6, dtype=torch.bool).triu(), torch.tensor(v)),
            (SEQUENCE,),
        )
        for v in (0.0, -1.0)
    ]
    + [Case(lambda x: aten.masked_fill.Tensor(x, ~MASK, torch.tensor(math.inf)).amin(1), (SEQUENCE,))],
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
        Case(lambda x, c: aten.where.self(~MASK, c.abs() * math.inf, x).amin(1), (SEQUENCE,), ((1,),)),
    ],
    aten.where.ScalarOther: unary(lambda x, v: aten.where.ScalarOther(x > 0, x, v), (0,), (0.5,))
    + unary(lambda x: aten.where.ScalarOther(MASK, x, 0))
    + unary(lambda x: aten.where.ScalarOther(MASK, x, -math.inf).amax(1)),
    aten.slice_scatter.default: [
        *(Case(lambda x, y, d=d: aten.slice_scatter.default(x, y, d, 1, 3), (SEQUENCE, s)) for d, s in SCATTERED),
        Case(lambda x: aten.slice_scatter.default(x, x[:, 2:], 1, 0, 2), (SEQUENCE,)),
        Case(lambda x, c: aten.slice_scatter.default(x, c, 1, 1, 3), (SEQUENCE,), ((2, 2, 6),)),
        Case(lambda x, y: aten.slice_scatter.default(x, y, 2, None, -1, 2), (SEQUENCE, (2, 4, 3))),
        Case(lambda x: aten.slice_scatter.default(aten.empty_like.default(x) * 0.0, x, 2), (SEQUENCE,)),
        Case(lambda x: aten.slice_scatter.default(aten.new_zeros.default(x, [2, 4, 9]), x, 2, 2, 8), (SEQUENCE,)),
        Case(lambda x: aten.slice_scatter.default(aten.zeros_like.default(x), x[:, 1:], 1, 0, 3), (SEQUENCE,)),
    ],
    aten.select_scatter.default: [
        Case(lambda x, y: aten.select_scatter.default(x, y, 1, 2), (SEQUENCE, (2, 6))),
        Case(lambda x, y: aten.select_scatter.default(x, y, -1, 2), (SEQUENCE, (2, 4))),
        Case(lambda x: aten.select_scatter.default(x, aten.zero.default(x[..., 0]), -1, -1), (SEQUENCE,)),
        Case(lambda x, y: aten.select_scatter.default(x, aten.copy.default(x[:, 1], y), 1, 1), (SEQUENCE, (2, 1))),
    ],
    aten.index_copy.default: [
        Case(lambda x, y, d=d: aten.index_copy.default(x, d, torch.tensor([2, 0]), y), (SEQUENCE, s))
        for d, s in SCATTERED
    ],
    aten.scatter.src: [
        Case(lambda x, y, d=d, s=s: aten.scatter.src(x, d, torch.zeros(s, dtype=torch.int64), y), (SEQUENCE, s))
        for d, s in SCATTERED
    ],
    aten.index_add.default: [
        Case(lambda x, y, d=d: aten.index_add.default(x, d, torch.tensor([2, 0]), y, alpha=2), (SEQUENCE, s))
        for d, s in SCATTERED
    ],
    aten.scatter_add.default: [
        Case(lambda x, y, d=d, s=s: aten.scatter_add.default(x, d, torch.zeros(s, dtype=torch.int64), y), (SEQUENCE, s))
        for d, s in SCATTERED
    ]
    + [Case(lambda x, c: aten.scatter_add.default(c, 1, torch.zeros(2, 4, 6).long(), x), (SEQUENCE,), ((2, 3, 6),))],
    aten.index_put.default: [
        *(
            Case(lambda x, y, i=i, a=a: aten.index_put.default(x, [*i, torch.tensor([2, 0])], y, a), (SEQUENCE, s))
            for i, s in (([], SEQUENCE), ([None], (2, 2, 6)), ([None, None], (2, 4, 2)))
            for a in (False, True)
            if i
        ),
        Case(
            lambda x, y: aten.index_put.default(x, [torch.tensor([1, 0]), torch.tensor([3, 2])], y), (SEQUENCE, (2, 6))
        ),
        Case(lambda x, y: aten.index_put.default(x, [None, torch.tensor([3, 2])], y), (SEQUENCE, (6,))),
        Case(lambda x, y: aten.index_put.default(x, [MASK[:2, 0]], y), (SEQUENCE, (1, 4, 6))),
        Case(lambda x, y: aten.index_put.default(x, [MASK[:2, :4]], y), (SEQUENCE, (6,))),
        Case(lambda x, y: aten.index_put.default(x, [None, torch.tensor([[0], [2]])], y), (SEQUENCE, (2, 1, 6))),
        Case(lambda x, y: aten.index_put.default(x, [torch.tensor([1]), None, torch.tensor([2])], y), (SEQUENCE, (4,))),
        *(
            Case(lambda x, i=i: aten.index_put.default(x, i, torch.tensor(0.0, dtype=x.dtype)), (SEQUENCE,))
            for i in ([MASK[:2, :4]], [None, None, torch.tensor([1, 4])], [torch.tensor([1]), None, torch.tensor([2])])
        ),
    ],
    aten.scatter_reduce.two: [
        Case(
            lambda x, y, d=d, s=s, r=r: aten.scatter_reduce.two(x, d, torch.zeros(s, dtype=torch.int64), y, r),
            (SEQUENCE, s),
        )
        for d, s in SCATTERED
        for r in ("sum", "mean", "amax", "prod")
    ],
    aten.index_reduce.default: [
        Case(
            lambda x, y, d=d, r=r: aten.index_reduce.default(x, d, torch.tensor([2, 0]), y, r, include_self=False),
            (SEQUENCE, s),
        )
        for d, s in SCATTERED
        for r in ("mean", "amin", "prod")
    ],
    aten.index_fill.int_Scalar: unary(
        aten.index_fill.int_Scalar, *((d, torch.tensor([1]), v) for d in (1, 2) for v in (0, 1))
    ),
    aten.scatter.value: unary(
        aten.scatter.value, *((d, torch.ones(2, 2, 1).long(), v) for d in (1, 2) for v in (0.0, 1.0))
    ),
    aten.tril.default: unary(aten.tril.default, (), (1,)),
    aten.triu.default: unary(aten.triu.default, (), (1,)),
    aten.where.ScalarSelf: unary(lambda x, v: aten.where.ScalarSelf(MASK, v, x), (0,), (0.5,))
    + unary(lambda x: aten.where.ScalarSelf(~MASK, -math.inf, x).amax(1)),
    aten.square.default: unary(aten.square.default),
    aten.mse_loss.default: [
        *(Case(lambda x, c: aten.mse_loss.default(x, c, 0), (SEQUENCE,), (shape,)) for shape in CONSTANTS),
        *(Case(lambda x, c: aten.mse_loss.default(x, c, 0), (shape,), ((6,),)) for shape in ((2, 1, 6), (6,))),
        Case(lambda x, c: aten.mse_loss.default(c, x, 0), (SEQUENCE,), ((6,),)),
        Case(lambda x, c: aten.mse_loss.default(x.relu(), c, 0).square(), (SEQUENCE,), ((6,),)),
        Case(lambda x, c: aten.mse_loss.default(x, c, 1), (SEQUENCE,), ((6,),)),
        Case(lambda x, y: aten.mse_loss.default(x, y, 0), (SEQUENCE, SEQUENCE)),
    ],
    aten.sqrt.default: unary(lambda x: aten.sqrt.default(x.abs())),
    aten.rsqrt.default: unary(lambda x: aten.rsqrt.default(x.abs())),
    aten.reciprocal.default: unary(aten.reciprocal.default),
    aten.pow.Tensor_Scalar: [
        *unary(aten.pow.Tensor_Scalar, (2,), (3,), (0,), (-2,)),
        Case(lambda x: aten.pow.Tensor_Scalar(x.relu(), 1.5), (SEQUENCE,)),
        Case(lambda x: aten.pow.Tensor_Scalar(x, 2) + x.relu(), (SEQUENCE,)),
    ],
    aten.glu.default: unary(aten.glu.default, (), (1,), shape=(2, 4, 6)),
}
