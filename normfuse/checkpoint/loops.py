"""Loops over a dimension, which a trace holds as one copy of the loop's body for each step."""

from __future__ import annotations

import os
import re
from collections import Counter

import torch
from torch.export import ExportedProgram

_LINE = re.compile(r'File "([^"]+)", line (\d+), in \w+')
_TORCH = os.path.dirname(torch.__file__)  # whose lines are not the model's
_STEPS = 3  # fewer copies say little


def loop_over(program: ExportedProgram, size: int) -> str | None:
    """The line of a model that a trace holds ``size`` times, in words; None where there is none."""
    runs: Counter[tuple[str, str, str, str]] = Counter()
    for node in program.graph.nodes:
        lines = [at for at in _LINE.findall(node.meta.get("stack_trace") or "") if not at[0].startswith(_TORCH)]
        if node.op == "call_function" and lines:
            stack = node.meta.get("nn_module_stack") or {"": ""}
            runs[(*lines[-1], next(reversed(stack)), str(node.target))] += 1
    found = [(file, line) for (file, line, _, _), count in runs.items() if count == size >= _STEPS]
    return f"{os.path.basename(found[0][0])}, line {found[0][1]}" if found else None
