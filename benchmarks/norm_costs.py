"""Times a training step of every norm against LayerNorm and writes docs/norms.md.

    python benchmarks/norm_costs.py --threads 1 --clock cpu

Norms over sequences take x [8, 197, 192], norms over images [8, 192, 14, 14]: nearly as many numbers; what
reparametrises a weight is timed alone, on the weight of a layer from 192 to 192. Every norm takes its turn with
LayerNorm in each of the rounds, and the median of the rounds' ratios counts.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import records
import torch
from torch import nn

from normfuse.nn.registry import NORMS, NormEntry, page

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "norm_costs.json"
CHANNELS = 192
SHAPES = {"sequence": (197, CHANNELS), "image": (CHANNELS, 14, 14)}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
CALLS = 3


def step_of(entry: NormEntry, batch: int) -> Callable[[], object]:
    """Forward and backward of one norm, past its warm-up."""
    torch.manual_seed(0)
    norm = entry.make(CHANNELS)
    if hasattr(norm, "warmup_iters"):
        norm.warmup_iters = 0
    parameters = list(norm.parameters())
    if entry.layout == "weight":
        grad = torch.randn(CHANNELS, CHANNELS)
        parameters.remove(norm.bias)
        return lambda: torch.autograd.grad(norm.weight, parameters, grad)
    x = torch.randn(batch, *SHAPES[entry.layout], requires_grad=True)
    others, grad = entry.others(x.detach()), torch.randn_like(x)
    return lambda: torch.autograd.grad(norm(x, *others), [x, *parameters], grad)


def ratio(step: Callable[[], object], baseline: Callable[[], object], rounds: int, clock: str) -> float:
    """Median over the rounds of the two times' quotient."""
    now, found = CLOCKS[clock], []
    for number in range(rounds + 3):
        times = []
        for run in (step, baseline) if number % 2 else (baseline, step):
            start = now()
            for _ in range(CALLS):
                run()
            times.append(now() - start)
        times = times if number % 2 else times[::-1]
        if number >= 3:
            found.append(times[0] / times[1])
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--clock", choices=tuple(CLOCKS), default="wall", help="cpu: what other programs take is left out"
    )
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--machine", default="2 shared cores of an AMD EPYC", help="to be named on the page")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "norms.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    layer_norm = NormEntry("", "", "", "", False, "", nn.LayerNorm)
    ratios = {}
    for entry in NORMS:
        steps = step_of(entry, args.batch), step_of(layer_norm, args.batch)
        ratios[entry.name] = round(ratio(*steps, args.rounds, args.clock), 3)
        print(f"{entry.name:36}{ratios[entry.name]:8.2f}", flush=True)
    command = f"python benchmarks/norm_costs.py --threads {args.threads} --clock {args.clock}"
    where = (
        f"`{command}`, {args.machine}, {args.threads} thread{'s' * (args.threads > 1)}, float32, torch "
        f"{torch.__version__}, {datetime.date.today()}, load {os.getloadavg()[0]:.1f}"
        f"{', processor time' if args.clock == 'cpu' else ''}. Sequences are {args.batch}×197×192, "
        f"images {args.batch}×192×14×14; what "
        "reparametrises a weight is timed alone, on 192×192. Kernels of their own have LayerNorm, RMSNorm, CRMSNorm, "
        "UnifiedNorm, PowerNorm, the BatchNorm family, MovingAverageBatchNorm, RegionNorm, AdaptiveInstanceNorm, DyT "
        "and Derf; the others are compositions of PyTorch's operations and of these."
    )
    costs = {"where": where, "ratios": ratios}
    args.results.parent.mkdir(parents=True, exist_ok=True)
    records.write(args.results, costs)
    args.page.write_text(page(costs))
    print(f"written: {args.results}, {args.page}")


if __name__ == "__main__":
    main()
