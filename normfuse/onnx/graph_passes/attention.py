"""Attention on [B, S, H·D] tensors."""

from __future__ import annotations

import math

import onnx_ir as ir

from .editing import Editor, constant, dims, is_permutation, only_user, operand, producer, sizes

_PACKED = 3  # queries, keys and values in one tensor


def attention3d(model: ir.Model) -> int:
    """Let ``Attention`` split and merge the heads itself; says for how many nodes.

    *Algebra.* With ``q_num_heads = H``, Attention reads [B, S, H·D] as the heads that
    ``Transpose(Reshape(x, [B, S, H, D]), [0, 2, 1, 3])`` would give, and writes its result as
    ``Reshape(Transpose(y, [0, 2, 1, 3]), [B, S, H·D])`` would. Queries, keys and values cut from one tensor
    [B, S, 3, H, D] are thirds of its last axis, [B, S, 3·H·D]: one ``Split``.

    *Needs* opset 23; all of queries, keys and values in one of these forms, with nothing (such as a rotation) between
    head split and attention; a result that goes through that Transpose and Reshape and nowhere else.

    *Saves* a copy of queries, keys, values and the result.
    """
    if model.opset_imports.get("", 0) < 23:
        return 0
    editor = Editor(model, "attention3d")
    thirds: dict[ir.Value, ir.Node] = {}
    return sum(_rewrite(node, editor, thirds) for node in list(model.graph) if node.op_type == "Attention")


def _rewrite(node: ir.Node, editor: Editor, thirds: dict[ir.Value, ir.Node]) -> bool:
    if node.domain or "q_num_heads" in node.attributes or len(node.inputs) > 4 or len(node.outputs) > 1:
        return False
    split = [operand(node, place) for place in range(3)]
    sources = [source for value in split if (source := unsplit(value)) is not None]
    merged = merged_heads(node.outputs[0])
    if merged is None or len(sources) < len(split):
        return False
    flat = [take(source, editor, thirds) for source in sources]
    for old, new in zip(split, flat, strict=True):
        _redirect_lengths(old, new, editor)
    attributes = dict(node.attributes.items())
    fused = editor.node("Attention", [*flat, *node.inputs[3:]], merged, [dims(merged)])
    for name, attribute in attributes.items():
        fused.attributes[name] = attribute
    for name, value in zip(("q_num_heads", "kv_num_heads"), split, strict=False):
        fused.attributes[name] = ir.AttrInt64(name, int(sizes(value)[1]))
    editor.graph.insert_after(node, fused)
    editor.replace(merged, fused.outputs[0])
    editor.drop(merged)
    return True


def unsplit(value: ir.Value) -> tuple[ir.Value, int | None] | None:
    """The [B, S, H·D] that heads were split from, or [B, S, 3·H·D] and which third of it."""
    shape = dims(value)
    if shape is None or len(shape) != 4 or not all(isinstance(size, int) for size in (shape[1], shape[3])):
        return None
    batch, heads, length, size = shape
    part, packed = _part(value, 0)
    if packed is not None:
        fold = producer(packed, "Transpose")
        reshape = producer(fold.inputs[0], "Reshape") if is_permutation(fold, 2, 0, 3, 1, 4) else None
    else:
        transpose = producer(value, "Transpose")
        if not is_permutation(transpose, 0, 2, 1, 3):
            return None
        part, packed = _part(operand(transpose, 0), 2)
        reshape = producer(transpose.inputs[0] if packed is None else packed, "Reshape")
    if reshape is None:
        return None
    source, split = dims(reshape.inputs[0]), dims(reshape.outputs[0])
    parts = () if packed is None else (_PACKED,)
    merged = int(heads) * int(size) * (1 if packed is None else _PACKED)
    if source != (batch, length, merged) or split != (batch, length, *parts, heads, size):
        return None
    return operand(reshape, 0), part


def _part(value: ir.Value, axis: int) -> tuple[int | None, ir.Value | None]:
    """Which entry of ``axis`` a value is, and of what: unbind, select and indexing as torch writes them."""
    gather = producer(value, "Gather")
    if gather is not None:
        index = constant(gather.inputs[1])
        at = gather.attributes.get_int("axis", 0)
        if index is not None and index.ndim == 0 and at == axis and 0 <= index < _PACKED:
            return int(index), gather.inputs[0]
        return None, None
    squeeze = producer(value, "Squeeze")
    axes = constant(squeeze.inputs[1]) if squeeze is not None and len(squeeze.inputs) > 1 else None
    if squeeze is None or axes is None or axes.tolist() != [axis]:
        return None, None
    piece = operand(squeeze, 0)
    split = producer(piece, "Split")
    if split is not None and len(split.outputs) == _PACKED and split.attributes.get_int("axis", 0) == axis:
        return piece.index(), split.inputs[0]
    cut = producer(piece, "Slice")
    if cut is None:
        return None, None
    start, end, along, *step = [constant(operand) for operand in cut.inputs[1:]]
    if (
        start is None
        or end is None
        or along is None
        or along.tolist() != [axis]
        or any(s is None or s != 1 for s in step)
    ):
        return None, None
    return (int(start[0]), cut.inputs[0]) if 0 <= start[0] < _PACKED and end[0] == start[0] + 1 else (None, None)


def merged_heads(value: ir.Value) -> ir.Value | None:
    """The [B, S, H·D] to which the heads of a result are put together."""
    transpose = only_user(value, "Transpose")
    if not is_permutation(transpose, 0, 2, 1, 3):
        return None
    moved = transpose.outputs[0]
    reshape = only_user(moved, "Reshape")
    if reshape is None or reshape.inputs[0] is not moved:
        return None
    apart, together = dims(moved), dims(reshape.outputs[0])
    if apart is None or together is None or not all(isinstance(size, int) for size in apart[2:]):
        return None
    width = math.prod(size for size in apart[2:] if isinstance(size, int))
    return reshape.outputs[0] if together == (*apart[:2], width) else None


def take(source: tuple[ir.Value, int | None], editor: Editor, thirds: dict[ir.Value, ir.Node]) -> ir.Value:
    """What :func:`unsplit` gave as one value: itself, or that third of it, from one ``Split`` for all in ``thirds``."""
    value, part = source
    if part is None:
        return value
    if value not in thirds:
        batch, length, packed = sizes(value)
        shape = (batch, length, int(packed) // _PACKED)
        split = editor.node("Split", [value], value, [shape] * _PACKED, {"axis": -1, "num_outputs": _PACKED})
        editor.put([split], after=value)
        thirds[value] = split
    return thirds[value].outputs[part]


def _redirect_lengths(old: ir.Value, new: ir.Value, editor: Editor) -> None:
    """Lets what asks heads [B, H, S, D] for their length S (masks that are written out) ask [B, S, H·D]."""
    for use in old.uses():
        shape = use.node
        if shape.op_type != "Shape" or (shape.attributes.get_int("start", 0), shape.attributes.get_int("end", 9)) != (
            2,
            3,
        ):
            continue
        length = editor.node("Shape", [new], shape.outputs[0], [(1,)], {"start": 1, "end": 2}, dtype=ir.DataType.INT64)
        editor.graph.insert_before(shape, length)
        editor.replace(shape.outputs[0], length.outputs[0])
        editor.graph.remove(shape, safe=True)
