"""From what folding decided to one record per norm."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from torch.fx import Node

from .gauge import Gauge
from .nodes import argument, module_of, operation_name
from .operations import NORMALISING
from .report import DynamicNormRecord, NormRecord
from .rules.base import MeanRole
from .settle import sources_of_shift
from .tolerance import tolerant_values

_FAR = 64  # operations around a norm among which the weights that took it are looked for


def collect_records(gauge: Gauge) -> list[tuple[NormRecord, list[Node]]]:
    """One record per module (affine maps in one norm belong together), with the operations around it."""
    tolerant = tolerant_values(gauge)
    materialising = {
        source: _why_written_out(value, tolerant, gauge)
        for source, value in sources_of_shift(gauge.shifts.materialised_shifts, gauge).items()
    }
    records: dict[str, tuple[NormRecord, list[Node]]] = {}
    calls: dict[str, dict[str, bool]] = {}  # of each module: whether something of a call stays
    for node, (_, a, _) in gauge.matches.affine.items():
        path, kind = module_of(node)
        norm = "Norm" in kind or node.target in NORMALISING
        if not norm and a.size == 1:
            continue
        key = path if norm else node.name
        name = path if norm else f"{path}.{node.name}".lstrip(".")
        record, around = records.setdefault(key, (NormRecord(name, kind if norm else "affine"), []))
        if node in gauge.solution.kept:
            record.status, record.reason = "kept", gauge.solution.kept[node]
        elif node in materialising and record.status == "folded":
            record.status = "partly folded"
            record.reason = materialising[node]
        own = calls.setdefault(key, {})
        call = next(reversed(node.meta.get("nn_module_stack") or {}), "") if norm else ""
        own[call] = own.get(call, False) or node in gauge.solution.kept
        around += _operations_around(node, gauge)
    for key, (record, _) in records.items():
        stays = list(calls[key].values())
        if any(stays) and not all(stays):
            record.status, record.reason = "partly folded", f"at {sum(stays)} of {len(stays)} uses {record.reason}"
    for caller, path in gauge.program.statistics_in_branches():
        record, _ = records.setdefault(path, (NormRecord(path, "norm", "kept"), []))
        record.status = "partly folded" if record.status == "folded" else record.status
        record.reason = record.reason or _inside(caller)
    return list(records.values())


def collect_dynamic(gauge: Gauge) -> list[tuple[DynamicNormRecord, list[Node]]]:
    """One record per norm that computes its statistics from its input, with the operations that read it.

    Norms that no rule knows, and those in branches that folding does not follow, have one as well.
    """
    records: list[tuple[DynamicNormRecord, list[Node]]] = []
    dynamic = set(gauge.matches.dynamic)
    for node in gauge.program.graph.nodes:
        if node in dynamic:
            records.append((_record(node, gauge), list(_operations_around(node, gauge, backward=False))))
        elif node.target in NORMALISING and node not in gauge.matches.affine and not gauge.program.is_constant(node):
            records.append((_untouched(node, _why_untouched(node, gauge)), []))
    for caller, node in gauge.program.norms_in_branches():
        if argument(node, "running_mean") is None:  # others have running statistics, and a record as static norms
            records.append((_untouched(node, _inside(caller)), []))
    return records


def _inside(caller: str) -> str:
    return f"it runs inside {caller}, which folding does not follow"


def at_fault(node: Node, gauge: Gauge) -> Node | None:
    """The norm or other map, of those around an operation, whose gain or shift is largest; None if all stay already."""
    sizes: dict[Node, float] = {}
    for found in (*gauge.matches.affine, *gauge.matches.dynamic):
        if gauge.untouched(found) or node not in {found, *_operations_around(found, gauge)}:
            continue
        affine = gauge.matches.affine.get(found)
        rule = gauge.matches.of[found]
        a, b = (affine.a, affine.b) if affine is not None else (rule.gain(gauge), rule.shift(gauge))
        gains = np.abs(a[a != 0])
        sizes[found] = max(gains.max(initial=1.0), (1.0 / gains).max(initial=1.0), np.abs(b).max(initial=0.0))
    return max(sizes, key=sizes.__getitem__, default=None)


def _record(node: Node, gauge: Gauge) -> DynamicNormRecord:
    rule = gauge.matches.of[node]
    gain, shift = rule.gain(gauge), rule.shift(gauge)
    gone = rule.gain_is_gone(gauge)
    rest = (shift - gauge.shifts.of[node]).any()
    core = NORMALISING[node.target]
    name, kind = _name_and_kind(node)
    record = DynamicNormRecord(
        name=name,
        kind=kind,
        core="none"
        if node in gauge.cancelling.cancelled
        else "RMSNorm"
        if node in gauge.centring.without_mean
        else core,
        gain=_fate(bool((gain != 1).any()), gone),
        shift=_fate(bool(shift.any()), not rest),
        measured_by=[module_of(norm)[0] or norm.name for norm in gauge.cancelling.cancelled.get(node, ())],
    )
    reasons = {
        "gain": "" if gone else gauge.solution.kept_gain.get(node, "the maps behind it went into it"),
        "shift": gauge.shifts.kept_shift.get(node, "shifts further on are cancelled in it") if rest else "",
        "mean": gauge.centring.with_mean.get(node, ""),
        "statistics": _what_it_measures(node),
        "cancel": gauge.cancelling.not_cancelled.get(node, ""),
    }
    if not gauge.options.keep_dynamic_norms:
        record.reasons = {what: why for what, why in reasons.items() if why}
    return record


def _untouched(node: Node, why: str) -> DynamicNormRecord:
    name, kind = _name_and_kind(node)
    has = {entry: argument(node, entry) is not None for entry in ("weight", "bias")}
    gain, shift = ("kept" if has[entry] else "none" for entry in ("weight", "bias"))
    what = "gain" if has["weight"] else "shift" if has["bias"] else "statistics"
    return DynamicNormRecord(name, kind, NORMALISING[node.target], gain, shift, reasons={what: why})


def _what_it_measures(node: Node) -> str:
    """What keeps a norm that could have had running statistics dynamic; empty for other norms."""
    measured = {"batch_norm": "training", "instance_norm": "use_input_stats"}.get(operation_name(node))
    if measured and argument(node, measured):
        over = "each batch" if measured == "training" else "each sample"
        return f"it has no running statistics and measures {over}"
    return ""


def _why_untouched(node: Node, gauge: Gauge) -> str:
    if why := _what_it_measures(node):
        return why
    constants = [c for name in ("weight", "bias") if (c := argument(node, name)) is not None]
    if not all(map(gauge.program.is_constant, constants)):
        return "its gain or shift is computed from the input"
    if not all(map(gauge.usable_weight, constants)):
        return "its gain or shift is shared and may not be copied"
    return "no rule of folding knows this form of it"


def _name_and_kind(node: Node) -> tuple[str, str]:
    """A norm is called like its module, if it has one of its own."""
    path, kind = module_of(node)
    return path or node.name, kind if "Norm" in kind else NORMALISING[node.target]


def _fate(present: bool, gone: bool) -> str:
    return "kept" if not gone else "folded" if present else "none"


def _why_written_out(value: Node, tolerant: set[Node], gauge: Gauge) -> str:
    """Why the shift of a value is an Add."""
    reader = gauge.shifts.materialised_shifts[value][0]
    if value in tolerant:
        return "its shift stays as one Add, instead of one behind each of the products without a bias that read it"
    stops = "the model's output" if gauge.returns(reader, value) else gauge.describe(reader)
    return f"its shift meets {stops}, which cannot take one, and no weight before it can cancel it"


def _operations_around(node: Node, gauge: Gauge, *, backward: bool = True) -> Iterable[Node]:
    """The operations that read a norm's result and, if asked for, those that write its input.

    They are looked for through operations without weights, but through one that brings several values together only
    once: behind it begins the rest of the residual stream. Maps that stay, and a long way, end the search.
    """
    pending = [(node, True, False), *([(node, False, False)] if backward else [])]
    found: dict[Node, None] = {}
    while pending and len(found) < _FAR:
        current, forward, met = pending.pop()
        for neighbour in current.users if forward else current.all_input_nodes:
            rule = gauge.matches.of.get(neighbour)
            if rule is None or rule.opaque or neighbour in found:
                continue
            found[neighbour] = None
            several = sum(operand in gauge.matches.scale_of for operand in neighbour.all_input_nodes) > 1
            weights = rule.chooses_shift(gauge) or rule.mean is MeanRole.MEASURES
            if not (weights or neighbour in gauge.solution.kept or (several and met)):
                pending.append((neighbour, forward, met or several))
    return found
