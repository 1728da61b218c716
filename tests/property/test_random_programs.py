"""Folded = original in float64 for programs that nobody thought of."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext

import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor
from torch.export import Dim, ExportedProgram

from normfuse.folding import fold
from tests.folding.checks import any_gauge, operations

from .programs import Plan, Program, example_input, plans
from .quick_export import quick_export


def relative_error(plan: Plan, statuses: Counter | None = None, *, quick: bool = False) -> float:
    """The largest difference over all outputs, relative to the largest value that occurs in the program.

    Values inside a program can be far larger than its output (they cancel), and rounding is relative to them. The
    plan's seed chooses the options, whether what is free is chosen at random, and a fixed or a dynamic batch; `quick`
    stands for :func:`quick_export`, whose batch is fixed. `statuses` counts what became of the norms.
    """
    model, x = Program(plan).eval(), example_input(plan)
    if quick:
        program = quick_export(model, (x,))
    else:
        batch = Dim("batch") if plan.seed % 4 == 0 else Dim.STATIC  # a dynamic one takes twice the time to trace
        program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    with any_gauge(plan.seed) if plan.seed % 5 == 0 else nullcontext():
        options = {"copy_shared": plan.seed % 2 == 0, "carry_biases": plan.seed % 3 == 0}
        folded, report = fold(program, verify=False, **options)  # what is compared here as well
    if statuses is not None:
        statuses.update(record.status for record in report.norms)
        statuses.update(f"core {record.core}" for record in report.dynamic)
    with torch.no_grad():
        values = model.values(x)
        got = interpret(folded, x) if quick else folded.module(check_guards=False)(x)
    expected, largest = [values[i] for i in plan.outputs], max(float(value.abs().max()) for value in values)
    return max(float((e - g).abs().max()) for e, g in zip(expected, got, strict=True)) / max(largest, 1.0)


def interpret(program: ExportedProgram, x: Tensor) -> tuple[Tensor, ...]:
    """Run a program with one input node by node; `program.module()` compiles it first, which takes longer."""
    stored = program.state_dict | program.constants
    inputs = [stored[spec.target] if spec.target else x for spec in program.graph_signature.input_specs]
    return torch.fx.Interpreter(program.graph_module).run(*inputs)


def allowed_error(plan: Plan) -> float:
    """The most extreme scale is 1e-6: shifts and weights grow by its inverse and cancel again."""
    return 1e-7 if plan.extremes else 1e-10


@given(plans())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_folding_changes_nothing(plan: Plan) -> None:
    assert relative_error(plan) <= allowed_error(plan)


@given(plans())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_folding_a_folded_program_changes_nothing(plan: Plan) -> None:
    options = {"copy_shared": plan.seed % 2 == 0, "carry_biases": plan.seed % 3 == 0}
    once, _ = fold(quick_export(Program(plan).eval(), (example_input(plan),)), **options)
    twice, _ = fold(once, **options)
    assert operations(twice) == operations(once)
