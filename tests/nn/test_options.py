"""Every option of every norm away from its default: results, gradients and buffers of several steps, in float64."""

import inspect

import option_references as references
import pytest
import torch
from torch import nn

import normfuse.nn
from normfuse.nn import DomainSplitNorm, MaskedBatchNorm, ProgressiveNorm, RepBatchNorm
from normfuse.nn.registry import NORMS

C = 8
CLOSE = {"rtol": 1e-9, "atol": 1e-9}  # sums of some hundred numbers of size ten in float64
SHAPES = {"rows": (6, C), "sequence": (5, 4, C), "image": (4, C, 3, 5)}
LAYERS = ("weight_standardization", "center_weight", "sigma_reparam")


class Named(nn.Linear):
    """A linear layer whose weight has another name."""

    def __init__(self, channels):
        super().__init__(channels, channels)
        self.kernel = self.weight
        del self.weight

    def forward(self, x):
        return nn.functional.linear(x, self.kernel, self.bias)


def layer(function, options):
    base = Named(C) if options.get("name", "weight") != "weight" else nn.Linear(C, C)
    return getattr(normfuse.nn, function)(base, **options)


def progressive(**options):
    return ProgressiveNorm(nn.LayerNorm(C), RepBatchNorm(C), **options)


def domains(inner, **options):
    return DomainSplitNorm(MaskedBatchNorm(C, **inner), **options)


MAKERS = {"ProgressiveNorm": progressive, "DomainSplitNorm": domains}
BATCH = [{"eps": 0.1, "momentum": 0.3}, {"momentum": None, "affine": False}, {"ghost_size": 2, "eps": 1e-3}]
IMAGES = [{**options, "channel_dim": 1} for options in BATCH]
# What each norm is built with, besides channels. Residuals, masks, styles and times come from `others_of`.
VARIANTS = {
    "LayerNorm": [{"eps": 0.1, "unit_offset": True}, {"bias": False}, {"elementwise_affine": False}],
    "RMSNorm": [{"eps": 0.1, "unit_offset": True}, {"elementwise_affine": False}],
    "CRMSNorm": [{"eps": 0.1, "unit_offset": True}, {"eps": None}, {"elementwise_affine": False}],
    "UnifiedNorm": [
        {"eps": 0.1, "window_size": (2, 3), "warmup_iters": 0, "momentum": 0.5},
        {"window_size": 2, "warmup_iters": 1, "affine": False, "ghost_size": 2, "skip_nonfinite": True},
        {"window_size": 3, "warmup_iters": 2, "outlier_filtration": True, "channel_dim": 1},
    ],
    "PowerNorm": [
        {"eps": 0.1, "group_num": 2, "group_eps": 0.3, "warmup_iters": 2, "alpha_fwd": 0.6, "alpha_bkw": 0.5},
        {"group_num": None, "warmup_iters": 1, "affine": False, "ghost_size": 2, "skip_nonfinite": True, "eps": 1e-3},
        {"group_num": 4, "backward": "paper", "warmup_iters": 1, "channel_dim": 1},
    ],
    "MaskedBatchNorm": BATCH + IMAGES,
    "RegularizedBatchNorm": [
        {**options, "eps": eps, "mean_penalty": 0.0, "var_penalty": 0.0}
        for options, eps in zip(BATCH + IMAGES, (0.1, 1.0, 1.0, 0.1, 1.0, 1.0), strict=True)
    ],
    "RepBatchNorm": BATCH + IMAGES,
    "EstimatedBatchNorm": [
        {"eps": 0.1, "momentum": 0.3, "channel_dim": 1},
        {"affine": False, "momentum": 0.0},
        {"momentum": 1.0},
    ],
    "MovingAverageBatchNorm": [
        {"eps": 0.1, "window_size": 2, "warmup_iters": 0, "momentum": 0.5},
        {"affine": False, "window_size": 3, "warmup_iters": 3, "channel_dim": -1},
    ],
    "ProgressiveNorm": [
        {"begin": 1, "end": 5, "r0": 0.7},
        {"end": 3, "evaluate_static": True},
        {"end": 8, "frozen": True, "r0": 0.9},
        {"end": 1},
        {"begin": 1, "end": 4, "shape": "cosine"},
    ],
    "BatchChannelNorm": [
        {"num_groups": 2, "eps": 0.1, "momentum": 0.3, "ghost_size": 2},
        {"num_groups": 4, "estimated": True, "momentum": 0.5},
        {"num_groups": 1, "momentum": None},
    ],
    "RegionNorm": [{"eps": 0.1, "pool": "batch"}, {"eps": 0.1, "shift_everywhere": True}],
    "LearnableRegionNorm": [
        {"threshold": 0.5, "kernel_size": 3, "eps": 0.1, "pool": "batch"},
        {"threshold": 0.45, "kernel_size": 5, "eps": 1e-3},
    ],
    "AdaptiveInstanceNorm": [{"eps": 0.1, "unbiased": True}, {"eps": 1e-3}],
    "TimeDependentLayerNorm": [{"eps": 0.1}, {"eps": 0.1, "rms": True}],
    "DyT": [{"alpha": -0.8}],
    "Derf": [{"alpha": 1.5, "shift": -0.4}],
    "DomainSplitNorm": [{"inner": {"eps": 0.1, "momentum": 0.3}, "num_domains": 3, "domain": 2}],
    "weight_standardization": [{"eps": 0.1, "form": "variance"}, {"eps": 0.1, "name": "kernel"}],
    "center_weight": [{"name": "kernel"}],
    "sigma_reparam": [
        {"init": "spectral", "iterate_in_evaluation": True},
        {"program": "vision"},
        {"program": "vision", "init": "one", "name": "weight"},
    ],
}
REFERENCES = {
    "LayerNorm": references.LayerReference,
    "RMSNorm": references.RMSReference,
    "CRMSNorm": references.CRMSReference,
    "UnifiedNorm": references.UnifiedReference,
    "PowerNorm": references.PowerReference,
    "MaskedBatchNorm": references.BatchReference,
    "RegularizedBatchNorm": references.RegularisedReference,
    "RepBatchNorm": references.RepReference,
    "EstimatedBatchNorm": references.EstimatedReference,
    "MovingAverageBatchNorm": references.MovingAverageReference,
    "ProgressiveNorm": references.ProgressiveReference,
    "BatchChannelNorm": references.BatchChannelReference,
    "RegionNorm": references.RegionReference,
    "LearnableRegionNorm": references.LearnableRegionReference,
    "AdaptiveInstanceNorm": references.StyleReference,
    "TimeDependentLayerNorm": references.TimeReference,
    "DyT": references.DyTReference,
    "Derf": references.DyTReference,
    "DomainSplitNorm": references.DomainReference,
    "weight_standardization": references.StandardisedReference,
    "center_weight": references.CentredReference,
    "sigma_reparam": references.SpectralReference,
}
SUMMED = ("LayerNorm", "RMSNorm", "CRMSNorm", "UnifiedNorm", "PowerNorm")  # that take a residual
MASKED = ("MaskedBatchNorm", "RegularizedBatchNorm", "RepBatchNorm", "EstimatedBatchNorm", "MovingAverageBatchNorm",
          "UnifiedNorm", "PowerNorm", "DomainSplitNorm")  # fmt: skip
NEEDED = {"ProgressiveNorm": {"end": 100}, "BatchChannelNorm": {"num_groups": 4}, "DomainSplitNorm": {"inner": {}}}
CASES = [(name, options) for name in VARIANTS for options in (NEEDED.get(name, {}), *VARIANTS[name])]
IDS = [f"{name}-{'-'.join(f'{k}={v}' for k, v in options.items())}" for name, options in CASES]


def make(name, options):
    if name in LAYERS:
        norm = layer(name, options)
    elif name in ("AdaptiveInstanceNorm", "LearnableRegionNorm"):
        norm = getattr(normfuse.nn, name)(**options)
    else:
        norm = MAKERS[name](**options) if name in MAKERS else getattr(normfuse.nn, name)(C, **options)
    norm.double()
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return norm


def shapes_of(name, options):
    if name in ("RegionNorm", "LearnableRegionNorm", "AdaptiveInstanceNorm", "BatchChannelNorm"):
        return ["image"]
    if name == "DomainSplitNorm":
        return ["rows"]
    if options.get("channel_dim", 1 if name == "MovingAverageBatchNorm" else -1) == 1:
        return ["image", "rows"]
    return ["rows", "sequence"]


def others_of(name, options, shape, step):
    """What the call takes besides x, by name."""
    if name == "RegionNorm":
        return {"mask": torch.rand(shape[0], 1, *shape[2:]) < 0.4}
    if name == "AdaptiveInstanceNorm":
        return {"style": torch.randn(*shape, dtype=torch.float64), "alpha": (1.0, 0.3)[step % 2]}
    if name == "TimeDependentLayerNorm":
        return {"log_snr": torch.linspace(-4, 4, shape[0], dtype=torch.float64)}
    given = {}
    if name in MASKED and step % 2:
        channel_dim = options.get("channel_dim", 1 if name == "MovingAverageBatchNorm" else -1) % len(shape)
        given["pad_mask"] = torch.zeros(*shape[:channel_dim], *shape[channel_dim + 1 :], dtype=torch.bool)
        given["pad_mask"].view(-1)[::4] = True
    if name in SUMMED and step % 3 == 2:
        given["residual"] = torch.randn(shape, dtype=torch.float64)
    return given


def called(norm, x, others):
    """Results and gradients of one call, and then the parameters a step further."""
    parameters = norm.parameters if isinstance(norm, references.Reference) else dict(norm.named_parameters())
    x = x.clone().requires_grad_()
    y = norm.forward(x, **others)
    results = y if isinstance(y, tuple) else (y,)
    sum((result * torch.linspace(-1, 2, result.numel()).view_as(result)).sum() for result in results).backward()
    found = {"results": results, "gradient of x": x.grad, "gradients": {n: p.grad for n, p in parameters.items()}}
    with torch.no_grad():
        for parameter in parameters.values():
            if parameter.grad is not None:
                parameter -= 0.01 * parameter.grad
                parameter.grad = None
    return found


def compare(what, actual, expected):
    torch.testing.assert_close(actual, expected, **CLOSE, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_an_option_does_what_the_paper_says(name, options):
    for kind in shapes_of(name, options):
        shape = SHAPES[kind]
        torch.manual_seed(len(kind))
        norm = make(name, options)
        reference = REFERENCES[name](norm, **options)
        spread = torch.rand(C, dtype=torch.float64).view(-1, *[1] * (2 if kind == "image" else 0))
        for step in range(4):
            x = 1 + 2 * torch.randn(shape, dtype=torch.float64) * spread
            others = others_of(name, options, shape, step)
            found, wanted = called(norm, x, others), called(reference, x, others)
            for what, value in found.items():
                compare(f"{kind}, step {step}, {what}", value, wanted[what])
            for n, buffer in reference.buffers.items():
                own = norm.state_dict().get(n, buffer).double()  # what is not kept is not compared
                compare(f"{kind}, step {step}, {n}", own.flatten(), buffer.double().flatten())
            if name == "ProgressiveNorm":
                norm.advance()
                reference.buffers["step"] += 1
        norm.eval()
        reference.training = False
        x, others = torch.randn(shape, dtype=torch.float64), others_of(name, options, shape, 0)
        compare(f"{kind}, evaluation", norm(x, **others), reference.forward(x, **others))


def test_every_row_has_variants_and_a_reference():
    rows = {entry.name.partition("(")[0] for entry in NORMS}
    assert rows == set(VARIANTS) == set(REFERENCES)


# Refused; the last is tested in tests/convert/test_tapering.py.
ELSEWHERE = {
    "EstimatedBatchNorm": {"ghost_size"},
    "MovingAverageBatchNorm": {"ghost_size"},
    "ProgressiveNorm": {"momentum"},
}


def options_of(name):
    """What the norm can be built with."""
    parameters = inspect.signature(getattr(normfuse.nn, name)).parameters.values()
    return {p.name for p in parameters if p.default is not p.empty} - {"device", "dtype"}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_option_is_varied(name):
    """A new option fails until it has a reference."""
    varied = {option for options in VARIANTS[name] for option in options}
    assert options_of(name) - ELSEWHERE.get(name, set()) <= varied
