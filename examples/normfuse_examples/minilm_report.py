"""What became of a converted MiniLM: files in ONNX Runtime against the original's, and the picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from torch.export import Dim

import normfuse
import normfuse.onnx

from .prose import Batch
from .sentence_encoder import SentenceEncoder
from .serving import File, milliseconds, original_files

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"general": "#0b6e4f", "documentation": "#d1495b", "dictionary": "#e09f3e", "original": "#5c677d"}
TITLES = {"general": "everyday sentences", "documentation": "documentation", "dictionary": "dictionary"}
LENGTHS = (16, 64)
Quality = Callable[[Callable[[Batch], torch.Tensor]], dict[str, dict[str, float]]]


def serve(
    original: SentenceEncoder, converted: SentenceEncoder, example: Batch, typical: list[tuple[torch.Tensor, ...]],
    folder: Path, quality: Quality, rounds: int,
) -> dict[str, Any]:  # fmt: skip
    """Write all files, check, describe and time them.

    Args:
        original: the model as it was, in evaluation mode.
        converted: the model without its norms, in evaluation mode.
        example: of the inputs.
        typical: batches by which the scales for int8 are chosen.
        folder: for the files.
        quality: measures a function from a batch to embeddings against the original.
        rounds: timed runs of each file.
    """
    shapes = {name: {0: Dim("batch"), 1: Dim("tokens", min=2, max=512)} for name in example}
    normfuse.save(converted, folder / "converted.pt", example_inputs=example, dynamic_shapes=shapes)
    checkpoint = normfuse.load(folder / "converted.pt")
    shaped = normfuse.onnx.export(checkpoint, folder / "converted.onnx", target="cpu")
    static = torch.export.export(converted, (), dict(example), dynamic_shapes=shapes)
    folded, _ = normfuse.fold(static)
    # All channels of a tensor share the steps of an integer: stored at very different scales, small ones are lost.
    balanced, report = normfuse.fold(static, balance="int8", example_inputs=typical)
    for_int8 = {"converted": balanced, "converted, scales not chosen": folded}
    for name, folded_program in for_int8.items():
        normfuse.onnx.write(folded_program, folder / _for_int8(name), opset=23)
    config = original.bert.config
    program = torch.export.export(original, (), dict(example), dynamic_shapes=shapes)
    files = original_files(program, folder, config.num_attention_heads, config.hidden_size)
    kept = folder / "original-normfuse.onnx"
    normfuse.onnx.export(original, kept, example_inputs=example, dynamic_shapes=shapes, target="cpu")
    found: dict[str, Any] = {
        "norms_folded": f"{len(shaped.report.norms) - len(shaped.report.remaining)} of {len(shaped.report.norms)}",
        "largest_difference": shaped.verification.worst("ONNX file"),
        "norms_folded_for_int8": f"{len(report.norms) - len(report.remaining)} of {len(report.norms)}",
    }
    precisions = {
        "float32": {**files, "normfuse, norms kept": File(kept), "converted": File(shaped.path)},
        "int8": {
            **{name: file.quantized() for name, file in files.items()},
            **{name: File(folder / _for_int8(name)).quantized() for name in for_int8},
        },
    }
    for precision, variants in precisions.items():
        found[precision] = {name: file.describe() for name, file in variants.items()}
        for name, file in variants.items():
            found[precision][name]["quality"] = quality(_runner(file))
        for length in LENGTHS:
            feeds = {name: np.ones((1, length), dtype=np.int64) for name in example}
            times = {name: np.array(ms) for name, ms in milliseconds(variants, feeds, rounds).items()}
            medians = {name: np.median(ms) for name, ms in times.items() if not name.startswith("converted")}
            rival = min(medians, key=medians.get)
            for name, ms in times.items():
                found[precision][name][f"milliseconds_{length}"] = np.percentile(ms, (25, 50, 75)).tolist()
            ratio = times["converted"] / times[rival]
            found[precision][f"against_{length}"] = {
                "fastest_original": rival,
                "ratio": np.percentile(ratio, (25, 50, 75)).tolist(),
            }
    return found


def _for_int8(name: str) -> str:
    return f"{name.replace(',', '').replace(' ', '-')}-for-int8.onnx"


def _runner(file: File) -> Callable[[Batch], torch.Tensor]:
    session = file.session()
    return lambda batch: torch.from_numpy(session.run(None, {name: t.numpy() for name, t in batch.items()})[0])


def draw(record: dict[str, Any], served: dict[str, Any], file: Path) -> None:
    """The curve of the cosine on the left; on the right latency against the fastest form of the original."""
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4), width_ratios=(3, 2), layout="constrained")
    steps = [0, *(point["step"] for point in record["curve"])]
    for name, title in ((name, title) for name, title in TITLES.items() if name in record["fitted"]):
        points = [record["reconstructed"], *record["curve"]]
        mean, low = ([point[name][key] for point in points] for key in ("mean_cosine", "fifth_percentile"))
        left.plot(steps, mean, color=COLOURS[name], linewidth=2, label=f"{title}: mean {mean[-1]:.3f}")
        left.plot(steps, low, color=COLOURS[name], linewidth=1, linestyle="--", label=f"5 % are below {low[-1]:.3f}")
        left.plot(0, record["fitted"][name]["mean_cosine"], "o", color=COLOURS[name], clip_on=False)
    left.axhline(0.95, color="#b8c0cc", linewidth=1)
    left.set(xlabel="training step", ylabel="cosine to the original's embedding", xlim=(0, None))
    left.set_title("No norm left (dots: norms fitted alone; step 0: layers fitted as well)", loc="left", fontsize=11)
    left.grid(axis="y", color="#e3e3e3")
    left.legend(framealpha=1, edgecolor="white", loc="lower right")
    places, labels = [], []
    for group, (precision, length) in enumerate((p, n) for p in ("float32", "int8") for n in LENGTHS):
        rival = served[precision][f"against_{length}"]["fastest_original"]
        for side, (name, colour) in enumerate(((rival, COLOURS["original"]), ("converted", COLOURS["general"]))):
            low, middle, high = served[precision][name][f"milliseconds_{length}"]
            right.bar(
                group + (side - 0.5) * 0.36, middle, width=0.34, color=colour,
                yerr=[[middle - low], [high - middle]], capsize=3,
            )  # fmt: skip
        ratio = served[precision][f"against_{length}"]["ratio"][1]
        places.append(group)
        labels.append(f"{precision}\n{length} tokens\n× {ratio:.3f}")
    right.set_xticks(places, labels)
    right.set(ylabel="ms per sentence, one thread")
    right.set_title("Grey: fastest form of the original; green: converted", loc="left", fontsize=11)
    figure.savefig(file, dpi=130)
    plt.close(figure)
