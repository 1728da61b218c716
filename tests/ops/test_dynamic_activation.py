"""The functional forms of Dynamic Tanh and Dynamic erf: the formulas, true gradients, compiled, exported, refusals."""

from contextlib import nullcontext

import pytest
import torch
from native import autograd_in_python, needs_autograd, needs_kernels
from torch.utils.checkpoint import checkpoint

from normfuse.nn import Derf, DyT
from normfuse.ops import dynamic_erf, dynamic_tanh
from normfuse.ops.dynamic_activation import (
    ERF,
    TANH,
    dynamic_activation_backward_reference,
    dynamic_activation_forward_reference,
)

C = 6
SCALARS = {dynamic_tanh: 1, dynamic_erf: 2}  # alpha, and the shift


@pytest.fixture(params=SCALARS, ids=lambda f: f.__name__)
def activation(request):
    return request.param


def leaf(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def parameters(activation, dtype=torch.float64, shape=()):
    return [
        *(leaf(*shape, dtype=dtype) for _ in range(SCALARS[activation])),
        leaf(C, dtype=dtype),
        leaf(C, dtype=dtype),
    ]


def detached(tensors):
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("fused", [True, False])
def test_the_formulas(fused, implementation):
    x, weight, bias = torch.randn(3, 4, C).double(), torch.randn(C).double(), torch.randn(C).double()
    alpha, shift = torch.tensor([0.7, -0.3]).double()
    y = dynamic_tanh(x, alpha, weight, bias, fused=fused)
    torch.testing.assert_close(y, weight * torch.tanh(alpha * x) + bias)
    y = dynamic_erf(x, alpha, shift, weight, bias, fused=fused)
    torch.testing.assert_close(y, weight * torch.erf(alpha * x + shift) + bias)


@pytest.mark.parametrize("shape", [(), (1,)], ids=["scalar", "one number"])
def test_gradients_are_true(activation, shape, implementation):
    assert torch.autograd.gradcheck(activation, (leaf(4, 3, C), *parameters(activation, shape=shape)))


@pytest.mark.parametrize("frozen", ["x", "alpha", "weight"])
def test_some_gradients_are_not_wanted(activation, frozen, implementation):
    tensors = [leaf(5, C), *parameters(activation)]
    plain = detached(tensors)
    index = {"x": 0, "alpha": 1, "weight": -2}[frozen]
    for group in (tensors, plain):
        group[index].requires_grad_(False)
    activation(*tensors).square().sum().backward()
    activation(*plain, fused=False).square().sum().backward()
    for ours, other in zip(tensors, plain, strict=True):
        assert (ours.grad is None) == (other.grad is None)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, other.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_and_plain_agree(activation, dtype, parameter_dtype, implementation):
    """Fused rounds once; in plain operations u, f, the parameters and the result are rounded."""
    x, vectors = torch.randn(2, 7, C).to(dtype), parameters(activation, parameter_dtype)
    y, plain = (activation(x, *vectors, fused=fused) for fused in (True, False))
    assert y.dtype == plain.dtype == dtype
    rounding = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    # |u| f'(u) <= 1, so that a relative error of u is at most that of f; the gain is at most some 4.
    torch.testing.assert_close(y, plain, rtol=8 * rounding, atol=6 * 4 * rounding)


def test_parameters_are_not_rounded_to_the_dtype_of_x():
    x, weight = torch.zeros(1, 64, dtype=torch.bfloat16), torch.ones(64)
    alpha, bias = torch.tensor(1.0), torch.linspace(1, 2, 64)
    bias_grad = torch.autograd.grad(
        dynamic_tanh(x, alpha, weight, bias.requires_grad_()), bias, torch.full_like(x, 1 + 2**-7)
    )[0]
    assert bias_grad.dtype == torch.float32 and torch.equal(bias_grad, torch.full((64,), 1 + 2**-7))
    fine = torch.full((64,), 1 + 2**-9)  # has no bfloat16, and shows where it is multiplied by 256
    y = dynamic_tanh(torch.full_like(x, 256), alpha, 256 * fine, torch.full((64,), -256.0))
    assert torch.equal(y, torch.full_like(x, 0.5))


def test_shapes_and_layouts(activation, implementation):
    dy, others = torch.randn(4, 2, C, dtype=torch.float64), parameters(activation)
    for x in (torch.randn(4, C, 2).double().transpose(1, 2), torch.randn(8, 2, C).double()[::2], leaf(4, 2, C)):
        a, b = x.detach().requires_grad_(), x.detach().requires_grad_()
        y, plain = activation(a, *others), activation(b, *others, fused=False)
        y.backward(dy.transpose(0, 1).contiguous().transpose(0, 1))
        plain.backward(dy)
        torch.testing.assert_close(y, plain)
        torch.testing.assert_close(a.grad, b.grad)
    assert activation(torch.randn(C), *parameters(activation, torch.float32)).shape == (C,)


@pytest.mark.parametrize("shape", [(0, C), (2, 0, C)])
def test_empty(activation, shape, implementation):
    x, others = leaf(*shape), parameters(activation)
    y = activation(x, *others)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in others)


def test_what_is_kept_for_backward(activation):
    """x and the parameters, no copies."""
    x, others = leaf(50, C, dtype=torch.float32), parameters(activation, torch.float32)
    with autograd_in_python():  # the graph in C++ does not show it
        kept = activation(x, *others).grad_fn.saved_tensors
    given = {tensor.data_ptr() for tensor in (x, *others)}
    assert {tensor.data_ptr() for tensor in kept if tensor is not None} <= given


@needs_autograd
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("frozen", [None, 0, 1, 2], ids=str)
def test_autograd_in_cpp_gives_the_same_bits(activation, dtype, frozen):
    tensors = [leaf(4, C, 3, dtype=dtype), *parameters(activation, torch.float64 if dtype == torch.float64 else dtype)]
    results = []
    for in_cpp in (True, False):
        own = detached(tensors)
        if frozen is not None:
            own[frozen].requires_grad_(False)
        with nullcontext() if in_cpp else autograd_in_python():
            y = activation(own[0].transpose(1, 2), *own[1:])
        assert ("normfuse::" in y.grad_fn.name()) == in_cpp
        y.backward(torch.linspace(-1, 1, y.numel()).to(dtype).view(y.shape[::-1]).permute(2, 1, 0))
        results.append([y, *(tensor.grad for tensor in own)])
    for a, b in zip(*results, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_compiled(activation):
    x, others = leaf(5, C, dtype=torch.float32), parameters(activation, torch.float32)

    def block(x, *others):
        return activation(activation(x, *others).sin(), *others) + x

    expected = torch.autograd.grad(block(x, *others).square().sum(), (x, *others))
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager_decomp_partition")
    actual = torch.autograd.grad(compiled(x, *others).square().sum(), (x, *others))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(activation, reentrant):
    x, others = leaf(5, C), parameters(activation)
    expected = torch.autograd.grad(activation(x, *others).sin().sum(), (x, *others))
    checkpoint(lambda x: activation(x, *others).sin(), x, use_reentrant=reentrant).sum().backward()
    assert all(torch.equal(a.grad, b) for a, b in zip((x, *others), expected, strict=True))


def test_second_derivatives(activation, implementation):
    x, others = leaf(2, 3, C), parameters(activation)
    assert torch.autograd.gradgradcheck(activation, (x, *others))
    assert torch.autograd.gradgradcheck(lambda x, *others: activation(x.transpose(0, 1), *others), (x, *others))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("curve", [TANH, ERF])
def test_opcheck(curve, dtype):
    (x, dy), (alpha, shift), weight = torch.randn(2, 3, 2, 5).to(dtype), torch.randn(2), torch.randn(5)
    for offset in (None, shift):
        arguments = x, alpha, offset, weight, weight, curve
        torch.library.opcheck(torch.ops.normfuse.dynamic_activation_forward, arguments)
        torch.library.opcheck(torch.ops.normfuse.dynamic_activation_backward, (dy, *arguments[:4], curve))


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("dynamic_activation_forward", dynamic_activation_forward_reference),
        ("dynamic_activation_backward", dynamic_activation_backward_reference),
    ],
)
def test_the_library_declares_what_the_reference_takes(name, reference):
    declared = getattr(torch.ops.normfuse, name).default._schema
    inferred = torch._C.parse_schema(name + torch.library.infer_schema(reference, mutates_args=()))
    assert [(a.name, str(a.type)) for a in declared.arguments] == [(a.name, str(a.type)) for a in inferred.arguments]
    assert [str(r.type) for r in declared.returns] == [str(r.type) for r in inferred.returns]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(("make", "function"), [(DyT, "tanh"), (Derf, "erf")])
def test_an_exported_program_holds_plain_operations(make, function, training):
    """Without statistics there is nothing to tell the modes apart: both may be exported."""
    program = torch.export.export(make(C).train(training), (torch.randn(2, C),))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert targets <= {"aten.mul.Tensor", "aten.add.Tensor", f"aten.{function}.default", "aten.addcmul.default"}


X, VECTOR, SCALAR = torch.zeros(2, 3, C), torch.ones(C), torch.tensor(0.5)
REFUSALS = [
    ((X.int(), SCALAR, VECTOR, VECTOR), TypeError, r"x has dtype torch.int32; allowed are .*x\.to"),
    ((torch.zeros(()), SCALAR, VECTOR, VECTOR), ValueError, r"x of shape \(\) has no channels"),
    ((torch.zeros(2, 0), SCALAR, VECTOR, VECTOR), ValueError, r"x of shape \(2, 0\) has no channels"),
    ((X, SCALAR, torch.ones(3), VECTOR), ValueError, r"weight has shape \(3,\); x of .* needs \(6,\).*movedim"),
    ((X, SCALAR, VECTOR, torch.ones(1)), ValueError, r"bias has shape \(1,\); x of .* needs \(6,\).*movedim"),
    ((X, VECTOR, VECTOR, VECTOR), ValueError, r"alpha has shape \(6,\); it must hold one number"),
    ((X, SCALAR.to("meta"), VECTOR, VECTOR), ValueError, "x is on cpu but alpha is on meta"),
]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("arguments", "error", "message"), REFUSALS)
def test_refusals(arguments, error, message, fused):
    with pytest.raises(error, match=message):
        dynamic_tanh(*arguments, fused=fused)


def test_refusals_of_the_shift():
    with pytest.raises(ValueError, match=r"shift has shape \(6,\); it must hold one number"):
        dynamic_erf(X, SCALAR, VECTOR, VECTOR, VECTOR)


@pytest.mark.parametrize("make", [DyT, Derf])
def test_refusals_of_the_modules(make):
    for training in (True, False):
        with pytest.raises(ValueError, match=r"x of shape \(2, 3, 6\) must have 4 channels in its last dimension"):
            make(4).train(training)(X)


@needs_kernels
def test_refusals_of_the_operations():
    forward, backward = torch.ops.normfuse.dynamic_activation_forward, torch.ops.normfuse.dynamic_activation_backward
    with pytest.raises(RuntimeError, match=r"curve is 2; it must be 0 \(tanh\) or 1 \(erf\)"):
        forward(X, SCALAR, None, VECTOR, VECTOR, 2)
    with pytest.raises(RuntimeError, match="alpha must hold one number, not 6"):
        forward(X, VECTOR, None, VECTOR, VECTOR, TANH)
    with pytest.raises(RuntimeError, match="shift is float64; with x of float32 it must be float32"):
        forward(X, SCALAR, SCALAR.double(), VECTOR, VECTOR, ERF)
    with pytest.raises(RuntimeError, match="grad_y must be contiguous and of the shape of x"):
        backward(X[:1], X, SCALAR, None, VECTOR, TANH)
