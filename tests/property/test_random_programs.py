"""Folded = original in float64 for programs that nobody thought of."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from torch.export import Dim

from normfuse.fold import fold

from .programs import Plan, Program, example_input, plans


def relative_error(plan: Plan, **options: bool) -> float:
    """The largest difference over all outputs, relative to the largest value that occurs in the program.

    Values inside a program can be far larger than its output (they cancel), and rounding is relative to them.
    """
    model = Program(plan).eval()
    everything = Program(Plan(**{**vars(plan), "outputs": tuple(range(len(plan.steps) + 1))})).eval()
    x = example_input(plan)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: Dim("batch")},))
    folded, _ = fold(program, **options)
    with torch.no_grad():
        expected, got = model(x), folded.module()(x)
        largest = max(float(value.abs().max()) for value in everything(x))
    return max(float((e - g).abs().max()) for e, g in zip(expected, got, strict=True)) / max(largest, 1.0)


@given(plans())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_folding_changes_nothing(plan: Plan) -> None:
    # The most extreme scale is 1e-6: shifts and weights grow by its inverse and cancel again.
    assert relative_error(plan, copy_shared=plan.seed % 2 == 0, carry_biases=plan.seed % 3 == 0) <= (
        1e-7 if plan.extremes else 1e-10
    )
