"""Fold many random programs and compare each with its original; every difference is a bug.

python -m tests.property.soak --programs 100000 --seed 20261125 --jobs 2 --out benchmarks/results/soak.json
python -m tests.property.soak --kind modules --programs 2000 --seed 20261129 --jobs 2 --out modules.json

The first draws programs of single operations (``programs.py``) and compares in float64. The second draws models of the
layers that people write (``modules.py``), and compares in float32 as well. Works in blocks and writes the file after
each. Started again, it goes on with the blocks that the file does not hold.
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

from .modules import errors, random_model
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


def run_programs(job: tuple[int, int]) -> tuple[int, str, dict[str, float] | str, Counter]:
    """Fold one program; its number, the plan, the error, or what was raised, and what became of its norms."""
    number, seed = job
    plan, statuses = random_plan(number, seed), Counter()
    kind = "with scales down to 1e-6" if plan.extremes else "ordinary"
    try:
        if number % FULL_EXPORT == 0:
            plan = Plan(**{**vars(plan), "seed": plan.seed // 4 * 4})
            error = relative_error(plan, statuses)
        else:
            error = relative_error(plan, statuses, quick=True)
    except Exception as error:  # whatever it is, it is a finding
        return number, repr(plan), f"{type(error).__name__}: {error}", statuses
    return number, repr(plan), {kind: error} if error <= allowed_error(plan) else str(error), statuses


def run_modules(job: tuple[int, int]) -> tuple[int, str, dict[str, float] | str, Counter]:
    """Fold one model; its number, what was drawn, the errors as parts of what is allowed, and what became of norms."""
    number, seed = job
    statuses: Counter = Counter()
    try:
        wide, narrow = errors(number, seed, statuses)
    except Exception as error:  # whatever it is, it is a finding
        return number, random_model(number, seed).words, f"{type(error).__name__}: {error}", statuses
    found = {"float64, of what is allowed": wide, "float32, of what is allowed": narrow}
    return number, random_model(number, seed).words, found if max(wide, narrow) <= 1 else str(found), statuses


RUNS = {"programs": run_programs, "modules": run_modules}


def block(first: int, programs: int, seed: int, kind: str, pool: ProcessPoolExecutor) -> dict[str, Any]:
    """Run the programs with the numbers from `first` on; JSON-ready findings."""
    started, norms, differences = time.perf_counter(), Counter(), []
    worst: dict[str, float] = {}
    jobs = [(first + number, seed) for number in range(programs)]
    results = pool.map(RUNS[kind], jobs, chunksize=16)
    for number, plan, found, statuses in track(
        results, f"from {first}", total=programs, disable=not sys.stdout.isatty()
    ):
        norms += statuses
        if isinstance(found, str):
            differences.append({"program": number, "error": found, "plan": plan})
            print(f"program {number} of seed {seed}: {found}: {plan}", flush=True)
        else:
            worst |= {name: max(worst.get(name, 0.0), error) for name, error in found.items()}
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


def summary(blocks: list[dict[str, Any]], seed: int, kind: str) -> dict[str, Any]:
    """All blocks of a seed in one JSON-ready result."""
    blocks = sorted(blocks, key=lambda entry: entry["first"])
    norms: Counter = sum((Counter(entry["norms"]) for entry in blocks), Counter())
    return {
        "command": f"python -m tests.property.soak --kind {kind} --seed {seed}",
        "kind": kind,
        "seed": seed,
        "programs": sum(entry["programs"] for entry in blocks),
        "differences": sum(len(entry["differences"]) for entry in blocks),
        "worst_error": {
            name: max(entry["worst_error"].get(name, 0.0) for entry in blocks)
            for name in sorted({name for entry in blocks for name in entry["worst_error"]})
        },
        "norms": dict(norms),
        "seconds": round(sum(entry["seconds"] for entry in blocks)),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "torch": torch.__version__,
        "blocks": blocks,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=RUNS, default="programs", help="single operations, or models of layers")
    parser.add_argument("--programs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first program")
    parser.add_argument("--block", type=int, default=2000, help="programs in one block")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file of results, read first if it exists")
    options = parser.parse_args()
    from benchmarks import records  # found where the soak is run from, the root of the checkout

    blocks: dict[int, dict[str, Any]] = {}
    if options.out and options.out.exists():
        known = json.loads(options.out.read_text())
        holds = known.get("kind", "programs"), known["seed"]
        if holds != (options.kind, options.seed):
            asked = options.kind, options.seed
            parser.error(f"{options.out} holds {holds[0]} of seed {holds[1]}, not {asked}: give another --out")
        blocks = {entry["first"]: entry for entry in known["blocks"]}
    last = options.first + options.programs
    with ProcessPoolExecutor(options.jobs, initializer=start) as pool:
        for first in range(options.first, last, options.block):
            if first in blocks:
                continue
            blocks[first] = block(first, min(options.block, last - first), options.seed, options.kind, pool)
            result = summary(list(blocks.values()), options.seed, options.kind)
            if options.out:
                records.write(options.out, result)
            print(f"{result['programs']} programs, {result['differences']} differences", flush=True)
    result = summary(list(blocks.values()), options.seed, options.kind)
    print(f"seed {options.seed}: {result['differences']} differences, worst {result['worst_error']}")
    print("norms: " + ", ".join(f"{count} {status}" for status, count in sorted(result["norms"].items())))
    return min(result["differences"], 1)


if __name__ == "__main__":
    sys.exit(main())
