"""The host kernels: accuracy over many rows, results streamed past the cache, threads."""

import pytest
import torch
from native import needs_kernels
from steps import Step, assert_same_results, host, reference

pytestmark = needs_kernels

CASES = [("unified", {}), ("power", {}), ("power", {"warmup_iters": 100}), ("power", {"group_num": 2})]


FLOAT32_TOLERANCE = 40 * 2**-24  # some 40 roundings


@pytest.mark.parametrize(("kind", "options"), CASES)
@pytest.mark.parametrize("channels", [24, 23])  # rows that can be streamed, rows not aligned for it
def test_many_rows(kind, options, channels):
    """100 000 rows, 9 MB: sums of float32 keep five digits, and the result is larger than what is cached."""
    step = Step.random(kind, 100_000, channels, masked=True, residual=channels == 24)
    if channels % options.get("group_num", 1):
        options = options | {"group_num": 1}
    expected = step.in_float64().run(reference, **options)
    results = step.run(host, **options)
    for name in ("grad_weight", "grad_bias"):  # sums over rows, whose terms cancel
        scale = step.dy.abs().sum(0).max().item()
        assert (results[name] - expected[name]).abs().max() <= 1e-6 * scale, name
        expected[name] = results[name].double()
    assert_same_results(results, expected, 1e-5)


@pytest.mark.parametrize(("kind", "options"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_residual(kind, options, dtype):
    for rows, channels in ((0, 8), (1, 6), (33, 10), (300, 136)):
        step = Step.random(kind, rows, channels, dtype, masked=True, residual=True)
        expected, results = step.in_float64().run(reference, **options), step.run(host, **options)
        if dtype in (torch.bfloat16, torch.float16):  # dx is rounded once, and the sum with ds again
            want, rounding = expected["grad_x"], 1.01 * torch.finfo(dtype).eps / 2
            allowed = rounding * ((want - step.ds.double()).abs() + want.abs()) + FLOAT32_TOLERANCE
            assert ((results["grad_x"].double() - want).abs() <= allowed).all()
            expected["grad_x"] = results["grad_x"].double()
        assert_same_results(results, expected, 1e-13 if dtype == torch.float64 else FLOAT32_TOLERANCE)


@pytest.mark.parametrize(("kind", "options"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_the_threads(on_threads, kind, options, dtype):
    on_threads((1, 2, 3), lambda: Step.random(kind, 1000, 40, dtype, masked=True, residual=True).run(host, **options))
