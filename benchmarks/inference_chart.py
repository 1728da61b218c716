"""Draws and tabulates benchmarks/results/inference-*.json: times as multiples of the same network without norms.

python benchmarks/inference_chart.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
SERIES = {
    "fastest LayerNorm": "#8d99ae",
    "static": "#edae49",
    "folded": "#9ad1b3",
    "folded and shaped": "#0b6e4f",  # for the target that docs/graph_passes.md advises
}


def height(setting: dict, series: str) -> float:
    """The median ratio to the floor; the fastest LayerNorm is what users get without this package."""
    named = {"fastest LayerNorm": setting["fastest_layer_norm"], "folded and shaped": setting["advised"]}
    return setting["to_floor"][named.get(series, series)][1]


def panels(run: dict) -> dict[str, list[dict]]:
    """Settings by what a panel has in common, by width and sequence."""
    found: dict[str, list[dict]] = {}
    for setting in sorted(run["settings"], key=lambda setting: (setting["width"], setting["sequence"])):
        title = (
            f"{setting['placement']}-norm, {setting['precision']}, batch {setting['batch']}, "
            f"{setting['threads']} thread{'s' * (setting['threads'] > 1)}"
        )
        found.setdefault(title, []).append(setting)
    return found


def draw(run: dict, file: Path) -> None:
    groups = panels(run)
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    columns = 2 if len(groups) > 4 else 1
    rows = -(-len(groups) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(10 * columns, 2.9 * rows), squeeze=False, layout="constrained", sharey=True
    )
    for axis in axes.T.flat[len(groups) :]:
        axis.set_visible(False)
    # Down the columns, so that what differs by the placement, which comes first in a title, stands side by side.
    for axis, (title, settings) in zip(axes.T.flat, sorted(groups.items(), reverse=True), strict=False):
        for place, (series, colour) in enumerate(SERIES.items()):
            at = [number + 0.2 * (place - 1.5) for number in range(len(settings))]
            axis.bar(at, [height(setting, series) for setting in settings], 0.18, label=series, color=colour)
        axis.axhline(1.0, color="black", linewidth=0.8)
        labels = [f"{setting['width']}\nS {setting['sequence']}" for setting in settings]
        axis.set_xticks(range(len(settings)), labels)
        axis.set_ylim(0.6, 1.2)
        axis.set_title(title, loc="left", fontsize=9)
    axes[0, 0].legend(frameon=False, ncols=len(SERIES), loc="upper right")
    where = run["machine"]
    source = f"{where['cpu']}, ONNX Runtime {where['onnxruntime']}, {run['date']}"
    note = f"\n{run['note']}" if run["note"] else ""
    figure.suptitle(
        f"Time ÷ the same network with its norms deleted, by width and sequence (lower is better)\n{source}{note}",
        x=0.01,
        ha="left",
        fontsize=9,
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)
    plt.close(figure)


QUANTITIES = {
    "shaped ÷ floor": lambda setting: height(setting, "folded and shaped"),
    "shaped ÷ fastest LayerNorm": lambda setting: setting["shaped_to_fastest_layer_norm"][1],
    "folded ÷ floor": lambda setting: height(setting, "folded"),
    "static ÷ floor": lambda setting: height(setting, "static"),
}
NOISE = 0.05  # settings whose second session of the floor differs by more from the first say nothing


def quiet(run: dict) -> list[dict]:
    """The settings that were measured undisturbed."""
    return [s for s in run["settings"] if abs(s["to_floor"]["floor again"][1] - 1) <= NOISE]


def table(run: dict) -> str:
    """Markdown: for each kind of setting and width, lowest to highest median of the undisturbed settings."""
    widths = sorted({setting["width"] for setting in run["settings"]})
    lines = ["| | " + " | ".join(f"width {width}" for width in widths) + " |", "|---" * (len(widths) + 1) + "|"]
    kinds = dict.fromkeys((s["precision"], s["threads"], s["batch"]) for s in run["settings"])
    for precision, threads, batch in sorted(kinds):
        of_kind = [s for s in quiet(run) if (s["precision"], s["threads"], s["batch"]) == (precision, threads, batch)]
        for name, value in QUANTITIES.items():
            spans = [_span([value(s) for s in of_kind if s["width"] == width]) for width in widths]
            label = f"{precision}, {threads} thread{'s' * (threads > 1)}, batch {batch}: {name}"
            lines.append(f"| {label} | " + " | ".join(spans) + " |")
    return "\n".join(lines)


def counts(run: dict) -> str:
    """In how many of the undisturbed settings, by number of threads, a ratio is as low as it should be."""
    asked = [
        ("shaped ÷ floor", 1.0, "", lambda s: True),
        ("shaped ÷ floor", 0.96, "", lambda s: True),
        ("shaped ÷ floor", 0.9, " at width 64", lambda s: s["width"] == 64),
        ("shaped ÷ fastest LayerNorm", 1.0, "", lambda s: True),
        (
            "shaped ÷ fastest LayerNorm",
            0.95,
            " at batch 1, widths to 384",
            lambda s: s["batch"] == 1 and s["width"] <= 384,
        ),
    ]
    lines = []
    for threads in sorted({setting["threads"] for setting in run["settings"]}):
        chosen = [s for s in quiet(run) if s["threads"] == threads]
        measured = sum(s["threads"] == threads for s in run["settings"])
        lines.append(f"{threads} thread{'s' * (threads > 1)}: {len(chosen)} of {measured} settings undisturbed")
        for name, most, which, belongs in asked:
            ratios = [QUANTITIES[name](s) for s in chosen if belongs(s)]
            reached = sum(ratio <= most for ratio in ratios)
            lines.append(f"  {name} at most {most:.2f}{which}: {reached} of {len(ratios)}")
    return "\n".join(lines)


def _span(ratios: list[float]) -> str:
    if not ratios:
        return "–"
    low, high = (
        f"{ratio:.2f}".replace("0.", ".", 1) if ratio < 0.995 else f"{ratio:.2f}"
        for ratio in (min(ratios), max(ratios))
    )
    return low if low == high else f"{low} to {high}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--images", type=Path, default=ROOT / "docs" / "images")
    args = parser.parse_args()
    files = sorted(args.results.glob("inference-*.json"))
    if not files:
        parser.error(f"no inference-*.json in {args.results}; run benchmarks/inference.py first")
    for file in files:
        chart = args.images / f"{file.stem}.png"
        run = json.loads(file.read_text())
        draw(run, chart)
        print(f"written: {chart}\n\n{table(run)}\n\n{counts(run)}\n")


if __name__ == "__main__":
    main()
