"""Draws the table and chart of docs/benchmarks.md of the training step from the JSON in benchmarks/results.

python benchmarks/report.py
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import matplotlib
import records

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
MODE = "forward+backward"
OTHERS = {
    "layer_norm": "LayerNorm",
    "rms_norm": "RMSNorm",
    "batch_norm": "BatchNorm",
    "{} reference": "its PyTorch reference",
    "{} compiled reference": "the same, `torch.compile`d",
}
OURS = {
    "unified": "Unified Norm",
    "power": "Power Norm",
    "our layer_norm": "LayerNorm (ours)",
    "our rms_norm": "RMSNorm (ours)",
}
DRAWN = ("layer_norm", "batch_norm", "unified", "power")
COLOURS = {"layer_norm": "#8d99ae", "batch_norm": "#edae49", "unified": "#0b6e4f", "power": "#d1495b"}


def title(run: dict) -> str:
    """Where and when a result was measured, in one line."""
    where = run["machine"]
    name = where["gpu"] or f"{where['cpu']} ({where['instructions']}, {where['cores']} cores)"
    threads = f", {run['threads']} thread{'s' * (run['threads'] > 1)}" if run["threads"] else ""
    busy = f", other programs running (load {where['load']:.1f})" if where["load"] > 0.5 else ""
    clock = ", CPU time" if run["clock"] == "cpu" else ""
    return f"{name}{threads}{clock}, {run['dtype']}, torch {where['torch']}, {run['date']}{busy}"


def table(run: dict) -> str:
    """Markdown: time of our norms as multiples of a copy and of what else there is."""
    lines = [
        f"`{run['command']}`, {title(run)}:",
        "",
        "| shape | | ÷ copy | " + " | ".join(f"÷ {label}" for label in OTHERS.values()) + " | residual |",
        "|---|---|" + "---:|" * (2 + len(OTHERS)),
    ]
    for shape, modes in run["milliseconds"].items():
        medians = {name: quartiles[1] for name, quartiles in modes[MODE].items()}
        for kind, label in OURS.items():
            pairs = [(kind, other.format(kind)) for other in ("copy", *OTHERS)]
            pairs.append((f"{kind}, residual", "add, layer_norm"))
            cells = [shape.replace("x", "×") if kind == "unified" else "", label]
            for mine, other in pairs:
                ratio = medians[mine] / medians[other] if {mine, other} <= medians.keys() else None
                mark = "**" if ratio is not None and ratio > 1 and other != "copy" else ""
                cells.append("–" if ratio is None else f"{mark}{ratio:.2f}{mark}")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(runs: list[dict], file: Path) -> None:
    """One panel a result: forward and backward together as multiples of copying the tensor once."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, panels = plt.subplots(len(runs), 1, figsize=(9, 3.3 * len(runs)), squeeze=False, layout="constrained")
    labels = {name: (OTHERS | OURS)[name] for name in DRAWN}
    for panel, run in zip(panels[:, 0], runs, strict=True):
        shapes = list(run["milliseconds"])
        for place, (name, label) in enumerate(labels.items()):
            heights = []
            for shape in shapes:
                modes = run["milliseconds"][shape][MODE]
                heights.append(modes[name][1] / modes["copy"][1])
            at = [number + 0.2 * (place - 1.5) for number in range(len(shapes))]
            bars = panel.bar(at, heights, 0.18, label=label, color=COLOURS[name])
            panel.bar_label(bars, fmt="%.1f", fontsize=8, padding=1)
        panel.set_xticks(range(len(shapes)), [shape.replace("x", "×") for shape in shapes])
        panel.set_ylabel("× one copy of the tensor")
        panel.set_title(title(run), loc="left", fontsize=10)
        panel.grid(axis="y", color="#e3e3e3")
        panel.set_axisbelow(True)
    handles = panels[0, 0].get_legend_handles_labels()
    figure.legend(*handles, frameon=False, ncols=4, loc="outside lower center")
    figure.suptitle("Training step of one norm, forward + backward (lower is better)", x=0.01, ha="left")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "benchmarks.md")
    parser.add_argument("--chart", type=Path, default=ROOT / "docs" / "images" / "training_step.png")
    args = parser.parse_args()
    files = sorted(args.results.glob("training_step-*.json"))
    if not files:
        parser.error(f"no training_step-*.json in {args.results}; run benchmarks/training_step.py first")
    runs = [json.loads(file.read_text()) for file in files]
    chart = os.path.relpath(args.chart, args.page.parent)
    tables = "\n\n".join([*(table(run) for run in runs), f"![Training step as multiples of a copy]({chart})"])
    records.between(args.page, "training-step", tables)
    draw(runs, args.chart)
    print(f"written: {args.page}, {args.chart}")


if __name__ == "__main__":
    main()
