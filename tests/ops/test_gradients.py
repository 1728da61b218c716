"""Autograd of the functional forms: true gradients where the papers have them, and how backward passes move state."""

import pytest
import torch
from spec_numpy import PowerNormSpec, UnifiedNormSpec

from normfuse.ops import PowerNormState, UnifiedNormState, power_norm, unified_norm

C = 6


def unified_state(dtype=torch.float64, iters=20):
    running_var, ema_gz = torch.rand(2, C, dtype=dtype) + 0.5
    buffer_x2, buffer_gz = torch.rand(2, 3, C, dtype=dtype) + 0.5
    counters = torch.tensor([iters]), torch.tensor([0])
    return UnifiedNormState(running_var, ema_gz - 1, buffer_x2, buffer_gz - 1, *counters)


def power_state(dtype=torch.float64, iters=20):
    phi, ema = torch.rand(2, C, dtype=dtype) + 0.5
    return PowerNormState(phi, ema - 1, torch.tensor([iters]))


def copy(state):
    return type(state)(*(None if tensor is None else tensor.clone() for tensor in state))


def present(state):
    """The statistics by name, without counters that are switched off."""
    return {name: tensor for name, tensor in state._asdict().items() if tensor is not None}


def leaf(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def affine(dtype=torch.float64):
    return leaf(C, dtype=dtype), leaf(C, dtype=dtype)


NORMS = {"unified": (unified_norm, unified_state), "power": (power_norm, power_state)}


@pytest.fixture(params=NORMS)
def norm(request):
    return NORMS[request.param]


def test_gain_and_shift_have_true_gradients(norm, implementation):
    """Unified Norm's gain has one while r = 1, which holds for its first thousand steps."""
    function, make_state = norm
    state, x = make_state(), torch.randn(4, 3, C, dtype=torch.float64)

    def call(weight, bias):
        return function(x, weight, bias, copy(state), training=True, warmup_iters=10)

    assert torch.autograd.gradcheck(call, affine())


@pytest.mark.parametrize("group_num", [None, 1, 3])
def test_input_gradient_is_true_where_the_statistic_is_constant(group_num, implementation):
    """Without the share of ``ema_gz`` the paper's gradient is that of a constant running statistic."""
    state = power_state()
    options = {"warmup_iters": 0, "alpha_bkw": 1.0, "backward": "paper", "group_num": group_num}

    def call(x, weight, bias):
        return power_norm(x, weight, bias, copy(state), training=True, **options)

    assert torch.autograd.gradcheck(call, (leaf(4, 2, C), *affine()))


@pytest.mark.parametrize("channel_dim", [-1, 1])
def test_evaluation_has_true_gradients(norm, channel_dim):
    function, make_state = norm
    shape = (2, 4, C) if channel_dim == -1 else (2, C, 4)
    state = make_state()
    before = copy(state)
    options = {"training": False, "channel_dim": channel_dim}
    options |= {"group_num": 2} if function is power_norm else {}

    def call(x, weight, bias):
        return function(x, weight, bias, state, **options)

    assert torch.autograd.gradcheck(call, (leaf(*shape), *affine()))
    assert all(torch.equal(a, b) for a, b in zip(present(state).values(), present(before).values(), strict=True)), (
        "evaluation moved the statistics"
    )


def spec_like(function, state, weight, bias):
    unified = function is unified_norm
    spec = UnifiedNormSpec(C, warmup=10) if unified else PowerNormSpec(C, warmup=10, groups=1)
    for name, tensor in present(state).items():
        value = tensor.numpy().copy()
        setattr(spec, name, int(value[0]) if name in ("iters", "skip_counter") else value)
    spec.weight, spec.bias = weight.detach().numpy(), bias.detach().numpy()
    return spec


def assert_state(spec, state):
    for name, tensor in present(state).items():
        torch.testing.assert_close(tensor, torch.tensor(getattr(spec, name)).reshape(tensor.shape), msg=name)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first first", "last first"])
def test_two_forwards_before_two_backwards(norm, order, implementation):
    """Each backward uses its own forward's step and statistic, and the gradient statistics as they are by then."""
    function, make_state = norm
    state, (weight, bias) = make_state(), affine()
    spec = spec_like(function, state, weight, bias)
    inputs, grads = [leaf(5, C) for _ in range(2)], torch.randn(2, 5, C, dtype=torch.float64)
    outputs = [function(x, weight, bias, state, training=True, warmup_iters=10) for x in inputs]
    saved = [spec.forward(x.detach().numpy())[1] for x in inputs]
    for index in order:
        weight.grad = None
        outputs[index].backward(grads[index])
        dx, dw, _ = spec.backward(grads[index].numpy(), saved[index])
        torch.testing.assert_close(inputs[index].grad, torch.tensor(dx))
        torch.testing.assert_close(weight.grad, torch.tensor(dw))
        assert_state(spec, state)


def test_a_second_backward_through_one_forward_moves_the_state_again(norm, implementation):
    function, make_state = norm
    state, (weight, bias), x = make_state(), affine(), leaf(5, C)
    spec = spec_like(function, state, weight, bias)
    dy = torch.randn(5, C, dtype=torch.float64)
    y = function(x, weight, bias, state, training=True, warmup_iters=10)
    saved = spec.forward(x.detach().numpy())[1]
    total = 0.0
    for _ in range(2):
        y.backward(dy, retain_graph=True)
        total = total + spec.backward(dy.numpy(), saved)[0]
    torch.testing.assert_close(x.grad, torch.tensor(total))
    assert_state(spec, state)


def test_gradients_accumulate(norm, implementation):
    function, make_state = norm
    state, (weight, bias), x = make_state(), affine(), torch.randn(5, C, dtype=torch.float64)
    for _ in range(2):
        function(x, weight, bias, state, training=True).sum().backward()
    torch.testing.assert_close(bias.grad, torch.full((C,), 10.0, dtype=torch.float64))


def swapped_in_memory(tensor):
    return tensor.transpose(0, 2).contiguous().transpose(0, 2)


def test_layout_of_input_and_gradient_does_not_matter(norm, implementation):
    function, make_state = norm
    state, (weight, bias) = make_state(), affine()
    x, dy = torch.randn(2, 3, 4, C, dtype=torch.float64)
    results = []
    for arrange in (torch.clone, swapped_in_memory):
        here = copy(state)
        x_here = arrange(x).requires_grad_()
        weight.grad = bias.grad = None
        y = function(x_here, weight, bias, here, training=True)
        y.backward(arrange(dy))
        results.append((y.detach(), x_here.grad, weight.grad, bias.grad, *present(here).values()))
    assert not swapped_in_memory(x).is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_expanded_gradient(norm, implementation):
    """The gradient of a sum is one number seen everywhere."""
    function, make_state = norm
    state, (weight, bias), x = make_state(), affine(), leaf(5, C)
    function(x, weight, bias, copy(state), training=True).sum().backward()
    expected, x.grad = x.grad, None
    ones = torch.ones(5, C, dtype=torch.float64)
    function(x, weight, bias, copy(state), training=True).backward(ones)
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("needed", ["x", "weight", "bias"])
def test_one_gradient_alone(norm, needed, implementation):
    function, make_state = norm
    state = make_state()
    tensors = {"x": leaf(5, C), "weight": leaf(C), "bias": leaf(C)}
    dy = torch.randn(5, C, dtype=torch.float64)
    all_state = copy(state)
    function(state=all_state, training=True, **tensors).backward(dy)
    expected = tensors[needed].grad
    alone = {name: tensor.detach().requires_grad_(name == needed) for name, tensor in tensors.items()}
    alone_state = copy(state)
    function(state=alone_state, training=True, **alone).backward(dy)
    assert torch.equal(alone[needed].grad, expected)
    assert [name for name, tensor in alone.items() if tensor.grad is not None] == [needed]
    assert all(
        torch.equal(a, b) for a, b in zip(present(all_state).values(), present(alone_state).values(), strict=True)
    )


def test_without_gain_and_shift(norm, implementation):
    function, make_state = norm
    state, x = make_state(), leaf(5, C)
    y = function(x, None, None, copy(state), training=True)
    ones, zeros = torch.ones(C, dtype=torch.float64), torch.zeros(C, dtype=torch.float64)
    assert torch.equal(y, function(x, ones, zeros, copy(state), training=True))
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(norm, dtype, implementation):
    """Results have the dtype of what they belong to; statistics stay float32."""
    function, make_state = norm
    state, (weight, bias) = make_state(torch.float32), affine(dtype)
    x = leaf(5, C, dtype=dtype)
    y = function(x, weight, bias, state, training=True)
    y.sum().backward()
    assert [t.dtype for t in (y, x.grad, weight.grad, bias.grad)] == [dtype] * 4
    assert {t.dtype for t in present(state).values()} == {torch.float32, torch.int64}
    assert function(x, weight, bias, state, training=False).dtype == dtype


@pytest.mark.parametrize("training", [True, False])
def test_autocast_keeps_the_dtype_of_the_input(norm, training, implementation):
    function, make_state = norm
    state, x = make_state(torch.float32), torch.randn(5, C)
    plain = function(x, None, None, copy(state), training=training)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = function(x, None, None, copy(state), training=training)
    assert cast.dtype == torch.float32 and torch.equal(cast, plain)


@pytest.mark.parametrize("group_num", [0, 2])
def test_memory_kept_for_backward(norm, group_num):
    """The input itself, not a copy, and a few numbers per channel (and per row and group with group scaling)."""
    function, make_state = norm
    state, rows = make_state(torch.float32), 50
    options = {"group_num": group_num} if function is power_norm else {}
    x, kept = leaf(rows, C, dtype=torch.float32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        function(x, *affine(torch.float32), state, training=True, **options)
    others = [tensor for tensor in kept if tensor.data_ptr() != x.data_ptr()]
    assert len(others) == len(kept) - 1
    assert sum(tensor.numel() for tensor in others) <= 4 * C + 2 + rows * group_num


def test_no_second_derivative(norm, implementation):
    function, make_state = norm
    x = leaf(5, C)
    y = function(x, None, None, make_state(), training=True)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="is an approximation by running statistics"):
        gradient.sum().backward()


def test_forward_without_gradient_moves_forward_statistics_only(norm, implementation):
    function, make_state = norm
    state = make_state()
    before = copy(state)
    with torch.no_grad():
        function(leaf(5, C), *affine(), state, training=True)
    assert state.iters.item() == before.iters.item() + 1
    assert not torch.equal(state[0], before[0])
    assert torch.equal(state.ema_gz, before.ema_gz)


def test_padded_rows_cannot_poison_the_statistic(norm, implementation):
    function, make_state = norm
    state, x = make_state(), torch.randn(5, C, dtype=torch.float64)
    x[2] = float("nan")
    pad_mask = torch.tensor([False, False, True, False, False])
    y = function(x, None, None, state, training=True, pad_mask=pad_mask)
    assert y[~pad_mask].isfinite().all() and state[0].isfinite().all()
