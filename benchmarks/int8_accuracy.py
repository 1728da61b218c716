"""What dynamic quantisation to int8 costs encoders with static norms: unfolded, and folded with bounded scales.

python benchmarks/int8_accuracy.py

The encoders are those of benchmarks/inference.py with random weights, gains, and statistics that match their
activations. Each is exported with its norms as they are, and folded with a ladder of bounds on the scales
(``max_scale_range``); ONNX Runtime's `quantize_dynamic` makes the products int8, with weights per tensor and per output
channel. Printed is the difference of the output from the float32 module, root of the summed squares relative to that of
the output: unfolded, and folded as a multiple of that, with the share of norms that fold.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import records
import torch
from encoder_files import POSITIONS, VOCABULARY, Encoder, Variant, session
from onnxruntime.quantization import quantize_dynamic
from torch import Tensor
from torch.export import Dim, ExportedProgram

import normfuse
import normfuse.onnx
from normfuse.nn import UnifiedNorm

UNBOUNDED = 2.0**40


def quantized_errors(program: ExportedProgram, tokens: Tensor, expected: np.ndarray) -> list[float]:
    """Relative L2 difference from `expected` of the program's int8 files: weights per tensor, per output channel."""
    errors = []
    with tempfile.TemporaryDirectory() as folder:
        plain, target = Path(folder) / "plain.onnx", Path(folder) / "int8.onnx"
        normfuse.onnx.write(program, plain, opset=23)
        for per_channel in (False, True):
            proto = onnx.load(plain)
            proto.graph.ClearField("value_info")  # the quantizer infers shapes anew, and trips over torch's names
            quantize_dynamic(
                proto,
                target,
                op_types_to_quantize=["MatMul"],
                per_channel=per_channel,
                extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
            )
            loaded = session(Variant(target, expected), 1)
            got = loaded.run(None, {loaded.get_inputs()[0].name: tokens.numpy()})[0]
            errors.append(float(np.linalg.norm(got - expected) / np.linalg.norm(expected)))
    return errors


def encoder(width: int, depth: int, post: bool, spread: float, seed: int) -> Encoder:
    """The benchmark's encoder with gains from 1/spread to spread and statistics that match its activations."""

    def measure(norm: UnifiedNorm, args: tuple[Tensor, ...]) -> None:
        norm.running_var.copy_(args[0].square().flatten(0, -2).mean(0))

    torch.manual_seed(seed)
    model = Encoder(width, depth, "static", post).eval()
    norms = [module for module in model.modules() if isinstance(module, UnifiedNorm)]
    hooks = [module.register_forward_pre_hook(measure) for module in norms]
    with torch.no_grad():
        for module in norms:
            module.weight.copy_(spread ** (2 * torch.rand(width) - 1))
            module.bias.copy_(0.2 * torch.randn(width))
        model(torch.randint(VOCABULARY, (4, 64)))
    for hook in hooks:
        hook.remove()
    return model


def measure(width: int, depth: int, post: bool, spread: float, seed: int, bounds: list[float]) -> dict[str, Any]:
    """Errors of one encoder: ``[weights per tensor, weights per channel]`` unfolded and for every bound."""
    model = encoder(width, depth, post, spread, seed)
    tokens = torch.randint(VOCABULARY, (4, 64))
    with torch.inference_mode():
        expected = model(tokens).numpy()
    shapes = ({0: Dim("batch"), 1: Dim("seq", max=POSITIONS)},)
    program = torch.export.export(model, (tokens,), dynamic_shapes=shapes)
    folded = {}
    for bound in bounds:
        form, report = normfuse.fold(program, max_scale_range=bound)
        gone = len(report.norms) - len(report.remaining)
        folded[f"{bound:g}"] = {"errors": quantized_errors(form, tokens, expected), "folded": gone / len(report.norms)}
    return {
        "encoder": f"width {width}, {'post' if post else 'pre'}-norm, gains 1/{spread:g} to {spread:g}",
        "seed": seed,
        "unfolded": quantized_errors(program, tokens, expected),
        "bounds": folded,
    }


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: errors as multiples of the unfolded file's, geometric means over the encoders of one kind."""
    bounds = list(results[0]["bounds"])
    lines = [
        "| encoder | unfolded | " + " | ".join("unbounded" if float(b) == UNBOUNDED else b for b in bounds) + " |",
        "|---|---:|" + "---:|" * len(bounds),
    ]
    for name in dict.fromkeys(result["encoder"] for result in results):
        alike = [result for result in results if result["encoder"] == name]
        unfolded = np.array([result["unfolded"] for result in alike])
        cells = [" / ".join(f"{error:.3f}" for error in np.exp(np.log(unfolded).mean(0)))]
        for bound in bounds:
            entries = [result["bounds"][bound] for result in alike]
            ratios = np.exp(np.log(np.array([entry["errors"] for entry in entries]) / unfolded).mean(0))
            gone = float(np.mean([entry["folded"] for entry in entries]))
            cells.append(" / ".join(f"{ratio:.2f}" for ratio in ratios) + f" ({gone:.0%})")
        lines.append(f"| {name} ({len(alike)}) | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 192])
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument(
        "--spreads", type=float, nargs="+", default=[2, 8], help="largest gain, its inverse the smallest"
    )
    parser.add_argument("--seeds", type=int, default=3, help="encoders of each kind")
    parser.add_argument("--bounds", type=float, nargs="+", default=[4, 8, 32, UNBOUNDED])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "int8_accuracy.json")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    results = []
    about = {"onnxruntime": onnxruntime.__version__, "torch": torch.__version__, "date": str(date.today())}
    kinds = itertools.product(range(options.seeds), options.widths, options.spreads, (True, False))
    for seed, width, spread, post in kinds:
        results.append(measure(width, options.depth, post, spread, seed, options.bounds))
        records.write(options.out, {"depth": options.depth, **about, "results": results})
        print(table(results), flush=True)


if __name__ == "__main__":
    main()
