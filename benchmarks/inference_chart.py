"""Draws benchmarks/results/inference-*.json: times of encoders as multiples of the same network without norms.

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
    "folded and shaped": "#0b6e4f",
}


def height(setting: dict, series: str) -> float:
    """The median ratio to the floor; the fastest LayerNorm is what users get without this package."""
    name = setting["fastest_layer_norm"] if series == "fastest LayerNorm" else series
    return setting["to_floor"][name][1]


def panels(run: dict) -> dict[str, list[dict]]:
    """Settings by what a panel has in common, in the order of the run."""
    found: dict[str, list[dict]] = {}
    for setting in run["settings"]:
        title = (
            f"{setting['placement']}-norm, {setting['precision']}, batch {setting['batch']}, "
            f"{setting['threads']} thread{'s' * (setting['threads'] > 1)}"
        )
        found.setdefault(title, []).append(setting)
    return found


def draw(run: dict, file: Path) -> None:
    groups = panels(run)
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(len(groups), 1, figsize=(10, 2.9 * len(groups)), squeeze=False, layout="constrained")
    for axis, (title, settings) in zip(axes[:, 0], groups.items(), strict=True):
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
    figure.savefig(file, dpi=120)
    plt.close(figure)


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
        draw(json.loads(file.read_text()), chart)
        print(f"written: {chart}")


if __name__ == "__main__":
    main()
