"""Times one step of decoding: a token with a cache of keys and values, in ONNX Runtime or OpenVINO on the CPU.

    python benchmarks/decode.py --quick
    python benchmarks/decode.py
    python benchmarks/decode.py --runtime openvino         # pip install openvino

The same decoder with LayerNorm, RMSNorm, static norms folded away, folded and shaped, and with its norms deleted (the
floor). Every round runs each once, in an order of its own, as in benchmarks/inference.py; ratios of a round are
reported, over sessions that are opened several times. Results go to benchmarks/results/decode-<label>.json;
`--page docs/benchmarks.md` writes their table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import records
import torch
from encoder_files import VOCABULARY, quantize_file
from inference import AGAIN, Results, open_sessions, ratios, run_in_turns
from runtimes import RUNTIMES, open_file
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

import normfuse
from normfuse import onnx as to_onnx
from normfuse.nn import UnifiedNorm
from normfuse.options import TARGETS

ROOT = Path(__file__).parent.parent
NORMS = {
    "floor": lambda width: nn.Identity(),
    "layer": nn.LayerNorm,
    "rms": partial(nn.RMSNorm, eps=1e-5),
    "static": UnifiedNorm,
}
SHAPED = ("cpu", "cpu-single")


class Block(nn.Module):
    def __init__(self, width: int, norm: str) -> None:
        super().__init__()
        self.heads = max(2, width // 64)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = NORMS[norm](width), NORMS[norm](width)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, _, width = x.shape
        shape = (batch, 1, 3, self.heads, width // self.heads)
        query, key, value = self.qkv(self.norm1(x)).reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)
        everything = torch.cat((keys, key), 2), torch.cat((values, value), 2)
        mixed = F.scaled_dot_product_attention(query, *everything).transpose(1, 2).reshape(batch, 1, width)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.norm2(x)))), key, value


class Step(nn.Module):
    """The next token [B, 1] and caches [depth, B, heads, past, width ÷ heads] to logits and what joins the caches."""

    def __init__(self, width: int, depth: int, norm: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width, norm) for _ in range(depth))
        self.last, self.head = NORMS[norm](width), nn.Linear(width, VOCABULARY)

    def forward(self, token: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, new = self.embedding(token), []
        for number, block in enumerate(self.blocks):
            x, key, value = block(x, keys[number], values[number])
            new.append((key, value))
        keys, values = (torch.stack(parts) for parts in zip(*new, strict=True))
        return self.head(self.last(x)), keys, values


def trained(width: int, depth: int, norm: str) -> Step:
    """Gains between 1/2 and 2, biases, and statistics that match the activations."""
    torch.manual_seed(0)
    model = Step(width, depth, norm).eval()
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm | nn.RMSNorm | UnifiedNorm)]
    hooks = [m.register_forward_pre_hook(_measure) for m in norms if isinstance(m, UnifiedNorm)]
    with torch.no_grad():
        for module in norms:
            module.weight.copy_(torch.exp2(2 * torch.rand(width) - 1))
            if getattr(module, "bias", None) is not None:
                module.bias.copy_(0.2 * torch.randn(width))
        model(*example(width, depth, 64, 16))
    for hook in hooks:
        hook.remove()
    return model


def _measure(norm: UnifiedNorm, arguments: tuple[Tensor, ...]) -> None:
    norm.running_var.copy_(arguments[0].square().flatten(0, -2).mean(0))


def example(width: int, depth: int, batch: int, past: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    heads = max(2, width // 64)
    shape = (depth, batch, heads, past, width // heads)
    caches = (torch.randn(shape, generator=generator) for _ in range(2))
    return torch.randint(VOCABULARY, (batch, 1), generator=generator), *caches


def write_files(folder: Path, width: int, depth: int) -> dict[str, Path]:
    """All float32 files, by variant."""
    files = {}
    inputs = example(width, depth, 2, 5)
    batch, past = Dim("batch"), Dim("past")
    shapes = ({0: batch}, {1: batch, 3: past}, {1: batch, 3: past})
    for norm in NORMS:
        model = trained(width, depth, norm)
        program = torch.export.export(model, inputs, dynamic_shapes=shapes)
        forms = {"folded": (normfuse.fold(program)[0], ())} if norm == "static" else {norm: (program, ())}
        if norm == "static":
            carried = normfuse.fold(program, carry_biases=True)[0]
            forms |= {f"shaped, {target}": (carried, TARGETS[target]) for target in SHAPED}
        for name, (form, passes) in forms.items():
            files[name] = folder / f"{name.replace(', ', '-')}.onnx"
            to_onnx.write(form, files[name], opset=23, passes=passes)
    return files


def measure(args: argparse.Namespace, files: dict[str, Path], where: dict[str, int]) -> dict[str, Any]:
    """Quartiles of the ratios to the floor, and of folded to the norms that it replaces, over all openings."""
    times: dict[str, list[float]] = {name: [] for name in (*files, AGAIN)}
    for opening in range(args.openings):
        for name, some in _time_opened(args, files, where, opening).items():
            times[name] += some
    ours = min((name for name in files if name.startswith(("folded", "shaped"))), key=lambda n: np.median(times[n]))
    return {
        "load": round(os.getloadavg()[0], 2),
        "rounds": len(times["floor"]),
        "milliseconds": {name: round(float(np.median(values)), 4) for name, values in times.items()},
        "to_floor": {name: ratios(values, times["floor"]) for name, values in times.items()},
        "fastest": ours,
        "folded_to_layer": ratios(times["folded"], times["layer"]),
        "folded_to_rms": ratios(times["folded"], times["rms"]),
        "fastest_to_layer": ratios(times[ours], times["layer"]),
    }


def _time_opened(
    args: argparse.Namespace, files: dict[str, Path], where: dict[str, int], opening: int
) -> dict[str, list[float]]:
    """Milliseconds of every file and of the floor again, by round, in sessions that are opened here."""
    sessions = open_sessions(files, opening, lambda name: open_file(files[name], args.threads, args.runtime))
    arrays = [t.numpy() for t in example(where["width"], args.depth, where["batch"], where["past"])]
    inputs = {
        name: dict(zip((entry.name for entry in loaded.get_inputs()), arrays, strict=True))
        for name, loaded in sessions.items()
    }
    return run_in_turns(sessions, inputs, args.seconds / args.openings, args.rounds)


def table(run: dict[str, Any]) -> str:
    """Markdown: medians of ratios to the floor, and of the folded file to LayerNorm and RMSNorm."""
    names = [name for name in run["settings"][0]["to_floor"] if name != "floor"]
    lines = [
        "| width | precision | batch | cache | floor, ms | " + " | ".join(f"{n} ÷ floor" for n in names)
        + " | folded ÷ LayerNorm | ÷ RMSNorm |",
        "|---:|---|---:|---:|---:|" + "---:|" * (len(names) + 2),
    ]  # fmt: skip
    for s in run["settings"]:
        cells = [s["width"], s["precision"], s["batch"], s["past"], f"{s['milliseconds']['floor']:.3f}"]
        cells += [f"{s['to_floor'][name][1]:.2f}" for name in names]
        cells += [f"{s[key][1]:.2f}" for key in ("folded_to_layer", "folded_to_rms")]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    about = run["machine"]
    command = run["commands"][-1].partition(" (load")[0]
    runtime = next(name for name in RUNTIMES if name in about)
    lines += ["", f"`{command}`, {about['cpu']}, {runtime} {about[runtime]}, {run['date']}. {run['note']}".rstrip()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512, 768])
    parser.add_argument("--pasts", type=int, nargs="+", default=[128, 1024], help="tokens in the cache")
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "int8"), default=["fp32", "int8"])
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--runtime", choices=RUNTIMES, default="onnxruntime")
    parser.add_argument("--seconds", type=float, default=5.0, help="per setting, for all variants together [5]")
    parser.add_argument("--openings", type=int, default=8, help="how often all sessions are opened anew [8]")
    parser.add_argument("--rounds", type=int, default=9, help="the fewest for each opening [9]")
    parser.add_argument("--resume", action="store_true", help="keep what the file of results has, measure the rest")
    parser.add_argument("--quick", action="store_true", help="one width and cache, fp32")
    parser.add_argument("--label", help="part of the result's name [cpu, or the runtime]")
    parser.add_argument("--note", default="", help="what a reader must know of this run, such as a shared machine")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--page", type=Path, help="only write the table of the results into this page")
    args = parser.parse_args()
    label = args.label or ("cpu" if args.runtime == "onnxruntime" else args.runtime)
    target = args.results / f"decode-{label}.json"
    if args.page is not None:
        records.between(args.page, f"decode-{label}", table(json.loads(target.read_text())))
        return
    if args.quick:
        args.widths, args.pasts, args.precisions, args.depth, args.seconds = [128], [128], ["fp32"], 2, 1.0
    args.results.mkdir(parents=True, exist_ok=True)
    results = Results(target, args)
    for width, precision in itertools.product(args.widths, args.precisions):
        settings = [
            {"width": width, "precision": precision, "threads": args.threads, "batch": batch, "past": past}
            for batch, past in itertools.product(args.batches, args.pasts)
        ]
        if all(results.find(where) for where in settings):
            continue
        with tempfile.TemporaryDirectory() as folder:
            files = write_files(Path(folder), width, args.depth)
            if precision == "int8":
                files = {name: quantize_file(path) for name, path in files.items()}
            for where in settings:
                if not results.find(where):
                    results.add("settings", where, measure(args, files, where))
                    print(where, results.find(where)["to_floor"], flush=True)
    print(f"written: {target}")


if __name__ == "__main__":
    main()
