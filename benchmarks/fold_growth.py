"""Times folding against the number of operations: deep programs of every placement of norms.

    python benchmarks/fold_growth.py --out growth.json

Programs of width 4 are traced by the exporter of the tests, which takes milliseconds, and folded: pre-norm and
post-norm with constant statistics, weights that are products of all weights before them, LayerNorm before and behind
the addition, and norms whose shift has to be written out. Times are of the process (CPU), the smallest of three.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import records
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normfuse.folding import fold
from normfuse.nn import UnifiedNorm

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.property.quick_export import quick_export

WIDTH = 4
BLOCK = {
    "pre-norm": lambda x, norm, a, b: x + b(torch.tanh(a(norm(x)))),
    "post-norm": lambda x, norm, a, b: norm(x + b(torch.tanh(a(x)))),
    "shifts written out": lambda x, norm, a, b: x + b(torch.relu(norm(x))),
}
KINDS = ("pre-norm", "post-norm", "shifts written out", "constants", "LayerNorm, pre-norm", "LayerNorm, post-norm")


class Deep(nn.Module):
    """`depth` blocks of one kind."""

    def __init__(self, kind: str, depth: int) -> None:
        super().__init__()
        self.kind = kind.removeprefix("LayerNorm, ")
        norm: Callable[[int], nn.Module] = nn.LayerNorm if kind.startswith("LayerNorm") else UnifiedNorm
        self.norms = nn.ModuleList(norm(WIDTH) for _ in range(depth))
        self.first, self.last = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 3)
        self.a, self.b = (nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth)) for _ in range(2))
        for parameter in self.norms.parameters():
            nn.init.uniform_(parameter, 0.8, 1.2)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        x, weight = self.first(x), torch.eye(WIDTH)
        for norm, a, b in zip(self.norms, self.a, self.b, strict=True):
            if self.kind == "constants":
                weight = weight @ a.weight
                x = F.linear(norm(x), weight)
            else:
                x = BLOCK[self.kind](x, norm, a, b)
        return (self.last(x),)


def seconds(kind: str, depth: int) -> tuple[int, float]:
    """The number of operations of a program, and the time that folding it takes."""
    program = quick_export(Deep(kind, depth).eval().requires_grad_(False), (torch.randn(2, 3),))
    operations = sum(node.op == "call_function" for node in program.graph.nodes)
    times = []
    for _ in range(3):
        started = time.process_time()
        fold(program, verify=False)
        times.append(time.process_time() - started)
    return operations, min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", type=int, nargs="+", default=[1000, 5000, 20000], help="about so many")
    parser.add_argument("--out", type=Path, help="JSON file of results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for kind in KINDS:
        per_block = (seconds(kind, 20)[0] - seconds(kind, 10)[0]) / 10
        for wanted in options.operations:
            operations, took = seconds(kind, round(wanted / per_block))
            rows.append({"kind": kind, "operations": operations, "seconds": round(took, 2)})
            print(
                f"{kind:22} {operations:6} operations {took:7.2f} s {1e3 * took / operations:6.3f} ms each", flush=True
            )
    result = {"command": "python benchmarks/fold_growth.py", "rows": rows, "machine": platform.processor()}
    result |= {"date": datetime.date.today().isoformat(), "torch": torch.__version__}
    if options.out:
        records.write(options.out, result)


if __name__ == "__main__":
    main()
