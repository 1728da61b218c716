"""Trains a small causal language model on the sources of Python's standard library, exports it and lets it write.

    python examples/train_lm_stdlib.py --out lm.pt

Post-norm with tapered LayerNorms by default: the placement in which the norms stand on the residual stream itself, and
the harder one to fold. After the training the checkpoint is exported to ONNX, compared with the module it came from,
and ONNX Runtime continues a piece of code.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
from pathlib import Path

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from normfuse_examples import LanguageModel
from normfuse_examples.blocks import PLACEMENTS
from normfuse_examples.training import TAPERED, TRAININGS, tapered, train
from torch import Tensor

import normfuse
import normfuse.onnx

CONTEXT = 128
BATCH = 16
VALIDATION_BATCHES = 20


def corpus() -> tuple[Tensor, Tensor]:
    """Bytes of the standard library's top-level modules for training, and those of every tenth module, held out."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    held_out = files[::10]
    parts = ([file for file in files if file not in held_out], held_out)
    training, validation = (b"\n".join(file.read_bytes() for file in part) for part in parts)
    return torch.frombuffer(bytearray(training), dtype=torch.uint8), torch.frombuffer(
        bytearray(validation), dtype=torch.uint8
    )


def windows(text: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random pieces of a text and the bytes that follow each of their bytes, both int64 [count, CONTEXT]."""
    starts = torch.randint(len(text) - CONTEXT, (count, 1), generator=generator)
    pieces = text[starts + torch.arange(CONTEXT + 1)].long()
    return pieces[:, :-1], pieces[:, 1:]


def bits_per_byte(model: LanguageModel, text: Tensor) -> float:
    """Mean over the same random pieces in every call; the model is left in evaluation mode."""
    model.eval()
    generator = torch.Generator().manual_seed(1)
    total = 0.0
    with torch.no_grad():
        for _ in range(VALIDATION_BATCHES):
            tokens, targets = windows(text, BATCH, generator)
            total += F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()).item()
    return total / VALIDATION_BATCHES / math.log(2)


def fit(norm: str, placement: str, steps: int, seed: int, training: Tensor) -> LanguageModel:
    """A trained model in evaluation mode."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    kind = "layer" if norm == TAPERED else norm
    model = LanguageModel(context=CONTEXT, norm=kind, placement=placement, warmup_iters=steps // 10)
    conversion = tapered(model, norm, steps)
    recent: list[float] = []

    def loss_of_step(step: int) -> Tensor:
        tokens, targets = windows(training, BATCH, generator)
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        recent.append(loss.item())
        return loss

    def after_step(step: int) -> str:
        last = recent[-50:]
        return f"{sum(last) / len(last) / math.log(2):.2f} bits per byte"

    title = f"{norm} {placement}-norm"
    train(model, loss_of_step, steps, learning_rate=2e-3, title=title, conversion=conversion, after_step=after_step)
    return model.eval()


def save(model: LanguageModel, text: Tensor, path: Path) -> None:
    """Saves the model with two pieces of ``text`` as its example; batch and sequence may vary later."""
    example, _ = windows(text, 2, torch.Generator().manual_seed(2))
    dynamic = {"tokens": {0: "batch", 1: torch.export.Dim("sequence", max=CONTEXT)}}
    normfuse.save(model, path, example_inputs=example, dynamic_shapes=dynamic)


def continue_text(session: onnxruntime.InferenceSession, prompt: str, length: int, seed: int) -> str:
    """``length`` more bytes, drawn from the model's distribution at temperature 0.7."""
    generator = np.random.default_rng(seed)
    text = list(prompt.encode())
    for _ in range(length):
        (logits,) = session.run(None, {"tokens": np.array([text[-CONTEXT:]], dtype=np.int64)})
        scaled = logits[0, -1].astype(np.float64) / 0.7
        odds = np.exp(scaled - scaled.max())
        text.append(int(generator.choice(256, p=odds / odds.sum())))
    return bytes(text).decode(errors="replace")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--norm", choices=TRAININGS, default=TAPERED)
    parser.add_argument("--placement", choices=PLACEMENTS, default="post")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("lm.pt"))
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps {args.steps} is not allowed; give at least 1")

    training, validation = corpus()
    print(f"{len(training) / 1e6:.1f} MB to train on, {len(validation) / 1e6:.1f} MB held out")
    model = fit(args.norm, args.placement, args.steps, args.seed, training)
    print(f"training text:   {bits_per_byte(model, training):.3f} bits per byte")
    print(f"validation text: {bits_per_byte(model, validation):.3f} bits per byte")

    save(model, validation, args.out)
    onnx_file = args.out.with_suffix(".onnx")
    result = normfuse.onnx.export(normfuse.load(args.out), onnx_file)
    folded = len(result.report.norms) - len(result.report.remaining)
    print(f"saved {args.out}, exported {onnx_file} (opset {result.opset})")
    print(
        f"{folded} of {len(result.report.norms)} norms folded; "
        f"largest difference to the module {result.verification.worst('ONNX file'):.1e} of the largest output value"
    )
    print("\nwritten by ONNX Runtime:\n")
    print(continue_text(onnxruntime.InferenceSession(onnx_file), "    def __init__(self, ", 300, args.seed))


if __name__ == "__main__":
    main()
