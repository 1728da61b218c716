"""Fold many random programs and compare each with its original in float64.

python -m tests.property.soak --programs 100000 --seed 1 --jobs 2
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import torch
from rich.progress import track

from .programs import BINARY, UNARY, Plan, Step
from .test_random_programs import allowed_error, relative_error


def random_plan(number: int, seed: int, max_steps: int = 14) -> Plan:
    """The plan with this number; the same seed gives the same plans."""
    source = random.Random(f"{seed}/{number}")
    steps = []
    for index in range(source.randint(1, max_steps)):
        kind = source.choice(BINARY if source.random() < 0.3 else UNARY)
        inputs = tuple(
            index if source.random() < 0.6 else source.randint(max(0, index - 3), index)
            for _ in range(2 if kind in BINARY else 1)
        )
        steps.append(Step(kind, inputs, source.randint(0, 2)))
    outputs = (len(steps), *(source.randint(0, len(steps)) for _ in range(source.choice((0, 0, 1, 2)))))
    return Plan(
        width=source.choice((2, 4, 6)),
        seed=source.randint(0, 2**16),
        steps=steps,
        outputs=outputs,
        source=source.choice(("tokens", "values")),
        extremes=source.random() < 0.5,
    )


def run(job: tuple[int, int]) -> tuple[Plan, float | str, Counter]:
    """Fold one program; the error, or what was raised, and what became of its norms."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    plan, statuses = random_plan(*job), Counter()
    try:
        return plan, relative_error(plan, statuses), statuses
    except Exception as error:  # whatever it is, it is a finding
        return plan, f"{type(error).__name__}: {error}", statuses


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first program")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    started, different, worst, total = time.perf_counter(), 0, 0.0, Counter()
    jobs = [(options.first + number, options.seed) for number in range(options.programs)]
    with ProcessPoolExecutor(options.jobs) as pool:
        results = pool.map(run, jobs, chunksize=16)
        for plan, error, statuses in track(results, "folding", total=len(jobs), disable=not sys.stdout.isatty()):
            total += statuses
            if isinstance(error, str) or not error <= allowed_error(plan):
                different += 1
                print(f"{error}: {plan}")
            elif not plan.extremes:
                worst = max(worst, error)
    seconds = time.perf_counter() - started
    print(
        f"{options.programs} programs, seed {options.seed}, {seconds:.0f} s: {different} differences, worst {worst:.1e}"
    )
    print("norms: " + ", ".join(f"{count} {status}" for status, count in sorted(total.items())))
    return min(different, 1)


if __name__ == "__main__":
    sys.exit(main())
