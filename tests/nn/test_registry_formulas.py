"""Every row of the registry against a formula of its own in float64: two training steps, then evaluation.

A new row fails until it has a formula here. What a formula leaves open (masks, ghost batches, gradients, options, late
steps) is tested with its norm.
"""

import math

import norm_formulas
import numpy as np
import pytest
import spec_numpy
import torch
from torch import nn

from normfuse.nn import MaskedBatchNorm, MovingAverageBatchNorm, PowerNorm, ProgressiveNorm
from normfuse.nn.registry import NORMS
from tests.property.programs import FAMILY

C = 8
EXACT = {"rtol": 1e-10, "atol": 1e-10}  # some thousand roundings of numbers of size one in float64


def numbers(tensor):
    return tensor.detach().numpy().copy()


def affine_of(norm):
    return numbers(norm.weight), numbers(norm.bias)


def on_rows(compute, channel_dim=-1):
    """``compute`` of [rows, C] as a function of an array of any shape."""

    def run(x, training):
        moved = np.moveaxis(x, channel_dim, -1)
        return np.moveaxis(compute(moved.reshape(-1, moved.shape[-1]), training).reshape(moved.shape), -1, channel_dim)

    return run


def each_token(normalise):
    return lambda norm: lambda x, training: normalise(norm, x)


def with_affine(norm, y):
    y = y * numbers(norm.weight)
    return y if getattr(norm, "bias", None) is None else y + numbers(norm.bias)


def eps_of(norm):
    return np.finfo(np.float64).eps if norm.eps is None else norm.eps  # as torch.nn.RMSNorm


def crms(norm, x):
    total = (x**2).sum(-1, keepdims=True) + x.sum(-1, keepdims=True) ** 2
    return with_affine(norm, x / np.sqrt(total / (x.shape[-1] + 1) + eps_of(norm)))


def unified(norm):
    spec = spec_numpy.UnifiedNormSpec(C, warmup=norm.warmup_iters)
    spec.weight, spec.bias = affine_of(norm)
    return on_rows(lambda x, training: spec.forward(x)[0] if training else spec.evaluate(x))


def power(norm):
    spec = spec_numpy.PowerNormSpec(C, groups=norm.group_num or 0, warmup=norm.warmup_iters)
    spec.weight, spec.bias = affine_of(norm)
    return on_rows(lambda x, training: spec.forward(x)[0] if training else spec.evaluate(x))


def batch(norm, ghosts=1):
    spec = norm_formulas.BatchNormSpec(C)
    spec.weight, spec.bias = affine_of(norm)

    def rows(x, training):
        parts = np.split(x, ghosts)
        return spec.train(parts, [None] * ghosts) if training else spec.evaluate(x)

    return on_rows(rows, norm.channel_dim)


def floored(norm):
    """Divided by sqrt(max(var, eps)): the numbers drawn have variances far above eps."""
    spec = norm_formulas.BatchNormSpec(C, eps=0.0)
    spec.weight, spec.bias = affine_of(norm)
    return on_rows(lambda x, training: spec.train([x], [None]) if training else spec.evaluate(x), norm.channel_dim)


def rep_batch(norm):
    plain, alpha = batch(norm), norm.alpha.item()
    return lambda x, training: plain(x, training) + alpha * x


def progressive(norm):
    static, share = rep_batch(norm.static), 1 - 25 / 100
    norm.advance(25)

    def run(x, training):
        original = with_affine(norm.original, norm_formulas.layer_norm(x, norm.original.eps))
        return share * original + (1 - share) * static(x, training)

    return run


def moving_average(norm):
    spec = norm_formulas.MovingAverageNormSpec(C)
    spec.weight, spec.bias = affine_of(norm)

    def rows(x, training):
        if training:
            return spec.forward(x)[0]
        return spec.weight * x / np.sqrt(spec.running_var + spec.eps) + spec.bias

    return on_rows(rows, norm.channel_dim)


def estimated(norm):
    spec = norm_formulas.EstimatedBatchNormSpec(C)
    spec.weight, spec.bias = affine_of(norm)
    return on_rows(lambda x, training: spec.train(x) if training else spec.evaluate(x), 1)


def batch_channel(half):
    def build(norm):
        first, groups = half(norm.batch_norm), (numbers(norm.group_weight), numbers(norm.group_bias))
        return lambda x, training: norm_formulas.group_norm(first(x, training), norm.num_groups, *groups, norm.eps)

    return build


def region(norm):
    weight, bias = affine_of(norm)

    def run(x, training, mask):
        inside = mask[:, 0].astype(bool)
        r = inside.astype(int)
        gain, shift = (np.moveaxis(p[r], -1, 1) for p in (weight, bias))
        return norm_formulas.region_norm(x, inside, norm.eps, "sample") * (1 + gain) + shift

    return run


def convolved(layer, images):
    """Zero-padded convolution of [B, channels, H, W] to one channel."""
    weight, bias = numbers(layer.weight)[0], 0.0 if layer.bias is None else layer.bias.item()
    size = weight.shape[-1]
    padded = np.pad(images, ((0, 0), (0, 0), (size // 2,) * 2, (size // 2,) * 2))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(2, 3))
    return np.einsum("bchwij,cij->bhw", windows, weight)[:, None] + bias


def learnable_region(norm):
    def run(x, training):
        level = 1 / (1 + np.exp(-convolved(norm.attention, np.stack([x.mean(1), x.max(1)], 1))))
        xhat = norm_formulas.region_norm(x, level[:, 0] >= norm.threshold, norm.eps, "sample")
        return xhat * (1 + convolved(norm.gain, level)) + convolved(norm.shift, level)

    return run


def style(norm):
    return lambda x, training, other: norm_formulas.adaptive_instance_norm(x, other, norm.eps, norm.unbiased, 1.0)


def time(norm):
    def run(x, training, log_snr):
        gain, shift = (
            norm_formulas.time_ramp(
                log_snr[:, None] / 4, *(numbers(p) for p in (ramp.slope, ramp.offset, ramp.start, ramp.end))
            )[:, None]
            for ramp in (norm.gain, norm.shift)
        )
        return norm_formulas.layer_norm(x, norm.eps) * gain + shift

    return run


def pointwise(function):
    def run(norm, x):
        inner = norm.alpha.item() * x + (norm.shift.item() if hasattr(norm, "shift") else 0.0)
        return with_affine(norm, np.vectorize(function)(inner))

    return each_token(run)


def domains(norm):
    parts = [batch(inner) for inner in norm.norms]

    def run(x, training):
        if not training:
            return parts[0](x, False)
        return np.concatenate([part(half, True) for part, half in zip(parts, np.split(x, 2), strict=True)])

    return run


def linear_with(weight_of):
    """A reparametrised linear layer; ``weight_of(layer)`` is called before each use with whether it trains."""

    def build(layer):
        bias, weight = numbers(layer.bias), weight_of(layer)
        return lambda x, training: x @ weight(training).T + bias

    return build


def original(layer):
    return numbers(layer.parametrizations.weight.original)


def spectral(layer):
    parametrization = layer.parametrizations.weight[0]
    matrix, gain = original(layer), parametrization.gain.item()
    state = {"u": numbers(parametrization.u), "v": numbers(parametrization.v)}

    def weight(training):
        if training:
            state["v"] = matrix.T @ state["u"] / np.linalg.norm(matrix.T @ state["u"])
            state["u"] = matrix @ state["v"] / np.linalg.norm(matrix @ state["v"])
        return gain * matrix / (state["u"] @ matrix @ state["v"])

    return weight


FORMULAS = {
    "LayerNorm": each_token(lambda norm, x: with_affine(norm, norm_formulas.layer_norm(x, norm.eps))),
    "RMSNorm": each_token(lambda norm, x: with_affine(norm, norm_formulas.rms_norm(x, eps_of(norm)))),
    "CRMSNorm": each_token(crms),
    "UnifiedNorm": unified,
    "PowerNorm(group_num=None)": power,
    "PowerNorm": power,
    "MaskedBatchNorm": batch,
    "MaskedBatchNorm(ghost_size=…)": lambda norm: batch(norm, ghosts=2),
    "RegularizedBatchNorm": floored,
    "RepBatchNorm": rep_batch,
    "ProgressiveNorm": progressive,
    "MovingAverageBatchNorm": moving_average,
    "EstimatedBatchNorm": estimated,
    "BatchChannelNorm": batch_channel(batch),
    "BatchChannelNorm(estimated=True)": batch_channel(estimated),
    "RegionNorm": region,
    "LearnableRegionNorm": learnable_region,
    "AdaptiveInstanceNorm": style,
    "TimeDependentLayerNorm": time,
    "DyT": pointwise(math.tanh),
    "Derf": pointwise(math.erf),
    "DomainSplitNorm": domains,
    "weight_standardization": linear_with(lambda layer: lambda t: norm_formulas.standardized_weight(original(layer))),
    "center_weight": linear_with(lambda layer: lambda t: original(layer) - original(layer).mean(1, keepdims=True)),
    "sigma_reparam": linear_with(spectral),
}


def randomised(norm):
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return norm.double()


def test_every_row_has_a_formula():
    assert set(FORMULAS) == {entry.name for entry in NORMS}


@pytest.mark.parametrize("entry", NORMS, ids=lambda entry: entry.name)
def test_training_and_evaluation_are_the_formulas(entry):
    norm = randomised(entry.make(C))
    formula = FORMULAS[entry.name](norm)
    for training in (True, True, False):
        norm.train(training)
        x = 2 + 3 * torch.randn((4, C, 3, 5) if entry.layout == "image" else (4, 5, C), dtype=torch.float64)
        others = entry.others(x)
        expected = formula(x.numpy(), training, *(numbers(other) for other in others))
        np.testing.assert_allclose(numbers(norm(x, *others)), expected, **EXACT)


def test_random_programs_hold_every_static_norm():
    """A ProgressiveNorm at its end is the static norm in it."""

    def kind(module):
        if isinstance(module, PowerNorm):
            return type(module), module.group_num
        return type(module)

    static = {kind(entry.make(C)) for entry in NORMS if entry.static and entry.layout != "weight"}
    assert static - {kind(make(C)) for make in FAMILY} == {ProgressiveNorm}
    assert {MaskedBatchNorm, MovingAverageBatchNorm} <= static and nn.Linear not in static
