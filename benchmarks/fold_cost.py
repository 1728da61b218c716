"""Times folding and writing a large decoder, and the memory they take on top of the loaded model.

    python benchmarks/fold_cost.py --width 2048 --depth 20

A pre-norm decoder with Unified Norm and random weights is traced with torch.export, folded and written as ONNX (with
external data beyond 2 GB). Memory is the process's resident set: its peak during each stage, less what was resident
with the model loaded, as a multiple of the weights.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import records
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

import normfuse
from normfuse.nn import UnifiedNorm


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 64
        self.norm1, self.norm2 = UnifiedNorm(width), UnifiedNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, s, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, s, 3, self.heads, 64).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, s, c))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Decoder(nn.Module):
    def __init__(self, width: int, depth: int, vocabulary: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm, self.head = UnifiedNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(tokens))))


def build(width: int, depth: int, vocabulary: int) -> nn.Module:
    """The decoder with random weights and statistics, built without the slow default initialisation."""
    with torch.device("meta"):
        model = Decoder(width, depth, vocabulary)
    model = model.to_empty(device="cpu").eval()
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            tensor.zero_()
        elif tensor.dim() > 1 and "buffer" not in name:
            tensor.uniform_(-(width**-0.5), width**-0.5)
        else:
            tensor.uniform_(0.5, 1.5)
    return model


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def watched(name: str, record: dict[str, dict[str, float]], base: int, weights: int) -> Iterator[None]:
    """Record a stage's seconds and its peak of memory above `base` as a multiple of the weights.

    The seconds are recorded as spent on CPUs too, by all threads: a busy machine leaves those as they are.
    """
    peak, done = resident(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, resident())

    thread = threading.Thread(target=watch)
    thread.start()
    started, worked = time.perf_counter(), time.process_time()
    try:
        yield
    finally:
        seconds, cpu = time.perf_counter() - started, time.process_time() - worked
        done.set()
        thread.join()
        memory = round((peak - base) / weights, 3)
        record[name] = {"seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2), "memory": memory}
        print(f"{name:>6}: {seconds:7.1f} s, {cpu:.1f} s of CPU, at most {memory:.2f} x the weights above the model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--vocabulary", type=int, default=1000)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    model = build(options.width, options.depth, options.vocabulary)
    parameters = sum(p.numel() for p in model.parameters())
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    print(f"{parameters / 1e9:.2f} billion parameters, {weights / 1e9:.2f} GB")
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    stages: dict[str, dict[str, float]] = {}
    base = resident()
    with watched("trace", stages, base, weights):
        program = torch.export.export(model, (tokens,), dynamic_shapes=({0: Dim("batch"), 1: Dim("sequence")},))
    with watched("fold", stages, base, weights):
        folded, report = normfuse.fold(program)
    with tempfile.TemporaryDirectory() as folder, watched("write", stages, base, weights):
        files = normfuse.onnx.write(folded, Path(folder) / "model.onnx", opset=23)
        size = sum(file.stat().st_size for file in files)
    print(
        f"{len(report.norms) - len(report.remaining)} of {len(report.norms)} norms folded, {size / 1e9:.2f} GB written"
    )
    if options.out is not None:
        machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        figures = {
            "date": datetime.date.today().isoformat(),
            "load": round(os.getloadavg()[0], 1),
            "machine": machine,
            "torch": torch.__version__,
            "parameters": parameters,
            "stages": stages,
        }
        records.write(options.out, figures)


if __name__ == "__main__":
    main()
