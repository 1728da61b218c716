"""ProgressiveNorm: exact at both ends, linear between, resumable, refused by export before the end."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from normfuse.nn import PowerNorm, ProgressiveNorm, RepBatchNorm, UnifiedNorm

C = 6


def make(end=10, static=RepBatchNorm, **options):
    torch.manual_seed(1)
    original = nn.LayerNorm(C)
    nn.init.normal_(original.weight)
    nn.init.normal_(original.bias)
    return ProgressiveNorm(original, static(C), end=end, **options)


@pytest.mark.parametrize("static", [RepBatchNorm, UnifiedNorm, PowerNorm])
@pytest.mark.parametrize("training", [True, False])
def test_both_ends_are_exact(training, static):
    norm = make(static=static).train(training)
    twin = copy.deepcopy(norm.static)
    x = torch.randn(4, 5, C)
    assert torch.equal(norm(x), norm.original(x))
    twin(x)
    norm.advance(10)
    assert norm.share == 0 and torch.equal(norm(x), twin(x))


def test_the_share_falls_linearly_between_begin_and_end():
    norm = make(begin=2, end=6)
    shares = []
    for _ in range(8):
        shares.append(norm.share)
        norm.advance()
    assert shares == [1, 1, 1, 0.75, 0.5, 0.25, 0, 0] and norm.step.item() == 8
    halfway = make(begin=2, end=6).eval()
    halfway.advance(4)
    x = torch.randn(3, C)
    torch.testing.assert_close(halfway(x), (halfway.original(x) + halfway.static(x)) / 2)


def test_the_share_begins_at_r0_and_the_static_norm_rests_before():
    norm = make(begin=2, end=6, r0=0.5).train()
    before = copy.deepcopy(norm.static.state_dict())
    shares = []
    for step in range(7):
        shares.append(norm.share)
        x = torch.randn(4, C)
        y = norm(x)
        if step < 2:
            assert torch.equal(y, norm.original(x))
            assert all(torch.equal(v, before[k]) for k, v in norm.static.state_dict().items())
        norm.advance()
    assert shares == [1, 1, 0.5, 0.375, 0.25, 0.125, 0]
    assert norm.static.num_batches_tracked == 5
    with pytest.raises(ValueError, match="r0=2 is not allowed"):
        make(r0=2)


def test_gradients_reach_both_norms():
    norm = make()
    norm.advance(3)
    norm(torch.randn(5, C)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in norm.parameters())


def test_the_step_is_in_the_state():
    norm = make()
    norm.advance(4)
    fresh = make()
    fresh.load_state_dict(copy.deepcopy(norm.state_dict()))
    x = torch.randn(4, C)
    assert fresh.share == norm.share == 0.6 and torch.equal(fresh(x), norm(x))
    fresh.advance()
    assert fresh.step.item() == 5


def test_frozen_statistics_stay_and_gain_and_shift_learn():
    norm = make(frozen=True).train()
    norm.advance(5)
    assert norm.training and not norm.static.training
    before = {name: buffer.clone() for name, buffer in norm.static.named_buffers()}
    norm(torch.randn(9, C)).square().sum().backward()
    assert all(torch.equal(norm.static.get_buffer(name), value) for name, value in before.items())
    assert norm.static.weight.grad.abs().sum() > 0


def test_a_mask_that_fits_is_used_and_another_is_not():
    x, mask = torch.randn(3, 4, C), torch.rand(3, 4) < 0.4
    given, held, none = make(), make(), make()
    given(x, pad_mask=mask)
    held.pad_mask = mask
    held(x)
    none.pad_mask = torch.ones(5, 4, dtype=torch.bool)
    none(x)
    assert torch.equal(given.static.running_mean, held.static.running_mean)
    torch.testing.assert_close(none.static.running_mean, 0.1 * x.mean((0, 1)))


def test_autocast_and_half_precision():
    norm = make().bfloat16()
    norm.advance(5)
    assert norm(torch.randn(3, C, dtype=torch.bfloat16)).dtype == torch.bfloat16
    model = nn.Sequential(nn.Linear(C, C), make())
    model[1].advance(5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(torch.randn(3, C))
        assert y.dtype == F.layer_norm(model[0](torch.randn(3, C)), (C,)).dtype


@pytest.mark.parametrize("strict", [False, True])
def test_export_is_refused_before_the_end(strict):
    norm = make().eval()
    norm.advance(4)
    x = torch.randn(3, C)
    with pytest.raises(Exception, match=r"still 60.0% LayerNorm \(step 4 of 10\)"):
        torch.export.export(norm, (x,), strict=strict)
    norm.advance(6)
    program = torch.export.export(norm, (x,), strict=strict)
    assert torch.equal(program.module()(x), norm.static(x))


def test_compiled_steps_equal_eager_ones():
    eager, compiled = make(), make()
    run = torch.compile(compiled, backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=3, fail_on_recompile_limit_hit=True):
        for _ in range(6):
            x = torch.randn(4, C)
            torch.testing.assert_close(run(x), eager(x))
            eager.advance()
            compiled.advance()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"end": 0}, ValueError, "end=0 is not allowed; give an int of at least 1"),
        ({"begin": 4, "end": 4}, ValueError, "end=4 is not allowed; give an int of at least 5"),
        ({"begin": -1, "end": 4}, ValueError, "begin=-1"),
        ({"end": 2.5}, TypeError, "end=2.5 has type float"),
    ],
)
def test_refusals(options, error, message):
    with pytest.raises(error, match=message):
        make(**options)


def test_evaluation_can_use_the_static_norm_alone_whatever_the_share():
    """As the authors of PRepBN evaluate and export."""
    norm = ProgressiveNorm(nn.LayerNorm(4), RepBatchNorm(4), end=10, evaluate_static=True)
    for _ in range(3):
        norm(torch.randn(8, 4))
        norm.advance()
    x = torch.randn(5, 4)
    mixed = norm(x)
    norm.eval()
    assert 0 < norm.share < 1 and torch.equal(norm(x), norm.static(x)) and not torch.allclose(mixed, norm(x))
    program = torch.export.export(norm, (x,))
    torch.testing.assert_close(program.module()(x), norm.static(x))
    assert "evaluate_static=True" in repr(norm)
