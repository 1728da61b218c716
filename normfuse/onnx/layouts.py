"""Strides on which torch.onnx does not agree with itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.export import ExportedProgram

aten = torch.ops.aten


@contextmanager
def contiguous_reshapes(program: ExportedProgram) -> Iterator[None]:
    """Meanwhile what a program reshapes is made contiguous first.

    torch.onnx decides whether a reshape is a view from strides, when it decomposes the program, and refuses the view
    when strides differ the second time it looks; attention with a mask has such results. ONNX has no strides: nothing
    of this is left in the file.
    """
    added = []
    for node in list(program.graph.nodes):
        if node.target is aten.reshape.default:
            operand = node.args[0]
            with program.graph.inserting_before(node):
                copy = program.graph.call_function(
                    aten.clone.default, (operand,), {"memory_format": torch.contiguous_format}
                )
            copy.meta = {**operand.meta, "val": operand.meta["val"].clone(memory_format=torch.contiguous_format)}
            node.replace_input_with(operand, copy)
            added.append((node, operand, copy))
    program.graph_module.recompile()
    try:
        yield
    finally:
        for node, operand, copy in added:
            node.replace_input_with(copy, operand)
            program.graph.erase_node(copy)
        program.graph_module.recompile()
