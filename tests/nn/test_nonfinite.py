"""Infinite and NaN batches and gradients, mixed precision: statistics stay finite, and steps can be taken back."""

import copy

import pytest
import torch
from torch import nn

from normfuse.nn import UnifiedNorm
from tests.norms import running

C = 6
NORMS = running(C, "unified", "unified, filtered", "power", "power, no groups")
BAD = [float("inf"), float("-inf"), float("nan")]
FORWARD = ("running_var", "buffer_x2", "running_phi", "iters", "skip_counter")


@pytest.fixture(params=NORMS)
def make(request):
    return NORMS[request.param]


def step(norm, x, dy=None):
    x = x.clone().requires_grad_()
    norm(x).backward(torch.ones_like(x) if dy is None else dy)
    return x.grad


def trained(norm, steps=4):
    generator = torch.Generator().manual_seed(1)
    for x, dy in torch.randn(steps, 2, 9, C, generator=generator):
        step(norm, x, dy)
    return norm


def assert_finite(norm):
    for name, value in norm.named_buffers():
        assert value.isfinite().all(), f"{name}: {value}"


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("after", [0, 1, 4])
def test_a_bad_gradient_moves_its_channel_nowhere(make, implementation, bad, after):
    norm = trained(make(), after)
    twin = copy.deepcopy(norm)
    x, dy = torch.randn(2, 9, C)
    step(twin, x, dy)
    before = {name: value.clone() for name, value in norm.named_buffers()}
    dy[3, 2] = bad
    step(norm, x, dy)
    assert_finite(norm)
    assert torch.equal(norm.ema_gz[2], before["ema_gz"][2])
    others = torch.arange(C) != 2
    for name, value in norm.named_buffers():
        expected = twin.get_buffer(name)
        same = value[..., others] == expected[..., others] if value.shape[-1] == C else value == expected
        assert same.all(), name
    trained(norm)
    assert_finite(norm)


@pytest.mark.parametrize("bad", [*BAD, 1e30])
@pytest.mark.parametrize("after", [0, 1, 4])
@pytest.mark.parametrize("name", [name for name in NORMS if name != "power"])  # group scaling spreads a bad number
def test_a_bad_input_moves_its_channel_nowhere(name, implementation, bad, after):
    norm = trained(NORMS[name](), after)
    twin = copy.deepcopy(norm)
    x, dy = torch.randn(2, 9, C)
    step(twin, x, dy)
    x[3, 2] = bad
    statistic = "running_var" if isinstance(norm, UnifiedNorm) else "running_phi"
    before = norm.get_buffer(statistic).clone()
    step(norm, x, dy)
    assert_finite(norm)
    assert norm.get_buffer(statistic)[2] == before[2]
    others = torch.arange(C) != 2
    if name != "unified, filtered":  # whether a step is an outlier may have been up to this channel
        assert torch.equal(norm.get_buffer(statistic)[others], twin.get_buffer(statistic)[others])
    assert norm.iters.item() == after + 1
    trained(norm)
    assert_finite(norm)


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_input_shows_in_the_output(make, implementation, bad):
    norm = trained(make())
    x = torch.randn(9, C)
    x[3, 2] = bad
    assert not norm(x).isfinite().all()


@pytest.mark.parametrize("bad", BAD)
def test_a_skipped_forward_leaves_no_trace(make, implementation, bad):
    norm = trained(make(skip_nonfinite=True))
    twin = copy.deepcopy(norm)
    x, dy = torch.randn(2, 9, C)
    bad_x = x.clone()
    bad_x[3, 2] = bad
    step(norm, bad_x, dy)
    assert norm.skipped_forwards.item() == norm.skipped_backwards.item() == 1
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in norm.state_dict().items())
    for each in (norm, twin):
        step(each, x, dy)
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in norm.state_dict().items())
    assert norm.skipped_forwards.item() == 1 and twin.skipped_forwards.item() == 0


@pytest.mark.parametrize("bad", BAD)
def test_a_skipped_backward_leaves_the_gradient_statistics(make, implementation, bad):
    norm = trained(make(skip_nonfinite=True))
    before = {name: value.clone() for name, value in norm.named_buffers()}
    x, dy = torch.randn(2, 9, C)
    dy[3, 2] = bad
    step(norm, x, dy)
    assert (norm.skipped_forwards.item(), norm.skipped_backwards.item()) == (0, 1)
    for name in ("ema_gz", "buffer_gz"):
        if name in before:
            assert torch.equal(norm.get_buffer(name), before[name])
    assert norm.iters.item() == 5


def test_skipping_changes_no_finite_step(make):
    plain, guarded = trained(make()), trained(make(skip_nonfinite=True))
    assert all(torch.equal(value, guarded.state_dict()[name]) for name, value in plain.state_dict().items())


def test_counters_are_not_in_checkpoints_and_reset(make):
    norm = make(skip_nonfinite=True)
    assert norm.state_dict().keys() == make().state_dict().keys()
    norm.load_state_dict(make().state_dict())
    step(norm, torch.full((3, C), float("nan")))
    assert norm.skipped_forwards.item() == 1
    norm.reset_running_stats()
    assert norm.skipped_forwards.item() == norm.skipped_backwards.item() == 0
    assert "skip_nonfinite=True" in repr(norm) and "skip_nonfinite" not in repr(make())


@pytest.mark.parametrize("name", ["unified, filtered", "power"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_skip_counts_once(name, reentrant):
    from torch.utils.checkpoint import checkpoint

    norm = NORMS[name](skip_nonfinite=True)
    for value in (0.0, float("nan"), 1.0):
        x = torch.full((3, C), value, requires_grad=True)
        checkpoint(norm, x, use_reentrant=reentrant).sum().backward()
    assert (norm.skipped_forwards.item(), norm.skipped_backwards.item(), norm.iters.item()) == (1, 1, 2)


@pytest.mark.parametrize("name", ["unified, filtered", "power"])
def test_skipping_compiles_without_a_break(name):
    torch.compiler.reset()
    eager = NORMS[name](skip_nonfinite=True).double()
    inside = copy.deepcopy(eager)
    compiled = torch.compile(inside, fullgraph=True, backend="aot_eager_decomp_partition")
    for index in range(6):
        x, dy = torch.randn(2, 9, C, dtype=torch.float64)
        if index == 3:
            x[0, 0] = float("nan")
        if index == 4:
            dy[0, 0] = float("inf")
        step(eager, x, dy)
        step(compiled, x, dy)
        for (label, a), b in zip(inside.named_buffers(), eager.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=lambda m, label=label: f"{label}: {m}")
    assert (inside.skipped_forwards.item(), inside.skipped_backwards.item()) == (1, 2)


class Net(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.inner, self.norm, self.outer = nn.Linear(4, C), make(), nn.Linear(C, 4)

    def forward(self, x):
        return self.outer(torch.relu(self.norm(self.inner(x))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_follows_float32(make, dtype):
    """Statistics are sums of rounded inputs: they may differ by the rounding of the input, twice (x²), and of dy."""
    wide = Net(make)
    narrow = copy.deepcopy(wide)
    for _ in range(4):
        x = torch.randn(32, 4)
        wide(x).square().mean().backward()
        with torch.autocast("cpu", dtype=dtype):
            y = narrow(x)
            assert y.dtype == dtype
            y.float().square().mean().backward()
    eps = torch.finfo(dtype).eps
    for (name, a), b in zip(narrow.norm.named_buffers(), wide.norm.buffers(), strict=True):
        assert a.dtype == b.dtype
        scale = b.abs().max().clamp(min=1e-2)
        assert (a - b).abs().max() <= 16 * eps * scale, name


@pytest.mark.parametrize("skip", [False, True])
def test_grad_scaler_steps_over_infinite_gradients(make, skip):
    """A scale that overflows: the scaler skips the optimiser's step, and the norm keeps finite statistics."""
    net = Net(lambda: make(skip_nonfinite=skip))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=100)
    target = torch.randn(32, 4)
    skipped, losses = 0, []
    for _ in range(40):
        before = net.outer.weight.detach().clone()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = nn.functional.mse_loss(net(target).float(), target)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        skipped += torch.equal(before, net.outer.weight)
        losses.append(loss.item())
        assert_finite(net.norm)
    assert 0 < skipped < 35, "the test has to see both kinds of step"
    assert losses[-1] < losses[0]
    if skip:
        assert net.norm.skipped_backwards.item() > 0


def test_a_pure_bfloat16_module_learns(make):
    net = Net(make).bfloat16()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    x = torch.randn(64, 4, dtype=torch.bfloat16)
    losses = []
    for _ in range(30):
        loss = nn.functional.mse_loss(net(x).float(), x.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert {b.dtype for b in net.norm.buffers()} == {torch.float32, torch.int64}
    assert_finite(net.norm)
