"""progressive: the original at first, the static norms at the end, and a way between that can be interrupted."""

import copy

import pytest
import torch
from torch import nn

import normfuse.onnx
from normfuse.convert import Schedule, progressive
from normfuse.convert.fitting import static_alone
from normfuse.nn import MaskedBatchNorm, PowerNorm, ProgressiveNorm, RepBatchNorm, UnifiedNorm

DIM, WORDS, TOKENS = 8, 20, 6
KINDS = {"rep_batch": RepBatchNorm, "batch": MaskedBatchNorm, "unified": UnifiedNorm, "power": PowerNorm}


class Encoder(nn.Module):
    """A post-norm encoder in small, with the attention mask of transformers' models."""

    def __init__(self, depth=2):
        super().__init__()
        self.embed = nn.Embedding(WORDS, DIM)
        self.norm = nn.LayerNorm(DIM)
        self.mix = nn.ModuleList(
            nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh(), nn.Linear(DIM, DIM)) for _ in range(depth)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(depth))
        self.head = nn.Linear(DIM, DIM)

    def forward(self, input_ids, attention_mask=None):
        x = self.norm(self.embed(input_ids))
        for mix, norm in zip(self.mix, self.norms, strict=True):
            x = norm(x + mix(x))
        return self.head(x)


@pytest.fixture
def model():
    net = Encoder()
    for norm in (net.norm, *net.norms):
        nn.init.normal_(norm.weight, mean=1, std=0.3)
        nn.init.normal_(norm.bias)
    return net


def batch(seed=0, rows=5):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(WORDS, (rows, TOKENS), generator=generator)
    lengths = torch.randint(2, TOKENS + 1, (rows, 1), generator=generator)
    return {"input_ids": ids, "attention_mask": (torch.arange(TOKENS) < lengths).long()}


BATCHES = [batch(seed) for seed in range(4)]


@pytest.mark.parametrize("to", KINDS)
def test_the_original_at_first_and_only_static_norms_at_the_end(model, to):
    original = copy.deepcopy(model)
    conversion = progressive(model, to=to, schedule=10, where=r"norms")
    assert conversion.report.kept == ["norm"] and list(conversion.norms) == ["norms.0", "norms.1"]
    conversion.calibrate(BATCHES)
    assert torch.equal(model(**BATCHES[0]), original(**BATCHES[0])) and conversion.share == 1
    conversion.step(8)
    assert conversion.share == 0
    expected = model.eval()(**BATCHES[0])
    report = conversion.finish()
    assert [type(norm) for norm in model.norms] == [KINDS[to]] * 2 and len(report.swaps) == 2
    assert torch.equal(model(**BATCHES[0]), expected) and not model._forward_pre_hooks
    assert to != "power" or model.norms[0].group_num is None


@pytest.mark.parametrize("to", KINDS)
def test_models_that_ask_a_norm_for_its_dtype(to):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.RMSNorm(DIM), nn.Linear(DIM, DIM)

        def forward(self, x):
            return self.linear(self.norm(x.to(dtype=self.norm.weight.dtype, device=self.norm.weight.device)))

    model, x = Block(), torch.randn(3, DIM)
    expected = model(x)
    conversion = progressive(model, to=to, schedule=2)
    assert torch.equal(model(x.double()), expected) and not hasattr(model.norm, "bias")
    conversion.calibrate([x])
    conversion.step(2)
    conversion.finish()
    assert model(x.double()).dtype == torch.float32


@pytest.mark.parametrize(("to", "options"), [*((to, {}) for to in KINDS), ("power", {"group_num": 2})])
def test_the_fit_is_least_squares_over_valid_tokens(model, to, options):
    conversion = progressive(model.double(), to=to, schedule=1, **options)
    explained = conversion.calibrate(BATCHES)
    norm = conversion.norms["norm"]
    valid = torch.cat([b["attention_mask"] for b in BATCHES]).bool()
    x = model.embed(torch.cat([b["input_ids"] for b in BATCHES]))[valid].detach()
    y = norm.original(x)
    u = x
    if options:
        u = torch.cat([part / (part.square().mean(1, keepdim=True) + 1e-5).sqrt() for part in x.chunk(2, 1)], 1)
    best = torch.empty_like(y)
    for channel in range(DIM):
        design = torch.stack([u[:, channel], torch.ones_like(u[:, 0])], 1)
        best[:, channel] = design @ torch.linalg.lstsq(design, y[:, channel]).solution
    # Least squares of about a hundred rows in float64, by normal equations here and by QR there.
    torch.testing.assert_close(norm.static.eval()(x), best, rtol=1e-8, atol=1e-8)
    residual = (y - best).square().sum() / (y - y.mean(0)).square().sum()
    assert explained["norm"] == pytest.approx(1 - residual.item(), abs=1e-8) and 0 < explained["norm"] <= 1
    statistic = norm.static.get_buffer("running_phi" if to == "power" else "running_var")
    torch.testing.assert_close(statistic, x.var(0) if "batch" in to else u.square().mean(0))


def test_statistics_are_those_of_the_inputs_that_static_norms_leave(model):
    conversion = progressive(model.double(), schedule=1)
    conversion.calibrate([batch(rows=40)])
    seen = []
    hook = model.norms[1].static.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    conversion.step()
    whole = batch(rows=40)
    model.eval()(**whole)
    hook.remove()
    rows = seen[0][whole["attention_mask"].bool()]
    # While they are taken, norms divide by a batch's biased variance; afterwards by the unbiased one.
    close = {"rtol": 2 / len(rows), "atol": 2 / len(rows)}
    torch.testing.assert_close(model.norms[1].static.running_mean, rows.mean(0), **close)
    torch.testing.assert_close(model.norms[1].static.running_var, rows.var(0), **close)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("to", KINDS)
def test_a_learning_rate_of_zero_keeps_what_calibration_gave(to, frozen):
    """Wide tokens, as behind a trained embedding: a shortcut of 1 beside the fit would hurt."""
    torch.manual_seed(0)
    model = Encoder(depth=6)
    with torch.no_grad():
        model.embed.weight.mul_(30.0).add_(15 * torch.randn(DIM))
    original = copy.deepcopy(model).eval()
    data, whole = [batch(seed, rows=8) for seed in range(30)], batch(99, rows=200)
    expected = original(**whole)

    def error():
        with torch.no_grad():
            off = model.eval()(**whole) - expected
        return ((off.square().mean() / expected.var()).sqrt()).item()

    options = {} if "batch" in to else {"warmup_iters": 0}
    conversion = progressive(model, to=to, schedule=Schedule(steps=60, end=0.5), frozen=frozen, **options)
    conversion.calibrate(data)
    with static_alone(conversion.norms):
        calibrated = error()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    for step in range(60):
        model.train()
        model(**data[step % 30]).square().mean().backward()
        optimizer.step()
        conversion.step()
    assert conversion.share == 0
    # Statistics that run are means over the last ten batches of some 30 valid tokens: within √(2/300), a twelfth, of a
    # deviation, of which the error, a third of a deviation itself, moves by that share.
    assert error() <= calibrated * (1 if frozen else 1 + 1 / 12)


def test_without_the_fit_gain_and_shift_are_the_originals(model):
    conversion = progressive(model, schedule=1)
    conversion.calibrate(BATCHES, max_batches=2, fit=False)
    for norm in conversion.norms.values():
        assert torch.equal(norm.static.weight, norm.original.weight)
        assert torch.equal(norm.static.bias, norm.original.bias)


def test_modes_and_steps_survive_calibration(model):
    conversion = progressive(model, to="unified", schedule=10, frozen=False)
    conversion.step(2)
    model.mix.eval()
    conversion.calibrate(BATCHES)
    norm = conversion.norms["norm"]
    assert model.training and not model.mix.training and norm.static.training
    assert norm.static.iters.item() == 0 and norm.step.item() == 2


def test_padding_is_left_out_of_the_statistics_in_training(model):
    spoiled = copy.deepcopy(model)
    ids, mask = BATCHES[0]["input_ids"], BATCHES[0]["attention_mask"]
    for net, words in ((model, ids), (spoiled, torch.where(mask == 1, ids, WORDS - 1))):
        progressive(net, schedule=1, frozen=False)
        net(words, attention_mask=mask)
    for one, other in zip(model.buffers(), spoiled.buffers(), strict=True):
        torch.testing.assert_close(one, other)
    assert model.norm.static.running_mean.abs().sum() > 0


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *arguments, **options):
        return self.module(*arguments, **options)


@pytest.mark.parametrize("wrap", [Wrapper, nn.DataParallel])
def test_padding_is_known_through_wrappers(model, wrap):
    wrapped = wrap(copy.deepcopy(model))
    progressive(model).calibrate(BATCHES)
    progressive(wrapped).calibrate([(batch, "label") for batch in BATCHES])
    for one, other in zip(model.buffers(), wrapped.buffers(), strict=True):
        assert torch.equal(one, other)


def test_layer_by_layer(model):
    conversion = progressive(model, schedule=Schedule(steps=20, start=0.1, end=0.7, order="layers"))
    assert [(norm.begin, norm.end) for norm in conversion.norms.values()] == [(2, 6), (6, 10), (10, 14)]
    conversion.step(7)
    assert [norm.share for norm in conversion.norms.values()] == [0, 0.75, 1]


def train(model, conversion, optimizer, steps, first):
    for step in range(first, first + steps):
        loss = model(**BATCHES[step % 4]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        conversion.step()


@pytest.mark.parametrize("to", KINDS)
def test_resuming_is_bit_exact(model, to):
    def begin():
        net = copy.deepcopy(model)
        conversion = progressive(net, to=to, schedule=8, **({} if "batch" in to else {"warmup_iters": 3}))
        return net, conversion, torch.optim.Adam(net.parameters(), lr=1e-2)

    through, conversion, optimizer = begin()
    conversion.calibrate(BATCHES)
    train(through, conversion, optimizer, 3, 0)
    stored = copy.deepcopy((through.state_dict(), optimizer.state_dict()))
    train(through, conversion, optimizer, 5, 3)
    resumed, again, other = begin()
    resumed.load_state_dict(stored[0])
    other.load_state_dict(stored[1])
    assert 0 < again.share < 1
    train(resumed, again, other, 5, 3)
    assert again.share == conversion.share == 0
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in through.state_dict().items())


def test_a_shared_norm_is_replaced_once(model):
    model.norms[1] = model.norms[0]
    conversion = progressive(model, schedule=1, where="norms")
    assert list(conversion.norms) == ["norms.0"] and len(conversion.report.swaps) == 2
    assert model.norms[0] is model.norms[1]
    conversion.step()
    conversion.finish()
    assert model.norms[0] is model.norms[1] and isinstance(model.norms[0], RepBatchNorm)


def test_exporting_waits_for_the_end(model, tmp_path):
    conversion = progressive(model, schedule=10, frozen=True)
    conversion.calibrate(BATCHES)
    conversion.step(4)
    example = {"example_inputs": {"input_ids": BATCHES[0]["input_ids"]}}
    with pytest.raises(normfuse.CheckpointError, match=r"still 50\.0% LayerNorm \(step 4 of 8\); train on"):
        normfuse.onnx.export(model.eval(), tmp_path / "m.onnx", **example)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"norm is still 50\.0% LayerNorm \(step 4 of 8\); train on, and call step"):
        conversion.finish()
    assert isinstance(model.norm, ProgressiveNorm)
    conversion.step(4)
    conversion.finish()
    result = normfuse.onnx.export(model.eval(), tmp_path / "m.onnx", **example)
    assert not result.graph.norms and not result.graph.affines and len(result.report.norms) == 3


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"to": "layer"}, ValueError, "to='layer' is unknown; give 'rep_batch' or 'batch' or 'unified' or 'power'"),
        ({"where": "nothing"}, ValueError, "where='nothing' selects nothing; the norms are norm"),
        ({"schedule": 0}, ValueError, "steps=0 is not allowed"),
        ({"momentum": 7.0}, ValueError, r"norm: momentum=7\.0 is not allowed"),
    ],
)
def test_refusals_leave_the_model_as_it_was(model, options, error, message):
    before = [type(module) for module in model.modules()]
    with pytest.raises(error, match=message):
        progressive(model, **options)
    assert [type(module) for module in model.modules()] == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"end": 1.5}, "end=1.5 are not allowed"),
        ({"start": 0.8}, "start=0.8, end=0.8 are not allowed"),
        ({"order": "x"}, "order='x' is unknown"),
        ({"shape": "x"}, "shape='x' is unknown; give 'linear' or 'cosine'"),
    ],
)
def test_schedules_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        Schedule(10, **options)


def test_norms_that_the_data_does_not_reach_are_told(model):
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = model, nn.LayerNorm(DIM)

        def forward(self, input_ids, attention_mask=None):
            return self.used(input_ids, attention_mask)

    conversion = progressive(Half())
    with pytest.warns(RuntimeWarning, match=r"^1 of 4 norms saw no valid row and are not fitted: idle\. .*`where`"):
        assert len(conversion.calibrate(BATCHES)) == 3


def test_calibration_needs_data(model):
    conversion = progressive(model, schedule=1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="loader gave no batch"):
        conversion.calibrate([])
    hidden = {**BATCHES[0], "attention_mask": torch.zeros(5, TOKENS)}
    with pytest.raises(ValueError, match="no norm saw a valid row"):
        conversion.calibrate([hidden])
    with torch.no_grad():
        model.embed.weight[3] = float("inf")
    with pytest.raises(ValueError, match="the statistic of norm is not finite"):
        conversion.calibrate(BATCHES)
    del before["embed.weight"]
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
