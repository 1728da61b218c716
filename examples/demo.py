"""The whole way in a few minutes: train four norms, fold one of them away, serve it with ONNX Runtime.

Leaves in demo/: the checkpoint, the ONNX file with its norms folded away and the one with them, a picture
(curves of the four trainings, latency of both files) and summary.json with every number shown.
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
from normfuse_examples.blocks import NORMS
from train_vit_digits import HELD_OUT, Digits, Run, digits, run

import normfuse
import normfuse.onnx

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NAMES = {"unified": "Unified Norm", "power": "Power Norm", "batch": "BatchNorm", "layer": "LayerNorm"}
COLOURS = {"unified": "#0b6e4f", "power": "#d1495b", "batch": "#edae49", "layer": "#5c677d"}


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


def draw(curves: dict[str, list[float]], latency: list[tuple[float, float, float]], ratio: float, file: Path) -> None:
    """Training curves on the left; on the right medians with the quartiles of both files, from zero."""
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(3, 2), layout="constrained")
    epochs = len(next(iter(curves.values())))
    for norm, accuracies in curves.items():
        label = f"{NAMES[norm]}  {accuracies[-1]:.1%}"
        left.plot(range(1, epochs + 1), [100 * a for a in accuracies], color=COLOURS[norm], label=label, linewidth=2)
    left.set(xlabel="epoch", ylabel="held-out accuracy, %", ylim=(0, 100))
    left.set_title("Same vision transformer, four norms (one seed)", loc="left")
    left.grid(axis="y", color="#e3e3e3")
    left.xaxis.get_major_locator().set_params(integer=True)
    left.set_axisbelow(True)
    left.legend(
        framealpha=1, edgecolor="white", loc="lower right", title="accuracy after the last epoch", alignment="left"
    )

    medians = np.array([middle for _, middle, _ in latency])
    spread = np.array([(middle - low, high - middle) for low, middle, high in latency]).T
    right.bar(
        ("norms as exported", "norms folded away"),
        medians,
        yerr=spread,
        capsize=5,
        width=0.55,
        color=("#b8c0cc", COLOURS["unified"]),
    )
    for place, (median, colour) in enumerate(zip(medians, ("black", "white"), strict=True)):
        right.text(place, median / 2, f"{median:.3f} ms", ha="center", color=colour)
    right.set(ylabel="ms per picture", ylim=(0, 1.1 * max(high for _, _, high in latency)), xlim=(-0.7, 1.7))
    right.set_title(f"Unified Norm, latency: ratio {ratio:.3f}", loc="left")
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
    parser.add_argument("--epochs", type=int, default=20, help="of each of the four trainings")
    parser.add_argument("--rounds", type=int, default=300, help="timed runs of each file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for everything that is written")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    data = digits()
    print(f"Training four vision transformers on {len(data.train_images)} handwritten digits; {HELD_OUT} held out.")
    runs = {norm: run(norm, "pre", args.epochs, args.seed, data) for norm in NORMS}
    print("Exporting the one with Unified Norm and running it in ONNX Runtime.")
    found = serve(runs["unified"], data, args.out, args.rounds)
    curves = {norm: result.accuracies for norm, result in runs.items()}
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
