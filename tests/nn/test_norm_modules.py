"""The modules: options, masks, layouts, statistics of a safe dtype, checkpoints, training."""

import copy
import io

import pytest
import torch
from torch import nn

from normfuse.nn import PowerNorm, UnifiedNorm
from tests.norms import running

C = 6
NORMS = running(C, "unified", "power")


@pytest.fixture(params=NORMS)
def make(request):
    return NORMS[request.param]


def train(norm, steps=4, shape=(5, 3, C), dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
        norm(x).square().sum().backward()
    return norm


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def statistics(norm):
    return {name: value for name, value in norm.named_buffers() if value.is_floating_point()}


def test_fresh_unified_norm():
    norm = UnifiedNorm(C, window_size=(3, 5))
    shapes = {name: tuple(value.shape) for name, value in norm.state_dict().items()}
    assert shapes == {
        "weight": (C,),
        "bias": (C,),
        "running_var": (C,),
        "ema_gz": (C,),
        "buffer_x2": (3, C),
        "buffer_gz": (5, C),
        "iters": (1,),
        "skip_counter": (1,),
    }
    ones = {"weight", "running_var"}
    assert all((value == (name in ones)).all() for name, value in norm.state_dict().items())
    options = norm.warmup_iters, norm.outlier_filtration, norm.eps, norm.momentum, norm.channel_dim
    assert options == (4000, False, 1e-5, 0.9, -1)


def test_fresh_power_norm():
    norm = PowerNorm(C)
    shapes = {name: tuple(value.shape) for name, value in norm.state_dict().items()}
    assert shapes == {"weight": (C,), "bias": (C,), "running_phi": (C,), "ema_gz": (C,), "iters": (1,)}
    ones = {"weight", "running_phi"}
    assert all((value == (name in ones)).all() for name, value in norm.state_dict().items())
    options = norm.group_num, norm.alpha_fwd, norm.alpha_bkw, norm.warmup_iters, norm.eps, norm.channel_dim
    assert options == (1, 0.9, 0.9, 10000, 1e-5, -1)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: UnifiedNorm(0), ValueError, "num_features=0 is not allowed; give an int of at least 1"),
        (lambda: UnifiedNorm(4.0), TypeError, r"num_features=4\.0 has type float; give an int"),
        (lambda: UnifiedNorm(C, window_size=0), ValueError, "window_size=0 is not allowed"),
        (lambda: UnifiedNorm(C, window_size=4.0), TypeError, r"window_size=4\.0 has type float"),
        (lambda: UnifiedNorm(C, window_size=(1, 2, 3)), ValueError, "has 3 entries; give an int or a pair"),
        (lambda: UnifiedNorm(C, warmup_iters=-1), ValueError, "warmup_iters=-1 is not allowed"),
        (lambda: UnifiedNorm(C, momentum=1.5), ValueError, r"momentum=1\.5 is not allowed.*from 0 to 1"),
        (lambda: UnifiedNorm(C, eps=0.0), ValueError, r"eps=0\.0 is not allowed; give a positive"),
        (lambda: UnifiedNorm(C, eps=float("nan")), ValueError, "eps=nan is not allowed"),
        (lambda: UnifiedNorm(C, channel_dim=None), TypeError, "channel_dim=None is not allowed"),
        (lambda: UnifiedNorm(C, dtype=torch.int32), TypeError, r"dtype=torch\.int32 is not allowed"),
        (lambda: PowerNorm(C, group_num=4), ValueError, "group_num=4 is not allowed with 6 channels"),
        (lambda: PowerNorm(C, group_num=2.0), TypeError, r"group_num=2\.0 has type float"),
        (lambda: PowerNorm(C, alpha_fwd=-0.1), ValueError, r"alpha_fwd=-0\.1 is not allowed"),
        (lambda: PowerNorm(C, alpha_bkw=2), ValueError, "alpha_bkw=2 is not allowed"),
        (lambda: PowerNorm(C, warmup_iters=True), TypeError, "warmup_iters=True has type bool"),
        (lambda: PowerNorm(C, backward="exact"), ValueError, "backward='exact' is unknown"),
    ],
)
def test_refused_options(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_repr_shows_the_options():
    assert repr(UnifiedNorm(8, channel_dim=1)) == (
        "UnifiedNorm(8, window_size=(4, 4), warmup_iters=4000, outlier_filtration=False, momentum=0.9, "
        "eps=1e-05, affine=True, channel_dim=1)"
    )
    assert repr(PowerNorm(8, group_num=None, backward="paper")) == (
        "PowerNorm(8, group_num=None, group_eps=1e-05, alpha_fwd=0.9, alpha_bkw=0.9, warmup_iters=10000, "
        "backward='paper', eps=1e-05, affine=True, channel_dim=-1)"
    )


def test_without_affine(make):
    norm = make(affine=False)
    assert list(norm.parameters()) == []
    plain = make()
    x = torch.randn(4, C, requires_grad=True)
    assert torch.equal(norm(x), plain(x))
    norm.reset_parameters()
    assert torch.equal(norm.eval()(x), make().eval()(x))


@pytest.mark.parametrize("shape", [(2, C, 5), (2, C, 3, 4), (4, C)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_channel_dim_is_a_transposition(make, shape, masked):
    first, last = make(channel_dim=1), make()
    mask_shape = (shape[0], *shape[2:])
    pad_mask = torch.rand(mask_shape) < 0.3 if masked else None
    for _ in range(4):
        x, dy = torch.randn(2, *shape)
        here, there = x.clone().requires_grad_(), x.movedim(1, -1).contiguous().requires_grad_()
        y, moved = first(here, pad_mask), last(there, pad_mask)
        assert torch.equal(y, moved.movedim(-1, 1))
        y.backward(dy)
        moved.backward(dy.movedim(1, -1))
        assert torch.equal(here.grad, there.grad.movedim(-1, 1))
        assert torch.equal(first.weight.grad, last.weight.grad)
    assert same(first.state_dict(), last.state_dict())
    y = first.eval()(x, pad_mask)
    torch.testing.assert_close(y, last.eval()(x.movedim(1, -1), pad_mask).movedim(-1, 1))


def test_padding_is_normalised_but_not_counted(make):
    masked, short = make(), make()
    x = torch.randn(2, 4, C)
    pad_mask = torch.tensor([[False, False, True, True], [False, True, True, True]])
    y = masked(x, pad_mask)
    torch.testing.assert_close(y[~pad_mask], short(x[~pad_mask]))
    assert y.shape == x.shape and (y[pad_mask] != 0).any()
    for name, value in statistics(masked).items():
        torch.testing.assert_close(value, statistics(short)[name])


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16])
def test_statistics_stay_float32_in_a_low_precision_module(make, to):
    norm = train(make())
    before = copy.deepcopy(statistics(norm))
    norm.to(to)
    assert norm.weight.dtype == norm.bias.dtype == to
    assert same(statistics(norm), before), "a conversion rounded the statistics"
    train(norm, dtype=to)
    assert {value.dtype for value in statistics(norm).values()} == {torch.float32}
    assert norm.iters.dtype == torch.int64 and norm.iters.item() == 8
    assert norm.weight.grad.dtype == to


def test_statistics_follow_float64_and_come_back(make):
    norm = train(make())
    norm.double()
    assert {value.dtype for value in statistics(norm).values()} == {torch.float64}
    train(norm, dtype=torch.float64)
    norm.bfloat16()
    assert {value.dtype for value in statistics(norm).values()} == {torch.float32}


def test_statistics_that_were_narrowed_from_outside_are_refused(make):
    norm = make()
    for buffer in norm.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.bfloat16()  # as FSDP does
    with pytest.raises(TypeError, match=r"dtype torch\.bfloat16.*needs torch\.float32.*no buffer_dtype"):
        norm(torch.randn(2, norm.num_features, dtype=torch.bfloat16))


def test_dtype_and_device_of_construction(make):
    assert {value.dtype for value in statistics(make(dtype=torch.bfloat16)).values()} == {torch.float32}
    norm = make(dtype=torch.float64, device="meta")
    assert {value.dtype for value in statistics(norm).values()} == {torch.float64}
    assert {value.device.type for value in norm.state_dict().values()} == {"meta"}
    norm.to_empty(device="cpu").reset_parameters()
    assert same(norm.state_dict(), make(dtype=torch.float64).state_dict())


def test_reset(make):
    norm = train(make())
    with torch.no_grad():
        norm.weight.fill_(3.0)
    norm.reset_running_stats()
    fresh = make().state_dict()
    assert (norm.weight == 3.0).all()
    assert all(torch.equal(value, fresh[name]) for name, value in norm.named_buffers())
    norm.reset_parameters()
    assert same(norm.state_dict(), fresh)


def test_resuming_from_a_state_dict_continues_bit_for_bit(make):
    whole = train(train(make()), seed=2)
    stored = io.BytesIO()
    torch.save(train(make()).state_dict(), stored)
    stored.seek(0)
    resumed = make()
    resumed.load_state_dict(torch.load(stored, weights_only=True))
    assert same(train(resumed, seed=2).state_dict(), whole.state_dict())


def test_copies_are_independent(make):
    norm = train(make())
    twin = copy.deepcopy(norm)
    stored = io.BytesIO()
    torch.save(norm, stored)
    stored.seek(0)
    loaded = torch.load(stored, weights_only=False)
    train(norm)
    assert same(train(twin).state_dict(), norm.state_dict())
    assert same(train(loaded).state_dict(), norm.state_dict())


@pytest.mark.parametrize("shape", [(1, C, 1, 1), (1, 1, C), (C, 1), (C,)], ids=str)
@pytest.mark.parametrize("assign", [False, True])
def test_checkpoints_of_the_authors_programs(make, shape, assign):
    trained = train(make()).state_dict()
    vectors = {name for name, value in trained.items() if value.shape == (C,)}
    foreign = {name: value.reshape(shape) if name in vectors else value for name, value in trained.items()}
    for name in ("buffer_x2", "buffer_gz"):
        if name in foreign:
            foreign[name] = foreign[name].reshape(2, C, 1, 1)
    foreign["iters"] = trained["iters"].reshape(())
    nested = nn.Sequential(nn.Identity(), make())
    nested.load_state_dict({f"1.{name}": value for name, value in foreign.items()}, assign=assign)
    assert same(nested[1].state_dict(), trained)


def test_checkpoint_of_another_width_or_window_is_refused(make):
    wrong = make().state_dict()
    wrong["weight"] = torch.ones(1, C + 1, 1, 1)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        make().load_state_dict(wrong)
    with pytest.raises(RuntimeError, match="size mismatch for buffer_x2"):
        NORMS["unified"]().load_state_dict(NORMS["unified"](window_size=3).state_dict())


def test_low_precision_checkpoints_leave_statistics_wide(make):
    narrow = {name: v.bfloat16() if v.is_floating_point() else v for name, v in make().state_dict().items()}
    norm = make()
    norm.load_state_dict(narrow, assign=True)
    assert {value.dtype for value in statistics(norm).values()} == {torch.float32}


def test_training_repeats_bit_for_bit(make):
    runs = [train(make(), steps=6, shape=(64, 9, C)) for _ in range(2)]
    assert same(runs[0].state_dict(), runs[1].state_dict())
    assert torch.equal(runs[0].weight.grad, runs[1].weight.grad)


@pytest.mark.parametrize("options", [{}, {"channel_dim": 1}], ids=["last", "first"])
def test_a_small_model_learns(make, options):
    """Two classes that differ in the size of their inputs: a task for the network, through every layer of it."""
    hidden = make(**options)
    model = nn.Sequential(nn.Linear(2, C), hidden, nn.ReLU(), nn.Linear(C, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        x = torch.randn(128, 2)
        labels = (x[:, 0] * x[:, 1] > 0).long()
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    x = torch.randn(512, 2)
    model.eval()
    assert (model(x).argmax(1) == (x[:, 0] * x[:, 1] > 0)).float().mean() > 0.85
