"""Times one step of AdamP and SGDP against torch.optim.AdamW on the parameters of a transformer.

    python benchmarks/optimizers.py --threads 1

All candidates take turns in every round, in rotated order, and the medians over the rounds are compared. Every gradient
is orthogonal to its weight, so that every weight is projected: the dearest case.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from normfuse.optim import SGDP, AdamP

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
CANDIDATES: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "AdamW(foreach=True)": lambda p: torch.optim.AdamW(p, weight_decay=0.01, foreach=True),
    "AdamW(fused=True)": lambda p: torch.optim.AdamW(p, weight_decay=0.01, fused=True),
    "AdamP": lambda p: AdamP(p, weight_decay=0.01),
    "AdamP(nesterov=True)": lambda p: AdamP(p, weight_decay=0.01, nesterov=True),
    "SGDP(momentum=0.9)": lambda p: SGDP(p, momentum=0.9, weight_decay=0.01),
}


def parameters(width: int, depth: int, device: str) -> list[nn.Parameter]:
    """Weights, biases and gains of ``depth`` blocks, with gradients."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(depth):
        for out, inner in ((3, 1), (1, 1), (4, 1), (1, 4)):
            weight = torch.randn(out * width, inner * width, generator=generator) / width**0.5
            grad = torch.randn(weight.shape, generator=generator)
            grad -= (grad * weight).sum(1, keepdim=True) / weight.square().sum(1, keepdim=True) * weight
            found.append((weight, grad))
            found.append((torch.zeros(out * width), torch.randn(out * width, generator=generator)))
        found += [(torch.ones(width), torch.randn(width, generator=generator)) for _ in range(4)]
    result = []
    for value, grad in found:
        result.append(nn.Parameter(value.to(device)))
        result[-1].grad = grad.to(device)
    return result


def measure(width: int, depth: int, device: str, rounds: int, clock: str) -> dict[str, float]:
    """Median milliseconds of a step by candidate."""
    optimizers = {name: make(parameters(width, depth, device)) for name, make in CANDIDATES.items()}
    samples: dict[str, list[float]] = {name: [] for name in optimizers}
    names, now = list(optimizers), CLOCKS[clock]
    for number in range(rounds + 3):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            if device == "cuda":
                torch.cuda.synchronize()
            start = now()
            optimizers[name].step()
            if device == "cuda":
                torch.cuda.synchronize()
            if number >= 3:  # states exist, memory is warm
                samples[name].append(1e3 * (now() - start))
    return {name: statistics.median(values) for name, values in samples.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--clock", choices=tuple(CLOCKS), default="wall", help="cpu: what other programs take is left out"
    )
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--sizes", nargs="+", default=["64x12", "192x12", "384x12", "768x4"], metavar="WIDTHxDEPTH")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    baseline = next(iter(CANDIDATES))
    print(f"{args.device}, {args.threads} thread(s), {args.clock} time, torch {torch.__version__}, "
          f"{datetime.date.today()}, load {os.getloadavg()[0]:.1f}\n")  # fmt: skip
    print(
        f"| width × depth | parameters | {baseline} | " + " | ".join(f"{n} ÷ it" for n in list(CANDIDATES)[1:]) + " |"
    )
    print("|---|---:|---:|" + "---:|" * (len(CANDIDATES) - 1))
    for size in args.sizes:
        width, depth = map(int, size.split("x"))
        times = measure(width, depth, args.device, args.rounds, args.clock)
        count = sum(p.numel() for p in parameters(width, depth, "cpu"))
        ratios = " | ".join(f"{times[name] / times[baseline]:.2f}" for name in list(CANDIDATES)[1:])
        print(f"| {width} × {depth} | {count / 1e6:.1f} M | {times[baseline]:.2f} ms | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
