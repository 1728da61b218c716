"""Rows of the report for the norms that folding does not see, or was told to leave alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
from onnx import NodeProto

from normfuse.folding import FoldReport
from normfuse.folding.report import DynamicNormRecord, NormRecord
from normfuse.onnx.protos import all_nodes, attribute, graphs_of

from .onnx_file import OnnxFile, label

KIND = "BatchNormalization"
_BY_THE_BATCH = "it has no running statistics and measures each batch"
NOTHING_GAINED = "nothing would be gained"


def why_unread(file: OnnxFile, norm: NodeProto) -> str:
    """Why a BatchNormalization is no map with a finite number for each channel; empty if it is."""
    if attribute(norm, "training_mode", 0) or any(norm.output[1:]):
        return _BY_THE_BATCH
    if attribute(norm, "spatial", 1) != 1:
        return "it has a number for each position"
    computed = {*norm.input[1:]} - file.constants.keys()
    if computed and any(node.op_type == "DequantizeLinear" and computed & {*node.output} for node in file.nodes):
        return "its gain, shift or statistics are quantised"
    if not computed and len(norm.input) == 5:
        gain, shift, mean, variance = (file.array(name).astype(np.float64) for name in norm.input[1:])
        with np.errstate(all="ignore"):
            scale = gain / np.sqrt(variance + attribute(norm, "epsilon", 1e-5))
            if not np.isfinite([scale, shift - mean * scale]).all():
                return "its gain, shift or statistics are not finite, or its variance is negative"
    return ""


def with_all_norms(
    report: FoldReport, file: OnnxFile, paths: Mapping[str, int], why: Mapping[int, str], otherwise: str
) -> FoldReport:
    """A report with a row for every BatchNormalization of the file.

    Args:
        report: rows of what folding saw.
        file: the file.
        paths: positions of its operations by what the report calls them.
        why: why one stays, by position.
        otherwise: why one stays of which nothing else is known.
    """
    names = {position: name for name, position in paths.items()}
    last = len(file.nodes)
    static = [(paths.get(record.name, last), record) for record in report.norms]
    dynamic = [(paths.get(record.name, last), record) for record in report.dynamic]
    seen = {position for position, _ in static} | {position for position, _ in dynamic}
    for position, norm, around in _norms_of(file):
        if not around and position in seen:
            continue
        unread = "nothing reads its result" if position in file.dead else why_unread(file, norm)
        reason = around or unread or why.get(position, otherwise)
        name = norm.name or norm.output[0]
        name = name if around else names.get(position, name)
        if reason == _BY_THE_BATCH:
            row = DynamicNormRecord(name, KIND, "BatchNorm", "kept", "kept", reasons={"statistics": reason})
            dynamic.append((position, row))
        else:
            static.append((position, NormRecord(name, KIND, "kept", reason=reason)))
    return replace(report, norms=_in_order(static), dynamic=_in_order(dynamic))


def all_kept(record: NormRecord, why: str) -> NormRecord:
    """The row of a norm in a file that stays as it is."""
    return record if record.status == "kept" else replace(record, status="kept", reason=why, absorbed_by=[])


def _in_order(rows: list) -> list:
    return [record for _, record in sorted(rows, key=lambda row: row[0])]


def _norms_of(file: OnnxFile) -> Iterator[tuple[int, NodeProto, str]]:
    """Every BatchNormalization: the position, and for those in graphs of operations and in functions, why they stay."""
    for position, node in zip(file.positions, file.nodes, strict=True):
        if node.op_type == KIND and file.is_own(node):
            yield position, node, ""
        inner = [norm for graph in graphs_of(node) for norm in all_nodes(graph.node) if norm.op_type == KIND]
        yield from ((position, norm, f"it is inside {label(node)}, which stays as it is") for norm in inner)
    for function in file.proto.functions:
        why = f"it is inside the function {function.name!r}, which is for another operator set than the file"
        yield from ((len(file.nodes), norm, why) for norm in all_nodes(function.node) if norm.op_type == KIND)
