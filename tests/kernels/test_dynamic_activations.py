"""Dynamic Tanh and Dynamic erf: the curves to a few ulp, and both kernels against the float64 reference."""

from dataclasses import dataclass

import pytest
import torch
from native import needs_kernels
from steps import assert_same_results, host, reference

from normfuse.ops.dynamic_activation import ERF, TANH

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CURVES = {"tanh": TANH, "erf": ERF}
EXACT = {TANH: torch.tanh, ERF: torch.erf}
SLOPES = {
    TANH: lambda u: torch.cosh(u).square().reciprocal(),
    ERF: lambda u: 2 / torch.pi**0.5 * torch.exp(-u.square()),
}
CURVE_ULPS = 4  # of f, relative to f; what curve_math.h promises
# f to 4 ulp of at most 2⁻²³, its gain and shift, and sums of float32 over columns, spread over several partial sums.
FLOAT32_TOLERANCE = 40 * 2**-24
TOLERANCE = {torch.float64: 1e-13}
# Rows: none, one, fewer than a block's, many. Channels: one, odd, fewer than a pack, several tiles; aligned or not.
SHAPES = [(0, 5), (1, 8), (5, 1), (33, 7), (70, 48), (37, 136), (300, 33), (5, 520), (3, 515)]


@dataclass
class Activation:
    """A step of a dynamic activation, and what it is compared in."""

    curve: int
    x: torch.Tensor
    dy: torch.Tensor
    alpha: torch.Tensor
    shift: torch.Tensor | None
    weight: torch.Tensor
    bias: torch.Tensor

    @classmethod
    def random(cls, curve, rows, channels, dtype=torch.float32, shift=True):
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        x, dy = torch.randn(2, rows, channels).to(dtype)
        weight, bias = torch.randn(2, channels, dtype=acc)
        alpha, offset = torch.tensor([1.3, -0.4], dtype=acc)
        return cls(curve, x, dy, alpha.clone(), offset.clone() if shift else None, weight, bias)

    def run(self, implementation):
        scalars, curve = (self.alpha, self.shift), self.curve
        y = implementation("dynamic_activation_forward", self.x, *scalars, self.weight, self.bias, curve)
        grads = implementation("dynamic_activation_backward", self.dy, self.x, *scalars, self.weight, curve)
        names = ("grad_x", "grad_alpha", "grad_shift", "grad_weight", "grad_bias")
        return {"y": y} | dict(zip(names, grads, strict=True))

    def expected(self):
        vectors = (self.x, self.dy, self.alpha, self.shift, self.weight, self.bias)
        wide = Activation(self.curve, *(None if v is None else v.double() for v in vectors))
        return wide.run(reference)

    def check(self, implementation):
        self.check_results(self.run(implementation))

    def check_results(self, results):
        tolerance, expected = TOLERANCE.get(self.x.dtype, FLOAT32_TOLERANCE), self.expected()
        totals = {"grad_alpha", "grad_shift"}
        assert_same_results({n: results[n] for n in totals}, {n: expected[n] for n in totals}, tolerance * self.terms())
        names = set(results) - totals
        assert_same_results({n: results[n] for n in names}, {n: expected[n] for n in names}, tolerance)

    def terms(self):
        """How much larger the terms of the sums over everything are, together, than their sum may be: they cancel."""
        return max((self.dy.double() * self.weight.double() * self.x.double().clamp(min=1)).abs().sum().item(), 1.0)


def every(stride, limit=32.0):
    """Every ``stride``-th float32 from 0 to ``limit``, of both signs, as [R, 64]."""
    last = torch.tensor(limit).view(torch.int32).item()
    bits = torch.arange(0, last, stride, dtype=torch.int32)
    bits = bits[: len(bits) // 64 * 64].view(-1, 64)
    values = bits.view(torch.float32)
    return torch.cat([values, -values])


@pytest.mark.parametrize("curve", CURVES.values(), ids=CURVES)
def test_the_curve_to_a_few_ulp(implementation, curve):
    """On the host with the instructions that the loader picked, emulated without fused multiply-adds."""
    x = every(1021 if implementation is host else 100_003)
    one, zero = torch.ones(64), torch.zeros(64)
    y = implementation("dynamic_activation_forward", x, torch.tensor(1.0), None, one, zero, curve)
    want = EXACT[curve](x.double())
    ulp = torch.exp2(torch.floor(torch.log2(want.abs().clamp(min=2.0**-126))) - 23)
    assert ((y.double() - want).abs() / ulp).max() <= CURVE_ULPS
    assert y.abs().max() <= 1 and (y.double() * x.double() >= 0).all()

    grads = implementation("dynamic_activation_backward", torch.ones_like(x), x, torch.tensor(1.0), None, one, curve)
    slope = SLOPES[curve](x.double())
    # Relative to the largest slope; and where f is flat, relative to the slope itself but for the rounding of u².
    assert (grads[0].double() - slope).abs().max() <= 4 * 2**-23
    assert (grads[0] >= 0).all()
    steep = slope > 2**-60
    relative = (grads[0].double() - slope).abs()[steep] / slope[steep]
    assert (relative <= (4 + 2 * x.double().square()[steep]) * 2**-23).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("curve", CURVES.values(), ids=CURVES)
def test_what_is_not_finite(implementation, curve, dtype):
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), 6e4, -6e4, 0.0, -0.0]] * 3).to(dtype)
    vectors = torch.ones(7, dtype=acc), torch.zeros(7, dtype=acc)
    alpha = torch.tensor(1.0, dtype=acc)
    y = implementation("dynamic_activation_forward", x, alpha, None, *vectors, curve)
    assert y[:, 0].isnan().all() and torch.equal(y[0, 1:].double(), torch.tensor([1, -1, 1, -1, 0, 0]).double())
    grad_x = implementation("dynamic_activation_backward", torch.ones_like(x), x, alpha, None, vectors[0], curve)[0]
    assert grad_x[:, 0].isnan().all() and grad_x[:, 1:5].abs().max() <= 1e-30 and (grad_x[:, 5:] >= 1).all()


@pytest.mark.parametrize("shift", [False, True], ids=["alpha", "shift"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("curve", CURVES.values(), ids=CURVES)
def test_shapes(implementation, curve, dtype, shift):
    for rows, channels in SHAPES:
        Activation.random(curve, rows, channels, dtype, shift).check(implementation)


@pytest.mark.parametrize("curve", CURVES.values(), ids=CURVES)
def test_schedules(on_schedules, curve):
    for channels in (140, 600):
        step = Activation.random(curve, 70, channels)
        step.check_results(on_schedules(step.run))


@pytest.mark.parametrize("name", ["x", "dy", "weight", "bias"])
def test_one_unaligned_operand(emulator, name):
    step = Activation.random(ERF, 21, 16)
    tensor = getattr(step, name)
    shifted = torch.empty(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)
    assert shifted.data_ptr() % 16 != 0
    setattr(step, name, shifted)
    step.check(emulator)


@needs_kernels
@pytest.mark.parametrize("curve", CURVES.values(), ids=CURVES)
def test_many_rows_on_the_host(on_threads, curve):
    """Results larger than what is cached; the same bits for any number of threads."""
    step = Activation.random(curve, 140_000, 32)
    results = on_threads((1, 3), lambda: step.run(host))
    expected = step.expected()
    for name, scale in (("grad_alpha", 2e-7), ("grad_shift", 2e-7)):  # per-row sums in float32, added in float64
        assert (results[name] - expected[name]).abs() <= scale * step.terms(), name
        expected[name] = results[name].double()
    for name in ("grad_weight", "grad_bias"):  # sums over rows, whose terms cancel
        assert (results[name] - expected[name]).abs().max() <= 1e-6 * step.dy.abs().sum(0).max(), name
        expected[name] = results[name].double()
    assert_same_results(results, expected, FLOAT32_TOLERANCE)
