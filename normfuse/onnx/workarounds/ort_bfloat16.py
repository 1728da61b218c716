"""Operations in bfloat16, of which ONNX Runtime's CPU has hardly any."""

from __future__ import annotations

import onnx_ir as ir

_ROUNDS = ("Cast", "CastLike")
_NARROW, _WIDE = ir.DataType.BFLOAT16, ir.DataType.FLOAT


def widen_bfloat16(model: ir.Model) -> int:
    """Let operations in bfloat16 compute in float32 and round what they give; how many there were.

    PyTorch's CPU does the same. Outputs of the model in bfloat16 become float32: arrays of NumPy hold no bfloat16.
    """
    count = 0
    names = [str(value.name) for value in model.graph.outputs]
    widened: dict[ir.Value, ir.Value] = {}
    for node in list(model.graph):
        results = [value for value in node.outputs if value.dtype == _NARROW]
        operands = [value for value in node.inputs if value is not None and value.dtype == _NARROW]
        if node.op_type in _ROUNDS or not (results or operands):
            continue
        count += 1
        for place, value in enumerate(node.inputs):
            if value is not None and value.dtype == _NARROW:
                if value not in widened:
                    wide = _cast(value, _WIDE, f"{value.name}_wide")
                    model.graph.insert_before(node, wide)
                    widened[value] = wide.outputs[0]
                node.replace_input_with(place, widened[value])
        for value in results:
            rounded = _cast(value, _NARROW, f"{value.name}_rounded")
            if value.is_graph_output():
                value.name = f"{value.name}_exact"
            value.replace_all_uses_with(rounded.outputs[0], replace_graph_outputs=True)
            rounded.replace_input_with(0, value)
            value.dtype = _WIDE
            model.graph.insert_after(node, rounded)
    for place, value in enumerate(model.graph.outputs):
        if value.dtype == _NARROW:
            if value.name == names[place]:
                value.name = f"{value.name}_narrow"
            wide = _cast(value, _WIDE, names[place])
            model.graph.append(wide)
            model.graph.outputs[place] = wide.outputs[0]
            count += 1
    return count


def _cast(value: ir.Value, dtype: ir.DataType, name: str | None) -> ir.Node:
    cast = ir.node("Cast", [value], {"to": dtype})
    result = cast.outputs[0]
    result.name, result.dtype, result.shape = name, dtype, value.shape
    cast.name = f"cast_{name}"
    return cast
