"""Times encoders in ONNX Runtime on the CPU: LayerNorm, static norms, folded, shaped, and no norms at all.

    python benchmarks/inference.py --quick
    python benchmarks/inference.py --widths 64 192 --precisions fp32 int8
    python benchmarks/inference.py --runtime openvino

The floor is the same network with its norms deleted, as torch exports it. Every round runs each variant once, in an
order of its own, and threads do not spin between runs: a busy moment meets all variants alike, so that the ratios of a
round mean something where its milliseconds do not. Medians of ratios over sessions that are opened several times are
reported. Results go to
benchmarks/results/inference-<label>.json; benchmarks/inference_chart.py draws them.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peak_memory
import records
import runtimes
from encoder_files import POSITIONS, VOCABULARY, Variant, error, executed_nodes, quantized, session, write_variants
from training_step import machine

ROOT = Path(__file__).parent.parent
FEWEST_ROUNDS = 9
AGAIN = "floor again"
SHAPED = tuple(f"{norm} shaped{form}" for norm in ("folded and", "layer,") for form in ("", ", single", ", long"))
COMPARED = ("floor", "layer", *SHAPED)
OURS = ("folded", "static", *SHAPED)  # what is left is what a user gets without this package


def advised(norm: str, threads: int, batch: int, length: int) -> str:
    """The shaped variant that docs/graph_passes.md advises for a setting."""
    long = length >= 1024 or batch * length >= 4096
    single = threads == 1 and batch * length <= 2000
    return f"{norm} shaped{', long' if long else ', single' if single else ''}"


def feeds(loaded: Any, batch: int, length: int) -> dict[str, np.ndarray]:
    return peak_memory.feeds(loaded, batch, length, VOCABULARY)


def run_in_turns(
    sessions: dict[str, Any], inputs: dict[str, dict[str, np.ndarray]], seconds: float, rounds: int
) -> dict[str, list[float]]:
    """Milliseconds of every session with its inputs, one per round; each round in an order of its own."""
    times: dict[str, list[float]] = {name: [] for name in sessions}
    order = list(sessions)
    generator = np.random.default_rng(0)
    for name in order:  # memory is laid out on the first run of a shape
        sessions[name].run(None, inputs[name])
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(times[order[0]]) < rounds:
        for name in generator.permutation(order):
            start = time.perf_counter()
            sessions[name].run(None, inputs[name])
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def ratios(over: list[float], under: list[float]) -> list[float]:
    """Quartiles of the rounds' ratios: lower, median, upper."""
    return [round(q, 4) for q in statistics.quantiles([a / b for a, b in zip(over, under, strict=True)], n=4)]


def _there(name: str, times: dict[str, list[float]]) -> str:
    """A shaped variant, or the form that a runtime takes that cannot load it."""
    plain = "folded" if name.startswith("folded") else "layer"
    return next(n for n in (name, f"{name.partition(' shaped')[0]} shaped", plain) if n in times)


def summarize(times: dict[str, list[float]], threads: int, batch: int, length: int) -> dict[str, object]:
    to_floor = {name: ratios(values, times["floor"]) for name, values in times.items()}
    without_us = [name for name in times if name.startswith("layer") and name not in OURS]
    fastest = min(without_us, key=lambda name: to_floor[name][1])
    ours, same = (_there(advised(norm, threads, batch, length), times) for norm in ("folded and", "layer,"))
    return {
        "rounds": len(times["floor"]),
        "milliseconds": {name: [round(q, 4) for q in statistics.quantiles(v, n=4)] for name, v in times.items()},
        "to_floor": to_floor,
        # A second opinion for a machine that is never quiet: the least disturbed run of each variant.
        "lowest_to_floor": {name: round(min(v) / min(times["floor"]), 4) for name, v in times.items()},
        "fastest_layer_norm": fastest,
        "advised": ours,
        "shaped_to_fastest_layer_norm": ratios(times[ours], times[fastest]),
        "shaped_to_shaped_layer_norm": ratios(times[ours], times[same]),
    }


def peak_megabytes(variant: Variant, batch: int, length: int, threads: int) -> float:
    where = {"vocabulary": VOCABULARY, "threads": threads, "disabled": variant.disabled}
    return peak_memory.peak_megabytes(variant.path, batch, length, **where)


def open_sessions(names: Iterable[str], opening: int, open_one: Callable[[str], Any]) -> dict[str, Any]:
    """A session for every name, and a second one of the floor: what it differs by is the error of measurement.

    Where the weights of a session lie in memory can make it a tenth slower than an equal one for as long as it lives.
    So a benchmark opens all of them several times, in an order that depends on `opening`. The first session of a
    process was 2 % slower than an equal second one: one that is not timed comes first.
    """
    names = [*names, AGAIN]
    order = np.random.default_rng(opening).permutation(names)
    unused = open_one("floor")
    opened = {name: open_one(name.removesuffix(" again")) for name in order}
    del unused
    return {name: opened[name] for name in names}


class Results:
    """The file of a run, written after every setting, so that a run that was cut short or split goes on from it."""

    def __init__(self, path: Path, args: argparse.Namespace) -> None:
        here = {**machine("cpu"), args.runtime: runtimes.version(args.runtime)}
        load = here.pop("load")
        self.path = path
        self.run: dict = {"commands": [], "date": "", "note": args.note, "machine": here, "depth": args.depth}
        self.run |= {"files": [], "settings": []}
        if args.resume and path.exists():
            found = json.loads(path.read_text())
            differing = [key for key in ("machine", "depth") if found[key] != self.run[key]]
            if differing:
                raise SystemExit(f"{path} was measured with another {', '.join(differing)}: run without --resume")
            self.run = found | ({"note": args.note} if args.note else {})
        self.run["date"] = datetime.date.today().isoformat()
        self.run["commands"].append(f"{' '.join(['python', *sys.argv])} (load {load:.1f} before)")

    def find(self, where: dict) -> dict | None:
        """The result of a setting that was measured before."""
        return next((found for found in self.run["settings"] if where.items() <= found.items()), None)

    def add(self, kind: str, where: dict, values: dict) -> None:
        """A result, or more of a setting's, in the place of what was known of the same."""
        known = next((found for found in self.run[kind] if where.items() <= found.items()), None)
        if known is None:
            self.run[kind].append({**where, **values})
        else:
            known |= values
        records.write(self.path, self.run)


def settings(args: argparse.Namespace, **fixed: object) -> Iterator[dict]:
    """What identifies each setting: threads, batch, sequence, beside what is fixed."""
    for threads, batch, length in itertools.product(args.threads, args.batches, args.sequences):
        yield {**fixed, "threads": threads, "batch": batch, "sequence": length}


def missing(args: argparse.Namespace, results: Results, where: dict) -> set[str]:
    """What is to be measured of a setting: its times, its memory, both or neither.

    Times count as missing where the second session of the floor differs too much from the first: the machine was busy.
    """
    known = results.find(where) or {}
    times = {"to_floor"} - known.keys()
    if not times and args.retry is not None and abs(known["to_floor"][AGAIN][1] - 1) > args.retry:
        times = {"to_floor"}
    return times | ({"peak_megabytes"} - known.keys() if args.memory else set())


def run_settings(args: argparse.Namespace, results: Results, variants: dict[str, Variant], **fixed: object) -> None:
    """Measures what is missing of all numbers of threads, batches and sequences."""
    for threads in args.threads:
        wanted = [where for where in settings(args, **fixed) if where["threads"] == threads]
        timed = [where for where in wanted if "to_floor" in missing(args, results, where)]
        for where, times in zip(timed, measure(args, variants, threads, timed), strict=True):
            summary = summarize(times, threads, where["batch"], where["sequence"])
            results.add("settings", where, {"load": round(os.getloadavg()[0], 2), **summary})
            show(results.find(where))
        for where in wanted:
            if "peak_megabytes" in missing(args, results, where):
                size = where["batch"], where["sequence"], threads
                peaks = {name: peak_megabytes(variant, *size) for name, variant in variants.items()}
                results.add("settings", where, {"peak_megabytes": peaks})


def measure(
    args: argparse.Namespace, variants: dict[str, Variant], threads: int, wanted: list[dict]
) -> list[dict[str, list[float]]]:
    """Milliseconds of every variant in each wanted setting, one per round, over all openings of the sessions."""
    found: list[dict[str, list[float]]] = [{name: [] for name in (*variants, AGAIN)} for _ in wanted]
    for opening in range(args.openings if wanted else 0):
        sessions = open_sessions(variants, opening, lambda name: session(variants[name], threads, args.runtime))
        for where, times in zip(wanted, found, strict=True):
            inputs = {name: feeds(loaded, where["batch"], where["sequence"]) for name, loaded in sessions.items()}
            seconds, rounds = args.seconds / args.openings, -(-args.rounds // args.openings)
            for name, some in run_in_turns(sessions, inputs, seconds, rounds).items():
                times[name] += some
    return found


def show(result: dict) -> None:
    setting = " ".join(
        f"{name} {result[name]}" for name in ("width", "placement", "precision", "threads", "batch", "sequence")
    )
    print(f"{setting} ({result['rounds']} rounds, floor {result['milliseconds']['floor'][1]:.2f} ms)")
    for name, (low, middle, high) in result["to_floor"].items():
        lowest = result["lowest_to_floor"][name]
        print(f"  {name:32} {middle:.3f}  ({low:.3f} to {high:.3f}), lowest {lowest:.3f}")
    middle = result["shaped_to_fastest_layer_norm"][1]
    print(f"  {result['advised']} ÷ {result['fastest_layer_norm']}: {middle:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 192, 384, 768])
    parser.add_argument("--sequences", type=int, nargs="+", default=[32, 128, 197, 512])
    parser.add_argument("--placements", nargs="+", choices=("pre", "post"), default=["pre", "post"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "int8"), default=["fp32", "int8"])
    parser.add_argument("--depth", type=int, default=4, help="blocks of the encoder [4]")
    parser.add_argument("--seconds", type=float, default=5.0, help="per setting, for all variants together [5]")
    parser.add_argument("--rounds", type=int, default=FEWEST_ROUNDS, help=f"the fewest per setting [{FEWEST_ROUNDS}]")
    parser.add_argument("--openings", type=int, default=4, help="how often all sessions are opened anew [4]")
    parser.add_argument("--resume", action="store_true", help="keep what the file of results has, measure the rest")
    parser.add_argument(
        "--retry",
        type=float,
        metavar="DIFFERENCE",
        help="with --resume: measure anew where 'floor again' is so far from 1",
    )
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="variants to time besides those that are compared")
    parser.add_argument("--memory", action="store_true", help="peak memory too (Linux), a process for each variant")
    parser.add_argument("--quick", action="store_true", help="two widths, one sequence, fp32, batch 1, one thread")
    parser.add_argument("--runtime", choices=runtimes.RUNTIMES, default="onnxruntime", help="openvino: pip install it")
    parser.add_argument("--label", help="part of the result's name [cpu, or the runtime]")
    parser.add_argument("--note", default="", help="what a reader must know of this run, such as a shared machine")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    if args.quick:
        args.widths, args.sequences, args.batches, args.threads = [64, 192], [32], [1], [1]
        args.precisions, args.depth, args.seconds = ["fp32"], 2, 2.0
    args.results.mkdir(parents=True, exist_ok=True)
    label = args.label or ("cpu" if args.runtime == "onnxruntime" else args.runtime)
    target = args.results / f"inference-{label}.json"
    results = Results(target, args)
    for width, placement in itertools.product(args.widths, args.placements):
        wanted = [
            precision
            for precision in args.precisions
            if any(
                missing(args, results, where)
                for where in settings(args, width=width, placement=placement, precision=precision)
            )
        ]
        if not wanted:
            continue
        with tempfile.TemporaryDirectory() as folder:
            positions = max(POSITIONS, *args.sequences)
            float32, absent = write_variants(
                Path(folder), width, args.depth, placement == "post", positions, args.runtime
            )
            float32 = {n: v for n, v in float32.items() if not args.only or n in COMPARED or n in args.only}
            for precision in wanted:
                variants = quantized(float32) if precision == "int8" else float32
                where = {"width": width, "placement": placement, "precision": precision}
                nodes = {} if args.runtime != "onnxruntime" else {n: executed_nodes(v) for n, v in variants.items()}
                errors = {name: error(variant, args.runtime) for name, variant in variants.items()}
                results.add("files", where, {"executed_nodes": nodes, "relative_error": errors, "absent": absent})
                run_settings(args, results, variants, **where)
    print(f"written: {target}")


if __name__ == "__main__":
    main()
