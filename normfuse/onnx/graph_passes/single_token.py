"""Attention heads of one token, which are split and merged without moving anything."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .attention import merged_heads, take, unsplit
from .editing import Dim, Editor, dims, operand, sizes


def single_token(model: ir.Model) -> int:
    """Split and merge the heads of a single token by ``Reshape`` alone, as in a step of decoding; says how often.

    *Algebra.* ``Transpose(x, [0, 2, 1, 3])`` of [B, 1, H, D] moves an axis of size 1, so [B, H, 1, D] has the same
    entries in the same order: ``Reshape``. Queries, keys and values cut from one tensor [B, 1, 3, H, D] are thirds of
    its last axis before the heads are split, [B, 1, 3·H·D]: one ``Split`` and a ``Reshape`` each.

    *Needs* opset 18; a number of tokens, heads and their size that are known, the first of them 1.

    *Saves* a copy each of queries, keys, values and the result, and the nodes that cut the former out: a step takes
    so little time that each node counts. What :func:`attention3d` rewrites is left to it.
    """
    if model.opset_imports.get("", 0) < 18:
        return 0
    rewriting = _Rewriting(Editor(model, "single_token"))
    nodes = [node for node in model.graph if node.op_type in ("Transpose", "Squeeze", "Gather")]
    return sum(rewriting.split(node) or rewriting.merge(node) for node in nodes if node.graph is not None)


class _Rewriting:
    """What the rewrites of one graph share: thirds of packed tensors, and shapes."""

    def __init__(self, editor: Editor) -> None:
        self.editor = editor
        self._thirds: dict[ir.Value, ir.Node] = {}
        self._shapes: dict[tuple[Dim, ...], ir.Value] = {}

    def split(self, node: ir.Node) -> bool:
        """Heads [B, H, 1, D] out of [B, 1, H·D], or out of a third of [B, 1, 3·H·D]."""
        heads = node.outputs[0]
        source, shape = unsplit(heads), dims(heads)
        if source is None or shape is None or shape[2] != 1:
            return False
        self._reshape(take(source, self.editor, self._thirds), heads)
        return True

    def merge(self, node: ir.Node) -> bool:
        """[B, 1, H·D] out of heads [B, H, 1, D]."""
        heads = operand(node, 0)
        merged, shape = merged_heads(heads), dims(heads)
        if merged is None or shape is None or shape[2] != 1:
            return False
        self._reshape(heads, merged)
        return True

    def _reshape(self, value: ir.Value, old: ir.Value) -> None:
        """Puts a Reshape of a value in the place of another, which has sizes that are known behind the first."""
        shape = sizes(old)
        known = shape[1:]
        if known not in self._shapes:
            self._shapes[known] = self.editor.constant(np.array([-1, *known], np.int64), "shape")
        reshape = self.editor.node("Reshape", [value, self._shapes[known]], old, [shape])
        self.editor.put([reshape], after=value)
        self.editor.replace(old, reshape.outputs[0])
        self.editor.drop(old)
