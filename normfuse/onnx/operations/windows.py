"""Pooling, padding and resizing."""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional as F

from normfuse.onnx.operations.registry import Untranslated, operation, sizes


def window(node: ir.Node, name: str, axes: int) -> list[int]:
    """Strides or dilations, one by default."""
    return list(node.attributes.get_ints(name, [1] * axes))


def padding(node: ir.Node, x: Tensor, kernel: list[int]) -> tuple[list[Any], list[Any]]:
    """What a window pads in front of and behind each axis of `x` [N, C, …]; ``auto_pad`` depends on their sizes."""
    axes, auto = len(kernel), node.attributes.get_string("auto_pad", "NOTSET")
    if auto == "VALID":
        return [0] * axes, [0] * axes
    if auto == "NOTSET":
        pads = list(node.attributes.get_ints("pads", [0] * 2 * axes))
        return pads[:axes], pads[axes:]
    less, more = [], []
    for axis, (k, stride, dilation) in enumerate(
        zip(kernel, window(node, "strides", axes), window(node, "dilations", axes), strict=True)
    ):
        size, reach = x.shape[axis + 2], (k - 1) * dilation + 1
        covered = reach if stride == 1 else ((size + stride - 1) // stride - 1) * stride + reach
        total = reach - 1 if stride == 1 else torch.sym_max(covered - size, 0)
        less.append(total // 2)
        more.append(total - total // 2)
    return (less, more) if auto == "SAME_UPPER" else (more, less)


def pad(x: Tensor, before: list[Any], after: list[Any], value: float) -> Tensor:
    """Constant padding of the last axes."""
    both = [side for pair in zip(before[::-1], after[::-1], strict=True) for side in pair]
    return F.pad(x, both, value=value)


@operation("MaxPool")
def _max_pool(node: ir.Node, x: Tensor) -> Tensor:
    kernel = list(node.attributes["kernel_shape"].as_ints())
    axes, (before, after) = len(kernel), padding(node, x, kernel)
    function = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[axes]
    strides, dilations = window(node, "strides", axes), window(node, "dilations", axes)
    if before != after or any(2 * side > k for side, k in zip(before, kernel, strict=True)):
        x, before = pad(x, before, after, -math.inf), [0] * axes
    return function(x, kernel, strides, before, dilations, bool(node.attributes.get_int("ceil_mode", 0)))


@operation("AveragePool")
def _average_pool(node: ir.Node, x: Tensor) -> Tensor:
    kernel = list(node.attributes["kernel_shape"].as_ints())
    axes, (before, after) = len(kernel), padding(node, x, kernel)
    function = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[axes]
    counted, up = (bool(node.attributes.get_int(name, 0)) for name in ("count_include_pad", "ceil_mode"))
    if set(window(node, "dilations", axes)) != {1}:
        raise Untranslated("average pooling with dilations")
    strides = window(node, "strides", axes)
    if before == after and not any(2 * side > k for side, k in zip(before, kernel, strict=True)):
        return function(x, kernel, strides, before, up, counted)
    if up:
        raise Untranslated("average pooling with ceil_mode and padding that differs between the two sides of an axis")
    padded = function(pad(x, before, after, 0.0), kernel, strides)
    if counted:
        return padded
    inside = function(pad(torch.ones_like(x[:1, :1]), before, after, 0.0), kernel, strides)
    return padded / inside


@operation("GlobalAveragePool")
def _global_average(node: ir.Node, x: Tensor) -> Tensor:
    return x.mean(list(range(2, x.dim())), keepdim=True)


@operation("GlobalMaxPool")
def _global_max(node: ir.Node, x: Tensor) -> Tensor:
    return x.amax(list(range(2, x.dim())), keepdim=True)


@operation("Pad")
def _pad(node: ir.Node, x: Tensor, pads: Any, value: Any = None, axes: Any = None) -> Tensor:
    mode = node.attributes.get_string("mode", "constant")
    if mode not in ("constant", "reflect", "edge"):
        raise Untranslated(f"padding with mode {mode!r}")
    given = sizes(pads)
    where = [axis % x.dim() for axis in (range(x.dim()) if axes is None else sizes(axes))]
    before, after = ([0] * x.dim() for _ in range(2))
    for number, axis in enumerate(where):
        before[axis], after[axis] = given[number], given[number + len(where)]
    first = next((axis for axis in range(x.dim()) if before[axis] or after[axis]), None)
    if first is None:
        return x
    if mode == "constant":
        return pad(x, before[first:], after[first:], 0.0 if value is None else float(value))
    both = [side for pair in zip(before[:1:-1], after[:1:-1], strict=True) for side in pair]
    if first < 2:
        raise Untranslated(f"padding with mode {mode!r} in front of the third axis")
    return F.pad(x, both, mode="replicate" if mode == "edge" else mode)


@operation("Resize")
def _resize(node: ir.Node, x: Tensor, region: Any = None, scales: Any = None, given: Any = None) -> Tensor:
    attributes = node.attributes
    mode = attributes.get_string("mode", "nearest")
    places = attributes.get_string("coordinate_transformation_mode", "half_pixel")
    odd = {"axes", "antialias", "exclude_outside", "keep_aspect_ratio_policy"} & set(attributes)
    constant = None if scales is None else ir.convenience.get_const_tensor(node.inputs[2])
    factors = None if constant is None else constant.numpy().tolist()
    target = factors or (None if given is None else sizes(given))
    if odd or target is None or target[:2] != ([1, 1] if factors else list(x.shape[:2])):
        raise Untranslated("this form of Resize")
    size = {"scale_factor" if factors else "size": target[2:]}
    if mode == "nearest":
        whole = bool(factors) and all(factor == int(factor) for factor in factors)
        floored = places == "asymmetric" and attributes.get_string("nearest_mode", "round_prefer_floor") == "floor"
        if not floored and not (whole and places == "half_pixel" and "nearest_mode" not in attributes):
            raise Untranslated(f"Resize to the nearest with coordinates {places!r}")
        return F.interpolate(x, **size, mode="nearest")
    kind = {("linear", 3): "linear", ("linear", 4): "bilinear", ("cubic", 4): "bicubic"}.get((mode, x.dim()))
    if kind is None or places not in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        raise Untranslated(f"Resize {mode!r} with coordinates {places!r}")
    return F.interpolate(x, **size, mode=kind, align_corners=places == "align_corners")
