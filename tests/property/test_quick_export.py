"""The soak's own exporter makes the programs that `torch.export` makes."""

from __future__ import annotations

import pytest
import torch
from torch.export import ExportedProgram
from torch.fx import Node

from .programs import BINARY, UNARY, Plan, Program, Step, example_input
from .quick_export import quick_export
from .soak import random_plan


def described(program: ExportedProgram) -> list[object]:
    """All that folding reads of a program, node by node."""
    program.graph.eliminate_dead_code()

    def value(meta: object) -> object:
        if isinstance(meta, torch.Tensor):
            return meta.shape, meta.dtype
        return [value(part) for part in meta] if isinstance(meta, list | tuple) else meta

    def one(node: Node) -> object:
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: "%" + n.name)
        stack = node.meta.get("nn_module_stack", {})
        return node.op, node.name, node.target, args, kwargs, value(node.meta.get("val")), list(stack.values())

    signature = program.graph_signature
    constants = {name: tensor.tolist() for name, tensor in program.constants.items()}
    stored = {name: tensor.data_ptr() for name, tensor in program.state_dict.items()}
    specs = [signature.input_specs, signature.output_specs]
    return [*(one(node) for node in program.graph.nodes), *specs, constants, stored]


EVERY_KIND = [
    Plan(4, seed, [Step(kind, (0, 0)[: 1 + (kind in BINARY)], seed) for kind in kinds], tuple(range(1, len(kinds) + 1)))
    for kinds in [sorted({*UNARY, *BINARY})]
    for seed in range(3)
]
RANDOM = [random_plan(number, 0) for number in range(12)]


@pytest.mark.parametrize("plans", [EVERY_KIND, RANDOM], ids=["kinds", "random"])
def test_the_program_is_that_of_torch_export(plans: list[Plan]) -> None:
    for plan in plans:
        model, x = Program(plan).eval(), example_input(plan)
        quick, full = quick_export(model, (x,)), torch.export.export(model, (x,))
        for got, expected in zip(described(quick), described(full), strict=True):
            assert got == expected, plan
        assert torch.equal(quick.module()(x)[0], full.module()(x)[0])
