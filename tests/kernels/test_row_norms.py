"""LayerNorm, RMSNorm and CRMSNorm: emulated CUDA kernels and host kernels against the float64 reference."""

from dataclasses import dataclass

import pytest
import torch
from native import needs_kernels
from steps import assert_same_results, host, reference

from normfuse.ops.row_norm import CRMS, LAYER, RMS

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
KINDS = {"layer": LAYER, "rms": RMS, "crms": CRMS}
EPS = 1e-5
# Sums of float32 over a row or over columns, spread over at least 8 partial sums: some 40 roundings of 6e-8 each.
TOLERANCE = {torch.float64: 1e-13}
FLOAT32_TOLERANCE = 40 * 2**-24
# Rows: none, one, fewer than a block's teams, many. Channels: one, odd, fewer than a pack; a warp's, a block's of 4 and
# of 16 warps, more than those hold; each also where rows are not aligned.
SHAPES = [(0, 5), (1, 8), (5, 1), (33, 7), (70, 48), (37, 136), (5, 520), (5, 515), (3, 2056), (2, 2051)]
WIDE = [(5, 8200), (3, 8197)]


@dataclass
class Rows:
    """A step of a row norm, and what it is compared in."""

    kind: int
    x: torch.Tensor
    residual: torch.Tensor | None
    dy: torch.Tensor
    ds: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None

    @classmethod
    def random(cls, kind, rows, channels, dtype=torch.float32, residual=False, affine=True):
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        numbers = [torch.randn(rows, channels).to(dtype) for _ in range(4)]
        vectors = [0.5 + torch.rand(channels, dtype=acc) if affine else None for _ in range(2)]
        x = numbers[0] + 0.5  # rows whose mean is not zero
        return cls(kind, x, numbers[1] if residual else None, numbers[2], numbers[3] if residual else None, *vectors)

    def run(self, implementation):
        y, s, stats = implementation("row_norm_forward", self.x, self.residual, self.weight, self.bias, self.kind, EPS)
        rows = self.x if self.residual is None else s
        grads = implementation("row_norm_backward", self.dy, self.ds, rows, self.weight, stats, self.kind)
        results = {"y": y, "stats": stats, "grad_x": grads[0], "grad_weight": grads[1], "grad_bias": grads[2]}
        return results | {"s": s}

    def expected(self):
        """In float64, from s as it is after rounding to x's dtype."""
        s = self.x if self.residual is None else self.x + self.residual
        weight, bias, ds = (None if v is None else v.double() for v in (self.weight, self.bias, self.ds))
        y, _, stats = reference("row_norm_forward", s.double(), None, weight, bias, self.kind, EPS)
        grads = reference("row_norm_backward", self.dy.double(), ds, s.double(), weight, stats, self.kind)
        results = {"y": y, "stats": stats, "grad_x": grads[0], "grad_weight": grads[1], "grad_bias": grads[2]}
        return results | {"s": s.double() if self.residual is not None else s.new_empty(0).double()}

    def check(self, implementation, tolerance=None):
        self.check_results(self.run(implementation), tolerance)

    def check_results(self, results, tolerance=None):
        tolerance = tolerance or TOLERANCE.get(self.x.dtype, FLOAT32_TOLERANCE)
        expected = self.expected()
        # grad_x is a difference times inv_std, which is large where a row hardly varies.
        amplified = tolerance * max(expected["stats"][0].max().item(), 1.0) if len(self.x) else tolerance
        for names, bound in (({"grad_x"}, amplified), (set(results) - {"grad_x"}, tolerance)):
            assert_same_results({n: results[n] for n in names}, {n: expected[n] for n in names}, bound)
        if self.residual is not None:
            assert torch.equal(results["s"], self.x + self.residual)


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_shapes(implementation, kind, dtype, residual):
    for rows, channels in SHAPES:
        Rows.random(kind, rows, channels, dtype, residual, affine=channels % 3 != 0).check(implementation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_rows_too_wide_to_keep(implementation, kind, dtype):
    for rows, channels in WIDE:
        Rows.random(kind, rows, channels, dtype, residual=True).check(implementation)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_schedules(on_schedules, kind):
    for channels in (140, 600, 8200):
        rows = Rows.random(kind, 70 if channels < 8000 else 7, channels, residual=True)
        rows.check_results(on_schedules(rows.run))


@pytest.mark.parametrize("name", ["x", "residual", "dy", "ds", "weight", "bias"])
def test_one_unaligned_operand(emulator, name):
    rows = Rows.random(LAYER, 21, 16, residual=True)
    tensor = getattr(rows, name)
    shifted = torch.empty(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)
    assert shifted.data_ptr() % 16 != 0
    setattr(rows, name, shifted)
    rows.check(emulator)


def test_a_mean_far_from_zero(implementation):
    """The variance is that of the deviations: a mean of 1000 costs the three digits it takes in x, no more."""
    rows = Rows.random(LAYER, 20, 200)
    rows.x += 1000
    rows.check(implementation, 1000 * FLOAT32_TOLERANCE)


@needs_kernels
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_many_rows_on_the_host(on_threads, kind):
    """Results larger than what is cached; the same bits for any number of threads."""
    rows = Rows.random(kind, 70_000, 32, residual=True)
    results = on_threads((1, 3), lambda: rows.run(host))
    expected = rows.expected()
    for name in ("grad_weight", "grad_bias"):  # sums over rows, whose terms cancel
        assert (results[name] - expected[name]).abs().max() <= 1e-6 * 2 * rows.dy.abs().sum(0).max(), name
        expected[name] = results[name].double()
    assert_same_results(results, expected, FLOAT32_TOLERANCE)
