"""How norms with statistics of each input are written: as few nodes as ONNX Runtime can run them with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnxscript import opset18
from onnxscript.values import Op, Opset

from normfuse.onnx.graph_passes.editing import Editor, dtype_of, operand

aten = torch.ops.aten
RMS_NORM_SINCE = 23  # the operator set that RMSNormalization came with
_DTYPES = {ir.DataType.FLOAT: torch.float32, ir.DataType.FLOAT16: torch.float16, ir.DataType.DOUBLE: torch.float64}
# Until the graph passes are done, an RMSNorm is one node in every operator set; the exporter lets foreign domains pass.
_DOMAIN = "normfuse"
_standard = onnx.defs.get_schema("RMSNormalization", RMS_NORM_SINCE)
_own_rms_norm = Op(
    Opset(_DOMAIN, 1),
    _standard.name,
    onnx.defs.OpSchema(
        _standard.name,
        _DOMAIN,
        1,
        inputs=_standard.inputs,
        outputs=_standard.outputs,
        type_constraints=[(c.type_param_str, c.allowed_type_strs, "") for c in _standard.type_constraints],
        attributes=list(_standard.attributes.values()),
    ),
)


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Translations of ATen operations to put in the place of torch's own; then :func:`adopt`."""
    return {aten.rms_norm.default: _rms_norm, aten.group_norm.default: _group_norm}


def adopt(model: ir.Model) -> None:
    """Turn the nodes of :func:`translations` into ``RMSNormalization``, whatever the operator set."""
    for node in model.graph:
        if node.domain == _DOMAIN:
            node.domain = ""
    model.opset_imports.pop(_DOMAIN, None)


def spell_out(model: ir.Model) -> int:
    """Write ``RMSNormalization`` in operations that older operator sets have; says how many there were.

    They are spelled such that ONNX Runtime fuses them into one ``SimplifiedLayerNormalization``; with the same spelling
    by a reciprocal of the root it does not.
    """
    editor, count = Editor(model, "spelled"), 0
    for node in list(model.graph):
        if node.domain or node.op_type != "RMSNormalization":
            continue
        x, gain, result = operand(node, 0), operand(node, 1), node.outputs[0]
        axis, eps = node.attributes["axis"].as_int(), node.attributes["epsilon"].as_float()
        axes = editor.constant(np.arange(axis, 0), "axes")
        two, small = (
            editor.constant(np.array(v, dtype_of(x).numpy()), name) for v, name in ((2.0, "two"), (eps, "eps"))
        )
        shape = None if result.shape is None else list(result.shape)
        reduced = None if shape is None else [*shape[:axis], *(1,) * -axis]
        square = editor.node("Pow", [x, two], result, [shape])
        mean = editor.node("ReduceMean", [square.outputs[0], axes], result, [reduced], {"keepdims": 1})
        shifted = editor.node("Add", [mean.outputs[0], small], result, [reduced])
        root = editor.node("Sqrt", [shifted.outputs[0]], result, [reduced])
        divided = editor.node("Div", [x, root.outputs[0]], result, [shape])
        scaled = editor.node("Mul", [divided.outputs[0], gain], result, [shape])
        editor.graph.insert_after(node, [square, mean, shifted, root, divided, scaled])
        editor.replace(result, scaled.outputs[0])
        editor.drop(result)
        count += 1
    return count


def _rms_norm(input: Any, normalized_shape: Sequence[int], weight: Any = None, eps: float | None = None) -> Any:
    """One node; torch's translation computes a gain of ones from the input's shape."""
    weight = _filled(normalized_shape, 1.0, input) if weight is None else weight
    eps = torch.finfo(_DTYPES[input.dtype]).eps if eps is None else eps
    return _own_rms_norm(input, weight, axis=-len(normalized_shape), epsilon=eps)


def _group_norm(
    input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, cudnn_enabled: bool = True
) -> Any:
    """InstanceNormalization of the groups: ONNX Runtime takes GroupNormalization apart into two dozen nodes."""
    op: Any = opset18
    ones, zeros = (_filled([num_groups], value, input) for value in (1.0, 0.0))
    grouped = op.Reshape(input, op.Constant(value_ints=[0, num_groups, -1]))
    result = op.Reshape(op.InstanceNormalization(grouped, ones, zeros, epsilon=eps), op.Shape(input))
    shape = op.Constant(value_ints=[-1, *(1,) * (len(input.shape) - 2)])
    if weight is not None:
        result = op.Mul(result, op.Reshape(weight, shape))
    return result if bias is None else op.Add(result, op.Reshape(bias, shape))


def _filled(shape: Sequence[int], value: float, like: Any) -> Any:
    numbers = np.full(math.prod(shape), value, like.dtype.numpy()).reshape(list(shape))
    return opset18.Constant(value=ir.tensor(numbers))  # type: ignore[arg-type]  # it takes what ir makes
