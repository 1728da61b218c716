"""Trajectories at the edges of the options, against a third implementation of the papers (``spec_numpy``)."""

import numpy as np
import pytest
import torch
from spec_numpy import PowerNormSpec, UnifiedNormSpec

from normfuse.nn import PowerNorm, UnifiedNorm

# 60 steps of at most 64 rows round to 60 * 64 * 1.1e-16 = 4e-13 in float64. In float32 they round to
# 60 * 64 * 6e-8 = 2e-4 if every rounding went the same way, and as a random walk to less than 1e-5.
TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-5}
LEARNING_RATE = 0.01


def stream(channels, steps, seed, rows=(7, 12, 3), bursts=(), mask_share=0.0, empty=()):
    """Yields (x, dy, pad) in float64 with a scale per channel, bursts of 8 times the size, and masks."""
    random = np.random.default_rng(seed)
    scale = np.exp(random.normal(size=channels))
    for step in range(steps):
        count = 0 if step in empty else rows[step % len(rows)]
        x = random.normal(size=(count, channels)) * scale * (8.0 if step in bursts else 1.0)
        dy = random.normal(size=(count, channels)) + 0.3 * x
        pad = None
        if mask_share:
            pad = random.random(count) < mask_share
        yield x, dy, pad


def assert_near(name, actual, expected, dtype):
    actual, expected = np.asarray(actual, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    assert np.isfinite(actual).all(), name
    scale = max(np.abs(expected).max(initial=0.0), 1e-3)
    worst = np.abs(actual.reshape(expected.shape) - expected).max(initial=0.0)
    assert worst <= TOLERANCES[dtype] * scale, f"{name}: off by {worst:.1e} at a scale of {scale:.1e}"


def run(norm, spec, dtype, batches, start):
    norm.to(dtype)
    random = np.random.default_rng(5)
    spec.weight, spec.bias = random.normal(size=(2, norm.num_features))
    for name, value in start.items():
        setattr(spec, name, value)
    names = ("weight", "bias", *spec.STATE)
    norm.load_state_dict({name: torch.tensor(getattr(spec, name)) for name in names})

    for step, (x, dy, pad) in enumerate(batches):
        y, saved = spec.forward(x, pad)
        dx, dw, db = spec.backward(dy, saved)
        norm.zero_grad()
        tensor = torch.tensor(x, dtype=dtype, requires_grad=True)
        output = norm(tensor, None if pad is None else torch.tensor(pad))
        output.backward(torch.tensor(dy, dtype=dtype))

        expected = {"y": y, "dx": dx, "dw": dw, "db": db} | {name: getattr(spec, name) for name in spec.STATE}
        actual = {"y": output.detach(), "dx": tensor.grad, "dw": norm.weight.grad, "db": norm.bias.grad}
        actual |= dict(norm.named_buffers())
        for name, value in expected.items():
            assert_near(f"step {step}, {name}", actual[name], value, dtype)
        with torch.no_grad():
            norm.weight -= LEARNING_RATE * norm.weight.grad
            norm.bias -= LEARNING_RATE * norm.bias.grad
        spec.weight, spec.bias = spec.weight - LEARNING_RATE * dw, spec.bias - LEARNING_RATE * db
    x = np.random.default_rng(6).normal(size=(4, norm.num_features))
    evaluated = norm.eval()(torch.tensor(x, dtype=dtype)).detach()
    assert_near("evaluation", evaluated, spec.evaluate(x), dtype)


def spread(low, high, channels=6):
    return np.geomspace(low, high, channels)


UNIFIED = {
    "no warm-up, uneven windows": ({"windows": (3, 5), "warmup": 0}, {"steps": 20}, {}),
    "forward window of one": ({"windows": (1, 4), "warmup": 0}, {"steps": 12}, {}),
    "backward window of one": ({"windows": (4, 1), "warmup": 0}, {"steps": 12}, {}),
    "warm-up one short of the window": ({"windows": (4, 4), "warmup": 3}, {"steps": 12}, {}),
    "warm-up as long as the window": ({"windows": (4, 4), "warmup": 4}, {"steps": 12}, {}),
    "warm-up one past the window": ({"windows": (4, 4), "warmup": 5}, {"steps": 12}, {}),
    "nothing but warm-up": ({"windows": (4, 4), "warmup": 4000}, {"steps": 12}, {}),
    "bursts filtered out": (
        {"windows": (4, 4), "warmup": 6, "filtration": True, "momentum": 0.8},
        {"steps": 60, "bursts": (9, 10, 17, 30, 45), "rows": (64, 40)},
        {},
    ),
    "bursts filtered out by one channel": (
        {"windows": (4, 3), "warmup": 0, "filtration": True},
        {"steps": 20, "bursts": (8, 13), "rows": (64,), "channels": 1},
        {},
    ),
    "bursts let through": ({"windows": (4, 4), "warmup": 2}, {"steps": 20, "bursts": (5, 11)}, {}),
    "ratio begins": ({"windows": (2, 2), "warmup": 0}, {"steps": 8}, {"iters": 996}),
    "ratio begins after a long warm-up": ({"windows": (2, 2), "warmup": 1500}, {"steps": 8}, {"iters": 1496}),
    "ratio clamped at both ends": (
        {"windows": (2, 2), "warmup": 0, "momentum": 0.99},
        {"steps": 8},
        {"iters": 2000, "running_var": spread(1e-4, 1e4)},
    ),
    "most rows are padding": ({"windows": (3, 3), "warmup": 2}, {"steps": 20, "mask_share": 0.8}, {}),
    "all rows are padding": (
        {"windows": (3, 3), "warmup": 2, "filtration": True},
        {"steps": 9, "mask_share": 1.0},
        {"running_var": spread(0.5, 2.0)},
    ),
    "steps without rows": ({"windows": (3, 3), "warmup": 2}, {"steps": 12, "empty": (0, 4, 5, 9)}, {}),
    "one row": ({"windows": (3, 3), "warmup": 2}, {"steps": 12, "rows": (1,)}, {}),
    "no memory": ({"windows": (2, 2), "warmup": 0, "momentum": 0.0}, {"steps": 8}, {}),
}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", UNIFIED)
def test_unified_norm(case, dtype, implementation):
    options, data, start = UNIFIED[case]
    channels = data.get("channels", 6)
    spec = UnifiedNormSpec(channels, **options)
    norm = UnifiedNorm(
        channels,
        window_size=options["windows"],
        warmup_iters=spec.warmup,
        outlier_filtration=spec.filtration,
        momentum=spec.momentum,
    )
    run(norm, spec, dtype, stream(**{"channels": channels, "seed": 3, **data}), start)
    if "filtered out" in case:
        assert 0 < spec.skip_counter < data["steps"] / 2, "the data was to hold some outliers"


POWER = {
    "defaults": ({}, {"steps": 12}, {}),
    "no warm-up": ({"warmup": 0, "groups": 2}, {"steps": 20}, {}),
    "warm-up of one step": ({"warmup": 1, "groups": 3}, {"steps": 8}, {}),
    "warm-up ends": ({"warmup": 5, "groups": 3}, {"steps": 12}, {}),
    "no group scaling": ({"warmup": 3, "groups": 0, "alpha_fwd": 0.95, "alpha_bkw": 0.8}, {"steps": 20}, {}),
    "an eps of its own": ({"warmup": 3, "groups": 2, "eps": 1e-3, "group_eps": 0.1}, {"steps": 12}, {}),
    "paper's gradient": ({"warmup": 3, "groups": 2, "paper": True}, {"steps": 20}, {}),
    "paper's gradient, no group scaling": ({"warmup": 3, "groups": 0, "paper": True}, {"steps": 20}, {}),
    "bursts": ({"warmup": 3, "groups": 0}, {"steps": 20, "bursts": (6, 12)}, {}),
    "most rows are padding": ({"warmup": 3, "groups": 2}, {"steps": 20, "mask_share": 0.8}, {}),
    "all rows are padding": (
        {"warmup": 3, "groups": 0},
        {"steps": 9, "mask_share": 1.0},
        {"running_phi": spread(0.5, 2.0)},
    ),
    "steps without rows": ({"warmup": 3, "groups": 2}, {"steps": 12, "empty": (0, 4, 5, 9)}, {}),
    "one row": ({"warmup": 3, "groups": 1}, {"steps": 12, "rows": (1,)}, {}),
    "one channel": ({"warmup": 3, "groups": 0}, {"steps": 12, "channels": 1}, {}),
    "a group per channel": ({"warmup": 3, "groups": 6}, {"steps": 12}, {}),
}


# x/|x| has no gradient but for eps: what float32 leaves of it is rounding.
POWER_RUNS = [(case, dtype) for case in POWER for dtype in TOLERANCES]
POWER_RUNS.remove(("a group per channel", torch.float32))


@pytest.mark.parametrize(("case", "dtype"), POWER_RUNS, ids=str)
def test_power_norm(case, dtype, implementation):
    options, data, start = POWER[case]
    channels = data.get("channels", 6)
    spec = PowerNormSpec(channels, **options)
    norm = PowerNorm(
        channels,
        group_num=spec.groups,
        alpha_fwd=spec.alpha_fwd,
        alpha_bkw=spec.alpha_bkw,
        warmup_iters=spec.warmup,
        eps=spec.eps,
        group_eps=spec.group_eps,
        backward="paper" if spec.paper else "reference",
    )
    run(norm, spec, dtype, stream(**{"channels": channels, "seed": 4, **data}), start)
