"""One training step of each norm on an implementation of the operations, from the same random start."""

import sys
from dataclasses import dataclass

import torch

STATES = {"unified": ("running_var", "ema_gz", "buffer_x2", "buffer_gz"), "power": ("running_phi", "ema_gz")}
WINDOW = 3


def host(operation: str, *arguments):
    """The operation as torch runs it: by the kernels of the host."""
    return getattr(torch.ops.normfuse, operation)(*arguments)


def reference(operation: str, *arguments):
    """The plain PyTorch operation; given float64 it is what the kernels are compared with."""
    name = f"{operation}_reference"
    modules = [module for path, module in sys.modules.items() if path.startswith("normfuse.ops.")]
    (found,) = {getattr(module, name) for module in modules if hasattr(module, name)}
    return found(*arguments)


@dataclass
class Step:
    """Inputs and state of a step. ``results`` and the states are what implementations are compared in."""

    kind: str
    x: torch.Tensor
    dy: torch.Tensor
    pad_mask: torch.Tensor | None
    tensors: dict[str, torch.Tensor]
    iters: torch.Tensor
    skip_counter: torch.Tensor
    residual: torch.Tensor | None = None
    ds: torch.Tensor | None = None  # gradient of x + residual

    @classmethod
    def random(cls, kind, rows, channels, dtype=torch.float32, masked=False, iters=20, seed=0, residual=False):
        generator = torch.Generator().manual_seed(seed)
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        spread = 0.5 + torch.rand(channels, generator=generator)  # channels differ
        x = (torch.randn(rows, channels, generator=generator) * spread).to(dtype)
        dy = torch.randn(rows, channels, generator=generator).to(dtype)
        pad_mask = torch.rand(rows, generator=generator) < 0.3 if masked else None
        shapes = {"weight": (channels,), "bias": (channels,)}
        shapes |= {name: (WINDOW, channels) if name.startswith("buffer") else (channels,) for name in STATES[kind]}
        tensors = {name: (0.5 + torch.rand(shape, generator=generator)).to(acc) for name, shape in shapes.items()}
        others = [torch.randn(rows, channels, generator=generator).to(dtype) if residual else None for _ in range(2)]
        return cls(kind, x, dy, pad_mask, tensors, torch.tensor([iters]), torch.tensor([0]), *others)

    def in_float64(self) -> "Step":
        """The same numbers, in float64 and memory of their own. A residual is added in x's dtype."""
        tensors = {name: value.double().clone() for name, value in self.tensors.items()}
        mask = None if self.pad_mask is None else self.pad_mask.clone()
        counters = (self.iters.clone(), self.skip_counter.clone())
        x, ds = (self.x, None) if self.residual is None else (self.x + self.residual, self.ds.double())
        step = Step(self.kind, x.double(), self.dy.double(), mask, tensors, *counters, ds=ds)
        step.residual = None if self.residual is None else torch.zeros_like(step.x)
        return step

    def _sum(self):
        """Arguments for the sum with the residual and its place, and what is normalised."""
        s = None if self.residual is None else torch.full_like(self.x, float("nan"))
        return (self.residual, s), self.x if s is None else s

    def run(self, implementation, **options):
        return (self._run_unified if self.kind == "unified" else self._run_power)(implementation, **options)

    def _run_unified(self, implementation, *, warmup_iters=5, outlier_filtration=False, momentum=0.9):
        t = self.tensors
        state = (t["running_var"], t["buffer_x2"], self.iters, self.skip_counter)
        options = (warmup_iters, outlier_filtration, 1e-5, momentum)
        addend, rows = self._sum()
        y, stats, step = implementation(
            "unified_norm_forward", self.x, self.pad_mask, t["weight"], t["bias"], *state, *options, *addend
        )
        grads = implementation(
            *(
                "unified_norm_backward",
                self.dy,
                rows,
                t["weight"],
                stats,
                step,
                t["ema_gz"],
                t["buffer_gz"],
            ),
            *(warmup_iters, momentum, self.ds),
        )
        return self._results(y, stats, grads, rows) | {"step": step}

    def _run_power(self, implementation, *, warmup_iters=5, group_num=0, paper=False, alpha_fwd=0.9, alpha_bkw=0.9):
        t = self.tensors
        addend, rows = self._sum()
        options = (warmup_iters, group_num, 1e-5, 1e-3, alpha_fwd, *addend)
        y, stats, row_scale = implementation(
            *(
                "power_norm_forward",
                self.x,
                self.pad_mask,
                t["weight"],
                t["bias"],
                t["running_phi"],
                self.iters,
            ),
            *options,
        )
        grads = implementation(
            *("power_norm_backward", self.dy, rows, t["weight"], stats, row_scale, t["ema_gz"]),
            *(group_num, alpha_bkw, paper, self.ds),
        )
        return self._results(y, stats, grads, rows) | {"row_scale": row_scale}

    def _results(self, y, stats, grads, rows):
        results = {"y": y, "stats": stats, "grad_x": grads[0], "grad_weight": grads[1], "grad_bias": grads[2]}
        results |= {name: self.tensors[name] for name in STATES[self.kind]}
        results |= {} if self.residual is None else {"s": rows}
        return results | {"iters": self.iters, "skip_counter": self.skip_counter}


# The unit roundoff of the dtype a result is stored in.
_ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24, torch.float64: 2**-53}


def assert_same_results(actual, expected, acc_tolerance):
    """Compares with float64 results: ``acc_tolerance`` is for the arithmetic, storing adds a rounding."""
    assert set(actual) == set(expected)
    for name, value in actual.items():
        want = expected[name]
        if not value.is_floating_point():
            assert torch.equal(value, want), name
            continue
        assert value.numel() == want.numel(), name
        value, none = value.reshape(want.shape), want.isnan()  # a statistic of no row is NaN
        assert torch.equal(value.isnan(), none), name
        value, want = value[~none], want[~none]
        difference = (value.double() - want).abs()
        # Terms of size one and more may cancel: small results carry the error of their terms.
        scale = max(want.abs().max().item(), 1.0) if want.numel() else 1.0
        bound = acc_tolerance * scale + _ROUNDING[value.dtype] * want.abs() * 1.01
        subnormal = 2**-25 if value.dtype == torch.float16 else 0.0
        worst = (difference - bound).max().item() if want.numel() else 0.0
        assert torch.isfinite(value).all() and worst <= subnormal, f"{name}: beyond the bound by {worst:.1e}"
