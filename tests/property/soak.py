"""Fold many random programs and compare each with its original in float64; every difference is a bug.

python -m tests.property.soak --programs 100000 --seed 20261125 --jobs 2 --out benchmarks/results/soak.json

Works in blocks and writes the file after each. Started again, it goes on with the blocks that the file does not hold.
One program in a hundred is traced by `torch.export`, with a dynamic batch, and run as a module; the others by
:func:`quick_export`, whose graphs ``test_quick_export.py`` holds to those of `torch.export`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import subprocess
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from .programs import BINARY, UNARY, Plan, Step
from .test_random_programs import allowed_error, relative_error

FULL_EXPORT = 100  # one program in so many is traced by torch.export


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


def start() -> None:
    """Prepare a worker."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    gc.freeze()


def run(job: tuple[int, int]) -> tuple[int, Plan, float | str, Counter]:
    """Fold one program; its number, the error, or what was raised, and what became of its norms."""
    number, seed = job
    plan, statuses = random_plan(number, seed), Counter()
    try:
        if number % FULL_EXPORT == 0:
            dynamic = Plan(**{**vars(plan), "seed": plan.seed // 4 * 4})
            return number, dynamic, relative_error(dynamic, statuses), statuses
        return number, plan, relative_error(plan, statuses, quick=True), statuses
    except Exception as error:  # whatever it is, it is a finding
        return number, plan, f"{type(error).__name__}: {error}", statuses


def block(first: int, programs: int, seed: int, pool: ProcessPoolExecutor) -> dict[str, Any]:
    """Run the programs with the numbers from `first` on; JSON-ready findings."""
    started, norms, differences = time.perf_counter(), Counter(), []
    worst = {"ordinary": 0.0, "with scales down to 1e-6": 0.0}
    jobs = [(first + number, seed) for number in range(programs)]
    results = pool.map(run, jobs, chunksize=16)
    for number, plan, error, statuses in track(
        results, f"from {first}", total=programs, disable=not sys.stdout.isatty()
    ):
        norms += statuses
        if isinstance(error, str) or not error <= allowed_error(plan):
            differences.append({"program": number, "error": error, "plan": repr(plan)})
            print(f"program {number} of seed {seed}: {error}: {plan}", flush=True)
        else:
            kind = list(worst)[plan.extremes]
            worst[kind] = max(worst[kind], error)
    return {
        "first": first,
        "programs": programs,
        "commit": commit(),
        "date": date.today().isoformat(),
        "seconds": round(time.perf_counter() - started, 1),
        "differences": differences,
        "worst_error": worst,
        "norms": dict(sorted(norms.items())),
    }


def commit() -> str:
    """The commit the code stands at, marked if files differ from it."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return described.stdout.strip() or "unknown"


def summary(blocks: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """All blocks of a seed in one JSON-ready result."""
    blocks = sorted(blocks, key=lambda entry: entry["first"])
    norms: Counter = sum((Counter(entry["norms"]) for entry in blocks), Counter())
    return {
        "command": "python -m tests.property.soak --programs 100000 --seed 20261125 --jobs 2",
        "seed": seed,
        "programs": sum(entry["programs"] for entry in blocks),
        "differences": sum(len(entry["differences"]) for entry in blocks),
        "worst_error": {k: max(entry["worst_error"][k] for entry in blocks) for k in blocks[0]["worst_error"]},
        "norms": dict(norms),
        "seconds": round(sum(entry["seconds"] for entry in blocks)),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "torch": torch.__version__,
        "blocks": blocks,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first program")
    parser.add_argument("--block", type=int, default=2000, help="programs in one block")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file of results, read first if it exists")
    options = parser.parse_args()
    blocks: dict[int, dict[str, Any]] = {}
    if options.out and options.out.exists():
        known = json.loads(options.out.read_text())
        if known["seed"] != options.seed:
            parser.error(f"{options.out} holds seed {known['seed']}, not {options.seed}: give another --out")
        blocks = {entry["first"]: entry for entry in known["blocks"]}
    last = options.first + options.programs
    with ProcessPoolExecutor(options.jobs, initializer=start) as pool:
        for first in range(options.first, last, options.block):
            if first in blocks:
                continue
            blocks[first] = block(first, min(options.block, last - first), options.seed, pool)
            result = summary(list(blocks.values()), options.seed)
            if options.out:
                options.out.write_text(json.dumps(result, indent=1) + "\n")
            print(f"{result['programs']} programs, {result['differences']} differences", flush=True)
    result = summary(list(blocks.values()), options.seed)
    print(f"seed {options.seed}: {result['differences']} differences, worst {result['worst_error']}")
    print("norms: " + ", ".join(f"{count} {status}" for status, count in sorted(result["norms"].items())))
    return min(result["differences"], 1)


if __name__ == "__main__":
    sys.exit(main())
