"""From what folding decided to one record per norm."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from torch.fx import Node

from .engine import Folding
from .report import NormRecord
from .rules import OPAQUE
from .rules.base import is_float


def collect_records(folding: Folding) -> list[tuple[NormRecord, list[Node]]]:
    """One record per module (affine maps in one norm belong together), with the operations around it."""
    spilling = {source for node in folding.spilled for source in _sources_of_shift(node, folding)}
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


def _sources_of_shift(node: Node, folding: Folding) -> Iterable[Node]:
    """The affine maps from which the shift of a value may have come."""
    pending, seen = [node], set()
    while pending:
        current = pending.pop()
        if current in seen or current not in folding.rule_of:
            continue
        seen.add(current)
        if current in folding.affine and folding.affine[current].b.any():
            yield current
        pending += [o for o in current.all_input_nodes if is_float(o) and np.any(folding.shift_of.get(o, 0))]


def _operations_around(node: Node, folding: Folding) -> Iterable[Node]:
    """The operations that read a norm's result and those that write its input.

    They are looked for through operations without weights, but through one that brings several values together only
    once: behind it begins the rest of the residual stream.
    """
    pending, found = [(node, True, False), (node, False, False)], []
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
