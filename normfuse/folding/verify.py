"""Folding checks itself: the folded program against the one it was made of."""

from __future__ import annotations

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from normfuse.programs import Runner, own_rounding, relative_difference

from .program import Program
from .report import FoldError

# Roundings in a row, of float32 at most: what differs by less needs no closer look.
_ROUNDINGS = 16
_SINGLE = torch.finfo(torch.float32).eps
_TIMES_ITS_OWN = 10  # rounding that other weights may have; what is wrong is off by more


def check_folded(program: ExportedProgram, folded: ExportedProgram) -> float | None:
    """Compares both on the example inputs of the program, in its own dtype.

    Args:
        program: as it was.
        folded: what was made of it.

    Returns:
        The largest difference of any output ÷ its largest value, without places where the program gives NaN. None if
        there are no example inputs to compare on, or the program itself fails on them.

    Raises:
        FoldError: it is more than ten times what rounding alone changes.
    """
    given = program.example_inputs
    if given is None or any(type(leaf).__name__ == "FakeTensor" for leaf in pytree.tree_leaves(given)):
        return None
    args, kwargs = given
    try:
        expected = Runner(program)(*args, **kwargs)
    except Exception:  # examples that the program does not take prove nothing
        return None
    outputs = Runner(folded)(*args, **kwargs)
    if len(outputs) != len(expected):
        raise FoldError(
            f"the folded program has {len(outputs)} outputs, the program {len(expected)}: a fault of folding"
        )
    rounding: list[float] = []
    largest = 0.0
    for index, (got, want) in enumerate(zip(outputs, expected, strict=True)):
        got = _known(got, want)
        difference = relative_difference(got, want)
        if not difference <= _ROUNDINGS * min(_eps(want), _SINGLE):
            rounding = rounding or own_rounding(Program(program).finish(), expected, args, kwargs)
            if not difference <= _TIMES_ITS_OWN * rounding[index]:
                raise FoldError(
                    f"the folded program differs from the program on its example inputs: output {index} by "
                    f"{difference:.2e} of its largest value, where rounding alone changes {rounding[index]:.2e}; this "
                    "is a fault of folding, please report it (verify=False skips the comparison)"
                )
        largest = max(largest, difference)
    return largest


def _eps(tensor: torch.Tensor) -> float:
    """The distance from one to the next number in a tensor's dtype; none between integers."""
    return torch.finfo(tensor.dtype).eps if tensor.is_floating_point() or tensor.is_complex() else 0.0


def _known(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """Without what stands where the program has no value."""
    if got.shape != want.shape or not want.is_floating_point():
        return got
    return torch.where(want.isnan(), want, got)
