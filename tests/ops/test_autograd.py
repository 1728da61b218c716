"""The autograd of a training step in C++ gives what the autograd functions in Python give, bit for bit."""

import copy

import pytest
import torch
from native import autograd_in_python, needs_autograd
from norms import running

from normfuse.nn import CRMSNorm, LayerNorm, PowerNorm, RMSNorm, UnifiedNorm

C = 6
MAKE = running(C) | {
    "layer": lambda **o: LayerNorm(C, **o),
    "rms": lambda **o: RMSNorm(C, **o),
    "crms": lambda **o: CRMSNorm(C, **o),
}
pytestmark = needs_autograd


@pytest.fixture(params=MAKE)
def make(request):
    return MAKE[request.param]


def in_python(call):
    with autograd_in_python():
        return call()


def node_name(tensor):
    return tensor.grad_fn.name()


def step(norm, used, shape=(4, 3, C), dtype=torch.float32, **arguments):
    """Results, gradients and statistics of one training step from which ``used`` of y and s go on."""
    torch.manual_seed(len(list(norm.buffers())))
    x, *residual = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(1 + ("s" in used)))
    results = norm(x, residual=residual[0], **arguments) if residual else (norm(x, **arguments),)
    chosen = [result for name, result in zip("ys", results, strict=False) if name in used]
    inputs = [x, *residual, *norm.parameters()]
    gradients = torch.autograd.grad(chosen, inputs, [torch.randn(shape).to(dtype) for _ in chosen], allow_unused=True)
    return [*results, *gradients, *(buffer.clone() for buffer in norm.buffers())]


def assert_equal(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("used", ["y", "ys", "s"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_four_steps(make, used, dtype):
    one = make(dtype=torch.float64 if dtype == torch.float64 else None)
    two = copy.deepcopy(one)
    for _ in range(4):
        expected = in_python(lambda: step(two, used, dtype=dtype))
        assert_equal(step(one, used, dtype=dtype), expected)


@pytest.mark.parametrize("shape", [(C,), (0, C), (1, C), (2, 5, 3, C)], ids=str)
def test_shapes(make, shape):
    one, two = make(), make()
    assert_equal(step(one, "ys", shape), in_python(lambda: step(two, "ys", shape)))


def test_padding():
    mask = torch.rand(4, 3) < 0.4
    for make in (MAKE["unified"], MAKE["power"], MAKE["power, no groups"]):
        one, two = make(), make()
        for _ in range(4):
            expected = in_python(lambda: step(two, "ys", pad_mask=mask))  # noqa: B023
            assert_equal(step(one, "ys", pad_mask=mask), expected)


def test_who_runs_it(make):
    x = torch.randn(4, C, requires_grad=True)
    assert "normfuse::" in node_name(make()(x))
    assert "normfuse::" not in in_python(lambda: node_name(make()(x)))


@pytest.mark.parametrize("options", [{"channel_dim": 1}, {"skip_nonfinite": True}], ids=str)
def test_other_cases_run_in_python(options):
    for make in (MAKE["unified"], MAKE["power"]):
        y = make(**options)(torch.randn(4, C, 3 if "channel_dim" in options else C, requires_grad=True))
        assert "normfuse::" not in y.grad_fn.next_functions[0][0].name() + node_name(y)


def test_strided_input_and_gradient(make):
    def run(norm):
        x = torch.linspace(-1, 1, 3 * C * 4).view(3, C, 4).transpose(1, 2).requires_grad_()
        return torch.autograd.grad(norm(x), x, torch.linspace(1, 2, 3 * C * 4).view(4, 3, C).transpose(0, 1))

    assert_equal(run(make()), in_python(lambda: run(make())))


def test_a_frozen_part_gets_no_gradient(make):
    x = torch.randn(4, C)
    norm = make()
    norm(x).sum().backward()
    assert norm.weight.grad is not None
    norm.requires_grad_(False).zero_grad()
    assert not norm(x).requires_grad
    norm(x.requires_grad_()).sum().backward()
    assert x.grad is not None and norm.weight.grad is None


def test_without_gain_and_shift(make):
    assert_equal(step(bare(make), "ys"), in_python(lambda: step(bare(make), "ys")))


def bare(make):
    module = make()
    module.weight = None
    if hasattr(module, "bias"):
        module.bias = None
    return module


def test_a_second_derivative(make):
    """Where the gradient is an approximation, both ways say why there is none."""

    def twice():
        torch.manual_seed(0)
        x, norm = torch.randn(4, C, requires_grad=True), make()
        (gradient,) = torch.autograd.grad(norm(x).sin().sum(), x, create_graph=True)
        if isinstance(norm, (UnifiedNorm, PowerNorm)):
            with pytest.raises(RuntimeError, match=r"is an approximation by running statistics.*create_graph=True"):
                gradient.sum().backward()
            return (gradient.detach(),)
        gradient.square().sum().backward()
        return gradient.detach(), x.grad, norm.weight.grad

    assert_equal(twice(), in_python(twice))


def test_a_second_backward_needs_the_graph(make):
    x = torch.randn(4, C, requires_grad=True)
    total = make()(x).sum()
    total.backward(retain_graph=True)
    total.backward()
    with pytest.raises(RuntimeError, match="a second time"):
        total.backward()


def test_an_input_changed_in_place_is_noticed(make):
    x = torch.randn(4, C, requires_grad=True)
    inner = x * 1
    total = make()(inner).sum()
    inner.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_no_gradient_wanted(make):
    norm = make()
    before = [buffer.clone() for buffer in norm.buffers()]
    with torch.no_grad():
        y = norm(torch.randn(4, C))
    assert not y.requires_grad
    assert not before or any(not torch.equal(a, b) for a, b in zip(before, norm.buffers(), strict=True))


@pytest.mark.slow
def test_a_captured_backward(make):
    """Compiled autograd looks into what the graph keeps, and statistics move all the same."""
    one, two = make(), make()
    for _ in range(3):
        x = torch.randn(4, C)
        gradients = []
        for norm, captured in ((one, True), (two, False)):
            leaf = x.clone().requires_grad_()
            total = norm(leaf).square().sum()
            if captured:
                with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
                    total.backward()
            else:
                total.backward()
            gradients.append(leaf.grad)
        torch.testing.assert_close(*gradients)
        torch.testing.assert_close(one.state_dict(), two.state_dict())
