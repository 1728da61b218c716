"""Products of matrices, convolutions, attention, and what is left."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .base import IMAGE, SEQUENCE, Case, Shape

aten = torch.ops.aten


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


CASES: dict[object, list[Case]] = {
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
    aten.dot.default: [
        Case(lambda x, w: aten.dot.default(x, w), ((6,),), ((6,),)),
        Case(lambda x, w: aten.dot.default(w, x), ((6,),), ((6,),)),
        Case(lambda x, y: aten.dot.default(x, y), ((6,), (6,))),
    ],
    aten.linalg_vecdot.default: [
        *(Case(lambda x, w: aten.linalg_vecdot.default(x, w), (SEQUENCE,), (w,)) for w in ((6,), (4, 6), (1, 6), (1,))),
        Case(lambda x, w: aten.linalg_vecdot.default(w, x, dim=2), (SEQUENCE,), ((6,),)),
        Case(lambda x, w: aten.linalg_vecdot.default(x, w, dim=1), (SEQUENCE,), (SEQUENCE,)),
        Case(lambda x, y: aten.linalg_vecdot.default(x, y), (SEQUENCE, (4, 6))),
    ],
    aten.bilinear.default: [
        Case(aten.bilinear.default, (SEQUENCE, (2, 4, 5)), ((3, 6, 5), (3,))),
        Case(lambda x, y, w: aten.bilinear.default(x, y, w, None), ((4, 6), (4, 5)), ((3, 6, 5),)),
        Case(lambda x, w: aten.bilinear.default(x, x, w, None), (SEQUENCE,), ((3, 6, 6),)),
        Case(lambda x, w, c: aten.bilinear.default(x, c, w, None), (SEQUENCE,), ((3, 6, 5), (2, 4, 5))),
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
