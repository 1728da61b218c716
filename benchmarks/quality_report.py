"""Makes the tables of docs/quality.md and its picture from the results of benchmarks/quality.py.

python benchmarks/quality_report.py
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import matplotlib
import records
from quality import ALL
from quality_tasks import NORMS, PLACEMENTS, TASKS

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullLocator

ROOT = Path(__file__).parent.parent
COLOURS = {
    "layer": "#5c677d", "rms": "#8d99ae", "unified": "#0b6e4f", "power": "#d1495b", "power_groups": "#e09aa3",
    "batch": "#edae49", "regularized": "#c98b1b", "progressive": "#3d5a98", "tapered": "#7b2d8b",
    "tapered_wholly": "#b07bbd", "dyt": "#2a9d8f",
}  # fmt: skip
Group = tuple[str, str, int, float]  # task, placement, steps, rate (0: that which was chosen for each norm)
Runs = dict[str, list[dict[str, Any]]]


def read(path: Path) -> dict[Group, Runs]:
    """The full trainings, by what can be compared, and in it by norm; by rate where LayerNorm has several.

    A norm's trainings at other rates than most of them are left out of its row.
    """
    records = [json.loads(line) for line in path.read_text().splitlines()]
    judged = [record for record in records if record["training"]["stage"] == "judge"]

    def comparable(training: dict[str, Any]) -> tuple[str, str, int]:
        return training["task"], training["placement"], training["steps"]

    rates: dict[tuple[str, str, int], set[float]] = defaultdict(set)
    for training in (record["training"] for record in judged):
        if training["norm"] == "layer":
            rates[comparable(training)].add(training["rate"])
    groups: dict[Group, Runs] = defaultdict(lambda: defaultdict(list))
    for record in judged:
        training = record["training"]
        what = comparable(training)
        rate = training["rate"] if len(rates[what]) > 1 else 0.0
        groups[(*what, rate)][training["norm"]].append(record)
    for runs in groups.values():
        for norm, found in runs.items():
            rates_found = Counter(record["training"]["rate"] for record in found)
            most = max(rates_found, key=rates_found.__getitem__)
            runs[norm] = [record for record in found if record["training"]["rate"] == most]
    order = {(task, place): number for number, (task, place) in enumerate((t, p) for t in TASKS for p in PLACEMENTS)}
    return dict(sorted(groups.items(), key=lambda entry: (order[entry[0][:2]], *entry[0][2:])))


def mean_and_spread(values: list[float]) -> tuple[float, float | None]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def shown(values: list[float], digits: int) -> str:
    mean, spread = mean_and_spread(values)
    return f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if spread is not None else "")


def ratio(runs: list[dict[str, Any]], base: list[dict[str, Any]]) -> str:
    """Mean loss ÷ LayerNorm's over the seeds that both have: the same seed means the same batches."""
    ours, theirs = (
        {r["training"]["seed"]: r["test"]["loss"] for r in group if not r["diverged"]} for group in (runs, base)
    )
    common = sorted(ours.keys() & theirs.keys())
    if not common:
        return "–"
    return f"{statistics.fmean(ours[s] for s in common) / statistics.fmean(theirs[s] for s in common):.3f}"


def table(group: Group, runs: Runs) -> str:
    lines = [
        "| norm | folds away | rate | seeds | test loss | ÷ LayerNorm | right | diverged | fluctuation | calibrated |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    base = runs.get("layer", [])
    alive = {name: [r for r in found if not r["diverged"]] for name, found in runs.items()}

    def rank(name: str) -> float:
        return statistics.fmean(r["test"]["loss"] for r in alive[name]) if alive[name] else float("inf")

    for name in sorted(runs, key=rank):
        found, norm = runs[name], NORMS[name]
        cells = [norm.title, norm.folds]
        cells += [f"{found[0]['training']['rate']:g}", str(len(found))]
        if alive[name]:
            cells += [shown([r["test"]["loss"] for r in alive[name]], 4), ratio(found, base)]
            cells += [shown([100 * r["test"]["accuracy"] for r in alive[name]], 1) + " %"]
        else:
            cells += ["–"] * 3
        cells += [f"{(len(found) - len(alive[name])) / len(found):.0%}"]
        moving = [r["fluctuation"] for r in found if r["fluctuation"] is not None]
        cells += [f"{statistics.fmean(moving):.3f}" if moving else "–"]
        again = [r["calibrated"] for r in found if r.get("calibrated") is not None]
        cells += [f"{statistics.fmean(again):.4f}" if again else "–"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def title(group: Group, runs: Runs) -> str:
    name, placement, steps, rate = group
    task = TASKS[name]()
    size = f"{steps * task.tokens_per_step / 1e6:.1f} M tokens" if name.startswith("lm") else f"{steps} steps"
    return f"{task.title}, {placement}-norm, {size}" + (f", rate {rate:g}" if rate else "")


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def where(runs: Runs) -> str:
    found = [record for group in runs.values() for record in group]
    days = sorted({record["date"] for record in found})
    span = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    machines = ", ".join(sorted({record["machine"] for record in found}))
    return f"{machines}, torch {found[0]['torch']}, {span}."


def text(groups: dict[Group, Runs]) -> str:
    """Everything between the marks of the page."""
    parts = [
        f"### {_sentence(title(group, runs))}\n\n{table(group, runs)}\n\n{where(runs)}"
        for group, runs in groups.items()
    ]
    return "\n\n".join([*parts, "![Validation loss over the training](images/quality.png)"])


def draw(groups: dict[Group, Runs], file: Path) -> None:
    """Validation loss over the steps, without variants; a line is a mean over seeds.

    A panel for each group of four norms or more.
    """
    drawn = {group: [name for name in ALL if name in runs] for group, runs in groups.items()}
    groups = {group: runs for group, runs in groups.items() if len(drawn[group]) >= 4} or groups
    columns = 2
    rows = -(-len(groups) // columns)
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, panels = plt.subplots(rows, columns, figsize=(11, 3.6 * rows), layout="constrained", squeeze=False)
    for panel in panels.flat[len(groups) :]:
        panel.set_visible(False)
    seen = {}
    for panel, (group, runs) in zip(panels.flat, groups.items(), strict=False):
        for name in drawn[group]:
            curves = [r["curve"] for r in runs[name] if not r["diverged"]]
            if not curves:
                continue
            steps = [point[0] for point in curves[0]]
            means = [statistics.fmean(curve[i][2] for curve in curves) for i in range(len(steps))]
            style = "--" if NORMS[name].folds == "no" else "-"
            (seen[name],) = panel.plot(steps, means, style, color=COLOURS[name], linewidth=1.4, label=NORMS[name].title)
        name, rest = title(group, runs).split(", ", 1)
        panel.set_title(f"{name},\n{rest}", loc="left", fontsize=9)
        panel.set(xlabel="step", ylabel="validation loss")
        losses = [p[2] for found in drawn[group] for r in runs[found] if not r["diverged"] for p in r["curve"]]
        panel.set_yscale("log")
        panel.set_ylim(0.95 * min(losses), min(1.05 * max(losses), 30 * min(losses)))
        narrow = max(losses) < 4 * min(losses)
        panel.yaxis.set_major_locator(LogLocator(subs=[1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 4] if narrow else [1, 2, 5]))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_locator(NullLocator())
        panel.grid(color="#e8e8e8")
    figure.legend(
        seen.values(), [NORMS[name].title for name in seen], ncols=3, frameon=False, loc="outside lower center"
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "quality.jsonl")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "quality.md")
    parser.add_argument("--chart", type=Path, default=ROOT / "docs" / "images" / "quality.png")
    options = parser.parse_args()
    groups = read(options.results)
    if not groups:
        parser.error(f"{options.results} has no full training yet; run benchmarks/quality.py")
    draw(groups, options.chart)
    records.between(options.page, "quality", text(groups))
    print(f"written: {options.page}, {options.chart}")


if __name__ == "__main__":
    main()
