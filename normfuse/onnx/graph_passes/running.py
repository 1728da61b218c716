"""Functions that change a model in place, as passes of onnx_ir."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir


class FunctionPass(ir.passes.InPlacePass):
    """A pass that calls a function.

    Args:
        function: changes the model in place; may return how often it applied.

    Attributes:
        count: what the function returned when it ran last; 0 before, and where it returns nothing.
    """

    def __init__(self, function: Callable[[ir.Model], int | None]) -> None:
        super().__init__()
        self._function = function
        self.count = 0

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run the function."""
        self.count = self._function(model) or 0
        return ir.passes.PassResult(model, modified=True)


def run(model: ir.Model, passes: Sequence[ir.passes.PassBase | Callable[[ir.Model], int | None]]) -> None:
    """Run passes, or functions in their place, one after another.

    Raises:
        Exception: what a pass raised, as it raised it.
    """
    if not passes:
        return
    wrapped = [each if isinstance(each, ir.passes.PassBase) else FunctionPass(each) for each in passes]
    try:
        ir.passes.PassManager(wrapped)(model)
    except ir.passes.PassError as error:
        cause: BaseException = error
        while isinstance(cause, ir.passes.PassError) and cause.__cause__ is not None:
            cause = cause.__cause__
        raise cause from None


def run_counted(model: ir.Model, functions: Mapping[str, Callable[[ir.Model], int]]) -> dict[str, int]:
    """Run functions as passes, in their order; how often each applied."""
    passes = {name: FunctionPass(function) for name, function in functions.items()}
    run(model, list(passes.values()))
    return {name: each.count for name, each in passes.items()}
