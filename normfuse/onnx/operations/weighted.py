"""Products: matrices, convolutions, einsum."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional as F

from normfuse.onnx.operations.registry import Untranslated, operation
from normfuse.onnx.operations.windows import pad, padding, window


@operation("MatMul")
def _matmul(node: ir.Node, a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a, b)


@operation("Gemm")
def gemm(node: ir.Node, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    attributes = node.attributes
    a = a.t() if attributes.get_int("transA", 0) else a
    alpha, beta = attributes.get_float("alpha", 1.0), attributes.get_float("beta", 1.0)
    if attributes.get_int("transB", 0):
        product = F.linear(a, b)
    else:
        product = torch.matmul(a, b)
    product = product if alpha == 1 else alpha * product
    return product if c is None else product + (c if beta == 1 else beta * c)


@operation("Einsum")
def _einsum(node: ir.Node, *operands: Tensor) -> Tensor:
    return torch.einsum(node.attributes["equation"].as_string(), *operands)


@operation("Conv")
def convolution(node: ir.Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A convolution of one to three axes. Padding that differs between the sides of an axis goes before it."""
    axes = weight.dim() - 2
    function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[axes]
    strides, dilations = window(node, "strides", axes), window(node, "dilations", axes)
    before, after = padding(node, x, list(weight.shape[2:]))
    if before != after:
        x, before = pad(x, before, after, 0.0), [0] * axes
    return function(x, weight, bias, strides, before, dilations, node.attributes.get_int("group", 1))


@operation("ConvTranspose")
def _transposed(node: ir.Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    axes = weight.dim() - 2
    function = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[axes]
    pads = list(node.attributes.get_ints("pads", [0] * 2 * axes))
    odd = node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET" or "output_shape" in node.attributes
    if odd or pads[:axes] != pads[axes:]:
        raise Untranslated("a transposed convolution with auto_pad, output_shape or padding that differs by side")
    strides, dilations = window(node, "strides", axes), window(node, "dilations", axes)
    more = list(node.attributes.get_ints("output_padding", [0] * axes))
    return function(x, weight, bias, strides, pads[:axes], more, node.attributes.get_int("group", 1), dilations)
