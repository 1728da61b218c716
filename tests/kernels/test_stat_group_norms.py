"""Batch normalisation and its kin: emulated CUDA kernels and host kernels against the float64 reference."""

from copy import deepcopy
from dataclasses import dataclass, replace

import pytest
import torch
from native import needs_kernels
from steps import assert_same_results, host, reference

EPS = 1e-3
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Sums of float32 over a statistics group, spread over at least 8 partial sums: some 40 roundings of 6e-8 each.
TOLERANCE = {torch.float64: 1e-13}
FLOAT32_TOLERANCE = 40 * 2**-24
# Samples, channels, positions, group size. Rows: none, one, an odd number of channels, fewer than a pack, a multiple of
# every pack, more than a tile. Planes: smaller and larger than a warp's round, odd, a whole block each, in pieces.
SHAPES = [
    (0, 5, 1, 0),
    (1, 8, 1, 0),
    (33, 7, 1, 5),
    (70, 48, 1, 0),
    (37, 136, 1, 10),
    (40, 264, 1, 0),
    (5, 3, 2, 2),
    (4, 9, 49, 0),
    (3, 5, 64, 1),
    (2, 2, 1030, 1),
    (2, 2, 9000, 0),
]


@dataclass
class Step:
    """A step on statistics groups, and what it is compared in. ``kind``: "batch", "estimated", "regions", "moving"."""

    kind: str
    x: torch.Tensor
    dy: torch.Tensor
    mask: torch.Tensor | None
    vectors: tuple[torch.Tensor, torch.Tensor]
    shortcut: torch.Tensor | None
    grad_stats: torch.Tensor | None
    state: list[torch.Tensor]
    group_size: int
    momentum: float | None = 0.1
    root: tuple[float, float, float] = (EPS, 0.0, 0.0)  # eps, floor, eps_total

    @classmethod
    def random(cls, kind, shape, dtype=torch.float32, masked=True, momentum=0.1):
        *sizes, group_size = shape
        group_size = 0 if kind in ("estimated", "moving") else group_size
        groups = max(sizes[0] // group_size, 1) if group_size else 1
        sets = 2 if kind == "regions" and masked else 1
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        x, dy = torch.randn(2, *sizes)
        mask = torch.rand(sizes[0], sizes[2]) < 0.3 if masked else None
        vectors = (sets if kind != "moving" else 1, sizes[1])
        gain, shift = 0.5 + torch.rand(2, 1 if kind != "regions" else groups, *vectors, dtype=acc)
        positive = [0.5 + torch.rand(sizes[1], dtype=acc) for _ in range(2)]
        if kind == "moving":
            windows = [0.5 + torch.rand(3, sizes[1], dtype=acc) for _ in range(2)]
            state = [positive[0], windows[0], torch.tensor([2000]), windows[1]]
        else:
            state = [positive[0] - 1, positive[1], torch.tensor(3)] if kind != "regions" else []
        others = kind in ("batch", "regions")
        grad_stats = torch.randn(2, groups, sets, sizes[1], dtype=acc) if others else None
        return cls(
            kind, (x + 0.5).to(dtype), dy.to(dtype), mask, (gain, shift), torch.rand(1, dtype=acc) if others else None,
            grad_stats, state, group_size, momentum,
        )  # fmt: skip

    def in_float64(self):
        """The same numbers in float64 and memory of their own."""

        def double(value):
            return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

        return replace(
            self,
            **{name: double(getattr(self, name)) for name in ("x", "dy", "shortcut", "grad_stats")},
            vectors=tuple(map(double, self.vectors)),
            state=[double(value.clone()) for value in self.state],
        )

    def run(self, implementation):
        if self.kind == "moving":
            return self._run_moving(implementation)
        correction = 1 if self.kind == "regions" and self.mask is None else 0
        given = (self.x, self.mask, *self.vectors, self.shortcut)
        estimated = self.kind == "estimated"
        if self.kind == "regions":
            eps, _, eps_total = self.root
            y, stats, count = implementation(
                "stat_group_norm_forward", *given, self.group_size, correction, eps, eps_total
            )
        else:
            y, stats, count = implementation(
                "batch_norm_forward", *given, *self.state, self.group_size, estimated, self.momentum, *self.root[:2]
            )
        more = [None, None] if self.grad_stats is None else list(self.grad_stats)
        grads = implementation(
            "batch_norm_backward", self.dy, *more, self.x, self.mask, self.vectors[0], self.shortcut, stats, count,
            self.group_size, self.kind == "regions", correction, estimated, self.root[1],
        )  # fmt: skip
        return self._results(y, stats, grads) | {"count": count}

    def _run_moving(self, implementation):
        gain, shift = (v.view(-1) for v in self.vectors)
        *moved, window = self.state
        y, stats, step = implementation(
            "moving_average_norm_forward", self.x, self.mask, gain, shift, *moved, 5, EPS, 0.9
        )
        grads = implementation("moving_average_norm_backward", self.dy, self.x, gain, stats, step, window, 5)
        return self._results(y, stats, grads) | {"step": step}

    def _results(self, y, stats, grads):
        results = {"y": y, "stats": stats, "grad_x": grads[0], "grad_weight": grads[1], "grad_bias": grads[2]}
        return results | {f"state {i}": value for i, value in enumerate(self.state)}

    def check(self, implementation, tolerance=None):
        wide = self.in_float64()  # before the states move
        wide.check_results(self.run(implementation), tolerance or TOLERANCE.get(self.x.dtype, FLOAT32_TOLERANCE))

    def check_results(self, results, tolerance):
        """This step is in float64."""
        expected = self.run(reference)
        # What hangs on 1/sqrt(variance + eps) is as uncertain as that is large, its derivative by the variance more so.
        inv_std = expected["stats"][0 if self.kind == "moving" else 2].max().item() if len(self.x) else 1.0
        amplified = tolerance * max(inv_std, 1.0) ** 3
        for name, value in results.items():
            loose = name in ("y", "stats", "grad_x", "grad_weight")
            assert_same_results({name: value}, {name: expected[name]}, amplified if loose else tolerance)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["batch", "estimated", "regions", "moving"])
def test_shapes(implementation, kind, dtype, masked):
    for shape in SHAPES:
        if kind != "regions" or shape[0] * shape[2] > 33:  # a group of one number has no unbiased variance
            Step.random(kind, shape, dtype, masked, None if shape[1] == 9 else 0.1).check(implementation)


@pytest.mark.parametrize("shape", [(70, 48, 1, 0), (33, 7, 1, 11), (4, 9, 64, 2)], ids=str)
@pytest.mark.parametrize(("kind", "root"), [("batch", (0.0, 1.0, 0.0)), ("regions", (0.0, 0.0, 7.0))], ids=str)
def test_what_stands_under_the_root(implementation, kind, root, shape):
    """Variances on both sides of a floor, and an eps that counts for more where a region is small."""
    step = Step.random(kind, shape)
    step.root = root
    below = step.in_float64().run(reference)["stats"][1] < root[1]
    assert kind == "regions" or (below.any() and not below.all())
    step.check(implementation)


@pytest.mark.parametrize("kind", ["batch", "regions", "moving"])
def test_schedules(on_schedules, kind):
    for shape in ((130, 40, 1, 40), (6, 10, 72, 2), (2, 3, 5000, 1)):
        step = Step.random(kind, shape)
        results = on_schedules(lambda emulator, step=step: deepcopy(step).run(emulator))
        step.in_float64().check_results(results, FLOAT32_TOLERANCE)


@pytest.mark.parametrize("name", ["x", "dy"])
@pytest.mark.parametrize("shape", [(21, 16, 1, 0), (3, 2, 64, 1)], ids=["rows", "planes"])
def test_one_unaligned_operand(emulator, name, shape):
    step = Step.random("batch", shape)
    tensor = getattr(step, name)
    shifted = torch.empty(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)
    assert shifted.data_ptr() % 16 != 0
    setattr(step, name, shifted)
    step.check(emulator)


@pytest.mark.parametrize("shape", [(600, 24, 1, 0), (4, 6, 200, 0)], ids=["rows", "planes"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_mean_far_from_zero(implementation, shape, masked):
    """The variance is that of the deviations: a mean of 1000 costs the three digits it takes in x, no more."""
    step = Step.random("regions", shape, masked=masked)
    step.x += 1000
    step.check(implementation, 1000 * FLOAT32_TOLERANCE)
    var = step.run(implementation)["stats"][1]
    assert (var - step.in_float64().run(reference)["stats"][1]).abs().max() < 1e-4


def test_an_outlier_is_no_reference(implementation):
    """One row far from the rest, first in its block: differences from it alone would lose the variance of the rest."""
    step = Step.random("batch", (700, 8, 1, 0), masked=False)
    step.x[0] = 300.0
    step.check(implementation, 4 * FLOAT32_TOLERANCE)


@pytest.mark.parametrize("shape", [(40, 5, 1, 8), (6, 5, 10, 2), (0, 5, 1, 0)], ids=["rows", "planes", "empty"])
@pytest.mark.parametrize("kind", ["batch", "estimated", "moving"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_groups_without_a_valid_number_move_nothing(implementation, kind, shape, momentum):
    torch.manual_seed(0)
    step = Step.random(kind, shape, momentum=momentum)
    before = [value.clone() for value in step.state]
    step.mask.fill_(True)
    step.check(implementation)
    assert all(torch.equal(a, b) for a, b in zip(step.state, before, strict=True))
    if kind == "batch" and step.group_size:  # only the groups that hold numbers count
        step.mask[step.group_size : 2 * step.group_size] = False
        step.check(implementation)
        assert step.state[2] == before[2] + 1


@pytest.mark.parametrize("iters", [-(2**63), -5, 2**63 - 1])
def test_any_counter_stays_inside_the_window(emulator, iters):
    step = Step.random("moving", (5, 4, 3, 0))
    step.state[2].fill_(iters)
    step.check(emulator)


@pytest.mark.parametrize("kind", ["batch", "regions"])
@pytest.mark.parametrize("shape", [(40, 5, 1, 0), (4, 5, 10, 0)], ids=["rows", "planes"])
def test_what_is_not_finite_stays_on_its_side_of_the_mask(implementation, kind, shape):
    step = Step.random(kind, shape)
    clean = step.in_float64().run(reference)
    step.x = torch.where(step.mask[:, None], float("nan"), step.x)
    results = step.run(implementation)
    torch.testing.assert_close(results["stats"][:, :, 0], clean["stats"][:, :, 0].float(), rtol=1e-5, atol=1e-5)
    keep = (~step.mask)[:, None].expand_as(step.x)
    torch.testing.assert_close(results["y"][keep], clean["y"].float()[keep], rtol=1e-5, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("kind", ["batch", "regions", "moving"])
@pytest.mark.parametrize("shape", [(70_000, 32, 1, 20_000), (9, 32, 8192, 2)], ids=["rows", "planes"])
def test_many_numbers_on_the_host(on_threads, kind, shape):
    """Results larger than what is cached; the same bits for any number of threads."""

    def start():
        torch.manual_seed(0)
        return Step.random(kind, shape)

    results, step = on_threads((1, 3), lambda: start().run(host)), start()
    expected = step.in_float64().run(reference)
    for name in ("grad_weight", "grad_bias"):  # sums over statistics groups, whose terms cancel
        scale = 2 * step.dy.abs().sum((0, 2)).max()
        assert (results[name] - expected[name]).abs().max() <= 1e-6 * scale, name
        expected[name] = results[name].double()
    for name, value in results.items():
        assert_same_results({name: value}, {name: expected[name]}, FLOAT32_TOLERANCE)


@needs_kernels
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(3, 4)}, r"x must have shape \[samples, channels, positions\]"),
        ({"mask": torch.zeros(3, 2, dtype=torch.bool)}, r"mask must be contiguous of shape \[3, 5\]"),
        ({"weight": torch.ones(2, 1, 4)}, r"weight must be contiguous of shape \[1 or 1, 1 or 1, 4\]"),
        ({"weight": torch.ones(1, 1, 4).double()}, "weight is float64"),
        ({"group_size": -1}, "group_size is -1"),
        ({"shortcut": torch.ones(2)}, r"shortcut must be contiguous of shape \[1\]"),
        ({"running_mean": torch.ones(5)}, r"running_mean must be contiguous of shape \[4\]"),
        ({"estimated": True, "group_size": 1}, "estimated statistics have one group"),
    ],
)
def test_refusals(change, message):
    given = {
        "x": torch.randn(3, 4, 5), "mask": None, "weight": torch.ones(1, 1, 4), "bias": torch.ones(1, 1, 4),
        "shortcut": None, "running_mean": torch.zeros(4), "running_var": torch.ones(4),
        "num_batches_tracked": torch.tensor(0), "group_size": 0, "estimated": False, "momentum": 0.1, "eps": 1e-5,
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        torch.ops.normfuse.batch_norm_forward(*(given | change).values())
