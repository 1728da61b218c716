"""The CUDA kernels, run by the host emulator, against the float64 references."""

from copy import deepcopy

import pytest
import torch
from steps import Step, assert_same_results, reference

# float32 sums over at most 300 rows, spread over at least 8 partial sums: some 40 roundings of 6e-8 each.
TOLERANCE = {torch.float64: 1e-13}
FLOAT32_TOLERANCE = 40 * 2**-24

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Rows: none, one, fewer than a block's, an odd number, many. Channels: one, odd, fewer than a pack, a multiple of every
# pack, one tile and a bit for float32 and for 16-bit dtypes.
SHAPES = [(0, 5), (1, 8), (5, 1), (33, 7), (20, 3), (64, 48), (37, 136), (300, 264)]
UNIFIED_OPTIONS = {
    "warm-up": {"warmup_iters": 100},
    "window": {},
    "filtered": {"outlier_filtration": True},
}
POWER_OPTIONS = {
    "warm-up": {"warmup_iters": 100},
    "running": {},
    "paper": {"paper": True},
    "grouped": {"group_num": 1},
    "grouped-warm-up": {"group_num": 1, "warmup_iters": 100},
}
CASES = [("unified", options) for options in UNIFIED_OPTIONS.values()]
CASES += [("power", options) for options in POWER_OPTIONS.values()]
CASE_NAMES = [f"unified-{name}" for name in UNIFIED_OPTIONS] + [f"power-{name}" for name in POWER_OPTIONS]


def check(implementation, step, options):
    expected = step.in_float64().run(reference, **options)
    tolerance = TOLERANCE.get(step.x.dtype, FLOAT32_TOLERANCE)
    assert_same_results(step.run(implementation, **options), expected, tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "options"), CASES, ids=CASE_NAMES)
def test_shapes(emulator, kind, options, dtype):
    for rows, channels in SHAPES:
        check(emulator, Step.random(kind, rows, channels, dtype, masked=channels % 2 == 0), options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "options"), CASES, ids=CASE_NAMES)
def test_residual(emulator, kind, options, dtype):
    for rows, channels in ((0, 8), (33, 7), (37, 136)):
        check(emulator, Step.random(kind, rows, channels, dtype, masked=True, residual=True), options)


@pytest.mark.parametrize("warmup_iters", [5, 100], ids=["running", "warm-up"])
def test_residual_and_groups(emulator, warmup_iters):
    """Groups too narrow and too wide to stay on chip, and some that do."""
    for rows, channels, groups in ((30, 12, 3), (6, 8200, 1), (6, 600, 4)):
        step = Step.random("power", rows, channels, masked=True, residual=True)
        check(emulator, step, {"group_num": groups, "warmup_iters": warmup_iters})


@pytest.mark.parametrize(("kind", "options"), CASES, ids=CASE_NAMES)
def test_schedules(on_schedules, kind, options):
    for residual in (False, True):
        step = Step.random(kind, 130, 140, masked=True, residual=residual)
        results = on_schedules(lambda emulator, step=step: deepcopy(step).run(emulator, **options))
        assert_same_results(results, step.in_float64().run(reference, **options), FLOAT32_TOLERANCE)


@pytest.mark.parametrize("groups", [1, 3, 6, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_groups(emulator, groups, dtype):
    """12 channels in groups of 12, 4, 2 and 1: packs inside a group, and groups inside a pack."""
    check(emulator, Step.random("power", 30, 12, dtype, masked=True), {"group_num": groups})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("warmup_iters", [5, 100], ids=["running", "warm-up"])
def test_wide_groups(emulator, dtype, warmup_iters):
    """Rows of a group that a warp holds, a block of 4 and of 16 warps, and one that does not fit on chip."""
    for channels, groups in ((600, 4), (1040, 1), (2067, 3), (2064, 1), (8200, 1)):
        step = Step.random("power", 6, channels, dtype, masked=True)
        check(emulator, step, {"group_num": groups, "warmup_iters": warmup_iters})


@pytest.mark.parametrize("kind", ["unified", "power"])
def test_unaligned_matrices(emulator, kind):
    step = Step.random(kind, 21, 16)
    for name in ("x", "dy"):
        shifted = torch.empty(21 * 16 + 1)[1:].view(21, 16).copy_(getattr(step, name))
        assert shifted.data_ptr() % 16 != 0
        setattr(step, name, shifted)
    check(emulator, step, {})


@pytest.mark.parametrize(
    ("kind", "statistic", "options"),
    [
        ("unified", "running_var", {"warmup_iters": 100}),  # later the window's other entries move it
        ("power", "running_phi", {}),
        ("power", "running_phi", {"warmup_iters": 100, "group_num": 1}),
    ],
)
def test_without_a_valid_row_statistics_stay(emulator, kind, statistic, options):
    step = Step.random(kind, 6, 10)
    step.pad_mask = torch.ones(6, dtype=torch.bool)
    before = step.tensors[statistic].clone()
    results = step.run(emulator, **options)
    torch.testing.assert_close(results[statistic], before, rtol=2**-22, atol=0)
    if kind == "power":  # the mean over all rows is NaN, which tells the backward pass that nothing moves
        assert results["stats"][2].isnan().all()
        results["stats"] = results["stats"][:2]
    assert all(torch.isfinite(value).all() for value in results.values() if value.is_floating_point())


def test_padding_is_left_out_of_the_statistics(emulator):
    """Whatever stands in padded rows, even NaN."""
    clean, dirty = Step.random("unified", 40, 24, masked=True), Step.random("unified", 40, 24, masked=True)
    dirty.x[dirty.pad_mask] = float("nan")
    clean_results, dirty_results = clean.run(emulator), dirty.run(emulator)
    for name in ("stats", "running_var", "buffer_x2"):
        assert torch.equal(clean_results[name], dirty_results[name]), name


def test_an_outlier_is_kept_out_of_the_window(emulator):
    options = {"outlier_filtration": True}
    step = Step.random("unified", 50, 20)
    step.tensors["buffer_x2"].fill_(1.0)
    step.x *= 30
    check(emulator, step, options)
    assert step.skip_counter.item() == 1
    calm = Step.random("unified", 50, 20)
    calm.tensors["buffer_x2"][:] = calm.x.square().mean(0)  # channels differ, steps do not
    check(emulator, calm, options)
    assert calm.skip_counter.item() == 0


def test_window_of_one_always_skips(emulator):
    step = Step.random("unified", 30, 10)
    step.tensors |= {name: step.tensors[name][:1].clone() for name in ("buffer_x2", "buffer_gz")}
    check(emulator, step, {})


def test_late_steps_clamp_the_ratio(emulator):
    step = Step.random("unified", 30, 10, iters=5000)
    step.tensors["running_var"][:3] = 1e-4  # the ratio would be far above 5
    step.tensors["running_var"][3:6] = 1e4  # and below 1/5
    check(emulator, step, {})


def test_errors_of_the_kernels_cross_to_python(emulator):
    with pytest.raises(ValueError, match="order must be"):
        emulator.configure(order="sideways")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(("kind", "options"), CASES, ids=CASE_NAMES)
def test_numbers_that_are_not_finite_enter_no_statistic(emulator, kind, options, bad):
    """Their channel stays where it was (with group scaling: every channel, as the row is bad); the others move."""
    step, reference_step = (Step.random(kind, 40, 12) for _ in range(2))
    for one in (step, reference_step):
        one.x[7, 5] = bad
        one.dy[3, 2] = bad
    step.run(emulator, **options)
    reference_step.run(reference, **options)
    for name, value in step.tensors.items():
        assert torch.isfinite(value).all(), name
        torch.testing.assert_close(value, reference_step.tensors[name], rtol=FLOAT32_TOLERANCE, atol=1e-6)
    assert torch.equal(step.iters, reference_step.iters)


@pytest.mark.parametrize(("kind", "options"), CASES, ids=CASE_NAMES)
def test_a_batch_without_a_valid_row_moves_nothing(emulator, kind, options):
    for rows, dtype in ((0, torch.float32), (33, torch.float32), (33, torch.bfloat16)):
        step = Step.random(kind, rows, 140, dtype, masked=True)
        step.pad_mask.fill_(True)
        check(emulator, step, options)
        untouched = Step.random(kind, rows, 140, dtype, masked=True)
        assert step.iters == untouched.iters and step.skip_counter == untouched.skip_counter
        assert all(torch.equal(value, untouched.tensors[name]) for name, value in step.tensors.items())


@pytest.mark.parametrize("iters", [-(2**63), -5, 2**63 - 1])
@pytest.mark.parametrize(("kind", "options"), CASES, ids=CASE_NAMES)
def test_any_counter_stays_inside_the_window(emulator, kind, options, iters):
    """On the device nobody reads a counter before the kernels do: they take the remainder of any number."""
    check(emulator, Step.random(kind, 9, 8, iters=iters), options)
