"""Forward passes that run a second time: activation checkpointing must move statistics once.

``torch.utils.checkpoint`` throws activations away and runs the forward pass again while the backward pass
executes. The second run must give what the first gave, although the statistics have moved since, and must not
move them again. So a run under a checkpoint leaves behind the statistics it started from, and the second run
works on a copy of those. They hang on the object that stands for the checkpointed call and lives as long as
its graph: nothing has to be cleaned up, and the order of calls and backward passes is of no consequence.

Whether a backward pass executes, which call it recomputes and which state belongs to it is all known on the
host: no step waits for the device.

Compiled code goes the same way when it runs inside a checkpoint, through an operation that looks at its
surroundings at run time. A checkpoint *inside* compiled code is another matter: there the partitioner decides
what to recompute, and is told to keep what the norms return.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType, FunctionType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    _CachingTorchDispatchMode,
    create_selective_checkpoint_contexts,
)

Statistics = tuple[Tensor, ...]
State = TypeVar("State", bound=NamedTuple)
_ATTRIBUTE = "_normfuse_first_runs"
_COMPILED = "CompiledFunctionBackward"
#: The operations that move statistics.
FORWARDS: set[torch._ops.OpOverload] = set()


class _FirstRuns:
    """Statistics before each norm's forward within one checkpointed call, in the order of the calls."""

    def __init__(self) -> None:
        self.before: list[Statistics] = []
        self._backward, self._position = -1, 0

    def next(self, backward: int) -> Statistics | None:
        """The statistics for the next recomputed norm in the backward pass of that id."""
        if backward != self._backward:
            self._backward, self._position = backward, 0
        self._position += 1
        return self.before[self._position - 1] if self._position <= len(self.before) else None


def _of(region: object) -> _FirstRuns:
    runs = getattr(region, _ATTRIBUTE, None)
    if runs is None:
        runs = _FirstRuns()
        setattr(region, _ATTRIBUTE, runs)
    return runs


def _checkpoint_hooks() -> list[dict[str, Any]]:
    """Variables of the hooks on saved tensors by which checkpoints make themselves known, innermost first."""
    hooks = []
    try:
        while pair := torch._C._autograd._top_saved_tensors_default_hooks(True):
            hooks.append(pair)
            torch._C._autograd._pop_saved_tensors_default_hooks()
    finally:
        for pair in reversed(hooks):
            torch._C._autograd._push_saved_tensors_default_hooks(*pair)
    packs = [getattr(pack, "_torchdynamo_orig_callable", pack) for pack, _ in hooks]
    return [
        {name: cell.cell_contents for name, cell in zip(pack.__code__.co_freevars, pack.__closure__ or (), strict=True)}
        for pack in packs
        if isinstance(pack, FunctionType) and pack.__module__ == "torch.utils.checkpoint"
    ]


def _first_run_regions() -> Iterator[object]:
    """Checkpointed calls under way around the caller whose forward will run again."""
    # use_reentrant=False: the call runs under a hook on saved tensors. Inside of it others may; around a
    # recomputation nothing is of interest.
    for variables in _checkpoint_hooks():
        if "target_frame_ref" in variables:
            break
        yield variables["frame"]
    if torch.is_grad_enabled():
        return
    # use_reentrant=True, and most checkpoints of other libraries: the call runs without gradients inside the
    # forward of an autograd function, whose backward runs it again.
    recomputing = torch._C._current_autograd_node()
    caller: FrameType | None = sys._getframe(1)
    while caller is not None:
        if caller.f_code.co_name in ("forward", "backward") and caller.f_code.co_argcount > 0:
            context = caller.f_locals.get(caller.f_code.co_varnames[0])
            if context is recomputing and context is not None:
                return
            # Compiled code runs inside an autograd function too, but as it is: it recomputes nothing.
            if isinstance(context, torch.autograd.function.FunctionCtx) and context.name() != _COMPILED:
                yield context
        caller = caller.f_back


def is_second_run() -> bool:
    """Whether a backward pass executes: a forward that runs then is a checkpoint's recomputation."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def in_reentrant_checkpoint() -> bool:
    """Whether what runs now runs without gradients inside a checkpoint, which runs it again with them."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    return any(isinstance(region, torch.autograd.function.FunctionCtx) for region in _first_run_regions())


def refuse_reentrant(what: str) -> None:
    """Say that ``what``, a term of the loss, has no gradient."""
    raise RuntimeError(
        f"{what} has no gradient inside a reentrant checkpoint; call torch.utils.checkpoint.checkpoint with "
        "use_reentrant=False"
    )


def _recomputed_region() -> Any:
    for variables in _checkpoint_hooks():
        if "target_frame_ref" in variables:
            return variables["target_frame_ref"]()
    return torch._C._current_autograd_node()


def statistics_of_this_run(statistics: Statistics) -> Statistics:
    """The tensors that a training forward is to read and update in place of ``statistics``.

    Usually ``statistics`` themselves. While a backward pass executes, a copy of what the first run of this
    forward started from (of ``statistics`` as they are, where no first run is known): whatever runs then is a
    recomputation and moves nothing.
    """
    backward = torch._C._current_graph_task_id()
    before = None
    if backward != -1:
        runs = getattr(_recomputed_region(), _ATTRIBUTE, None)
        before = (runs and runs.next(backward)) or statistics
    regions = list(_first_run_regions())
    if regions:
        before = tuple(tensor.clone() for tensor in before or statistics)
        for region in regions:
            _of(region).before.append(before)
    return statistics if backward == -1 else tuple(tensor.clone() for tensor in before or statistics)


def state_of_this_run(state: State, forward_statistics: tuple[str, ...]) -> State:
    """The ``state`` that a training forward is to work on: :func:`statistics_of_this_run` of what a forward moves."""
    if torch.compiler.is_compiling():  # asks at run time
        return state
    # The usual case first: this is in the way of every step.
    hooked = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if torch.is_grad_enabled() and not hooked and torch._C._current_graph_task_id() == -1:
        return state
    names = forward_statistics + (() if getattr(state, "skipped_forwards", None) is None else ("skipped_forwards",))
    own = statistics_of_this_run(tuple(getattr(state, name) for name in names))
    return state._replace(**dict(zip(names, own, strict=True)))


def recompute_safe(operation: torch._ops.OpOverload, positions: list[int]) -> Callable[..., object]:
    """Forward ``operation``, whose arguments at ``positions`` are statistics, for compiled code."""

    def run(*arguments: object) -> object:
        replaced = statistics_of_this_run(tuple(arguments[i] for i in positions))
        given = list(arguments)
        for position, tensor in zip(positions, replaced, strict=True):
            given[position] = tensor
        return operation(*given)

    return run


def keep_in_checkpoints(operation: torch._ops.OpOverload) -> None:
    """Let a checkpoint inside compiled code keep what ``operation`` returns, whatever its policy."""

    def keep(mode: Any, *arguments: object, **options: object) -> object:
        policy, mode.policy_fn = mode.policy_fn, lambda *_, **__: CheckpointPolicy.MUST_SAVE
        try:
            return mode.__torch_dispatch__(operation, (), arguments, options)
        finally:
            mode.policy_fn = policy

    operation.py_impl(_CachingTorchDispatchMode)(keep)


def keep_norms() -> tuple[object, object]:
    """A ``context_fn`` for ``torch.utils.checkpoint.checkpoint``: keep what norms return, recompute the rest.

    It stores the norms' results, which checkpoints inside of compiled code do in any case.

    Returns:
        Two context managers, for the first and for the second run.

    Example:
        >>> from torch.utils.checkpoint import checkpoint
        >>> from normfuse.nn import UnifiedNorm, keep_norms
        >>> block, x = nn.Sequential(UnifiedNorm(8), nn.Linear(8, 8)), torch.randn(4, 8, requires_grad=True)
        >>> checkpoint(block, x, use_reentrant=False, context_fn=keep_norms).shape
        torch.Size([4, 8])
    """

    def policy(context: object, operation: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operation in FORWARDS else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
