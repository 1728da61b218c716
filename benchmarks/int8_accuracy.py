"""What dynamic quantisation to int8 costs encoders with static norms: unfolded, and folded with bounded scales.

python benchmarks/int8_accuracy.py

The encoders are those of benchmarks/inference.py, with gains between 1/2 and 2, and with their cubes (1/8 to 8), their
statistics measured anew. Each is exported with its norms as they are, and folded with a ladder
of bounds on the scales (``max_scale_range``); ONNX Runtime's `quantize_dynamic` makes the products int8, with weights
per tensor and per output channel. Printed is the difference of the output from the float32 module, root of the summed
squares relative to that of the output, and how many norms fold.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from encoder_files import POSITIONS, VOCABULARY, Variant, session, trained
from onnxruntime.quantization import quantize_dynamic
from torch import Tensor, nn
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


def encoder(width: int, depth: int, post: bool, power: int) -> nn.Module:
    """The benchmark's encoder with its gains to a power, and statistics that match its activations."""

    def measure(norm: UnifiedNorm, args: tuple[Tensor, ...]) -> None:
        norm.running_var.copy_(args[0].square().flatten(0, -2).mean(0))

    model = trained(width, depth, "static", post)
    norms = [module for module in model.modules() if isinstance(module, UnifiedNorm)]
    hooks = [module.register_forward_pre_hook(measure) for module in norms]
    with torch.no_grad():
        for module in norms:
            module.weight.pow_(power)
        model(torch.randint(VOCABULARY, (4, 64), generator=torch.Generator().manual_seed(0)))
    for hook in hooks:
        hook.remove()
    return model


def measure(width: int, depth: int, post: bool, power: int, bounds: list[float]) -> dict[str, Any]:
    """Errors of one encoder: ``[weights per tensor, weights per channel]`` unfolded and for every bound."""
    model = encoder(width, depth, post, power)
    tokens = torch.randint(VOCABULARY, (4, 64), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model(tokens).numpy()
    shapes = ({0: Dim("batch"), 1: Dim("seq", max=POSITIONS)},)
    program = torch.export.export(model, (tokens,), dynamic_shapes=shapes)

    folded = {}
    for bound in bounds:
        form, report = normfuse.fold(program, max_scale_range=bound)
        folded[f"{bound:g}"] = {
            "errors": quantized_errors(form, tokens, expected),
            "folded": len(report.norms) - len(report.remaining),
        }
    norms = len(report.norms)
    return {
        "width": width,
        "post": post,
        "gains": 2**power,
        "norms": norms,
        "unfolded": quantized_errors(program, tokens, expected),
        "bounds": folded,
    }


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: error with weights per tensor / per channel as a multiple of the unfolded file's, and norms folded."""
    bounds = list(results[0]["bounds"])
    lines = [
        "| encoder | unfolded | " + " | ".join("unbounded" if float(b) == UNBOUNDED else b for b in bounds) + " |",
        "|---|---:|" + "---:|" * len(bounds),
    ]
    for result in results:
        gains = result["gains"]
        name = f"width {result['width']}, {'post' if result['post'] else 'pre'}-norm, gains 1/{gains} to {gains}"
        cells = [" / ".join(f"{error:.4f}" for error in result["unfolded"])]
        for bound in bounds:
            entry = result["bounds"][bound]
            ratios = (e / u for e, u in zip(entry["errors"], result["unfolded"], strict=True))
            cells.append(" / ".join(f"{r:.2f}" for r in ratios) + f" ({entry['folded']} of {result['norms']})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 192, 384])
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--powers", type=int, nargs="+", default=[1, 3], help="of the gains")
    parser.add_argument("--bounds", type=float, nargs="+", default=[4, 8, 16, 32, 64, UNBOUNDED])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "int8_accuracy.json")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    results = []
    about = {"onnxruntime": onnxruntime.__version__, "torch": torch.__version__, "date": str(date.today())}
    for width, power, post in itertools.product(options.widths, options.powers, (True, False)):
        results.append(measure(width, options.depth, post, power, options.bounds))
        print(table(results[-1:]), flush=True)
        options.out.write_text(json.dumps({"depth": options.depth, **about, "results": results}, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
