"""Running exported programs: without changing anything, and how much rounding they have of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export._tree_utils import reorder_kwargs
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

_DRAWS = 2  # of inputs and weights that are off by a little
# Operations that subtract a mean before they take a root mean square.
_DEVIATIONS = frozenset(
    "layer_norm group_norm instance_norm batch_norm native_layer_norm native_group_norm native_batch_norm "
    "_native_batch_norm_legit var std var_mean std_mean".split()
)
# The integers that have the bits of a floating-point number, by its size in bytes.
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Runner:
    """Runs a program, and changes neither its parameters and buffers nor the tensors that it is given.

    Called with the program's arguments, it returns the tensors in what the program returns. It is quick to make: it
    interprets the graph, and does not check arguments against the sizes that the program was made for.

    Args:
        program: the program.
        change: what to run with in the place of each parameter, buffer and constant.
        everywhere: whether what operations compute is changed as well; not in graphs that they call.
        deviations: whether only what operations subtract a mean of is changed, and nothing else.

    Example:
        >>> Runner(torch.export.export(torch.nn.Linear(4, 2), (torch.ones(3, 4),)))(torch.ones(3, 4))[0].shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        program: ExportedProgram,
        change: Callable[[Tensor], Tensor] | None = None,
        *,
        everywhere: bool = False,
        deviations: bool = False,
    ) -> None:
        if change is not None and everywhere:
            self._interpreter = _Changing(program.graph_module, change)
        elif change is not None and deviations:
            self._interpreter, change = _ChangingDeviations(program.graph_module, change), None
        else:
            self._interpreter = Interpreter(program.graph_module)
        self._in_spec = program.call_spec.in_spec
        self._writes = _writes(program)
        signature = program.graph_signature
        own = {**program.constants, **program.state_dict}
        self._given = [spec.kind is InputKind.USER_INPUT for spec in signature.input_specs]
        self._own = [own.get(spec.target) for spec in signature.input_specs]
        if change is not None:
            self._own = pytree.tree_map_only(Tensor, lambda tensor: change(tensor.detach()), self._own)
        self._returned = [spec.kind is OutputKind.USER_OUTPUT for spec in signature.output_specs]

    def __call__(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        ordered = reorder_kwargs(kwargs, self._in_spec) if kwargs else kwargs
        leaves = iter(pytree.tree_leaves((args, ordered)))
        operands = [next(leaves) if given else own for given, own in zip(self._given, self._own, strict=True)]
        with torch.inference_mode():
            if self._writes:
                operands = pytree.tree_map_only(Tensor, Tensor.clone, operands)
            results = self._interpreter.run(*operands, enable_io_processing=False)
        outputs = [result for result, wanted in zip(results, self._returned, strict=True) if wanted]
        return [output.detach() for output in outputs if isinstance(output, Tensor)]


def relative_difference(got: Tensor, want: Tensor) -> float:
    """The largest difference ÷ the largest finite value of `want`, 0 where there is none.

    NaN and infinities of `want` count as equal to themselves; anything else in their places, and other shapes, are
    infinitely far. Of integers and booleans, the share that differs.
    """
    if got.shape != want.shape:
        return float("inf")
    if not want.numel():
        return 0.0
    if not (want.is_floating_point() or want.is_complex()):
        return float((got != want).double().mean())
    wide = torch.complex128 if want.is_complex() else torch.float64
    got, want = got.to(wide), want.to(wide)
    finite = want.isfinite()
    if not torch.allclose(got[~finite], want[~finite], equal_nan=True):
        return float("inf")
    if not finite.any():
        return 0.0
    difference, scale = (got - want)[finite].abs().max(), want[finite].abs().max()
    return float(difference / scale) if scale else float(difference)


def own_rounding(
    program: ExportedProgram, outputs: Sequence[Tensor], args: Sequence[Any], kwargs: Mapping[str, Any] | None = None
) -> list[float]:
    """How far rounding alone takes each output of a program, ÷ the output's largest value.

    The program runs with fewer digits: inputs, weights and every result lose the last bit of their dtype, in three ways
    of rounding. It runs with inputs and weights that are off by up to a unit in the last place, equal ones by different
    amounts, and once in float64. Norms divide by a deviation that may be all rounding, of equal numbers for example:
    once what they subtract a mean of is off in the same way. What is off by as much may be rounding, what is off by
    much more is not.

    Args:
        program: the program; of regions that are closed only the results lose digits.
        outputs: the tensors in what it gives.
        args: its arguments.
        kwargs: its keyword arguments.
    """
    worst, generator = [0.0] * len(outputs), torch.Generator().manual_seed(0)

    def nudged(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * 2 - 1
        return (tensor.double() * (1 + noise * torch.finfo(tensor.dtype).eps)).to(tensor.dtype)

    given = (tuple(args), dict(kwargs or {}))
    runs = [*((change, {"everywhere": True}) for change in (_down, _up, _nearest)), *((nudged, {}),) * _DRAWS]
    for change, options in (*runs, (_double, {}), (nudged, {"deviations": True})):
        try:
            changed, named = pytree.tree_map_only(Tensor, change, given) if "deviations" not in options else given
            results = Runner(program, change, **options)(*changed, **named)
        except RuntimeError:  # a program that casts to float32 inside has no float64 result
            continue
        for index, (got, want) in enumerate(zip(results, outputs, strict=True)):
            worst[index] = max(worst[index], relative_difference(got, want))
    return worst


class _Changing(Interpreter):
    """Runs a graph, and changes what its operations compute; views of it change with it."""

    def __init__(self, module: GraphModule, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__(module)
        self._change = change

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.op != "call_function":
            return result
        given = pytree.tree_leaves(self.fetch_args_kwargs_from_env(n))
        memory = {tensor.untyped_storage().data_ptr() for tensor in given if isinstance(tensor, Tensor)}

        def change(tensor: Tensor) -> Tensor:
            return tensor if tensor.untyped_storage().data_ptr() in memory else self._change(tensor)

        return pytree.tree_map_only(Tensor, change, result)


class _ChangingDeviations(Interpreter):
    """Runs a graph, and changes the values of which its norms and variances subtract a mean."""

    def __init__(self, module: GraphModule, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__(module)
        self._change = change

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if getattr(getattr(target, "overloadpacket", None), "__name__", "") in _DEVIATIONS and args:
            args = (self._change(args[0]), *args[1:])
        return super().call_function(target, args, kwargs)


# Numbers with one digit less, in a way that leaves alone what has been rounded so already: values that were equal stay
# equal, and moving them about changes nothing.


def _down(tensor: Tensor) -> Tensor:
    """Rounds towards zero, to one bit less."""
    return _with_bits(tensor, lambda bits: bits & ~1)


def _up(tensor: Tensor) -> Tensor:
    """Rounds away from zero, to one bit less."""
    return _with_bits(tensor, lambda bits: (bits + 1) & ~1)


def _nearest(tensor: Tensor) -> Tensor:
    """Rounds to the nearest number, to two bits less."""
    return _with_bits(tensor, lambda bits: (bits + 1 + (bits >> 2 & 1)) & ~3)


def _with_bits(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    changed = change(tensor.view(_BITS[tensor.itemsize])).view(tensor.dtype)
    return torch.where(tensor.isfinite() & changed.isfinite(), changed, tensor)


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _writes(program: ExportedProgram) -> bool:
    signature = program.graph_signature
    schemas = [getattr(n.target, "_schema", None) for n in program.graph.nodes if n.op == "call_function"]
    in_place = any(schema is not None and schema.is_mutable for schema in schemas)
    return in_place or bool(signature.buffers_to_mutate or signature.user_inputs_to_mutate)
