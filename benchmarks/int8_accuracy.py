"""What dynamic quantisation to int8 costs encoders with static norms: unfolded, and folded with bounded scales.

python benchmarks/int8_accuracy.py --seeds 5
python benchmarks/int8_accuracy.py --page docs/exporting.md

The encoders are those of benchmarks/inference.py with random weights, gains, and statistics that match their
activations. Each is exported with its norms as they are, folded with a ladder of bounds on the scales
(``max_scale_range``), and folded with scales chosen for integers on other tokens (``balance``). ONNX Runtime's
`quantize_dynamic` makes the products int8, with weights per tensor and per output channel. Printed is the difference of
the output from the float32 module, root of the summed squares relative to that of the output: unfolded, and folded as
a multiple of that, with the share of norms that fold.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import sys
import tempfile
from collections.abc import Sequence
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
BALANCED = "balanced"


BALANCES = {"int8-per-tensor": False, "int8": True}  # and whether weights are quantised per output channel


def quantized_errors(
    program: ExportedProgram, tokens: Tensor, expected: np.ndarray, ways: Sequence[bool] = (False, True)
) -> list[float]:
    """Relative L2 difference from `expected` of the program's int8 files: weights per tensor, per output channel."""
    errors = []
    with tempfile.TemporaryDirectory() as folder:
        plain, target = Path(folder) / "plain.onnx", Path(folder) / "int8.onnx"
        normfuse.onnx.write(program, plain, opset=23)
        for per_channel in ways:
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
        folded[f"{bound:g}"] = {"errors": quantized_errors(form, tokens, expected), "folded": [_gone(report)] * 2}
    typical = torch.randint(VOCABULARY, (4, 64), generator=torch.Generator().manual_seed(seed))
    balanced: dict[str, list[float]] = {"errors": [], "folded": [], "predicted": []}
    for balance, per_channel in BALANCES.items():
        form, report = normfuse.fold(program, balance=balance, example_inputs=(typical,))
        balanced["errors"] += quantized_errors(form, tokens, expected, [per_channel])
        balanced["folded"].append(_gone(report))
        balanced["predicted"].append(report.int8_error)
    return {
        "encoder": _name(width, post, spread),
        "seed": seed,
        "unfolded": quantized_errors(program, tokens, expected),
        "bounds": folded | {BALANCED: balanced},
    }


def _gone(report: normfuse.FoldReport) -> float:
    return 1 - len(report.remaining) / len(report.norms)


def _name(width: int, post: bool, spread: float) -> str:
    return f"width {width}, {'post' if post else 'pre'}-norm, gains 1/{spread:g} to {spread:g}"


def _earlier(options: argparse.Namespace, about: dict[str, Any]) -> list[dict[str, Any]]:
    """The results of a run that was cut short, if it was one of the same versions."""
    if not (options.resume and options.out.exists()):
        return []
    found = json.loads(options.out.read_text())
    same = found["depth"] == options.depth and all(found[name] == about[name] for name in ("onnxruntime", "torch"))
    return found["results"] if same else []


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: errors as multiples of the unfolded file's, geometric means over the encoders of one kind."""
    bounds = list(results[0]["bounds"])
    lines = [
        "| encoder | unfolded | " + " | ".join("unbounded" if b == f"{UNBOUNDED:g}" else b for b in bounds) + " |",
        "|---|---:|" + "---:|" * len(bounds),
    ]
    for name in dict.fromkeys(result["encoder"] for result in results):
        alike = [result for result in results if result["encoder"] == name]
        unfolded = np.array([result["unfolded"] for result in alike])
        cells = [" / ".join(f"{error:.3f}" for error in np.exp(np.log(unfolded).mean(0)))]
        for bound in bounds:
            entries = [result["bounds"][bound] for result in alike]
            ratios = np.exp(np.log(np.array([entry["errors"] for entry in entries]) / unfolded).mean(0))
            gone = [f"{share:.0%}" for share in np.mean([entry["folded"] for entry in entries], 0)]
            folds = gone[0] if gone[0] == gone[1] else " / ".join(gone)
            cells.append(" / ".join(f"{ratio:.2f}" for ratio in ratios) + f" ({folds})")
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
    parser.add_argument(
        "--page", type=Path, help="only write the table of the results into this page, between its marks"
    )
    parser.add_argument("--resume", action="store_true", help="keep what the file of results has, measure the rest")
    options = parser.parse_args()
    if options.page is not None:
        found = json.loads(options.out.read_text())
        about = f"onnxruntime {found['onnxruntime']}, torch {found['torch']}, {found['date']}"
        command = found.get("command", "python benchmarks/int8_accuracy.py --seeds 5")
        records.between(options.page, options.out.stem, f"{table(found['results'])}\n\n`{command}`, {about}.")
        return
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    command = " ".join(["python", "benchmarks/int8_accuracy.py", *sys.argv[1:]])
    about = {
        "command": command,
        "onnxruntime": onnxruntime.__version__,
        "torch": torch.__version__,
        "date": str(date.today()),
    }
    results = _earlier(options, about)
    kinds = itertools.product(range(options.seeds), options.widths, options.spreads, (True, False))
    done = {(result["seed"], result["encoder"]) for result in results}
    for seed, width, spread, post in kinds:
        if (seed, _name(width, post, spread)) in done:
            continue
        results.append(measure(width, options.depth, post, spread, seed, options.bounds))
        records.write(options.out, {"depth": options.depth, **about, "results": results})
        print(table(results), flush=True)


if __name__ == "__main__":
    main()
