"""What older files spell out in arithmetic, as the operations that they mean: GELU, and products with their bias."""

from __future__ import annotations

import math

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional as F

from normfuse.onnx.operations.registry import operation
from normfuse.onnx.shaping.editing import Editor, constant, dims, only_user, producer

_DOMAIN = "normfuse"  # of what stands in their place; it never leaves memory


def restore(model: ir.Model) -> int:
    """Puts one operation in the place of what is spelled out, whatever the order of factors; says how often.

    LayerNorm and RMSNorm in arithmetic are found later, in the program, see :mod:`normfuse.folding.written_out`.
    """
    editor = Editor(model, "restored")
    for node in list(model.graph):
        _apart(node, editor)
    return sum(_gelu(node, editor) or _linear(node, editor) for node in list(model.graph))


@operation(f"{_DOMAIN}.Gelu")
def _gelu_in_torch(node: ir.Node, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=node.attributes.get_string("approximate", "none"))


@operation(f"{_DOMAIN}.Linear")
def _linear_in_torch(node: ir.Node, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, torch.t(weight), bias)


# Which operand is a bias in operations that ONNX Runtime fused, and which ones it may belong to.
_BIASED = {"BiasGelu": (1, (0,)), "FastGelu": (1, (0,)), "SkipLayerNormalization": (4, (0, 1))}


def _apart(node: ir.Node, editor: Editor) -> None:
    """Takes the bias of a product back out of what ONNX Runtime fused it into."""
    if node.domain != "com.microsoft" or node.op_type not in _BIASED:
        return
    place, owners = _BIASED[node.op_type]
    bias = node.inputs[place] if place < len(node.inputs) else None
    for owner in owners if bias is not None else ():
        value = node.inputs[owner]
        if producer(value, "MatMul") is not None and len(value.uses()) == 1:
            add = editor.node("Add", [value, bias], value, [dims(value)])
            editor.graph.insert_before(node, add)
            node.replace_input_with(owner, add.outputs[0])
            node.replace_input_with(place, None)
            return


def _linear(product: ir.Node, editor: Editor) -> bool:
    """``x W + b`` with constants W [K, N] and b [N]: a bias of its own lets shifts arrive."""
    if product.domain or product.op_type != "MatMul" or product.outputs[0].is_graph_output():
        return False
    x, weight = product.inputs
    add = only_user(product.outputs[0], "Add")
    bias = None if add is None else _other(add, product.outputs[0])
    if bias is None or weight.const_value is None or bias.const_value is None:
        return False
    shape = dims(weight)
    if shape is None or len(shape) != 2 or dims(bias) != shape[1:]:
        return False
    _put("Linear", [x, weight, bias], add, editor)
    return True


def _gelu(node: ir.Node, editor: Editor) -> bool:
    """``x / 2 · (1 + erf(x / √2))``, or the tanh that comes close to it."""
    if node.domain or node.op_type not in ("Erf", "Tanh"):
        return False
    x = _scaled(node.inputs[0], math.sqrt(0.5)) if node.op_type == "Erf" else _inside_tanh(node.inputs[0])
    plus = only_user(node.outputs[0], "Add")
    if x is None or plus is None or not _is_number(_other(plus, node.outputs[0]), 1.0):
        return False
    last, missing = plus, {"x", "half"}
    while missing:
        value = last.outputs[0]
        product = only_user(value, "Mul")
        factor = None if product is None else _other(product, value)
        if factor is x and "x" in missing:
            missing.remove("x")
        elif _is_number(factor, 0.5) and "half" in missing:
            missing.remove("half")
        elif len(missing) == 2 and _scaled(factor, 0.5) is x:
            missing.clear()
        else:
            return False
        last = product
    attributes = {} if node.op_type == "Erf" else {"approximate": "tanh"}
    _put("Gelu", [x], last, editor, attributes)
    return True


def _inside_tanh(value: ir.Value | None) -> ir.Value | None:
    """x in ``√(2/π) · (x + 0.044715 x³)``."""
    total = producer(_scaled(value, math.sqrt(2 / math.pi)), "Add")
    for x, cube in () if total is None else (total.inputs, total.inputs[::-1]):
        power = producer(_scaled(cube, 0.044715), "Pow", "Mul")
        if power is None:
            continue
        if power.op_type == "Pow" and power.inputs[0] is x and _is_number(power.inputs[1], 3.0):
            return x
        square = producer(_other(power, x), "Mul")
        if power.op_type == "Mul" and square is not None and list(square.inputs) == [x, x]:
            return x
    return None


def _scaled(value: ir.Value | None, factor: float) -> ir.Value | None:
    """What is multiplied by a number, or divided by its inverse."""
    node = producer(value, "Mul", "Div")
    if node is None:
        return None
    first, second = node.inputs
    if node.op_type == "Div":
        return first if _is_number(second, 1 / factor) else None
    return first if _is_number(second, factor) else second if _is_number(first, factor) else None


def _is_number(value: ir.Value | None, number: float) -> bool:
    """Whether a value is this number, up to the digits that files give it."""
    array = constant(value)
    return array is not None and array.size == 1 and math.isclose(array.item(), number, rel_tol=1e-4)


def _other(node: ir.Node, value: ir.Value | None) -> ir.Value | None:
    """The other of two operands; None if `value` is none of them."""
    left, right = node.inputs
    return right if left is value else left if right is value else None


def _put(
    kind: str, inputs: list[ir.Value | None], last: ir.Node, editor: Editor, attributes: dict | None = None
) -> None:
    old = last.outputs[0]
    new = ir.node(kind, inputs, attributes or {}, domain=_DOMAIN, name=last.name or editor.name(kind))
    new.outputs[0].name, new.outputs[0].dtype, new.outputs[0].shape = editor.name(str(old.name)), old.dtype, old.shape
    editor.graph.insert_after(last, new)
    editor.replace(old, new.outputs[0])
    editor.drop(old)
