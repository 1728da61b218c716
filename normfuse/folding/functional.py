"""Programs without in-place operations and without torch.vmap, whose operations are those on whole batches."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch._C import _functorch
from torch.export import ExportedProgram
from torch.fx import Node

aten = torch.ops.aten


def has_vmap(program: ExportedProgram) -> bool:
    """Whether torch.vmap ran while the program was traced: it is then recorded, and not what it made of operations."""
    return any(getattr(node.target, "__module__", "") == "torch._functorch.predispatch" for node in program.graph.nodes)


def functionalised(program: ExportedProgram) -> ExportedProgram:
    """The program without in-place operations and without torch.vmap, its norms whole."""
    level = _functorch.maybe_current_level()
    try:
        program = program.run_decompositions({})
    finally:
        while _functorch.maybe_current_level() != level:  # a run that fails inside of torch.vmap leaves it open
            _functorch._vmap_decrement_nesting()
    for node in list(program.graph.nodes):
        if node.target is operator.getitem and node.args[1] == 0 and node.args[0].target in _WHOLE:
            _restore(program, node)
    program.graph.eliminate_dead_code()
    return program


def _batch_norm(x: Any, weight: Any, bias: Any, mean: Any, var: Any, momentum: float, eps: float) -> Any:
    return aten.batch_norm.default, (x, weight, bias, mean, var, False, momentum, eps, False)


def _layer_norm(x: Any, shape: Any, weight: Any, bias: Any, eps: float) -> Any:
    return aten.layer_norm.default, (x, shape, weight, bias, eps, False)


def _group_norm(x: Any, weight: Any, bias: Any, n: Any, c: Any, rest: Any, groups: int, eps: float) -> Any:
    return aten.group_norm.default, (x, groups, weight, bias, eps, False)


# Taken apart, a norm is an operation with three results, of which only the first is read.
_WHOLE: dict[Any, Callable[..., Any]] = {
    aten._native_batch_norm_legit_no_training.default: _batch_norm,
    aten.native_layer_norm.default: _layer_norm,
    aten.native_group_norm.default: _group_norm,
}


def _restore(program: ExportedProgram, node: Node) -> None:
    apart = node.args[0]
    target, arguments = _WHOLE[apart.target](*apart.args)
    with program.graph.inserting_before(node):
        whole = program.graph.call_function(target, arguments, name=f"{node.name}_whole")
    whole.meta = dict(apart.meta) | {"val": node.meta["val"]}
    program.graph_signature.replace_all_uses(node.name, whole.name)
    node.replace_all_uses_with(whole)
    program.graph.erase_node(node)
