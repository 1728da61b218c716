"""Times one training step of each norm: forward, and forward with backward.

    python benchmarks/training_step.py --device cpu --threads 1

For every shape all candidates run side by side: each round runs every candidate once, in rotated order, and medians
over the rounds are compared. So a busy moment of the machine meets all candidates alike. An untimed call goes first:
no candidate is to pay for what its predecessor left in the caches and on the heap. Times are given as multiples of
copying the tensor once, and as ratios of Unified and Power Norm to every other candidate.

Norms are in the state in which training spends its time: past their warm-up steps, windows filled. The reference
is the plain PyTorch that stands beside each operation, run eagerly and through torch.compile.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import records
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normfuse
from normfuse import _native
from normfuse.nn import Derf, DyT, LayerNorm, PowerNorm, RMSNorm, UnifiedNorm

CPU_SHAPES = ("8x197x192", "8x197x384", "32x128x768", "64x256x512")
CUDA_SHAPES = (*CPU_SHAPES, "16x1024x4096", "8x4096x1024")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
MODES = ("forward", "forward+backward")
# Reads and writes of the whole tensor that no implementation with plain kernels can do without (a copy has two).
PASSES = {"unified": (3, 8), "power": (2, 5)}
SAMPLE_SECONDS = 1e-3  # shorter calls are repeated until a sample takes about that long
AUTOGRAD = _native.autograd
WARM_UP = 6  # calls: more than the windows of Unified Norm hold
FEWEST_ROUNDS = 7
L2_FLUSH = 256 * 2**20  # bytes: more than the L2 cache of any GPU the kernels are built for


@dataclass(frozen=True)
class Candidate:
    """A training step: what to call, what it learns, and who computes its operation (None: torch alone)."""

    step: Callable[..., Tensor | tuple[Tensor, Tensor]]
    parameters: tuple[Tensor, ...]
    operation: ModuleType | None = None
    implementation: tuple[Callable, Callable] | None = None

    def prepare(self) -> None:
        """Puts this candidate's forward and backward behind the operation, and autograd in Python around references."""
        if self.operation is not None:
            forward, backward = self.implementation
            self.operation._NORM = replace(self.operation._NORM, forward=forward, backward=backward)
            kernels = isinstance(forward, torch._ops.OpOverload)
            _native.autograd = AUTOGRAD if kernels else None


def ours(kind: str, make: Callable[[], nn.Module], compiled: bool) -> dict[str, Candidate]:
    """Kernels, eager reference and, if wanted, compiled reference of ``unified`` or ``power``."""
    operation = importlib.import_module(f"normfuse.ops.{kind}_norm")
    halves = ("forward", "backward")
    implementations = {kind: tuple(getattr(torch.ops.normfuse, f"{kind}_norm_{half}").default for half in halves)}
    reference = tuple(getattr(operation, f"{kind}_norm_{half}_reference") for half in halves)
    implementations[f"{kind} reference"] = reference
    if compiled:
        implementations[f"{kind} compiled reference"] = tuple(torch.compile(f, dynamic=False) for f in reference)
    found = {}
    for name, implementation in implementations.items():
        layer = make()
        found[name] = Candidate(layer, tuple(layer.parameters()), operation, implementation)
    return found


def with_residual(norm: Candidate, residual: Tensor) -> Candidate:
    """A step that adds ``residual`` first and hands the sum on, as the skip around a block does."""
    parameters = (residual, *norm.parameters)
    return replace(norm, step=lambda x: norm.step(x, residual=residual), parameters=parameters)


def candidates(residual: Tensor, device: str, dtype: torch.dtype, compiled: bool) -> dict[str, Candidate]:
    """Training steps by name, in the order of the report. Those with a residual do that much more."""
    channels = residual.shape[-1]
    weight = torch.ones(channels, device=device, dtype=dtype, requires_grad=True)
    bias = torch.zeros(channels, device=device, dtype=dtype, requires_grad=True)
    mean, var = torch.zeros(channels, device=device, dtype=dtype), torch.ones(channels, device=device, dtype=dtype)

    def batch_norm(x: Tensor) -> Tensor:
        return F.batch_norm(x.view(-1, channels), mean, var, weight, bias, training=True).view(x.shape)

    def add_then_layer_norm(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        s = x + residual
        return F.layer_norm(s, (channels,), weight, bias), s

    layer, rms = LayerNorm(channels, device=device, dtype=dtype), RMSNorm(channels, device=device, dtype=dtype)
    dyt, derf = DyT(channels, device=device, dtype=dtype), Derf(channels, device=device, dtype=dtype)
    norms = {
        "layer_norm": Candidate(lambda x: F.layer_norm(x, (channels,), weight, bias), (weight, bias)),
        "rms_norm": Candidate(lambda x: F.rms_norm(x, (channels,), weight), (weight,)),
        "batch_norm": Candidate(batch_norm, (weight, bias)),
        **ours("unified", lambda: UnifiedNorm(channels, warmup_iters=0, device=device), compiled),
        **ours("power", lambda: PowerNorm(channels, group_num=None, warmup_iters=0, device=device), compiled),
        "our layer_norm": Candidate(layer, tuple(layer.parameters())),
        "our rms_norm": Candidate(rms, tuple(rms.parameters())),
        "dyt": Candidate(dyt, tuple(dyt.parameters())),
        "derf": Candidate(derf, tuple(derf.parameters())),
    }
    sums = {"add, layer_norm": with_residual(Candidate(add_then_layer_norm, (weight, bias)), residual)}
    for name in ("our layer_norm", "unified", "power"):
        sums[f"{name}, residual"] = with_residual(norms[name], residual)
    return norms | sums


class Stopwatch:
    """Seconds per call, by the given clock or, on a GPU, by its own."""

    def __init__(self, device: str, clock: Callable[[], float]) -> None:
        self.cuda = device == "cuda"
        self.clock = clock
        self.flush = torch.empty(L2_FLUSH, dtype=torch.uint8, device=device) if self.cuda else None

    def __call__(self, run: Callable[[], object], calls: int = 1) -> float:
        if not self.cuda:
            run()
            start = self.clock()
            for _ in range(calls):
                run()
            return (self.clock() - start) / calls
        # One call at a time: repeated calls would find in the L2 what a training step does not.
        self.flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def runs_of(candidate: Candidate, x: Tensor, grad_y: Tensor) -> dict[str, Callable[[], object]]:
    """The two things that are timed. Both build the graph, as training does."""

    def both() -> tuple[Tensor, ...]:
        results = candidate.step(x)
        results = results if isinstance(results, tuple) else (results,)
        return torch.autograd.grad(results, (x, *candidate.parameters), [grad_y] * len(results))

    return {MODES[0]: lambda: candidate.step(x), MODES[1]: both}


def settle_allocator() -> None:
    """Frees a large block, as training has done before long.

    The C library keeps free memory up to twice the largest block it has freed (it counts blocks below 32 MiB). Before,
    it hands results of a megabyte back to the system step by step, and page faults take longer than any norm.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8).fill_(0)


def measure(
    shape: tuple[int, ...], device: str, dtype: torch.dtype, compiled: bool, rounds: int, seconds: float, clock: str
) -> dict[str, dict[str, list[float]]]:
    """Milliseconds (lower quartile, median, upper quartile) by mode and candidate."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
    grad_y = torch.randn(shape, generator=generator).to(device, dtype)
    target = torch.empty_like(grad_y)
    residual = torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
    norms = candidates(residual, device, dtype, compiled)
    watch = Stopwatch(device, CLOCKS[clock])
    results = {}
    for mode in MODES:
        runs = {"copy": lambda: target.copy_(grad_y)}
        runs |= {name: runs_of(candidate, x, grad_y)[mode] for name, candidate in norms.items()}

        def sample(name: str, calls: int, runs: dict[str, Callable[[], object]] = runs) -> float:
            if name in norms:
                norms[name].prepare()
            return watch(runs[name], calls)

        samples: dict[str, list[float]] = {name: [] for name in runs}
        calls = {}
        for name in runs:  # compiles, fills windows, and learns how long a call takes
            warm = [sample(name, 1) for _ in range(WARM_UP)]
            calls[name] = max(1, round(SAMPLE_SECONDS / warm[-1]))
        names = list(runs)
        begin = time.perf_counter()
        for number in range(rounds):
            if number >= FEWEST_ROUNDS and time.perf_counter() - begin > seconds:
                break
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                samples[name].append(1e3 * sample(name, calls[name]))
        results[mode] = {name: statistics.quantiles(values, n=4) for name, values in samples.items()}
    for name in ("unified", "power"):
        norms[name].prepare()
    return results


def show(shape: str, results: dict[str, dict[str, list[float]]], cuda: bool) -> None:
    for number, mode in enumerate(MODES):
        medians = {name: middle for name, (_, middle, _) in results[mode].items()}
        print(f"\n{shape}, {mode}: a copy takes {medians['copy']:.3f} ms")
        last = "  of copy bandwidth" if cuda else ""
        print(f"{'':30}{'ms':>9}{'÷ copy':>9}{'UN ÷ it':>9}{'PN ÷ it':>9}{last}")
        for name, median in medians.items():
            row = f"{name:30}{median:9.3f}{median / medians['copy']:9.2f}"
            row += f"{medians['unified'] / median:9.2f}{medians['power'] / median:9.2f}"
            if cuda and name in PASSES:
                row += f"{PASSES[name][number] / 2 * medians['copy'] / median:18.0%}"
            print(row)
    sys.stdout.flush()


def machine(device: str) -> dict[str, object]:
    """What a reader must know to judge the numbers."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                 if line.startswith("model name")]  # fmt: skip
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "compiler": normfuse.build_info()["compiler"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="of the input")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch and of the kernels on the CPU")
    parser.add_argument("--shapes", nargs="+", metavar="BxNxC", help="instead of those in the README")
    parser.add_argument("--rounds", type=int, default=40, help=f"at most; at least {FEWEST_ROUNDS} are run")
    parser.add_argument("--seconds", type=float, default=15, help="for the rounds of one shape and mode")
    parser.add_argument(
        "--clock", choices=tuple(CLOCKS), default="wall", help="cpu: one thread on a machine that is busy otherwise"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled references out")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder for the JSON")
    args = parser.parse_args()
    if args.rounds < FEWEST_ROUNDS:
        parser.error(f"--rounds {args.rounds} is not allowed; give at least {FEWEST_ROUNDS}")
    if args.clock == "cpu" and (args.device != "cpu" or args.threads != 1):
        parser.error("--clock cpu adds up the threads' time: it needs --device cpu --threads 1")
    if not normfuse.build_info()["available"]:
        parser.error(f"there are no kernels to measure: {normfuse.build_info()['reason']}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but this torch sees no GPU")
    torch.set_num_threads(args.threads)
    settle_allocator()
    about = machine(args.device)  # before the load is our own

    results = {}
    for text in args.shapes or (CUDA_SHAPES if args.device == "cuda" else CPU_SHAPES):
        shape = tuple(int(size) for size in text.split("x"))
        results[text] = measure(
            shape, args.device, DTYPES[args.dtype], not args.no_compile, args.rounds, args.seconds, args.clock
        )  # fmt: skip
        show(text, results[text], args.device == "cuda")
        torch._dynamo.reset()
    threads = f"-{args.threads}-threads" if args.device == "cpu" else ""
    file = args.results / f"training_step-{args.device}-{args.dtype}{threads}.json"
    content = {
        "benchmark": "training_step",
        "command": f"python benchmarks/training_step.py --device {args.device} --dtype {args.dtype}"
        + (f" --threads {args.threads}" if args.device == "cpu" else "")
        + (f" --clock {args.clock}" if args.clock != "wall" else ""),
        "date": datetime.date.today().isoformat(),
        "machine": about,
        "device": args.device,
        "dtype": args.dtype,
        "clock": args.clock,
        "threads": args.threads if args.device == "cpu" else None,
        "milliseconds": results,
    }
    args.results.mkdir(parents=True, exist_ok=True)
    records.write(file, content)
    print(f"\nwritten: {file}")


if __name__ == "__main__":
    main()
