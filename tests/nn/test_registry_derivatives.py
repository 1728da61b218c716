"""Second derivatives and the transforms of torch.func, for every row of the registry."""

import copy

import pytest
import torch
from registry_cases import (
    EVERY,
    LAYERS,
    C,
    copies,
    every,
    has_running_statistics,
    in_dtype,
    inputs_of,
    loss,
)
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.nn.utils import parametrize

from normfuse.nn import EstimatedBatchNorm


@EVERY
def test_second_derivatives_are_there_or_refused_with_the_reason(entry):
    (norm,) = copies(entry, 1, torch.float64)
    small = in_dtype(inputs_of(entry), torch.float64)
    x, *others = (value[:2, ..., :3, :] if value.dim() > 2 else value[:2] for value in small)
    x, others = x.clone().requires_grad_(), list(others)
    (gradient,) = torch.autograd.grad(loss(norm(x, *others)), x, create_graph=True)
    if not entry.exact:
        with pytest.raises(RuntimeError, match=r"is an approximation by running statistics.*create_graph=True"):
            gradient.square().sum().backward()
        return
    gradient.square().sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().max() > 0
    if any(isinstance(module, EstimatedBatchNorm) for module in norm.modules()):
        return  # of statistics that move with every call there are no differences to compare with
    norm.train(not parametrize.is_parametrized(norm))  # σReparam's iteration moves in training
    names = [name for name, _ in norm.named_parameters()]

    def call(x, *parameters):
        return functional_call(copy.deepcopy(norm), dict(zip(names, parameters, strict=True)), (x, *others))

    inputs = (x.detach().requires_grad_(), *(p.detach().requires_grad_() for p in norm.parameters()))
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@EVERY
def test_the_gradient_of_torch_func_is_that_of_backward(entry):
    plain, transformed = copies(entry)
    x, *others = inputs_of(entry)
    leaf = x.clone().requires_grad_()
    loss(plain(leaf, *others)).backward()
    expected = {name: p.grad for name, p in plain.named_parameters()}
    parameters = {name: p.detach() for name, p in transformed.named_parameters()}

    def call(x, parameters):
        return loss(functional_call(transformed, (parameters, dict(transformed.named_buffers())), (x, *others)))

    found_x, found = grad(call, argnums=(0, 1))(x, parameters)
    torch.testing.assert_close(found_x, leaf.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dict(transformed.named_buffers()), dict(plain.named_buffers()))


@every([entry for entry in LAYERS if entry.exact])
def test_the_other_transforms_of_torch_func(entry):
    (norm,) = copies(entry, 1, torch.float64)
    x, *others = in_dtype(inputs_of(entry), torch.float64)

    def call(x):
        return loss(norm(x, *others))

    along = torch.randn_like(x)
    _, slope = jvp(call, (x,), (along,))
    if not any(isinstance(module, EstimatedBatchNorm) for module in norm.modules()):  # its statistics have moved
        torch.testing.assert_close(slope, (grad(call)(x) * along).sum())
    ones = torch.ones((C, 1, 1) if x.dim() == 4 else C, dtype=x.dtype)
    square = hessian(lambda scale: call(x * scale))(ones).reshape(C, C)
    torch.testing.assert_close(square, square.T)


@every(LAYERS)
def test_vmap_runs_samples_or_says_why_not(entry):
    (norm,) = copies(entry, 1)
    inputs = inputs_of(entry)

    def call(*one):
        return loss(norm(*(value[None] for value in one)))

    if has_running_statistics(entry):
        with pytest.raises((RuntimeError, ValueError), match=r"torch\.func\.vmap cannot run|domains cannot share"):
            vmap(grad(call))(*inputs)
    else:
        each = torch.stack([grad(call)(*sample) for sample in zip(*inputs, strict=True)])
        torch.testing.assert_close(vmap(grad(call))(*inputs), each, rtol=1e-4, atol=1e-5)
    norm.eval()
    each = torch.stack([grad(call)(*sample) for sample in zip(*inputs, strict=True)])
    torch.testing.assert_close(vmap(grad(call))(*inputs), each, rtol=1e-4, atol=1e-5)
