"""Batch normalisation with masks and ghost batches, its regularised and estimated forms, against loops in NumPy."""

import copy
import warnings
from functools import partial
from itertools import pairwise

import norm_formulas
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from normfuse.nn import (
    EstimatedBatchNorm,
    MaskedBatchNorm,
    PowerNorm,
    RegularizedBatchNorm,
    RepBatchNorm,
    UnifiedNorm,
    batch_norm_penalty,
    set_momentum,
)
from normfuse.ops.batch_norm import BatchNormState, batch_norm_with_statistics

C = 5
DOUBLE = {"dtype": torch.float64}
# Sums of at most a hundred numbers of size one in float64.
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def with_affine(norm):
    with torch.no_grad():
        norm.weight.copy_(torch.randn(C))
        norm.bias.copy_(torch.randn(C))
    return norm


def spec_of(norm, kind=norm_formulas.BatchNormSpec):
    spec = kind(C, norm.eps, norm.momentum)
    spec.weight, spec.bias = norm.weight.detach().numpy(), norm.bias.detach().numpy()
    return spec


def assert_same_statistics(norm, spec):
    np.testing.assert_allclose(norm.running_mean.numpy(), spec.mean, **EXACT)
    np.testing.assert_allclose(norm.running_var.numpy(), spec.var, **EXACT)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("ghost_size", [None, 2, 3])
def test_training_follows_the_formula(ghost_size, masked, momentum):
    norm = with_affine(MaskedBatchNorm(C, momentum=momentum, ghost_size=ghost_size, **DOUBLE))
    spec = spec_of(norm)
    for step in range(3):
        x = torch.randn(7, 3, C, **DOUBLE) + 2
        pad_mask = torch.rand(7, 3) < 0.4 if masked else None
        if masked and step == 1:
            pad_mask[:4] = True  # a ghost batch without a valid row
        starts = {None: [0, 7], 2: [0, 2, 4, 7], 3: [0, 3, 7]}[ghost_size]
        pairs = list(pairwise(starts))
        parts = [x[a:b].reshape(-1, C).numpy() for a, b in pairs]
        pads = [pad_mask[a:b].reshape(-1).numpy() if masked else None for a, b in pairs]
        expected = spec.train(parts, pads)
        np.testing.assert_allclose(norm(x, pad_mask).detach().numpy().reshape(-1, C), expected, **EXACT)
        assert_same_statistics(norm, spec)
        assert norm.num_batches_tracked == spec.steps
    x = torch.randn(2, C, **DOUBLE)
    np.testing.assert_allclose(norm.eval()(x).detach().numpy(), spec.evaluate(x.numpy()), **EXACT)


@pytest.mark.parametrize("channel_dim", [-1, 1])
@pytest.mark.parametrize("ghost_size", [None, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_exact_through_result_and_statistics(masked, ghost_size, channel_dim):
    x, weight, bias = torch.randn(5, 2, 3, 2, **DOUBLE), torch.randn(2, **DOUBLE), torch.randn(2, **DOUBLE)
    x, shortcut = x.movedim(-1, channel_dim).contiguous(), torch.randn((), **DOUBLE)
    pad_mask = torch.rand(5, 2, 3) < 0.4 if masked else None

    def run(x, weight, bias, shortcut):
        state = BatchNormState(torch.zeros(2, **DOUBLE), torch.ones(2, **DOUBLE), torch.tensor(0))
        y, statistics, _ = batch_norm_with_statistics(
            x, weight, bias, state, pad_mask, eps=1e-3, channel_dim=channel_dim, ghost_size=ghost_size,
            shortcut=shortcut,
        )  # fmt: skip
        return y, statistics.mean, statistics.var

    assert torch.autograd.gradcheck(run, [value.requires_grad_() for value in (x, weight, bias, shortcut)])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", [MaskedBatchNorm, EstimatedBatchNorm, RepBatchNorm])
def test_every_layout_gives_the_same(kind, masked):
    norms = [with_affine(kind(C, channel_dim=-1))]
    for channel_dim in (1, 1, 0):
        norms.append(copy.deepcopy(norms[0]))
        norms[-1].channel_dim = channel_dim
    rows, pad_mask = torch.randn(4, 3, 6, C), torch.rand(4, 3, 6) < 0.3 if masked else None
    last = rows.movedim(-1, 1)
    results = []
    for norm, x in zip(norms, (rows, last.contiguous(), last, rows.movedim(-1, 0)), strict=True):
        x = x.detach().requires_grad_()
        y = norm(x, pad_mask)
        y.square().sum().backward()
        moved = [t.movedim(norm.channel_dim, -1) for t in (y.detach(), x.grad)]
        results.append([*moved, norm.weight.grad, norm.bias.grad, *norm.buffers()])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


@pytest.mark.parametrize("shape", [(6, C), (4, C, 3), (2, C, 3, 2)], ids=str)
def test_without_padding_it_is_torch_and_reads_its_checkpoints(shape):
    kinds = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}
    theirs, ours = with_affine(kinds[len(shape)](C)), MaskedBatchNorm(C, channel_dim=1)
    ours.load_state_dict(theirs.state_dict())
    for _ in range(2):
        x, dy = torch.randn(2, *shape)
        here, there = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = ours(here), theirs(there)
        torch.testing.assert_close(y, expected)
        y.backward(dy)
        expected.backward(dy)
        torch.testing.assert_close(here.grad, there.grad)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())


def test_a_mask_that_hides_nothing_changes_nothing():
    plain = with_affine(MaskedBatchNorm(C))
    masked = copy.deepcopy(plain)
    x = torch.randn(4, 3, C)
    torch.testing.assert_close(masked(x, torch.zeros(4, 3, dtype=torch.bool)), plain(x))
    torch.testing.assert_close(masked.state_dict(), plain.state_dict())


def test_nothing_in_padding_reaches_the_statistics():
    norm = MaskedBatchNorm(C)
    x = torch.randn(4, 3, C)
    pad_mask = torch.zeros(4, 3, dtype=torch.bool)
    pad_mask[0, 0] = True
    x[0, 0] = float("nan")
    assert norm(x, pad_mask)[~pad_mask].isfinite().all()
    assert norm.running_mean.isfinite().all() and norm.running_var.isfinite().all()


@pytest.mark.parametrize("kind", [MaskedBatchNorm, RegularizedBatchNorm, EstimatedBatchNorm])
@pytest.mark.parametrize("shape", [(0, 3, C), (0, C)])
def test_an_empty_batch_moves_no_statistic(kind, shape):
    norm = kind(C)
    before = copy.deepcopy(norm.state_dict())
    assert norm(torch.empty(shape)).shape == shape
    assert torch.equal(norm.running_mean, before["running_mean"]) and torch.equal(
        norm.running_var, before["running_var"]
    )
    hidden = norm(torch.randn(4, C), torch.ones(4, dtype=torch.bool))
    assert hidden.isfinite().all() and torch.equal(norm.running_var, before["running_var"])


@pytest.mark.parametrize("masked", [False, True])
def test_a_batch_that_is_not_finite_moves_only_the_other_channels(masked):
    norm = MaskedBatchNorm(C, ghost_size=2)
    x = torch.randn(4, C)
    x[1, 2] = float("inf")
    norm(x, torch.zeros(4, dtype=torch.bool) if masked else None)
    assert norm.running_mean.isfinite().all() and norm.running_var.isfinite().all()
    assert (norm.running_mean != 0).all()  # channel 2 moved with the second ghost batch


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
def test_low_precision_keeps_wide_statistics(dtype, masked):
    norm = MaskedBatchNorm(C).to(dtype)
    assert norm.weight.dtype == dtype and norm.running_var.dtype == torch.float32
    x = torch.randn(64, C)
    y = norm(x.to(dtype), torch.zeros(64, dtype=torch.bool) if masked else None)
    assert y.dtype == dtype and norm.running_var.dtype == torch.float32
    expected = MaskedBatchNorm(C)(x.to(dtype).float())
    torch.testing.assert_close(y.float(), expected, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)


def test_checkpointing_moves_statistics_once():
    x = torch.randn(6, C, requires_grad=True)
    for kind in (MaskedBatchNorm, RegularizedBatchNorm, EstimatedBatchNorm):
        once, plain = kind(C), kind(C)
        torch.utils.checkpoint.checkpoint(once, x, use_reentrant=False).sum().backward()
        plain(x).sum().backward()
        assert all(torch.equal(a, b) for a, b in zip(once.buffers(), plain.buffers(), strict=True))


def test_compiled_steps_are_eager_steps():
    eager = MaskedBatchNorm(C, ghost_size=2)
    compiled = torch.compile(copy.deepcopy(eager), fullgraph=True, backend="aot_eager")
    pad_mask = torch.rand(4, 3) < 0.3
    for _ in range(2):
        x = torch.randn(4, 3, C)
        torch.testing.assert_close(compiled(x, pad_mask), eager(x, pad_mask))
    torch.testing.assert_close(compiled.state_dict(), {f"_orig_mod.{k}": v for k, v in eager.state_dict().items()})


def test_the_penalty_is_the_papers_and_has_the_gradient_of_the_batch():
    norm = with_affine(RegularizedBatchNorm(C, mean_penalty=0.3, var_penalty=0.7, **DOUBLE))
    spec = spec_of(norm)
    x = torch.randn(6, C, **DOUBLE, requires_grad=True)
    y = norm(x)
    values = x.detach().numpy()
    spec.eps = 0.0  # divided by the root of max(var, eps), and var is above eps
    np.testing.assert_allclose(y.detach().numpy(), spec.train([values], [None]), **EXACT)
    mean, var = values.mean(0), values.var(0)
    expected = 0.3 * ((spec.mean - mean) ** 2).sum() + 0.7 * np.abs(spec.var - var).sum()
    penalty = batch_norm_penalty(nn.Sequential(norm), tokens=1)
    np.testing.assert_allclose(penalty.item(), expected, **EXACT)
    (grad,) = torch.autograd.grad(penalty, x)
    by_hand = 0.3 * 2 * (mean - spec.mean) / 6 + 0.7 * np.sign(var - spec.var) * 2 * (values - mean) / 6
    np.testing.assert_allclose(grad.numpy(), by_hand, **EXACT)
    norm(x)
    assert copy.deepcopy(norm).penalty is None
    published = RegularizedBatchNorm(C)  # the authors' weights in pre-norm translation models
    assert (published.mean_penalty, published.var_penalty) == (0.1, 0.01)
    with pytest.raises(ValueError, match="has no RegularizedBatchNorm with a penalty"):
        batch_norm_penalty(nn.Sequential(copy.deepcopy(norm)))


def test_a_checkpoint_leaves_its_penalty_once_and_a_reentrant_one_none():
    plain = RegularizedBatchNorm(C, mean_penalty=1.0, **DOUBLE)
    checkpointed = copy.deepcopy(plain)
    for _ in range(2):
        x = torch.randn(6, C, **DOUBLE)
        found = []
        for norm, run in ((plain, plain), (checkpointed, partial(checkpoint, checkpointed, use_reentrant=False))):
            leaf = x.clone().requires_grad_()
            loss = run(leaf).sum() + batch_norm_penalty(norm)
            loss.backward()
            found += [loss, leaf.grad]
        torch.testing.assert_close(found[:2], found[2:])
    y = checkpoint(checkpointed, x.clone().requires_grad_(), use_reentrant=True)
    with pytest.raises(RuntimeError, match=r"no gradient inside a reentrant checkpoint.*use_reentrant=False"):
        batch_norm_penalty(checkpointed)
    y.sum().backward()
    assert checkpointed.penalty is None


def test_penalties_of_several_forwards_add_up_and_are_for_a_mean_loss():
    twins = [RegularizedBatchNorm(C, **DOUBLE), RegularizedBatchNorm(C, **DOUBLE)]
    batches = [torch.randn(6, C, **DOUBLE) + i for i in range(3)]
    apart = []
    for x in batches:
        twins[0](x)
        apart.append(batch_norm_penalty(twins[0]))
        twins[1](x)
    torch.testing.assert_close(batch_norm_penalty(twins[1]), sum(apart))
    with pytest.raises(ValueError, match="run a forward in training mode first"):
        batch_norm_penalty(twins[1])  # it has been taken
    twins[0](batches[0])
    twins[1](batches[0])
    torch.testing.assert_close(4096 * batch_norm_penalty(twins[0]), batch_norm_penalty(twins[1], tokens=1))
    silent = RegularizedBatchNorm(C, 0.0, 0.0)
    silent(torch.randn(4, C))
    assert batch_norm_penalty(silent) == 0 and silent.penalty is None
    with pytest.raises(ValueError, match="tokens=0 is not allowed"):
        batch_norm_penalty(silent, tokens=0)


def test_forgotten_penalties_are_told_and_do_not_pile_up(monkeypatch):
    monkeypatch.setattr("normfuse.nn.batch_norm.FORGOTTEN", 3)
    norm = RegularizedBatchNorm(C)
    for more in (3, 2):  # the one that comes with the warning counts
        with warnings.catch_warnings(action="error"):
            for _ in range(more):
                norm(torch.randn(4, C))
        with pytest.warns(RuntimeWarning, match="3 penalties of a RegularizedBatchNorm were not used"):
            norm(torch.randn(4, C))
    last = norm.penalty
    assert batch_norm_penalty(norm, tokens=1) == last


@pytest.mark.parametrize("training", [True, False])
def test_regularized_norms_divide_by_the_floored_deviation_and_zero_padding(training):
    norm = with_affine(RegularizedBatchNorm(C, eps=1e-2, channel_dim=1, ghost_size=2, **DOUBLE)).train(training)
    scales = torch.tensor([1e-3, 1e-2, 0.05, 1.0, 3.0], **DOUBLE)
    norm.running_var.copy_(scales.square())
    x = torch.randn(4, C, 7, **DOUBLE) * scales[:, None]
    pad_mask = torch.zeros(4, 7, dtype=torch.bool)
    pad_mask[1, 3:] = pad_mask[3, :2] = True
    y = norm(x, pad_mask)
    for part in (slice(0, 2), slice(2, 4)):
        rows, keep = x[part].transpose(1, 2).reshape(-1, C), ~pad_mask[part].reshape(-1)
        mean = rows[keep].mean(0) if training else torch.zeros(C, **DOUBLE)
        var = rows[keep].var(0, unbiased=False) if training else scales.square()
        expected = norm.weight * (rows - mean) / var.clamp(min=1e-2).sqrt() + norm.bias
        got = y[part].transpose(1, 2).reshape(-1, C)
        torch.testing.assert_close(got, torch.where(keep[:, None], expected, 0.0), rtol=1e-10, atol=1e-10)
    if training:
        inputs = torch.randn(4, C, 3, **DOUBLE, requires_grad=True)
        assert torch.autograd.gradcheck(lambda v: norm(v * scales[:, None]), inputs)


def test_a_batch_norms_state_without_a_counter_loads():
    state = nn.BatchNorm1d(C).state_dict()
    del state["num_batches_tracked"]
    for norm in (MaskedBatchNorm(C), RepBatchNorm(C), EstimatedBatchNorm(C)):
        norm.num_batches_tracked.fill_(3)
        norm.load_state_dict({**state, **({"alpha": torch.ones(())} if isinstance(norm, RepBatchNorm) else {})})
        assert norm.num_batches_tracked == 3
    with pytest.raises(RuntimeError, match="running_mean"):
        MaskedBatchNorm(C).load_state_dict({k: v for k, v in state.items() if k != "running_mean"})


@pytest.mark.parametrize("masked", [False, True])
def test_estimated_statistics(masked):
    norm = with_affine(EstimatedBatchNorm(C, **DOUBLE))
    spec = spec_of(norm, norm_formulas.EstimatedBatchNormSpec)
    for rate in (0.2, 0.05):
        assert set_momentum(nn.Sequential(norm), rate) == 1
        spec.momentum = rate
        x = torch.randn(5, 2, C, **DOUBLE)
        pad_mask = torch.rand(5, 2) < 0.4 if masked else None
        expected = spec.train(x.reshape(-1, C).numpy(), None if pad_mask is None else pad_mask.reshape(-1).numpy())
        np.testing.assert_allclose(norm(x, pad_mask).detach().numpy().reshape(-1, C), expected, **EXACT)
        assert_same_statistics(norm, spec)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(norm(x).sum(), x)
    slope = norm.weight * (norm.running_var + norm.eps).rsqrt()
    torch.testing.assert_close(grad, slope.detach().expand_as(x))  # nothing through the statistics


@pytest.mark.parametrize("positions", [1, 4])
def test_the_operations_are_sound(positions):
    operations = torch.ops.normfuse
    x, weight, mask = torch.randn(6, C, positions), torch.rand(1, 1, C), torch.rand(6, positions) < 0.3
    running = torch.zeros(C), torch.ones(C), torch.tensor(0)
    given = x, mask, weight, weight + 1, torch.rand(1)
    torch.library.opcheck(operations.batch_norm_forward, (*given, *running, 2, False, 0.1, 1e-5))
    torch.library.opcheck(operations.batch_norm_forward_recompute_safe, (*given, *running, 0, True, None, 1e-5))
    torch.library.opcheck(operations.stat_group_norm_forward, (x, None, None, None, None, 2, 1, 1e-5))
    torch.library.opcheck(operations.stat_group_norm_forward, (*given, 2, 0, 1e-5))
    _, stats, count = operations.stat_group_norm_forward(*given, 2, 0, 1e-5)
    more = torch.randn(2, *stats.shape[1:])
    torch.library.opcheck(
        operations.batch_norm_backward, (x, *more, *given[:3], given[4], stats, count, 2, True, 0, False)
    )
    window, var = torch.rand(4, C), torch.ones(C)
    torch.library.opcheck(
        operations.moving_average_norm_forward, (x, mask, var, var, var, window, torch.tensor([7]), 2, 1e-5, 0.9)
    )
    torch.library.opcheck(
        operations.moving_average_norm_backward, (x, x, var, torch.rand(2, C), torch.tensor([7]), window, 2)
    )


@pytest.mark.parametrize(("kind", "options"), [(UnifiedNorm, {}), (PowerNorm, {"group_num": None})])
def test_ghost_batches_of_unified_and_power_norm_are_steps(kind, options):
    ghost = kind(C, ghost_size=2, warmup_iters=3, **options)
    plain = kind(C, warmup_iters=3, **options)
    x, pad_mask = torch.randn(7, 2, C), torch.rand(7, 2) < 0.3
    y = ghost(x, pad_mask)
    expected = torch.cat([plain(x[a:b], pad_mask[a:b]) for a, b in ((0, 2), (2, 4), (4, 7))])
    assert torch.equal(y, expected) and ghost.iters == 3
    assert all(torch.equal(a, b) for a, b in zip(ghost.buffers(), plain.buffers(), strict=True))
    assert torch.equal(ghost.eval()(x), plain.eval()(x))
    assert "ghost_size=2" in repr(ghost) and "ghost_size" not in repr(plain)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MaskedBatchNorm(C, momentum=1.5), r"momentum=1\.5 is not allowed.*share of the new value"),
        (lambda: MaskedBatchNorm(C, ghost_size=0), "ghost_size=0 is not allowed"),
        (lambda: MaskedBatchNorm(C, ghost_size=2, channel_dim=0), "ghost_size splits dimension 0"),
        (lambda: RegularizedBatchNorm(C, mean_penalty=-1), "mean_penalty=-1 is not allowed"),
        (lambda: EstimatedBatchNorm(C, ghost_size=2), "ghost_size makes no difference"),
        (lambda: set_momentum(nn.Linear(1, 1), 0.1), "has no EstimatedBatchNorm"),
        (lambda: MaskedBatchNorm(C)(torch.randn(2, C + 1)), "expected 5"),
        (lambda: MaskedBatchNorm(C)(torch.randn(2, C), torch.zeros(3, dtype=torch.bool)), "pad_mask has shape"),
        (lambda: RegularizedBatchNorm(C)(torch.randn(2, C + 1)), "expected 5"),
        (lambda: EstimatedBatchNorm(C)(torch.randn(2, C + 1)), "expected 5"),
    ],
)
def test_refusals(build, message):
    with pytest.raises(ValueError, match=message):
        build()
