"""Interval bounds through an exported program, folded or not (Gowal et al., 2018, arXiv 1810.12715)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node, map_arg

from .operations import CASTS, CONVOLUTIONS, VALLEYS, is_view, rises

aten = torch.ops.aten


class Interval(NamedTuple):
    """All values between two tensors.

    Attributes:
        lower: the smallest values.
        upper: the largest ones, of the same shape.

    Example:
        >>> from normfuse.folding import Interval
        >>> Interval(torch.zeros(2), torch.ones(2)).upper
        tensor([1., 1.])
    """

    lower: Tensor
    upper: Tensor


_TANH_GELU_VALLEY = -0.7524614220710162
_PRODUCTS = CONVOLUTIONS | {aten.linear.default, aten.matmul.default, aten.mm.default}


def interval_bounds(program: ExportedProgram, lower: Tensor, upper: Tensor, *others: Tensor) -> Interval:
    """Bounds of the output of a program for all first inputs between ``lower`` and ``upper``.

    Args:
        program: exported in evaluation mode, with one output, of weights, static norms, sums, pooling, and functions
            that rise (ReLU, tanh, …) or have one valley (GELU, SiLU). Folding a norm makes its bounds equal or
            tighter: it leaves fewer operations between which the relation of values is forgotten.
        lower: the smallest values of the first input, in its shape.
        upper: the largest ones.
        others: the remaining inputs, exactly known.

    Returns:
        The two bounds.

    Raises:
        ValueError: an operation has no bounds here; the message names it.

    Example:
        >>> from normfuse.folding import interval_bounds
        >>> program = torch.export.export(nn.Sequential(nn.Linear(2, 3), nn.ReLU()).eval(), (torch.zeros(1, 2),))
        >>> bounds = interval_bounds(program, -torch.ones(1, 2), torch.ones(1, 2))
        >>> bool((bounds.lower >= 0).all() and (bounds.lower <= bounds.upper).all())
        True
    """
    signature, values = program.graph_signature, {}
    stored = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    inputs = iter((Interval(lower, upper), *others))
    for node in program.graph.nodes:
        if node.op == "placeholder":
            known = stored.get(node.name)
            values[node] = next(inputs) if known is None else {**program.constants, **program.state_dict}[known]
        elif node.op == "output":
            (result,) = (values[operand] for operand in node.all_input_nodes)
            return result if isinstance(result, Interval) else Interval(result, result)
        elif node.op == "call_function" and node.target is not aten._assert_tensor_metadata.default:
            values[node] = _bound(node, values)
    raise ValueError("the program has no output")


def _bound(node: Node, values: dict[Node, Any]) -> Any:
    args, kwargs = (map_arg(part, lambda n: values[n]) for part in (node.args, dict(node.kwargs)))
    target = node.target

    def at(bound: int) -> Any:
        def pick(n: Node) -> Any:
            return values[n][bound] if isinstance(values[n], Interval) else values[n]

        return target(*map_arg(node.args, pick), **map_arg(dict(node.kwargs), pick))

    uncertain = [n for n in node.all_input_nodes if isinstance(values[n], Interval)]
    if not uncertain:
        return target(*args, **kwargs)
    x: Any = args[0] if isinstance(args[0], Interval) else None
    if rises(node) or is_view(node) or target in CASTS:  # each bound goes through on its own
        low, high = at(0), at(1)
        if isinstance(low, Tensor):
            return Interval(low, high)
        return [Interval(*pair) for pair in zip(low, high, strict=True)]
    if target in VALLEYS:
        bottom = _TANH_GELU_VALLEY if kwargs.get("approximate") == "tanh" else VALLEYS[target]
        return _valley(x, lambda v: target(v, *args[1:], **kwargs), bottom)
    if target in _PRODUCTS and x is not None and not isinstance(args[1], Interval):
        centre, radius = (x.upper + x.lower) / 2, (x.upper - x.lower) / 2
        rest = list(args[2:])
        middle = target(centre, args[1], *rest, **kwargs)
        if rest and target not in (aten.matmul.default, aten.mm.default):
            rest[0] = None  # the bias moves the centre only
        spread = target(radius, args[1].abs(), *rest, **{**kwargs, **({"bias": None} if "bias" in kwargs else {})})
        return Interval(middle - spread, middle + spread)
    if target is aten.batch_norm.default and x is not None and not args[5]:
        weight, bias, mean, var = args[1:5]
        eps = args[7]
        scale = torch.rsqrt(var + eps) if weight is None else weight * torch.rsqrt(var + eps)
        shift = -mean * scale if bias is None else bias - mean * scale
        shape = (1, -1, *(1,) * (x.lower.dim() - 2))
        return _affine(x, scale.view(shape), shift.view(shape))
    if target is aten.addcmul.default and len(uncertain) == 1 and not isinstance(args[0], Interval):
        factors = args[1:3] if isinstance(args[1], Interval) else args[2:0:-1]
        return _affine(factors[0], factors[1] * kwargs.get("value", 1), args[0])
    by_interval = target is aten.div.Tensor and x is None
    if target in (aten.mul.Tensor, aten.div.Tensor) and len(uncertain) == 1 and not by_interval:
        interval, factor = args[:2] if x is not None else args[1::-1]
        return _affine(interval, 1 / factor if target is aten.div.Tensor else factor, 0.0)
    if target is aten.add.Tensor and kwargs.get("alpha", 1) == 1:
        return Interval(at(0), at(1))
    if target is aten.sub.Tensor and kwargs.get("alpha", 1) == 1:
        first, second = (v if isinstance(v, Interval) else Interval(v, v) for v in args[:2])
        return Interval(first.lower - second.upper, first.upper - second.lower)
    if target is aten.neg.default:
        return Interval(-x.upper, -x.lower)
    raise ValueError(f"{target} ({node.name}) of an interval has no bounds here; take it out of the program")


def _affine(x: Interval, scale: Tensor | float, shift: Tensor | float) -> Interval:
    scale = torch.as_tensor(scale, dtype=x.lower.dtype)
    centre, radius = (x.upper + x.lower) / 2 * scale + shift, (x.upper - x.lower) / 2 * scale.abs()
    return Interval(centre - radius, centre + radius)


def _valley(x: Interval, function: Callable[[Tensor], Tensor], bottom: float) -> Interval:
    low, high = function(x.lower), function(x.upper)
    lowest = function(torch.minimum(torch.maximum(x.lower, torch.full_like(x.lower, bottom)), x.upper))
    return Interval(lowest, torch.maximum(low, high))
