"""taper: the original norms until they fade, static norms fitted from moving averages, one function throughout."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from normfuse.convert import ScaleAnchor, Schedule, taper
from normfuse.nn import LayerNorm, MaskedBatchNorm, ProgressiveNorm

DIM, TOKENS = 8, 6


class Network(nn.Module):
    """Pre-norm, with a norm in front of the head."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(2))
        self.layers = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, 4)

    def forward(self, x, attention_mask=None):
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return self.head(self.norm(x))


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = Network()
    for norm in (net.norm, *net.norms):
        nn.init.normal_(norm.weight, mean=1, std=0.3)
        nn.init.normal_(norm.bias)
    return net


def batch(seed, rows=16):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(rows, TOKENS, DIM, generator=generator) + torch.arange(DIM)


def train(model, conversion, steps, first=0, rate=1e-3):
    optimizer = torch.optim.SGD(model.parameters(), rate)
    for step in range(first, first + steps):
        optimizer.zero_grad()
        model(batch(step)).square().mean().backward()
        optimizer.step()
        conversion.step()


def test_held_then_a_cosine_then_constants(model):
    original = copy.deepcopy(model)
    conversion = taper(model, Schedule(20, start=0.25, end=0.75, shape="cosine"))
    assert list(conversion.norms) == ["norms.0", "norms.1"] and conversion.report.kept == ["norm"]
    shares = []
    for step in range(20):
        if step == 4:
            assert torch.equal(model(batch(0)), original(batch(0)))
        shares.append(conversion.share)
        conversion.step()
        if step < 4:
            model(batch(step))
    expected = [0.5 + 0.5 * torch.cos(torch.tensor(torch.pi * i / 10)).item() for i in range(11)]
    assert shares[:5] == [1.0] * 5
    assert shares[5:16] == pytest.approx(expected) and shares[16:] == [0.0] * 4
    conversion.finish()
    assert [type(norm) for norm in model.norms] == [MaskedBatchNorm] * 2 and isinstance(model.norm, nn.LayerNorm)


@pytest.mark.parametrize("to", ["batch", "rep_batch", "unified", "power"])
def test_the_fit_of_the_averages_is_least_squares(model, to):
    conversion = taper(model, Schedule(10, start=0.3, end=0.6), to=to, momentum=0.01)
    train(model, conversion, 3, rate=0.0)
    x = torch.cat([batch(step) for step in range(3)]).flatten(0, 1).double()
    norm = conversion.norms["norms.0"]
    y = copy.deepcopy(norm.original).double()(x)
    for channel in range(DIM):
        design = torch.stack([x[:, channel], torch.ones(len(x), dtype=torch.float64)], 1)
        best = design @ torch.linalg.lstsq(design, y[:, channel]).solution
        # float32 in the norm, whose input is up to some 20 wide.
        torch.testing.assert_close(norm.static(x.float())[:, channel].double(), best, rtol=1e-4, atol=1e-4)


def test_averages_forget(model):
    conversion = taper(model, Schedule(100, start=0.6, end=0.8), momentum=0.2)
    norm = conversion.norms["norms.0"]
    for step in range(59):
        norm(batch(step) + (100 if step < 20 else 0))
        norm.advance()
    norm(batch(59))
    norm.advance()
    assert norm.static.running_mean.sub(torch.arange(DIM)).abs().max() < 1.5  # 0.8 ** 40 of 100, and noise


def test_training_and_evaluation_are_one_function(model):
    conversion = taper(model, Schedule(12, start=0.25, end=0.75))
    statistics = {}
    for step in range(12):
        x = batch(step)
        assert torch.equal(model.train()(x), model.eval()(x))
        train(model.train(), conversion, 1, step)
        if step > 2:
            now = {name: value.clone() for name, value in model.named_buffers() if "running" in name}
            assert all(torch.equal(value, statistics.get(name, value)) for name, value in now.items())
            statistics = now


@pytest.mark.parametrize("stop", [2, 5])
def test_it_resumes_bit_for_bit(model, stop):
    def begin():
        net = copy.deepcopy(model)
        return net, taper(net, Schedule(10, start=0.4, end=0.8))

    through, conversion = begin()
    train(through, conversion, stop)
    stored = copy.deepcopy(through.state_dict())
    train(through, conversion, 8 - stop, stop)
    resumed, again = begin()
    resumed.load_state_dict(stored)
    train(resumed, again, 8 - stop, stop)
    assert again.share == conversion.share < 1
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in through.state_dict().items())


def test_averages_keep_their_precision_and_leave_out_what_is_no_number(model):
    conversion = taper(model, Schedule(10, start=0.3, end=0.6))
    norm = conversion.norms["norms.0"]
    model(batch(0))
    before = norm.moments.clone()
    model(torch.full_like(batch(1), float("inf")))
    model(batch(1)[:0])
    assert norm.moments.equal(before) and norm.measured == 1
    assert model.to(torch.bfloat16).norms[0].moments.dtype == torch.float64 and norm.moments.equal(before)


def test_a_checkpoint_measures_once(model):
    taper(model, Schedule(10, start=0.3, end=0.6))
    torch.utils.checkpoint.checkpoint(model, batch(0), use_reentrant=False).sum().backward()
    assert model.norms[0].measured == 1


def test_compiled_steps_equal_eager_ones_and_compile_once_a_phase(model):
    eager, compiled = model, copy.deepcopy(model)
    conversions = [taper(net, Schedule(8, start=0.4, end=0.6)) for net in (eager, compiled)]
    run = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    mask = (torch.arange(TOKENS) < 4).long().expand(16, -1)
    with torch._dynamo.config.patch(recompile_limit=4, fail_on_recompile_limit_hit=True):
        for step in range(8):
            for net in (eager, run):
                net.zero_grad()
                net(batch(step), attention_mask=mask).square().mean().backward()
            for conversion in conversions:
                conversion.step()
    for (name, one), other in zip(eager.state_dict().items(), compiled.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, msg=name)


def test_a_checkpointed_compiled_block_measures_once(model):
    taper(model, Schedule(10, start=0.3, end=0.6))
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.utils.checkpoint.checkpoint(run, batch(0), use_reentrant=False).sum().backward()
    assert model.norms[0].measured == 1


def test_static_norms_are_fitted_where_processes_keep_a_part_each(model, mesh):
    whole, sharded = model, copy.deepcopy(model)
    for net in (whole, sharded):
        conversion = taper(net, Schedule(10, start=0.2, end=0.6))
        fully_shard(net, mesh=mesh) if net is sharded else None
        train(net, conversion, 4)
    for (name, one), other in zip(whole.named_parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(other.full_tensor(), one.detach(), msg=name)


def test_masked_positions_do_not_count(model):
    taper(model, Schedule(10, start=0.3, end=0.6))
    x, mask = batch(0), (torch.arange(TOKENS) < 4).long().expand(16, -1)
    model(torch.where(mask[..., None] == 1, x, 1e4), attention_mask=mask)
    torch.testing.assert_close(model.norms[0].moments[0].float(), x[:, :4].flatten(0, 1).mean(0))


def test_a_norm_that_does_not_train_is_told_at_once_and_ends_it_when_its_turn_comes(model):
    conversion = taper(model, Schedule(10, start=0.3, end=0.6))
    model.norms[1].eval()
    model(batch(0))
    with pytest.warns(RuntimeWarning, match=r"^1 of 2 norms have not run.* first step: norms\.1\. .*`where`"):
        conversion.step()
    conversion.step()  # which says nothing more
    with pytest.raises(RuntimeError, match=r"^norms\.1: λ begins to fall at step 3, but the norm has not run.*`where`"):
        conversion.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"schedule": Schedule(10, start=0.0)},
            r"start=0\.0 of 10 steps leaves no step to measure in; give at least 0",
        ),
        ({"momentum": 2.0}, r"momentum=2\.0 is not allowed"),
        ({"where": r"^norm$"}, "keep_last=True leaves nothing to replace: norm is the only norm"),
    ],
)
def test_refusals_leave_the_model_as_it_was(model, options, message):
    with pytest.raises(ValueError, match=message):
        taper(model, **options)
    assert not any(isinstance(module, ProgressiveNorm) for module in model.modules())


def test_all_norms_go_where_an_anchor_holds_the_scale(model):
    conversion = taper(model, Schedule(10, start=0.1, end=0.5), keep_last=False)
    assert list(conversion.norms) == ["norms.0", "norms.1", "norm"]
    anchor = ScaleAnchor(model.head, weight=0.5)
    with pytest.raises(RuntimeError, match=r"call loss\(\) after a forward"):
        anchor.loss()
    model(batch(0))
    seen = model.norm(_before_the_head(model, batch(0))).square().mean(-1).sqrt()
    torch.testing.assert_close(anchor.target, seen.mean())
    expected = 0.5 * (seen / seen.mean() - 1).square().mean()
    torch.testing.assert_close(anchor.loss(), expected)
    model.norm.original.weight.data *= 3
    model(batch(0))
    torch.testing.assert_close(
        anchor.loss(), 0.5 * (_scale(model, batch(0)) / seen.mean() - 1).square().mean(), rtol=1e-4, atol=1e-5
    )
    anchor.close()
    model(batch(0))
    with pytest.raises(RuntimeError):
        anchor.loss()


def _before_the_head(model, x):
    for norm, layer in zip(model.norms, model.layers, strict=True):
        x = x + layer(norm(x))
    return x


def _scale(model, x):
    return model.norm(_before_the_head(model, x)).square().mean(-1).sqrt()


def test_our_layer_norm_fades_too():
    model = nn.Sequential(LayerNorm(DIM), nn.Linear(DIM, DIM), LayerNorm(DIM))
    conversion = taper(model, Schedule(4, start=0.25, end=0.75))
    train(model, conversion, 4)
    conversion.finish()
    assert isinstance(model[0], MaskedBatchNorm) and isinstance(model[2], LayerNorm)
