"""The rest of the family against loops in NumPy: MABN, weights, group half, regions, time, styles, no statistics."""

import copy
import math

import norm_formulas
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from normfuse.nn import (
    AdaptiveInstanceNorm,
    BatchChannelNorm,
    Derf,
    DomainSplitNorm,
    DyT,
    LearnableRegionNorm,
    MaskedBatchNorm,
    MovingAverageBatchNorm,
    RegionNorm,
    TimeDependentLayerNorm,
    UnifiedNorm,
    center_weight,
    choose_domain,
    weight_standardization,
)
from normfuse.nn.time_layer_norm import OffsetRMSNorm
from normfuse.ops import region_norm

DOUBLE = {"dtype": torch.float64}
EXACT = {"rtol": 1e-11, "atol": 1e-11}  # a thousand roundings of numbers of size one in float64


def randomised(module, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


def numbers(tensor):
    return tensor.detach().numpy()


# -- MABN ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_moving_average_norm_follows_the_formula(masked):
    """From the first step through the warm-up to beyond step 1000, where the ratio starts to count."""
    norm = randomised(MovingAverageBatchNorm(3, window_size=4, warmup_iters=6, channel_dim=-1, **DOUBLE))
    spec = norm_formulas.MovingAverageNormSpec(3, window=4, warmup=6)
    spec.weight, spec.bias = numbers(norm.weight), numbers(norm.bias)
    for step in range(16):
        if step == 10:
            norm.iters.fill_(2000)
            spec.iters = 2000
        x, dy = torch.randn(2, 5, 2, 3, **DOUBLE)
        x = (x * (1 + step)).requires_grad_()
        pad_mask = torch.rand(5, 2) < 0.3 if masked else None
        y = norm(x, pad_mask)
        norm.zero_grad()
        y.backward(dy)
        expected, saved = spec.forward(
            numbers(x).reshape(-1, 3), None if pad_mask is None else pad_mask.reshape(-1).numpy()
        )
        gradients = spec.backward(dy.reshape(-1, 3).numpy(), saved)
        np.testing.assert_allclose(numbers(y).reshape(-1, 3), expected, **EXACT)
        got = (x.grad.reshape(-1, 3), norm.weight.grad, norm.bias.grad)
        for have, want in zip(got, gradients, strict=True):
            np.testing.assert_allclose(have.numpy(), want, **EXACT)
        for name in spec.STATE:
            np.testing.assert_allclose(norm.get_buffer(name).squeeze(), np.squeeze(getattr(spec, name)), **EXACT)
    x = torch.randn(4, 3, **DOUBLE)
    expected = spec.weight * x.numpy() / np.sqrt(spec.running_var + norm.eps) + spec.bias
    np.testing.assert_allclose(numbers(norm.eval()(x)), expected, **EXACT)


def test_moving_average_norm_layouts_checkpoints_and_compiled_code():
    first, last = MovingAverageBatchNorm(3), MovingAverageBatchNorm(3, channel_dim=-1)
    compiled = torch.compile(copy.deepcopy(first), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 4, 5)
    for _ in range(2):
        y = first(x)
        torch.testing.assert_close(y, last(x.movedim(1, -1)).movedim(-1, 1))
        torch.testing.assert_close(compiled(x), y)
    again = MovingAverageBatchNorm(3)
    torch.utils.checkpoint.checkpoint(again, x.requires_grad_(), use_reentrant=False).sum().backward()
    assert again.iters == 1
    assert MovingAverageBatchNorm(3)(torch.empty(0, 3, 2, 2)).shape == (0, 3, 2, 2)
    assert MovingAverageBatchNorm(3).bfloat16()(x.bfloat16()).dtype == torch.bfloat16


# -- weights ---------------------------------------------------------------------------------------------------

LAYERS = {
    "linear": lambda: nn.Linear(5, 3),
    "conv": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3),
    "one weight per filter": lambda: nn.Conv2d(3, 3, 1, groups=3),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("form", ["std", "variance"])
def test_standardised_weights(layer, form):
    module = randomised(LAYERS[layer]().double())
    before = numbers(module.weight).copy()
    assert weight_standardization(module, form=form, eps=1e-3) is module
    turned = before.swapaxes(0, 1) if layer == "transposed" else before
    expected = norm_formulas.standardized_weight(turned, 1e-3, form)
    expected = expected.swapaxes(0, 1) if layer == "transposed" else expected
    np.testing.assert_allclose(numbers(module.weight), expected, **EXACT)
    original = module.parametrizations.weight.original
    if layer != "one weight per filter":
        function = module.parametrizations.weight[0]
        assert torch.autograd.gradcheck(function, original.detach().clone().requires_grad_())
    module.weight.sum().backward()
    assert original.grad.isfinite().all()
    parametrize.remove_parametrizations(module, "weight")
    np.testing.assert_allclose(numbers(module.weight), expected, **EXACT)


def test_centred_weights_have_filters_of_mean_zero():
    conv = center_weight(nn.Conv2d(3, 4, 3).double())
    before = numbers(conv.parametrizations.weight.original)
    expected = np.stack([filter_ - filter_.mean() for filter_ in before])
    np.testing.assert_allclose(numbers(conv.weight), expected, **EXACT)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: weight_standardization(nn.ReLU()), "ReLU.weight is not a weight"),
        (lambda: center_weight(nn.LayerNorm(3)), "LayerNorm.weight is not a weight"),
        (lambda: center_weight(nn.ConvTranspose1d(4, 4, 1, groups=2)), "groups=2: an output filter is not a slice"),
        (lambda: weight_standardization(nn.Linear(2, 2), eps=0), "eps=0 is not allowed"),
        (lambda: weight_standardization(nn.Linear(2, 2), form="biased"), "form='biased' is unknown"),
        (lambda: BatchChannelNorm(6, 4), "num_groups=4 is not allowed with 6 channels"),
        (lambda: RegionNorm(2, pool="image"), "pool='image' is unknown"),
        (lambda: RegionNorm(2)(torch.randn(1, 2, 3, 3), torch.ones(1, 2, 3, 3)), "do not fit"),
        (lambda: LearnableRegionNorm(threshold=1.5), r"threshold=1\.5 is not allowed"),
        (lambda: LearnableRegionNorm(kernel_size=4), "kernel_size=4 is even"),
        (lambda: TimeDependentLayerNorm(3)(torch.randn(2, 3), torch.randn(3)), "do not fit"),
        (lambda: AdaptiveInstanceNorm()(torch.randn(1, 2, 3)), "style is missing"),
        (lambda: AdaptiveInstanceNorm()(torch.randn(1, 2, 3), torch.randn(2, 2, 3)), "does not fit x"),
        (lambda: AdaptiveInstanceNorm().fix(torch.randn(2, 2, 3)), "style holds 2 samples"),
        (lambda: DyT(3, alpha=math.inf), "alpha=inf is not allowed"),
        (lambda: MovingAverageBatchNorm(3, window_size=0), "window_size=0 is not allowed"),
        (lambda: MovingAverageBatchNorm(3, ghost_size=2), "ghost_size is not an option of MovingAverageBatchNorm"),
        (lambda: DomainSplitNorm(nn.LayerNorm(2), 2, domain=2), "domain=2 does not exist"),
        (lambda: DomainSplitNorm(nn.LayerNorm(2))(torch.randn(3, 2)), "3 samples, which 2 domains cannot share"),
        (lambda: choose_domain(nn.Linear(1, 1), 0), "has no DomainSplitNorm"),
    ],
)
def test_refusals(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# -- batch-channel ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimated", [False, True])
@pytest.mark.parametrize("shape", [(3, 6, 4, 5), (3, 6, 7)], ids=str)
def test_batch_channel_norm_is_its_two_halves(estimated, shape):
    norm = randomised(BatchChannelNorm(6, 3, estimated=estimated, **DOUBLE))
    assert sorted(norm.state_dict()) == sorted(
        ["group_weight", "group_bias"]
        + [f"batch_norm.{n}" for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]
    )
    kind = norm_formulas.EstimatedBatchNormSpec if estimated else norm_formulas.BatchNormSpec
    spec = kind(6)
    spec.weight, spec.bias = numbers(norm.batch_norm.weight), numbers(norm.batch_norm.bias)
    for training in (True, True, False):
        norm.train(training)
        x = torch.randn(shape, **DOUBLE)
        rows = x.movedim(1, -1).reshape(-1, 6).numpy()
        half = (spec.train(rows) if estimated else spec.train([rows], [None])) if training else spec.evaluate(rows)
        half = np.moveaxis(half.reshape(shape[0], *shape[2:], 6), -1, 1)
        expected = norm_formulas.group_norm(half, 3, numbers(norm.group_weight), numbers(norm.group_bias), norm.eps)
        np.testing.assert_allclose(numbers(norm(x)), expected, **EXACT)


# -- regions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["sample", "batch"])
@pytest.mark.parametrize("shift_everywhere", [False, True])
def test_region_norm(pool, shift_everywhere):
    norm = randomised(RegionNorm(2, pool=pool, shift_everywhere=shift_everywhere, eps=1e-3, **DOUBLE))
    x = torch.randn(3, 2, 4, 6, **DOUBLE)
    small = torch.tensor([[[0, 1, 1], [0, 0, 1]]] * 3)[:, None]
    small[1] = 0  # a picture without a hole
    mask = small[:, 0].repeat_interleave(2, 1).repeat_interleave(2, 2).numpy() != 0  # nearest neighbour
    xhat = norm_formulas.region_norm(x.numpy(), mask, 1e-3, pool)
    weight, bias = numbers(norm.weight), numbers(norm.bias)
    expected = np.empty_like(xhat)
    for index in np.ndindex(3, 2, 4, 6):
        r, c = int(mask[index[0], index[2], index[3]]), index[1]
        shift = bias[0, c] + bias[1, c] if shift_everywhere else bias[r, c]
        expected[index] = xhat[index] * (1 + weight[r, c]) + shift
    np.testing.assert_allclose(numbers(norm(x, small)), expected, **EXACT)
    np.testing.assert_allclose(numbers(norm(x, small.bool())), expected, **EXACT)
    assert (RegionNorm(2).weight == 0).all() and (RegionNorm(2).bias == 0).all()


@pytest.mark.parametrize("shift_everywhere", [False, True])
def test_a_soft_mask_is_used_as_it_is(shift_everywhere):
    """Pooled over the batch, a region filled up with its mean and batch-normalised, times the root of its share."""
    norm = randomised(RegionNorm(2, pool="batch", shift_everywhere=shift_everywhere, eps=1e-2, **DOUBLE))
    x, mask = torch.randn(3, 2, 4, 6, **DOUBLE), torch.rand(3, 1, 4, 6, **DOUBLE)
    xhat = torch.zeros_like(x)
    for share in (mask, 1 - mask):
        mean = (x * share).sum((0, 2, 3)) / share.sum()
        filled = x * share + (1 - share) * mean[:, None, None]
        root = (share.sum() / share.numel()).sqrt()
        xhat += torch.nn.functional.batch_norm(filled, None, None, training=True, eps=1e-2) * root
    (w0, w1), (b0, b1) = (p.detach()[..., None, None] for p in (norm.weight, norm.bias))
    shift = b0 + b1 if shift_everywhere else (1 - mask) * b0 + mask * b1
    torch.testing.assert_close(norm(x, mask), xhat * (1 + (1 - mask) * w0 + mask * w1) + shift)
    halves = torch.randint(0, 2, (3, 1, 2, 3))
    torch.testing.assert_close(norm(x, halves.double()), norm(x, halves))


@pytest.mark.parametrize("pool", ["sample", "batch"])
def test_region_norm_has_the_exact_gradient(pool):
    mask = torch.rand(2, 1, 3, 3) < 0.5
    inputs = [torch.randn(shape, **DOUBLE, requires_grad=True) for shape in ((2, 2, 3, 3), (2, 2), (2, 2))]
    assert torch.autograd.gradcheck(lambda x, w, b: region_norm(x, mask, w, b, eps=1e-2, pool=pool), inputs)
    norm = RegionNorm(2, pool=pool, **DOUBLE)
    assert norm(torch.empty(0, 2, 3, 3, **DOUBLE), mask[:0]).shape == (0, 2, 3, 3)


def test_learnable_region_norm():
    norm = LearnableRegionNorm(threshold=0.55, kernel_size=3, **DOUBLE)
    x = torch.randn(2, 3, 5, 6, **DOUBLE)

    def conv(layer, image):
        weight, bias = numbers(layer.weight)[0], 0.0 if layer.bias is None else numbers(layer.bias)[0]
        padded, result = np.pad(image, ((0, 0), (1, 1), (1, 1))), np.zeros(image.shape[1:])
        for h, w in np.ndindex(result.shape):
            result[h, w] = (weight * padded[:, h : h + 3, w : w + 3]).sum() + bias
        return result

    values = x.numpy()
    maps = [1 / (1 + np.exp(-conv(norm.attention, np.stack([v.mean(0), v.max(0)])))) for v in values]
    mask = np.stack(maps) >= 0.55
    assert mask.any() and not mask.all()
    xhat = norm_formulas.region_norm(values, mask, norm.eps, "sample")
    expected = [xhat[b] * (1 + conv(norm.gain, m[None])) + conv(norm.shift, m[None]) for b, m in enumerate(maps)]
    np.testing.assert_allclose(numbers(norm(x)), np.stack(expected), **EXACT)
    norm(x).sum().backward()
    assert norm.attention.weight.grad.isfinite().all()


# -- time ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rms", [False, True])
def test_time_dependent_norm(rms):
    norm = TimeDependentLayerNorm(4, rms=rms, **DOUBLE)
    x, log_snr = torch.randn(3, 5, 4, **DOUBLE), torch.tensor([-6.0, 0.5, 8.0], **DOUBLE)
    plain, eps = (norm_formulas.divided_by_rms, 1e-8) if rms else (norm_formulas.layer_norm, 1e-5)
    x[0] *= 1e-8  # where eps counts
    np.testing.assert_allclose(numbers(norm(x, log_snr)), plain(x.numpy(), eps), **EXACT)  # at first no time in it
    randomised(norm)
    expected = plain(x.numpy(), eps)
    for b, value in enumerate(log_snr.tolist()):
        ramps = [
            norm_formulas.time_ramp(value / 4, *(numbers(p) for p in (r.slope, r.offset, r.start, r.end)))
            for r in (norm.gain, norm.shift)
            if r is not None
        ]
        expected[b] = expected[b] * ramps[0] + (0 if rms else ramps[1])
        fixed = norm.at(value)
        np.testing.assert_allclose(numbers(fixed(x[b])), expected[b], **EXACT)
    np.testing.assert_allclose(numbers(norm(x, log_snr)), expected, **EXACT)
    assert type(fixed) is (OffsetRMSNorm if rms else nn.LayerNorm)
    x[0] *= 1e8
    x.requires_grad_()
    assert torch.autograd.gradcheck(norm, (x, log_snr.requires_grad_()))
    zeros = torch.zeros(1, 4, **DOUBLE, requires_grad=True)
    norm(zeros, log_snr[:1].detach()).sum().backward()
    assert zeros.grad.isfinite().all()


# -- styles, and no statistics ---------------------------------------------------------------------------------


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("alpha", [1.0, 0.25])
def test_adaptive_instance_norm(unbiased, alpha):
    norm = AdaptiveInstanceNorm(unbiased=unbiased, eps=1e-3)
    x, style = torch.randn(2, 3, 4, 5, **DOUBLE), 2 * torch.randn(2, 3, 6, 2, **DOUBLE) + 1
    expected = norm_formulas.adaptive_instance_norm(x.numpy(), style.numpy(), 1e-3, unbiased, alpha)
    np.testing.assert_allclose(numbers(norm(x, style, alpha)), expected, **EXACT)
    norm.fix(style[:1])
    np.testing.assert_allclose(numbers(norm(x[:1], alpha=alpha)), expected[:1], **EXACT)
    x.requires_grad_(), style.requires_grad_()
    assert torch.autograd.gradcheck(lambda *pair: norm(*pair, alpha), (x, style))


@pytest.mark.parametrize("kind", [DyT, Derf])
def test_without_statistics(kind):
    norm = randomised(kind(4, **DOUBLE))
    x = torch.randn(3, 2, 4, **DOUBLE)
    inner = norm.alpha.item() * x.numpy() + (norm.shift.item() if kind is Derf else 0.0)
    function = np.vectorize(math.erf if kind is Derf else math.tanh)
    expected = numbers(norm.weight) * function(inner) + numbers(norm.bias)
    np.testing.assert_allclose(numbers(norm(x)), expected, **EXACT)
    assert kind(4).alpha.item() == 0.5 and sorted(kind(4).state_dict())[:2] == ["alpha", "bias"]
    assert torch.autograd.gradcheck(norm, x.requires_grad_())
    assert kind(4).bfloat16()(torch.randn(0, 4).bfloat16()).shape == (0, 4)


# -- domains ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: nn.LayerNorm(4), lambda: UnifiedNorm(4), lambda: MaskedBatchNorm(4)])
def test_every_domain_has_its_own_norm(make):
    base = randomised(make())
    split, alone = DomainSplitNorm(base, 2), [copy.deepcopy(base), copy.deepcopy(base)]
    x = torch.randn(6, 3, 4)
    expected = torch.cat([norm(part) for norm, part in zip(alone, x.chunk(2), strict=True)])
    torch.testing.assert_close(split(x), expected)
    for norm, own in zip(split.norms, alone, strict=True):
        assert all(
            torch.equal(a, b) for a, b in zip(norm.state_dict().values(), own.state_dict().values(), strict=True)
        )
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(split, nn.ModuleList([DomainSplitNorm(base, 2)])))
    assert choose_domain(model, 1) == 2 and split.domain == 1
    torch.testing.assert_close(split.eval()(x), alone[1].eval()(x))


def test_a_mask_is_split_with_its_batch_and_a_refused_domain_changes_nothing():
    split = DomainSplitNorm(MaskedBatchNorm(4), 2)
    x, pad_mask = torch.randn(4, 3, 4), torch.rand(4, 3) < 0.4
    y = split(x, pad_mask)
    torch.testing.assert_close(y[2:], MaskedBatchNorm(4)(x[2:], pad_mask[2:]))
    model = nn.ModuleList([DomainSplitNorm(nn.LayerNorm(2), 3), split])
    with pytest.raises(ValueError, match="domain=2 does not exist"):
        choose_domain(model, 2)
    assert model[0].domain == 0
