"""From what folding decided to one record per norm."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch.fx import Node

from .engine import Folding
from .report import DynamicNormRecord, NormRecord
from .rules import OPAQUE
from .settle import sources_of_shift

aten = torch.ops.aten
_CORES = {
    aten.layer_norm.default: "LayerNorm",
    aten.rms_norm.default: "RMSNorm",
    aten.group_norm.default: "GroupNorm",
}


def collect_records(folding: Folding) -> list[tuple[NormRecord, list[Node]]]:
    """One record per module (affine maps in one norm belong together), with the operations around it."""
    spilling = {source for node in folding.spilled for source in sources_of_shift(node, folding)}
    records: dict[str, tuple[NormRecord, list[Node]]] = {}
    for node, (_, a, _) in folding.affine.items():
        path, kind = folding.module(node)
        norm = folding.is_norm(node)
        if not norm and a.size == 1:
            continue
        key = path if norm else node.name
        name = path if norm else f"{path}.{node.name}".lstrip(".")
        record, around = records.setdefault(key, (NormRecord(name, kind if norm else "affine"), []))
        if node in folding.kept:
            record.status, record.reason = "kept", folding.kept[node]
        elif node in spilling and record.status == "folded":
            record.status = "partly folded"
            record.reason = "its shift meets an operation that cannot take one, and no weight before it can cancel it"
        around += _operations_around(node, folding)
    return list(records.values())


def collect_dynamic(folding: Folding) -> list[tuple[DynamicNormRecord, list[Node]]]:
    """One record per norm that computes its statistics from its input, with the operations that read it."""
    records = []
    for node in folding.dynamic:
        rule = folding.rule_of[node]
        gain, shift = rule.gain(node, folding), rule.shift(node, folding)
        gone = np.array_equal(folding.scales[folding.scale(node)], gain)
        rest = (shift - folding.shift_of[node]).any()
        path, kind = folding.module(node)
        core = _CORES[node.target]
        record = DynamicNormRecord(
            name=path or node.name,
            kind=kind if folding.is_norm(node) else core,
            core="RMSNorm" if node in folding.without_mean else core,
            gain=_fate(bool((gain != 1).any()), gone),
            shift=_fate(bool(shift.any()), not rest),
        )
        reasons = {
            "gain": "" if gone else folding.kept_gain.get(node, "the maps behind it went into it"),
            "shift": folding.kept_shift.get(node, "shifts further on are cancelled in it") if rest else "",
            "mean": folding.with_mean.get(node, ""),
        }
        if not folding.keep_dynamic_norms:
            record.reasons = {what: why for what, why in reasons.items() if why}
        records.append((record, list(_operations_around(node, folding, backward=False))))
    return records


def _fate(present: bool, gone: bool) -> str:
    return "kept" if not gone else "folded" if present else "none"


def _operations_around(node: Node, folding: Folding, *, backward: bool = True) -> Iterable[Node]:
    """The operations that read a norm's result and, if asked for, those that write its input.

    They are looked for through operations without weights, but through one that brings several values together only
    once: behind it begins the rest of the residual stream.
    """
    pending, found = [(node, True, False), *([(node, False, False)] if backward else [])], []
    while pending:
        current, forward, met = pending.pop()
        for neighbour in current.users if forward else current.all_input_nodes:
            rule = folding.rule_of.get(neighbour)
            if rule is None or rule is OPAQUE or neighbour in found:
                continue
            found.append(neighbour)
            several = sum(operand in folding.scale_of for operand in neighbour.all_input_nodes) > 1
            weights = rule.owns_constants and neighbour not in folding.affine
            if not (weights or (several and met)):
                pending.append((neighbour, forward, met or several))
    return found
