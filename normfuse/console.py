"""What the command line prints: stages with their times, tables, reports."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from normfuse.errors import joined_names, some_of
from normfuse.options import INT8_FILE

if TYPE_CHECKING:
    from normfuse.folding import DynamicNormRecord, FoldReport, NormRecord
    from normfuse.onnx import ExportResult

_SHOWN_NORMS = 24
_TABLE_WIDTH = 80  # a narrower terminal gets one paragraph per norm
_PLAIN_WIDTH = 110  # of output that goes to a file or a pipe

Record = TypeVar("Record", "NormRecord", "DynamicNormRecord")


class Stages:
    """Prints each stage with the time it took; on a terminal, the running one turns a spinner."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.status = console.status("") if console.is_terminal else None
        self.name = ""
        self.start = 0.0

    def __enter__(self) -> Stages:
        if self.status:
            self.status.start()
        return self

    def __call__(self, name: str) -> None:
        self._finish("✓")
        self.name, self.start = name, time.perf_counter()
        if self.status:
            self.status.update(escape(name))

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._finish("✓" if kind is None else "✗")
        if self.status:
            self.status.stop()

    def _finish(self, mark: str) -> None:
        if self.name:
            took = time.perf_counter() - self.start
            self.console.print(f"{mark} {escape(self.name)} ({took:.1f} s)", highlight=False)
        self.name = ""


def make_console(stderr: bool = False) -> Console:
    """As wide as the terminal; output that goes elsewhere has a width of its own."""
    stream = sys.stderr if stderr else sys.stdout
    if stream.isatty() or "COLUMNS" in os.environ:
        return Console(stderr=stderr)
    return Console(width=_PLAIN_WIDTH, stderr=stderr)


def make_table(*columns: str) -> Table:
    """An empty table without lines."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def print_result(console: Console, result: ExportResult) -> None:
    """What became of the norms, which graph passes applied, and how well it agrees."""
    print_report(console, result.report)
    for number, why in result.rejected.items():
        console.print(f"opset {number} was left out: {escape(why)}", style="yellow", highlight=False)
    print_notes(console, result.notes)
    if result.passes:
        passes = ", ".join(f"{name} ×{count}" for name, count in result.passes.items() if count)
        console.print(f"graph passes for {result.target}: {passes or 'no pass applies'}", highlight=False)
    if result.growth:
        grown = result.growth
        console.print(
            f"values inside reach {grown.largest:.3g} on the example inputs ({escape(grown.at)}), {grown.original:.3g} "
            f"in the model; {result.dtype} holds up to {grown.limit:.0f}",
            highlight=False,
        )
    graph, verification = result.graph, result.verification
    integers = [case for case in verification.cases if case.form == INT8_FILE]
    forms = dict.fromkeys(case.form for case in verification.cases if case not in integers)
    if forms:
        within = ", ".join(f"{form} within {verification.worst(form):.1e}" for form in forms)
        console.print(
            f"verified on {len(verification.shapes)} inputs: {within} of the output's largest value", highlight=False
        )
    for case in integers:
        console.print(f"int8: {case.output} is off by {case.error:.1%} of its size on {case.inputs}", highlight=False)
    left = f"{len(graph.norms)} norm nodes, {len(graph.affines)} per-channel Mul/Add left"
    console.print(
        f"{escape(str(result.path))}: opset {result.opset}, {result.dtype}, {graph.node_count} nodes, "
        f"{readable_size(graph.bytes)}; {left}",
        highlight=False,
    )


def print_notes(console: Console, notes: Sequence[str]) -> None:
    """A line for each decision that a reader may want to know of."""
    for note in notes:
        console.print(escape(note), style="yellow", highlight=False)


def print_report(console: Console, report: FoldReport) -> None:
    """A row for each norm (the folded ones of many are left out), and the sums."""
    rows, hidden = _abridged(report.norms, lambda record: record.status != "folded")
    if console.width < _TABLE_WIDTH:
        for record in rows:
            console.print(escape(str(record)), style=_style(record), highlight=False)
    elif rows:
        table = make_table("norm", "kind", "became", "into", *(["why it stayed"] if report.remaining else []))
        for record in rows:
            cells = [record.name, record.kind, record.status, joined_names(record.absorbed_by), record.reason]
            table.add_row(*(escape(cell) for cell in cells[: len(table.columns)]), style=_style(record))
        console.print(table)
    if hidden:
        console.print(f"… and {hidden} more, all folded (--report has them)", highlight=False)
    for removed in report.removed:
        what = f"{removed.channels} of {removed.num_features} channels taken out of {joined_names(removed.weights)}"
        line = f"{removed.name}: {what if removed.channels else f'constant channels stay ({removed.reason})'}"
        console.print(escape(line), highlight=False)
    if report.settled_early:
        where = some_of(report.settled_early, 4)
        line = f"shifts settled in the biases in front of {where}: norms had amplified them (no operation is added)"
        console.print(escape(line), highlight=False)
    _print_dynamic(console, report.dynamic)
    if report.cancel_difference is not None:
        console.print(
            f"norms cancelled: on the example inputs, rounding and the changed effect of eps change outputs by at most "
            f"{report.cancel_difference:.1e} of the largest",
            highlight=False,
        )
    folded = len(report.norms) - len(report.remaining)
    copied = f", {readable_size(report.bytes_copied)} of it copies of shared weights" if report.bytes_copied else ""
    console.print(
        f"{f'{folded} of {len(report.norms)} norms folded; ' if report.norms else ''}program: {report.nodes_before} → "
        f"{report.nodes_after} "
        f"operations, {readable_size(report.bytes_before)} → {readable_size(report.bytes_after)}{copied}",
        highlight=False,
    )


def _print_dynamic(console: Console, records: Sequence[DynamicNormRecord]) -> None:
    """The norms that compute their statistics from each input: what is left of them."""
    if not records:
        return
    rows, hidden = _abridged(records, lambda record: bool(record.reasons))
    if console.width < _TABLE_WIDTH:
        for record in rows:
            console.print(escape(str(record)), highlight=False)
    else:
        reasons = any(record.reasons for record in rows)
        table = make_table("norm", "kind", "core", "gain", "shift", "into", *(["why it stayed"] if reasons else []))
        for record in rows:
            into = joined_names(record.absorbed_by)
            cells = [record.name, record.kind, record.core, record.gain, record.shift, into, record.first_reason]
            table.add_row(*map(escape, cells[: len(table.columns)]))
        console.print(table)
    if hidden:
        console.print(f"… and {hidden} more of which nothing but the core is left", highlight=False)
    cores = Counter(record.core for record in records)
    gains, shifts = (
        Counter(fate for fate in fates if fate != "none")
        for fates in zip(*((record.gain, record.shift) for record in records), strict=True)
    )
    console.print(
        f"statistics from each input: {', '.join(f'{count} {core}' for core, count in cores.items())}; "
        f"{gains['folded']} of {gains.total()} gains and {shifts['folded']} of {shifts.total()} shifts folded",
        highlight=False,
    )


def _style(record: NormRecord) -> str:
    return "" if record.status == "folded" else "yellow"


def _abridged(records: Sequence[Record], stays: Callable[[Record], bool]) -> tuple[list[Record], int]:
    """At most ``_SHOWN_NORMS`` records, those of which something stays before others; and how many are left out."""
    if len(records) <= _SHOWN_NORMS:
        return list(records), 0
    stayed = [index for index, record in enumerate(records) if stays(record)]
    gone = [index for index, record in enumerate(records) if not stays(record)]
    kept = sorted(stayed + gone[: max(0, _SHOWN_NORMS - len(stayed))])
    return [records[index] for index in kept], len(records) - len(kept)


def readable_size(count: float) -> str:
    """Bytes with a unit."""
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
