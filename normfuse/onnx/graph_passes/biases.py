"""Whether the biases of residual branches may travel with the stream."""

from __future__ import annotations

from typing import Any

import torch

from normfuse.errors import one_line
from normfuse.folding import FoldReport, fold
from normfuse.onnx.references import References, VerificationError
from normfuse.programs import Runner, relative_difference

# Biases may cost two binary digits against the plain fold; below the second number, both are at float32's rounding.
_WORSE, _ROUNDING = 4.0, 1e-6

Folded = tuple[torch.export.ExportedProgram, FoldReport]


def carry_biases(
    program: torch.export.ExportedProgram,
    plain: Folded,
    references: References,
    **fold_options: Any,
) -> tuple[Folded, str]:
    """The fold with travelling biases if it keeps the digits, else the plain one; and why, in one line.

    *Algebra.* ``normfuse.fold(..., carry_biases=True)``: a branch ends without bias, and the weights that read the
    stream take the sum of those that were left out.

    *Needs* a stream that only folded norms and weights read, and examples like the inputs to come: where the sum is
    large against what varies in the stream, subtracting it later costs digits, which is measured on the example inputs.

    *Saves* an addition for each branch; ONNX Runtime saves another one where the branch ends in a product of matrices.
    """
    try:
        carried = fold(program, carry_biases=True, verify=False, **fold_options)
        errors = [_error(references, folded) for folded, _ in (plain, carried)]
    except VerificationError as error:
        return plain, f"biases stay in their branches: {error}"
    numbers = f"error {errors[1]:.1e} on the example inputs, {errors[0]:.1e} without"
    if not errors[1] <= max(_WORSE * errors[0], _ROUNDING):
        return plain, f"biases stay in their branches: travelling would cost digits ({numbers})"
    return carried, f"biases travel with the stream ({numbers})"


def _error(references: References, program: torch.export.ExportedProgram) -> float:
    """The largest difference from the module on the example inputs ÷ its largest value."""
    trial, expected = next(iter(references.on()))
    try:
        outputs = Runner(program)(*trial.tensors)
    except Exception as error:  # a program is free to fail in its own way
        raise VerificationError(f"the folded program fails on {trial.label}: {one_line(error)}") from error
    return max((relative_difference(got, want) for got, want in zip(outputs, expected, strict=True)), default=0.0)
