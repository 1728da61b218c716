"""What every folding test asks: the same function, and what is left of the norms."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

from normfuse.folding import FoldReport, fold, settle
from normfuse.folding.gauge import Gauge
from normfuse.folding.rules.weights import Weighted
from normfuse.folding.scales import Scales
from normfuse.programs import Runner

aten = torch.ops.aten
AFFINE = {aten.batch_norm.default, aten.addcmul.default}


def outputs(result: object) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def difference(expected: object, got: object) -> float:
    """The largest difference relative to the largest expected entry."""
    pairs = list(zip(outputs(expected), outputs(got), strict=True))
    for want, have in pairs:
        assert want.shape == have.shape and want.dtype == have.dtype
    return max(float((w - h).abs().max()) / max(float(w.abs().max()), 1e-30) if w.numel() else 0.0 for w, h in pairs)


def folded(
    model: nn.Module, inputs: tuple[Tensor, ...], dynamic_shapes: object = None, **options: bool
) -> tuple[ExportedProgram, FoldReport]:
    """Fold a model in float64 and check that it still computes the same: to 1e-12, hundreds of roundings."""
    model = model.double().eval()
    program = torch.export.export(model, inputs, dynamic_shapes=dynamic_shapes)
    before = {name: value.clone() for name, value in program.state_dict.items()}
    result, report = fold(program, verify=False, **options)
    with torch.no_grad():
        assert difference(model(*inputs), Runner(result)(*inputs)) <= 1e-12
    for name, value in before.items():
        torch.testing.assert_close(program.state_dict[name], value, rtol=0, atol=0, equal_nan=True)
    result.validate()
    return result, report


def operations(program: ExportedProgram) -> list[str]:
    """The operations of a program in order, without those on sizes and those that pick one of several results."""
    return [
        str(node.target)
        for node in program.graph.nodes
        if node.op == "call_function"
        and node.target is not operator.getitem
        and isinstance(node.meta.get("val"), Tensor | list | tuple)
    ]


def assert_nothing_left(program: ExportedProgram, report: FoldReport) -> None:
    assert report.norms and not report.remaining, [(r.name, r.reason) for r in report.remaining]
    assert all(record.absorbed_by for record in report.norms)
    constants = {
        spec.arg.name for spec in program.graph_signature.input_specs if spec.kind.name in ("PARAMETER", "BUFFER")
    }
    for node in program.graph.nodes:
        assert node.target not in AFFINE, node
        if node.target in (aten.mul.Tensor, aten.div.Tensor):
            assert not any(operand.name in constants for operand in node.all_input_nodes), node


@contextmanager
def any_gauge(seed: int) -> Iterator[None]:
    """Free scales are chosen at random here, and with ``carry_biases`` free shifts: any choice must be right."""
    generator, solve = np.random.default_rng(seed), Scales.solve

    def solve_anyhow(scales: Scales, stored: np.ndarray) -> None:
        solve(scales, stored)
        roots, _ = scales._roots(np.arange(scales._count))
        factors = np.exp(generator.uniform(-1, 1, len(roots)))
        factors *= np.where(scales._sign[: len(roots)] == 0, generator.choice((-1.0, 1.0), len(roots)), 1.0)
        factors[Scales.ONE] = 1.0
        scales._values = scales._values * factors[roots]

    def is_weighted(node: Node, gauge: Gauge) -> bool:
        return isinstance(gauge.matches.of[node], Weighted)

    def any_shift(match: Weighted, gauge: Gauge) -> np.ndarray:
        return generator.normal(size=gauge.scale(match.node).shape)

    with (
        patch.object(Scales, "solve", solve_anyhow),
        patch.object(settle, "_adds_to_stream", is_weighted),
        patch.object(Weighted, "constant_part", any_shift),
    ):
        yield
