"""The whole way in a few minutes: train with five norms, fold those of one away, serve it with ONNX Runtime.

Leaves in demo/: the checkpoint, the ONNX file with its norms folded away and the one with them, a picture
(curves of the trainings over three seeds, latency of both files) and summary.json with every number shown.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
import onnxruntime
import torch
from normfuse_examples.training import TAPERED, TRAININGS
from train_vit_digits import HELD_OUT, Digits, Run, digits, run

import normfuse
import normfuse.onnx

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NAMES = {
    "tapered": "LayerNorm, tapered",
    "unified": "Unified Norm",
    "power": "Power Norm",
    "batch": "BatchNorm",
    "layer": "LayerNorm",
}
COLOURS = {"tapered": "#7b2d8b", "unified": "#0b6e4f", "power": "#d1495b", "batch": "#edae49", "layer": "#5c677d"}


def classify(file: Path, images: torch.Tensor) -> np.ndarray:
    """The class of each picture according to an ONNX file in ONNX Runtime."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": images.numpy()})
    return logits.argmax(1)


def export_both(
    checkpoint: normfuse.ExportableModel, fused: Path, unfused: Path
) -> tuple[normfuse.onnx.ExportResult, normfuse.onnx.GraphSummary]:
    """The verified file without norms, and the same program written without folding."""
    result = normfuse.onnx.export(checkpoint, fused)
    normfuse.onnx.write(checkpoint.program, unfused, opset=result.opset, inputs=checkpoint.inputs)
    return result, normfuse.onnx.summarize(unfused)


Curves = dict[str, list[list[float]]]


def draw(curves: Curves, latency: list[tuple[float, float, float]], ratio: float, file: Path) -> None:
    """Mean and range of the training curves on the left; medians with quartiles of both files on the right."""
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(3, 2), layout="constrained")
    for norm, runs in curves.items():
        accuracies = 100 * np.array(runs)
        epochs, last = range(1, accuracies.shape[1] + 1), accuracies[:, -1]
        label = f"{NAMES[norm]}  {last.mean():.1f} ({last.min():.1f} to {last.max():.1f})"
        left.plot(epochs, accuracies.mean(0), color=COLOURS[norm], label=label, linewidth=2)
        left.fill_between(epochs, accuracies.min(0), accuracies.max(0), color=COLOURS[norm], alpha=0.12, linewidth=0)
    left.set(xlabel="epoch", ylabel="held-out accuracy, %", ylim=(0, 100))
    seeds = len(next(iter(curves.values())))
    left.set_title(f"Same vision transformer, {len(curves)} norms, {seeds} seeds each", loc="left")
    left.grid(axis="y", color="#e3e3e3")
    left.xaxis.get_major_locator().set_params(integer=True)
    left.set_axisbelow(True)
    left.legend(
        framealpha=1,
        edgecolor="white",
        loc="lower right",
        title="mean and range after the last epoch, %",
        alignment="left",
    )

    medians = np.array([middle for _, middle, _ in latency])
    spread = np.array([(middle - low, high - middle) for low, middle, high in latency]).T
    right.bar(
        ("norms as exported", "norms folded away"),
        medians,
        yerr=spread,
        capsize=5,
        width=0.55,
        color=("#b8c0cc", COLOURS[TAPERED]),
    )
    for place, (median, colour) in enumerate(zip(medians, ("black", "white"), strict=True)):
        right.text(place, median / 2, f"{median:.3f} ms", ha="center", color=colour)
    right.set(ylabel="ms per picture", ylim=(0, 1.1 * max(high for _, _, high in latency)), xlim=(-0.7, 1.7))
    right.set_title(f"Tapered, latency: ratio {ratio:.3f}", loc="left")
    right.set_xlabel("batch 1, one thread; median and quartiles")
    figure.savefig(file, dpi=150)
    plt.close(figure)


def serve(trained: Run, data: Digits, folder: Path, rounds: int) -> dict[str, object]:
    """Saves, exports, classifies the held-out pictures both ways and times the files; what was found, as data."""
    model_file, fused, unfused = folder / "vit.pt", folder / "vit.onnx", folder / "vit_with_norms.onnx"
    trained.save(model_file, data.test_images[:4])
    checkpoint = normfuse.load(model_file)
    result, with_norms = export_both(checkpoint, fused, unfused)
    (logits,) = checkpoint.run([data.test_images])
    expected = logits.argmax(1).numpy()
    got = classify(fused, data.test_images)
    labels = data.test_labels.numpy()
    timing = normfuse.onnx.bench([unfused, fused], rounds=rounds, threads=1)
    ratio, low, high = timing.ratio()
    return {
        "accuracy_pytorch": float((expected == labels).mean()),
        "accuracy_onnx_runtime": float((got == labels).mean()),
        "pictures": len(labels),
        "different_predictions": int((got != expected).sum()),
        "norms": len(result.report.norms),
        "norms_left": len(result.report.remaining) + len(result.graph.norms) + len(result.graph.affines),
        "opset": result.opset,
        "nodes_with_norms": with_norms.node_count,
        "nodes_folded": result.graph.node_count,
        "largest_difference": result.verification.worst("ONNX file"),
        "latency_ms": {"with_norms": timing.quartiles(0), "folded": timing.quartiles(1)},
        "ratio": {"median": ratio, "quartiles": (low, high)},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20, help="of each training")
    parser.add_argument("--rounds", type=int, default=300, help="timed runs of each file")
    parser.add_argument("--seeds", type=int, default=3, help="trainings with each norm")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for everything that is written")
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error(f"--seeds {args.seeds} is not allowed; give at least 1")
    args.out.mkdir(parents=True, exist_ok=True)

    data = digits()
    names = ", ".join(NAMES[norm] for norm in TRAININGS)
    print(
        f"Training vision transformers on {len(data.train_images)} handwritten digits, {HELD_OUT} held out: {names}; "
        f"{args.seeds} seeds each."
    )
    runs = {norm: [run(norm, "pre", args.epochs, seed, data) for seed in range(args.seeds)] for norm in TRAININGS}
    print("Exporting one with tapered norms and running it in ONNX Runtime.")
    found = serve(runs[TAPERED][0], data, args.out, args.rounds)
    curves = {norm: [result.accuracies for result in results] for norm, results in runs.items()}
    latency = [found["latency_ms"][which] for which in ("with_norms", "folded")]
    picture = args.out / "demo.png"
    draw(curves, latency, found["ratio"]["median"], picture)
    (args.out / "summary.json").write_text(json.dumps({"accuracies": curves, **found}, indent=2) + "\n")

    low, high = found["ratio"]["quartiles"]
    print(f"norms:        {found['norms']} in the model, {found['norms_left']} left in the file")
    print(f"operations:   {found['nodes_with_norms']} with norms, {found['nodes_folded']} without")
    print(f"accuracy:     {found['accuracy_pytorch']:.2%} in PyTorch")
    print(f"              {found['accuracy_onnx_runtime']:.2%} in ONNX Runtime")
    print(f"predictions:  {found['pictures'] - found['different_predictions']} of {found['pictures']} equal")
    print(f"latency:      {latency[0][1]:.3f} ms with norms, {latency[1][1]:.3f} ms without")
    print(f"              ratio {found['ratio']['median']:.3f} (quartiles {low:.3f} to {high:.3f})")
    print(f"picture:      {picture}")
    if found["different_predictions"] or found["norms_left"]:
        print("demo: the folded file is not what it should be, see above", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
