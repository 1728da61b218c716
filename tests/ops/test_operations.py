"""Kernels against references on [rows, channels] matrices, and what the dispatcher and torch.compile rely on."""

import pytest
import torch
from native import needs_kernels

from normfuse.ops.power_norm import power_norm_backward_reference, power_norm_forward_reference
from normfuse.ops.unified_norm import unified_norm_backward_reference, unified_norm_forward_reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = ((0, 5), (1, 1), (1, 7), (3, 1), (5, 8), (17, 33), (64, 64), (515, 130), (2, 1025))
MASKS = ("none", "some", "all")
EPS = 1e-5


def accumulation(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def make_mask(kind, rows):
    return {"none": None, "some": torch.rand(rows) < 0.4, "all": torch.ones(rows, dtype=torch.bool)}[kind]


def assert_near(name, actual, expected, scale, rows, exact_dtype):
    """Two ways to sum ``rows`` numbers differ by at most rows·eps·Σ|numbers|; 16 more for the operations around.

    ``scale`` is Σ|numbers|. An output narrower than the sums may round the other way: one unit in the last place.
    """
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, name
    actual, expected, scale = actual.double(), expected.double(), scale.double()
    allowed = (rows + 16) * torch.finfo(accumulation(exact_dtype)).eps * scale
    if exact_dtype in (torch.bfloat16, torch.float16):
        # float16 runs out of exponents below 6e-5: its smallest step is tiny * eps.
        info = torch.finfo(exact_dtype)
        allowed = allowed + info.eps * expected.abs() + info.tiny * info.eps
    excess = ((actual - expected).abs() - allowed).max() if actual.numel() else torch.tensor(0.0)
    assert excess <= 0, f"{name}: beyond the rounding bound by {excess:.1e}"


class UnifiedCase:
    """Arguments after warm-up, so that windows and the ratio take part."""

    def __init__(self, rows, channels, dtype, mask, window=3):
        acc = accumulation(dtype)
        self.x = (torch.randn(rows, channels) * 2).to(dtype)
        self.dy = torch.randn(rows, channels).to(dtype)
        self.mask = make_mask(mask, rows)
        self.weight, self.bias = torch.randn(2, channels, dtype=acc)
        self.running_var = torch.rand(channels, dtype=acc) * 4 + 0.1
        self.buffer_x2 = torch.rand(window, channels, dtype=acc) * 4 + 0.1
        self.ema_gz = torch.randn(channels, dtype=acc)
        self.buffer_gz = torch.randn(window + 1, channels, dtype=acc)
        self.counters = torch.tensor([1500]), torch.tensor([2])

    def forward_arguments(self, filtration=False):
        state = [self.running_var.clone(), self.buffer_x2.clone(), *(count.clone() for count in self.counters)]
        return (self.x, self.mask, self.weight, self.bias, *state, 10, filtration, EPS, 0.9)

    def backward_arguments(self, stats, step):
        state = self.ema_gz.clone(), self.buffer_gz.clone()
        return (self.dy, self.x, self.weight, stats, step, *state, 10, 0.9)


class PowerCase:
    def __init__(self, rows, channels, dtype, mask, groups, iters=50):
        acc = accumulation(dtype)
        self.x = (torch.randn(rows, channels) * 2).to(dtype)
        self.dy = torch.randn(rows, channels).to(dtype)
        self.mask = make_mask(mask, rows)
        self.groups = groups
        self.weight, self.bias = torch.randn(2, channels, dtype=acc)
        self.running_phi = torch.rand(channels, dtype=acc) * 4 + 0.1
        self.ema_gz = torch.randn(channels, dtype=acc)
        self.iters = torch.tensor([iters])

    def forward_arguments(self):
        state = self.running_phi.clone(), self.iters.clone()
        return (self.x, self.mask, self.weight, self.bias, *state, 20, self.groups, EPS, 10 * EPS, 0.9)

    def backward_arguments(self, stats, row_scale, paper=False):
        return (self.dy, self.x, self.weight, stats, row_scale, self.ema_gz.clone(), self.groups, 0.9, paper)


@needs_kernels
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unified_norm(shape, dtype, mask):
    case = UnifiedCase(*shape, dtype, mask)
    rows = shape[0]
    here, there = case.forward_arguments(), case.forward_arguments()
    y, stats, step = torch.ops.normfuse.unified_norm_forward(*here)
    y_ref, stats_ref, step_ref = unified_norm_forward_reference(*there)
    moves = rows > 0 if case.mask is None else (~case.mask).any().item()
    assert step.tolist() == step_ref.tolist() == [1501 if moves else 0, 0]
    assert [count.item() for count in here[6:8]] == [1501 if moves else 1500, 2]
    acc = stats.dtype
    for index, name in ((4, "running_var"), (5, "buffer_x2")):
        assert_near(name, here[index], there[index], there[index], rows, acc)
    assert_near("stats", stats, stats_ref, stats_ref, rows, acc)
    inv_std, ratio = stats_ref
    z = case.x.to(acc) * inv_std
    assert_near("y", y, y_ref, (case.weight * z).abs() + case.bias.abs(), rows, dtype)

    here, there = case.backward_arguments(stats_ref, step), case.backward_arguments(stats_ref, step)
    dx, dw, db = torch.ops.normfuse.unified_norm_backward(*here)
    dx_ref, dw_ref, db_ref = unified_norm_backward_reference(*there)
    dy = case.dy.to(acc)
    g = (dy * case.weight * ratio).abs()
    mean_gz = (g * z.abs()).sum(0) / max(rows, 1) + case.buffer_gz.abs().sum(0) + case.ema_gz.abs()
    assert_near("ema_gz", here[5], there[5], mean_gz, rows, acc)
    assert_near("buffer_gz", here[6], there[6], mean_gz.expand(4, -1), rows, acc)
    assert_near("grad_x", dx, dx_ref, (g + mean_gz * z.abs()) * inv_std, rows, dtype)
    assert_near("grad_weight", dw, dw_ref, (dy * ratio * z).abs().sum(0), rows, acc)
    assert_near("grad_bias", db, db_ref, dy.abs().sum(0), rows, acc)


@needs_kernels
@pytest.mark.parametrize("iters", [5, 50], ids=["warm-up", "after"])
@pytest.mark.parametrize("groups", ["off", "one", "most"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_power_norm(shape, dtype, mask, groups, iters):
    rows, channels = shape
    divisors = [count for count in range(1, channels) if channels % count == 0] or [1]
    group_num = {"off": 0, "one": 1, "most": divisors[-1]}[groups]
    case = PowerCase(rows, channels, dtype, mask, group_num, iters)
    here, there = case.forward_arguments(), case.forward_arguments()
    y, stats, row_scale = torch.ops.normfuse.power_norm_forward(*here)
    y_ref, stats_ref, row_scale_ref = power_norm_forward_reference(*there)
    acc = stats.dtype
    terms = rows + channels
    moves = rows > 0 if case.mask is None else (~case.mask).any().item()
    assert here[5].item() == iters + moves
    assert_near("running_phi", here[4], there[4], there[4], terms, acc)
    assert_near("stats", stats[: 2 + moves], stats_ref[: 2 + moves], stats_ref[: 2 + moves], terms, acc)
    assert moves or (stats[2].isnan().all() and stats_ref[2].isnan().all())
    assert_near("row_scale", row_scale, row_scale_ref, row_scale_ref, terms, acc)
    inv_used, inv_batch, _ = stats_ref
    values = case.x.to(acc)
    spread = None
    if group_num:
        spread = row_scale_ref.repeat_interleave(channels // group_num, dim=1)
        values = values * spread
    z = values * inv_used
    assert_near("y", y, y_ref, (case.weight * z).abs() + case.bias.abs(), terms, dtype)

    for paper in (False, True):
        here = case.backward_arguments(stats_ref, row_scale_ref, paper)
        there = case.backward_arguments(stats_ref, row_scale_ref, paper)
        dx, dw, db = torch.ops.normfuse.power_norm_backward(*here)
        dx_ref, dw_ref, db_ref = power_norm_backward_reference(*there)
        dy = case.dy.to(acc)
        a = (dy * case.weight).abs() + (case.ema_gz * z).abs()
        mean_az = (a * z.abs()).sum(0) / max(rows, 1) + case.ema_gz.abs()
        scale = a * (inv_used if paper else inv_batch)
        if group_num:
            along = (scale * values.abs()).reshape(rows, group_num, channels // group_num).mean(-1)
            scale = (scale + values.abs() * along.repeat_interleave(channels // group_num, dim=1)) * spread
        assert_near("ema_gz", here[5], there[5], mean_az, terms, acc)
        assert_near("grad_x", dx, dx_ref, scale, terms, dtype)
        assert_near("grad_weight", dw, dw_ref, (dy * z).abs().sum(0), terms, acc)
        assert_near("grad_bias", db, db_ref, dy.abs().sum(0), terms, acc)


@pytest.mark.parametrize("shape", [(12, 5), (3, 4, 5), (2, 1, 6, 5), (0, 4, 5)], ids=str)
@pytest.mark.parametrize("mask", ["none", "some"])
def test_leading_dimensions_are_rows(shape, mask):
    """Bit for bit what the [rows, channels] matrix gives, from the kernels and the references."""
    rows = torch.Size(shape[:-1]).numel()
    unified, power = UnifiedCase(rows, 5, torch.float32, mask), PowerCase(rows, 5, torch.float32, mask, 1)
    operations = torch.ops.normfuse
    for case, forward, backward in (
        (unified, operations.unified_norm_forward, operations.unified_norm_backward),
        (power, operations.power_norm_forward, operations.power_norm_backward),
        (unified, unified_norm_forward_reference, unified_norm_backward_reference),
        (power, power_norm_forward_reference, power_norm_backward_reference),
    ):
        y, *saved = forward(*case.forward_arguments())
        dx, *gradients = backward(*case.backward_arguments(*saved))
        matrices = case.x, case.dy
        case.x, case.dy = (matrix.reshape(shape) for matrix in matrices)
        shaped_y, *shaped_saved = forward(*case.forward_arguments())
        shaped_dx, *shaped_gradients = backward(*case.backward_arguments(*saved))
        case.x, case.dy = matrices
        assert shaped_y.shape == shaped_dx.shape == shape
        assert torch.equal(shaped_y.reshape(rows, 5), y) and torch.equal(shaped_dx.reshape(rows, 5), dx)
        for one, other in zip(shaped_saved + shaped_gradients, saved + gradients, strict=True):
            torch.testing.assert_close(one, other, atol=0, rtol=0, equal_nan=True)  # NaN: no row


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_unified_norm(dtype):
    case = UnifiedCase(6, 5, dtype, "some")
    case.x, case.dy = case.x.view(2, 3, 5), case.dy.view(2, 3, 5)
    arguments = case.forward_arguments(filtration=True)
    torch.library.opcheck(torch.ops.normfuse.unified_norm_forward, arguments)
    summed = (torch.randn_like(case.x), torch.empty_like(case.x))
    torch.library.opcheck(torch.ops.normfuse.unified_norm_forward, (*case.forward_arguments(), *summed))
    _, stats, step = torch.ops.normfuse.unified_norm_forward(*case.forward_arguments())
    for grad_s in (None, torch.randn_like(case.x)):
        arguments = (*case.backward_arguments(stats, step), grad_s)
        torch.library.opcheck(torch.ops.normfuse.unified_norm_backward, arguments)


@pytest.mark.parametrize("groups", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_power_norm(dtype, groups):
    case = PowerCase(6, 4, dtype, "some", groups)
    case.x, case.dy = case.x.view(2, 3, 4), case.dy.view(2, 3, 4)
    summed = (torch.randn_like(case.x), torch.empty_like(case.x))
    for arguments in (case.forward_arguments(), (*case.forward_arguments(), *summed)):
        torch.library.opcheck(torch.ops.normfuse.power_norm_forward, arguments)
    _, stats, row_scale = torch.ops.normfuse.power_norm_forward(*case.forward_arguments())
    for grad_s in (None, torch.randn_like(case.x)):
        arguments = (*case.backward_arguments(stats, row_scale), grad_s)
        torch.library.opcheck(torch.ops.normfuse.power_norm_backward, arguments)


@pytest.mark.parametrize(
    ("name", "reference", "mutated"),
    [
        (
            "unified_norm_forward",
            unified_norm_forward_reference,
            ("running_var", "buffer_x2", "iters", "skip_counter", "s"),
        ),
        ("unified_norm_backward", unified_norm_backward_reference, ("ema_gz", "buffer_gz")),
        ("power_norm_forward", power_norm_forward_reference, ("running_phi", "iters", "s")),
        ("power_norm_backward", power_norm_backward_reference, ("ema_gz",)),
    ],
)
def test_the_library_declares_what_the_reference_takes(name, reference, mutated):
    """Either side can declare an operation, so both must declare the same."""
    declared = getattr(torch.ops.normfuse, name).default._schema
    inferred = torch._C.parse_schema(name + torch.library.infer_schema(reference, mutates_args=mutated))
    assert [(a.name, str(a.type)) for a in declared.arguments] == [(a.name, str(a.type)) for a in inferred.arguments]
    assert tuple(a.name for a in declared.arguments if a.is_write) == mutated
    assert [str(r.type) for r in declared.returns] == [str(r.type) for r in inferred.returns]


@needs_kernels
def test_kernels_repeat_bit_for_bit():
    unified = UnifiedCase(4099, 96, torch.float32, "some")
    power = PowerCase(4099, 96, torch.float32, "some", 4)

    def once():
        forward, power_forward = unified.forward_arguments(), power.forward_arguments()
        y, stats, step = torch.ops.normfuse.unified_norm_forward(*forward)
        backward = unified.backward_arguments(stats, step)
        z, power_stats, row_scale = torch.ops.normfuse.power_norm_forward(*power_forward)
        power_backward = power.backward_arguments(power_stats, row_scale)
        gradients = torch.ops.normfuse.unified_norm_backward(*backward)
        gradients += torch.ops.normfuse.power_norm_backward(*power_backward)
        state = (*forward[4:8], *backward[5:7], *power_forward[4:6], power_backward[5])
        return (y, stats, z, power_stats, row_scale, *gradients, *state)

    first = once()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))
