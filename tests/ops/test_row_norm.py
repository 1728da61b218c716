"""The functional forms of LayerNorm, RMSNorm and CRMSNorm: against torch, true gradients, compiled, refusals."""

import pytest
import torch
import torch.nn.functional as F
from native import needs_kernels
from torch.utils.checkpoint import checkpoint

from normfuse.ops import crms_norm, layer_norm, rms_norm
from normfuse.ops.row_norm import LAYER, RMS, row_norm_backward_reference, row_norm_forward_reference

C = 6
NORMS = {"layer": layer_norm, "rms": rms_norm, "crms": crms_norm}


@pytest.fixture(params=NORMS)
def norm(request):
    return NORMS[request.param]


def leaf(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def parameters(norm, dtype=torch.float64, channels=C):
    return [leaf(channels, dtype=dtype) for _ in range(2 if norm is layer_norm else 1)]


def test_the_formulas():
    x, weight, bias = torch.randn(3, 4, C).double(), torch.randn(C).double(), torch.randn(C).double()
    torch.testing.assert_close(layer_norm(x, weight, bias), F.layer_norm(x, (C,), weight, bias, 1e-5))
    torch.testing.assert_close(rms_norm(x, weight), F.rms_norm(x, (C,), weight, 1e-6))
    torch.testing.assert_close(rms_norm(x, eps=None), F.rms_norm(x, (C,)))
    whole = torch.cat([x, -x.sum(-1, keepdim=True)], dim=-1)  # C + 1 channels with mean zero
    torch.testing.assert_close(crms_norm(x, weight), F.rms_norm(whole, (C + 1,), eps=1e-5)[..., :C] * weight)


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("unit_offset", [False, True], ids=["weight", "1+weight"])
def test_gradients_are_true(norm, residual, unit_offset, implementation):
    inputs = [leaf(4, 3, C), *([leaf(4, 3, C)] if residual else []), *parameters(norm)]

    def call(x, *others):
        options = {"residual": others[0]} if residual else {}
        return norm(x, *others[residual:], unit_offset=unit_offset, **options)

    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("used", ["y", "s", "both"])
def test_either_result_may_go_unused(norm, used, implementation):
    x, residual, weight = leaf(5, C), leaf(5, C), leaf(C)
    plain_x, plain_residual, plain_weight = (t.detach().clone().requires_grad_() for t in (x, residual, weight))

    def loss(y, s):
        return (y.sin().sum() if used != "s" else 0) + (s.cos().sum() if used != "y" else 0)

    loss(*norm(x, weight, residual=residual)).backward()
    loss(*norm(plain_x, plain_weight, residual=plain_residual, fused=False)).backward()
    for ours, plain in ((x, plain_x), (residual, plain_residual), (weight, plain_weight)):
        assert (ours.grad is None) == (plain.grad is None)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, plain.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_and_plain_agree(norm, dtype, parameter_dtype, implementation):
    """Both compute in float32 and round once, or where torch's own operation rounds the gain, twice."""
    x, residual = torch.randn(2, 7, 33).to(dtype), torch.randn(2, 7, 33).to(dtype)
    vectors = [torch.randn(33).to(parameter_dtype) for _ in range(2 if norm is layer_norm else 1)]
    (y, s), (plain_y, plain_s) = (norm(x, *vectors, residual=residual, fused=fused) for fused in (True, False))
    assert y.dtype == s.dtype == plain_y.dtype == dtype
    assert torch.equal(s, plain_s) and torch.equal(s, x + residual)
    rounding = {torch.float32: 2**-20, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(y, plain_y, rtol=2 * rounding, atol=2 * rounding)


def test_the_gain_is_not_rounded_before_it_is_used():
    """1 + weight with a small bfloat16 weight: 1 + 2⁻⁹ has no bfloat16."""
    x, weight = torch.randn(4, 64), torch.full((64,), 2.0**-9, dtype=torch.bfloat16)
    for fused in (True, False):
        y = rms_norm(x, weight, unit_offset=True, fused=fused)
        torch.testing.assert_close(y, rms_norm(x) * (1 + 2.0**-9), rtol=1e-6, atol=1e-6)


def test_shapes_and_layouts(norm, implementation):
    dy = torch.randn(4, 2, C, dtype=torch.float64)
    for x in (torch.randn(4, C, 2).double().transpose(1, 2), torch.randn(8, 2, C).double()[::2], leaf(4, 2, C)):
        a, b = x.detach().requires_grad_(), x.detach().requires_grad_()
        y, plain = norm(a), norm(b, fused=False)
        y.backward(dy.transpose(0, 1).contiguous().transpose(0, 1))
        plain.backward(dy)
        torch.testing.assert_close(y, plain)
        torch.testing.assert_close(a.grad, b.grad)
    assert norm(torch.randn(C)).shape == (C,)


@pytest.mark.parametrize("shape", [(0, C), (2, 0, C)])
def test_empty(norm, shape, implementation):
    x, residual, weight = leaf(*shape), leaf(*shape), leaf(C)
    y, s = norm(x, weight, residual=residual)
    (y.sum() + s.sum()).backward()
    assert y.shape == s.shape == x.grad.shape == shape
    assert torch.equal(weight.grad, torch.zeros(C, dtype=torch.float64))


def test_what_is_kept_for_backward(norm):
    """x itself, or s; the weight; and two numbers a row at most."""
    x, residual = (leaf(50, C, dtype=torch.float32) for _ in range(2))
    weight = leaf(C, dtype=torch.float32)
    for arguments in ({}, {"residual": residual}):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda index: index):
            results = norm(x, weight, **arguments)
        rows = results[1] if arguments else x
        others = [tensor for tensor in kept if tensor.data_ptr() not in (rows.data_ptr(), weight.data_ptr())]
        assert len(kept) == 3 and sum(tensor.numel() for tensor in others) <= 2 * 50


def test_compiled(norm):
    x, residual = (leaf(5, C, dtype=torch.float32) for _ in range(2))
    weight = leaf(C, dtype=torch.float32)

    def block(x, residual, weight):
        y, s = norm(x, weight, residual=residual)
        return norm(y.relu(), weight) + s

    expected = torch.autograd.grad(block(x, residual, weight).square().sum(), (x, residual, weight))
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager_decomp_partition")
    actual = torch.autograd.grad(compiled(x, residual, weight).square().sum(), (x, residual, weight))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(norm, reentrant):
    x, residual = leaf(5, C), leaf(5, C)
    weight = leaf(C)

    def block(x, residual):
        y, s = norm(x, weight, residual=residual)
        return y.sin() + s

    expected = torch.autograd.grad(block(x, residual).sum(), (x, residual))
    checkpoint(block, x, residual, use_reentrant=reentrant).sum().backward()
    assert torch.equal(x.grad, expected[0]) and torch.equal(residual.grad, expected[1])


def test_second_derivatives(norm, implementation):
    x, residual, weight = leaf(3, 2, C), leaf(3, 2, C), leaf(C)
    assert torch.autograd.gradgradcheck(norm, x)
    assert torch.autograd.gradgradcheck(lambda x, w: norm(x.transpose(0, 1), w), (x, weight))
    assert torch.autograd.gradgradcheck(lambda x, w, r: norm(x, w, residual=r), (x, weight, residual))
    assert torch.autograd.gradgradcheck(lambda x, r: norm(x, residual=r)[1].sin(), (x, residual))


def test_transforms(norm, implementation):
    x, weight = torch.randn(2, 4, C, dtype=torch.float64)

    def loss(x, weight):
        return norm(x, weight).sin().sum()

    plain = leaf(4, C)
    with torch.no_grad():
        plain.copy_(x)
    expected = torch.autograd.grad(loss(plain, weight[0]), plain)[0]
    torch.testing.assert_close(torch.func.grad(loss)(x, weight[0]), expected)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss), (0, None))(x, weight[0]), expected)
    _, along = torch.func.jvp(lambda x: loss(x, weight[0]), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(along, expected.sum())
    hessian = torch.func.hessian(loss)(x[0], weight[0])
    torch.testing.assert_close(hessian, hessian.T)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(loss(dual, weight[0])).tangent, expected.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [LAYER, RMS])
def test_opcheck(kind, dtype):
    x, residual, dy, ds = (torch.randn(6, 5).to(dtype) for _ in range(4))
    weight = torch.randn(5)
    for arguments in ((x, residual, weight, weight, kind, 1e-5), (x, None, None, None, kind, 1e-5)):
        torch.library.opcheck(torch.ops.normfuse.row_norm_forward, arguments)
    _, s, stats = torch.ops.normfuse.row_norm_forward(x, residual, weight, weight, kind, 1e-5)
    for arguments in ((dy, ds, s, weight, stats, kind), (dy, None, s, None, stats, kind)):
        torch.library.opcheck(torch.ops.normfuse.row_norm_backward, arguments)


@pytest.mark.parametrize(
    ("name", "reference"),
    [("row_norm_forward", row_norm_forward_reference), ("row_norm_backward", row_norm_backward_reference)],
)
def test_the_library_declares_what_the_reference_takes(name, reference):
    declared = getattr(torch.ops.normfuse, name).default._schema
    inferred = torch._C.parse_schema(name + torch.library.infer_schema(reference, mutates_args=()))
    assert [(a.name, str(a.type)) for a in declared.arguments] == [(a.name, str(a.type)) for a in inferred.arguments]
    assert [str(r.type) for r in declared.returns] == [str(r.type) for r in inferred.returns]


X = torch.zeros(2, 3, C)
REFUSALS = [
    ((X.int(),), {}, TypeError, r"x has dtype torch.int32; allowed are .*x\.to"),
    ((torch.zeros(()),), {}, ValueError, r"x of shape \(\) has no channels"),
    ((torch.zeros(2, 0),), {}, ValueError, r"x of shape \(2, 0\) has no channels"),
    ((X, torch.ones(3)), {}, ValueError, r"weight has shape \(3,\); x of shape \(2, 3, 6\) needs \(6,\).*movedim"),
    ((X, torch.ones(C, device="meta")), {}, ValueError, r"x is on cpu but weight is on meta"),
    ((X,), {"residual": X[:1]}, ValueError, r"residual is torch.float32 of shape \(1, 3, 6\).*must be like x"),
    ((X,), {"residual": X.double()}, ValueError, r"residual is torch.float64 .*must be like x, torch.float32"),
]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("arguments", "options", "error", "message"), REFUSALS)
def test_refusals(norm, arguments, options, error, message, fused):
    with pytest.raises(error, match=message):
        norm(*arguments, fused=fused, **options)


@needs_kernels
def test_refusals_of_the_operations():
    x, weight, stats = torch.randn(3, C), torch.ones(C), torch.ones(2, 3)
    with pytest.raises(RuntimeError, match=r"kind is 3; it must be 0 \(LayerNorm\), 1 \(RMSNorm\) or 2 \(CRMSNorm\)"):
        torch.ops.normfuse.row_norm_forward(x, None, weight, None, 3, 1e-5)
    with pytest.raises(RuntimeError, match=r"residual must be contiguous and of the shape of x"):
        torch.ops.normfuse.row_norm_forward(x, x[:2], weight, None, LAYER, 1e-5)
    with pytest.raises(RuntimeError, match=r"stats must be contiguous of shape \[1, 3\]"):
        torch.ops.normfuse.row_norm_backward(x, None, x, weight, stats, RMS)
