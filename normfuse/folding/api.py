"""The function that users call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from normfuse.errors import check_kind

from .balance import BALANCES, choose, observe
from .cancel import cancelling_norms
from .centre import centre
from .dead import remove_dead_channels
from .fuse_patterns import fuse_patterns
from .gauge import Gauge, Options
from .program import Program
from .records import at_fault, collect_dynamic, collect_records
from .relate import relate
from .report import DynamicNormRecord, FoldReport, NormRecord, RemovedChannels
from .results import Cancelling
from .rewrite import Overflow, rewrite
from .settle import CannotWriteOut, settle
from .solve import Contradiction, solve
from .typical import typical_runs
from .verify import check_folded


def fold(
    program: ExportedProgram,
    *,
    copy_shared: bool = True,
    carry_biases: bool = False,
    max_scale_range: float = 2.0**40,
    remove_dead: bool = False,
    keep_dynamic_norms: bool = False,
    cancel_norms: bool = False,
    balance: str | None = None,
    example_inputs: torch.Tensor | Sequence[torch.Tensor] | Sequence[Sequence[torch.Tensor]] | None = None,
    verify: bool = True,
) -> tuple[ExportedProgram, FoldReport]:
    """Fold every norm with constant statistics, and every other constant affine map per channel, into the weights.

    Norms that compute their statistics from each input (LayerNorm, RMSNorm, GroupNorm) stay, but their gains and shifts
    go into the weights behind them. A LayerNorm becomes an RMSNorm if everything that writes its input can subtract the
    mean beforehand.

    Args:
        program: an exported program in evaluation mode (``torch.export.export(model.eval(), ...)``). It is not changed.
            Its norms, and those that were decomposed, become whole operations again.
        copy_shared: whether a weight that is read at several places may be stored once per place where the places
            need different values. Otherwise operations with a shared weight stay as they are.
        carry_biases: whether the biases of the weights that write into a residual stream are moved into the weights
            that read it. This saves an addition per branch. It costs accuracy if the constant part of the stream is
            much larger than its variation, so check the result on real inputs.
        max_scale_range: the largest ratio allowed between the scales with which one channel is stored in different
            places; a norm that would exceed it stays. Scales do no harm in floating point until a value overflows or
            underflows: the default is safe for float32 and bfloat16, 2**10 for float16.
        remove_dead: whether channels that hold a constant, because a norm's gain is zero there, leave the weights
            around them; see :func:`normfuse.folding.remove_dead_channels` for where that is done.
        keep_dynamic_norms: leave LayerNorm, RMSNorm and GroupNorm as they are; only maps behind them go into them.
        cancel_norms: whether to drop norms that are followed by other norms which make their division superfluous; see
            :mod:`normfuse.folding.cancel`. The eps of the later norms then counts for more or less:
            ``report.cancel_difference`` says how much this changes the outputs on the example inputs.
        balance: "int8" chooses the free factors of the scales, and the norms that stay, to minimise the predicted error
            of dynamically quantised products, see :mod:`normfuse.folding.balance`. "int8-per-tensor" does so for
            weights with one step size per tensor instead of one per output channel. None: scales near one.
        example_inputs: typical inputs for ``balance``: a tensor, a tuple of positional inputs, or several such tuples;
            None: the program's own example inputs.
        verify: whether to compare the folded program with `program` on its example inputs, if it has any and no norms
            cancel. Each program runs once.

    Returns:
        The folded program, equal to `program` up to rounding, and a report of every decision.

    Raises:
        FoldError: statistics are not finite, the program is in training mode, the outputs of the folded program
            differ, or the program does not take ``example_inputs``. ValueError: ``balance`` is not allowed. TypeError:
            ``program`` is no exported program.

    Example:
        >>> import normfuse
        >>> from normfuse.nn import UnifiedNorm
        >>> model = nn.Sequential(nn.Linear(4, 8), UnifiedNorm(8), nn.Linear(8, 2)).eval()
        >>> program = torch.export.export(model, (torch.randn(3, 4),))
        >>> folded, report = normfuse.fold(program)
        >>> [(record.name, record.status) for record in report.norms]
        [('1', 'folded')]
    """
    check_kind(
        "program",
        program,
        ExportedProgram,
        "what torch.export.export(model.eval(), …) returns; a module goes into normfuse.fuse, an ONNX file into "
        "normfuse.onnx.fold_file",
    )
    given = program
    opened, removed = Program(program), list[RemovedChannels]()
    operations, size = opened.operations(), opened.bytes()
    if remove_dead:
        program, removed = remove_dead_channels(program)
        opened = Program(program)
    report = FoldReport(removed=removed, nodes_before=operations, bytes_before=size)
    options = Options(copy_shared, carry_biases, max_scale_range, keep_dynamic_norms)
    if balance is None and example_inputs is not None:
        raise ValueError("example_inputs are only used by balance; give balance='int8' or leave them out")
    examples = None if balance is None else _examples(program, balance, example_inputs)
    untouched: dict[str, str] = {}
    while True:
        if not keep_dynamic_norms:
            fuse_patterns(opened)
        options = replace(options, untouched=MappingProxyType(dict(untouched)))
        gauge, report.int8_error = _decided(opened, options, examples, per_tensor=balance != "int8")
        if cancel_norms and not keep_dynamic_norms:
            gauge = gauge.knowing(cancelling=Cancelling(*cancelling_norms(gauge)))
        records, dynamic = collect_records(gauge), collect_dynamic(gauge)
        try:
            edits = rewrite(gauge)
            break
        except Overflow as overflow:
            if (norm := at_fault(overflow.node, gauge)) is None:
                raise overflow.error from None
            untouched[norm.name] = str(overflow)
        opened = Program(program)  # of which a part has been rewritten
    found: list[tuple[NormRecord | DynamicNormRecord, list[Node]]] = [*records, *dynamic]
    for record, around in found:
        names = [name for node in around for name in edits.absorbed.get(node, ())]
        record.absorbed_by = list(dict.fromkeys(names))
    report.norms = [record for record, _ in records]
    report.dynamic = [record for record, _ in dynamic]
    free = gauge.matches.free_constants
    writers = [edits.absorbed.get(n, [opened.name(n)] if n in free else []) for n in gauge.centring.centred]
    report.centred = list(dict.fromkeys(name for names in writers for name in names))
    if gauge.matches.stored:
        used = np.abs(gauge.scales[np.concatenate([s.ravel() for s in gauge.matches.stored])])
        report.scale_range = (float(used.min(initial=1.0)), float(used.max(initial=1.0)))
    report.weight_growth = edits.weight_growth
    report.settled_early = list(dict.fromkeys(gauge.path(node) for node in gauge.shifts.settled_early))
    folded = opened.finish()
    report.nodes_after, report.bytes_after = opened.operations(), opened.bytes()
    report.bytes_copied = opened.bytes_copied
    cancelled = gauge.cancelling.cancelled
    if cancelled and program.example_inputs is not None:
        report.cancel_difference = _difference(program, folded)
    if verify and not cancelled:  # cancelling changes more than rounding does, and says how much
        report.verified = check_folded(given, folded)
    return folded, report


def _examples(
    program: ExportedProgram,
    balance: str,
    given: torch.Tensor | Sequence[torch.Tensor] | Sequence[Sequence[torch.Tensor]] | None,
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments and keyword arguments of the runs by which scales are chosen."""
    if balance not in BALANCES:
        raise ValueError(f"balance={balance!r} is unknown; give {' or '.join(map(repr, BALANCES))} or None")
    if given is not None:
        return [(run, {}) for run in typical_runs(program, given, "example_inputs")]
    if program.example_inputs is None:
        raise ValueError("balance needs typical inputs to choose by; give example_inputs")
    return [program.example_inputs]


def _decided(
    program: Program,
    options: Options,
    examples: list[tuple[tuple[Any, ...], dict[str, Any]]] | None,
    *,
    per_tensor: bool,
) -> tuple[Gauge, float | None]:
    """Scales, shifts and means; with examples those that cost integers least, and the error that these predict."""
    if examples is None:
        return centre(_settled(program, options)), None
    return choose(
        lambda kept: centre(_settled(program, replace(options, kept_maps=kept, fold_zeros=False))),
        program,
        observe(program, examples),
        per_tensor,
    )


def _settled(program: Program, options: Options) -> Gauge:
    """Scales and shifts; where a first attempt contradicts itself, what it tried is left out of the next."""
    while True:
        try:
            return settle(solve(relate(program, options)))
        except Contradiction as found:
            options = replace(options, fixed_equations=options.fixed_equations | found.equations)
        except CannotWriteOut:
            options = replace(options, fold_zeros=False)


@torch.no_grad()
def _difference(program: ExportedProgram, folded: ExportedProgram) -> float:
    """The largest difference between two programs' outputs on their example inputs, relative to the largest entries."""
    args, kwargs = program.example_inputs
    outputs = (tree_leaves(p.module(check_guards=False)(*args, **kwargs)) for p in (program, folded))
    differences = [
        float((want - got).abs().max() / want.abs().max().clamp(min=torch.finfo(want.dtype).tiny))
        for want, got in zip(*outputs, strict=True)
        if isinstance(want, torch.Tensor) and want.is_floating_point() and want.numel()
    ]
    return max(differences, default=0.0)
