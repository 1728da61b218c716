"""Products that begin with what they are added to."""

from __future__ import annotations

import onnx_ir as ir

from .editing import Editor, dims, only_user


def residual_gemm(model: ir.Model) -> int:
    """Make the residual that is added to a product its C operand; says how many there were.

    *Algebra.* ``r + A B = Gemm(A, B, C=r)``.

    *Needs* matrices (see ``gemm2d``), a product without bias that only the addition reads, and a residual of exactly
    the product's shape. Branches end without bias after ``normfuse.fold(..., carry_biases=True)``.

    *Saves* one pass over the product: it is accumulated onto the residual.
    """
    editor = Editor(model, "residual_gemm")
    return sum(_rewrite(node, editor) for node in list(model.graph) if not node.domain)


def _rewrite(node: ir.Node, editor: Editor) -> bool:
    plain = node.op_type == "MatMul" or (node.op_type == "Gemm" and (len(node.inputs) == 2 or node.inputs[2] is None))
    if not plain or node.outputs[0].dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
        return False
    product = node.outputs[0]
    shape = dims(product)
    add = only_user(product, "Add")
    if add is None or shape is None or len(shape) != 2 or any(len(dims(v) or ()) != 2 for v in node.inputs[:2]):
        return False
    residual = next((value for value in add.inputs if value is not product), None)
    if residual is None or dims(residual) != shape:
        return False
    total = add.outputs[0]
    gemm = editor.node("Gemm", [*node.inputs[:2], residual], total, [shape])
    for name, value in node.attributes.items():
        gemm.attributes[name] = value
    editor.graph.insert_after(add, gemm)
    editor.replace(total, gemm.outputs[0])
    editor.drop(total)
    return True
