"""Which maps of a file are worth folding: none that costs an operation, or one of ONNX Runtime's own fusions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto
from torch.export import ExportedProgram
from torch.fx import Node

from normfuse.folding import FoldReport, fold
from normfuse.onnx.graph import GraphError
from normfuse.onnx.protos import tensors_of
from normfuse.onnx.workarounds.ort_float16 import lift_weights
from normfuse.quiet import quiet

from .calls import aten
from .edits import Edited, EditError, edit, rewritten_maps
from .observing import Observed
from .onnx_file import OnnxFile
from .optimising import operations, optimised_operations
from .reading import Reader, Reading
from .rows import KIND, NOTHING_GAINED, with_all_norms

_ACTIVATIONS = ("Erf", "Tanh", "Sigmoid")
_ARITHMETIC = frozenset(("Add", "Sub", "Mul", "Div", "Pow"))
_REACH = 4  # operations around an activation that may belong to it
_MAPS = frozenset(("Add", "Sub", "Mul", "Div", "BatchNormalization"))
_ROUNDS = 4
_ADDITIONS = (aten.add.Tensor, aten.sub.Tensor)
_WEIGHTED = {
    *(aten.linear.default, aten.embedding.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default),
    *(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input),
}
_RMS_NORM_SINCE = 23  # the operator set in which a LayerNorm without a mean is one operation


@dataclass(frozen=True)
class Choice:
    """One way to fold a file.

    Attributes:
        edited: the file after it.
        report: what became of the norms.
        operations: how many the file has, constants left out.
        run: how many ONNX Runtime is left with after its own optimisations; infinite where it cannot do them.
        replaced: positions of the file's operations in whose place others take a shift: a Max for a Relu.
    """

    edited: Edited
    report: FoldReport
    operations: int
    run: float
    replaced: frozenset[int] = frozenset()

    @property
    def norms(self) -> int:
        """How many BatchNormalizations the file has after it."""
        return _norms(self.edited.proto)


def choose(
    file: OnnxFile,
    observed: Mapping[str, Observed],
    inputs: Mapping[str, Observed],
    folder: Path,
    *,
    keep_dynamic_norms: bool,
    options: Mapping[str, Any],
    progress: Callable[[str], None],
) -> tuple[list[Choice], FoldReport]:
    """Ways to fold a file that leave fewer operations or norms, in it and in what ONNX Runtime makes of it; best first.

    ONNX Runtime knows attention, GELU and LayerNorm by what other tools write for them. Where a factor in the middle
    of that has gone into a weight, it no longer does, and the file has fewer operations but takes longer. So factors of
    one number, and what stands behind a LayerNorm written out in arithmetic, are left alone where that is the case; so
    is a Relu in whose place a Max would take a shift.

    Returns:
        The ways, and the report of the widest one for files of which nothing is worth folding.
    """
    count, norms = operations(file.proto), _norms(file.proto)
    run = optimised_operations(file.proto, file, folder)
    found: list[Choice] = []
    first: FoldReport | None = None
    ways = list(dict.fromkeys((frozenset(), delicate(file, everywhere=False), delicate(file, everywhere=True))))
    for pinned in ways:
        progress("fold" if first is None else f"fold, {len(pinned)} maps left alone")
        choice = _settled(file, observed, inputs, folder, pinned, keep_dynamic_norms=True, **options)
        if math.isinf(choice.run) and not math.isinf(run):
            raise GraphError("folded, ONNX Runtime crashes when it optimises it, which it does not as it is")
        first = first or choice.report
        gain = choice.operations < count or choice.run < run or choice.norms < norms
        if gain and choice.operations <= count and choice.run <= run:
            found.append(choice)
        elif pinned | choice.replaced not in ways:
            ways.append(pinned | choice.replaced)
    found.sort(key=lambda choice: (choice.run, choice.operations))
    if (
        not keep_dynamic_norms
        and file.version >= _RMS_NORM_SINCE
        and any(node.op_type == "LayerNormalization" and file.is_own(node) for node in file.nodes)
    ):
        progress("fold the gains of LayerNorms")
        choice = _settled(
            file, observed, inputs, folder, delicate(file, everywhere=True), keep_dynamic_norms=False, **options
        )
        best = found[0] if found else Choice(Edited(file.proto), choice.report, count, run)
        # An RMSNorm and an addition of its own take less time than a LayerNorm that ONNX Runtime fused with one.
        cheaper = sum(record.core == "RMSNorm" for record in choice.report.dynamic)
        fewer = choice.operations < best.operations or cheaper
        if fewer and choice.operations <= best.operations and choice.run <= best.run + cheaper:
            found.insert(0, choice)
    assert first is not None
    return found, first


def _norms(model: ModelProto) -> int:
    return sum(node.op_type == KIND for node in model.graph.node)


def _settled(
    file: OnnxFile,
    observed: Mapping[str, Observed],
    inputs: Mapping[str, Observed],
    folder: Path,
    pinned: frozenset[int],
    **options: Any,
) -> Choice:
    """Fold, and leave alone what would only have moved; until nothing that is added could have been spared."""
    best: Choice | None = None
    paths: Mapping[str, int] = {}
    why: dict[int, str] = {}
    rounds = 0
    while rounds < _ROUNDS:  # each leaves more alone
        reading = Reader(file, observed, inputs, pinned).read()
        with quiet():  # PyTorch remarks on names that Python does not have
            folded, report = fold(reading.program, **options)
        try:
            edited = edit(reading, folded)
        except EditError as error:
            if error.position is None or error.position in pinned:
                raise
            pinned |= {error.position}
            why[error.position] = f"it cannot be written as an edit of the file: {error}"
            continue
        rounds += 1
        report = _in_words_of_the_file(report, reading)
        moved = _moved(reading, folded, report)
        _name_halves(report, reading, folded)
        choice = Choice(edited, report, operations(edited.proto), 0, _replaced(reading, folded))
        if best is None or choice.operations <= best.operations:
            best, paths = choice, reading.paths
        if moved <= pinned:
            break
        for record in report.norms:
            position = reading.paths.get(record.name)
            if position in moved and record.reason:
                why.setdefault(position, f"{NOTHING_GAINED}: {record.reason}")
        pinned |= moved
    assert best is not None
    report = with_all_norms(best.report, file, paths, why, NOTHING_GAINED)
    if any(tensor.data_type == TensorProto.FLOAT16 for tensor in tensors_of(best.edited.proto)):
        lift_weights(best.edited.proto)
    return replace(best, report=report, run=optimised_operations(best.edited.proto, file, folder))


def _replaced(reading: Reading, folded: ExportedProgram) -> frozenset[int]:
    """Positions of operations that are no maps, and in whose place others stand."""
    nodes, alive = reading.file.proto.graph.node, {node.name for node in folded.graph.nodes}
    gone = {max(origin.nodes) for name, origin in reading.origins.items() if name not in alive}
    kinds = {position: nodes[position].op_type for position in gone}
    squares = {position for position in gone if kinds[position] == "Mul" and len(set(nodes[position].input)) == 1}
    return frozenset(position for position in gone if kinds[position] not in _MAPS) | squares


def _name_halves(report: FoldReport, reading: Reading, folded: ExportedProgram) -> None:
    """Let the report say of a BatchNormalization of which a Mul alone is left that a part of it went."""
    halves = {position for position, pieces in rewritten_maps(reading, folded).items() if len(pieces) == 1}
    for record in report.norms:
        if record.kind == KIND and record.status == "kept" and reading.paths.get(record.name) in halves:
            record.status = "partly folded"


def _moved(reading: Reading, folded: ExportedProgram, report: FoldReport) -> frozenset[int]:
    """Maps of which an operation is left, so that nothing is gained by touching them."""
    added = [n for n in folded.graph.nodes if n.op == "call_function" and n.name not in reading.names]
    added = [n for n in added if n.target in (aten.mul.Tensor, aten.add.Tensor)]
    if not added:
        return frozenset()
    nodes = reading.file.proto.graph.node
    found = {reading.paths[r.name] for r in report.norms if r.status == "partly folded" and r.name in reading.paths}
    rewritten = rewritten_maps(reading, folded)
    for position, pieces in rewritten.items():
        if len(pieces) > 1 and nodes[position].op_type != "BatchNormalization":
            found.add(position)
    left = {node.name for node in folded.graph.nodes}
    before = {node.name: node for node in reading.program.graph.nodes}
    for node in set(added).difference(*rewritten.values()):
        source = before.get(getattr(node.args[0], "name", ""))
        near = [user.name for user in source.users if user.target in _ADDITIONS] if source is not None else []
        found |= {
            max(reading.origins[name].nodes)
            for name in (*near, *_additions_before(source))
            if name not in left and name in reading.origins
        }
    return frozenset(found)


def _additions_before(node: Node | None) -> Iterator[str]:
    """Additions of constants from which a shift may have come, by name: back to weights, and to what is unknown."""
    pending, seen = [node] if node is not None else [], set()
    while pending:
        current = pending.pop()
        if current in seen or current.op != "call_function":
            continue
        seen.add(current)
        if current.target in _ADDITIONS:
            yield current.name
        if getattr(current.target, "namespace", "aten") == "aten" and current.target not in _WEIGHTED:
            pending += current.all_input_nodes


def _in_words_of_the_file(report: FoldReport, reading: Reading) -> FoldReport:
    """The report with the names of the file's operations."""
    for record in report.norms:
        while record.name and record.name not in reading.paths and "." in record.name:
            record.name = record.name.rpartition(".")[0]
    for absorbed in (record.absorbed_by for records in (report.norms, report.dynamic) for record in records):
        absorbed[:] = [reading.scales.get(name, name) for name in absorbed]
    return report


def delicate(file: OnnxFile, *, everywhere: bool) -> frozenset[int]:
    """Maps that may be part of what ONNX Runtime fuses: by one number, or behind a norm written out in arithmetic.

    Args:
        file: the file.
        everywhere: whether maps by one number count anywhere, or only around an activation, as in GELU.
    """
    makers = {name: node for node in file.nodes for name in node.output if name}
    near = None if everywhere else _around_activations(file, makers)
    found, behind = set(), set()
    for position, node in zip(file.positions, file.nodes, strict=True):
        if node.op_type not in _MAPS or len(node.input) != 2:
            continue
        constants = [name for name in node.input if name in file.constants]
        single = any(int(np.prod(file.constants[name].dims)) == 1 for name in constants)
        if single and (near is None or node.output[0] in near):
            found.add(position)
        source = next((name for name in node.input if name not in file.constants), "")
        if constants and (source in behind or _is_normalised(makers.get(source), makers, file)):
            found.add(position)
            behind.update(node.output)
    return frozenset(found)


def _around_activations(file: OnnxFile, makers: Mapping[str, onnx.NodeProto]) -> set[str]:
    """Results of arithmetic that leads to an activation, or comes from one."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in file.nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found: set[str] = set()
    for node in file.nodes:
        if node.op_type in _ACTIVATIONS:
            before, after = list(node.input), list(node.output)
            for _ in range(_REACH):
                before = [n for name in before if name in makers and makers[name].op_type in _ARITHMETIC
                          for n in (name, *makers[name].input)]  # fmt: skip
                after = [n for name in after for reader in readers.get(name, ()) if reader.op_type in _ARITHMETIC
                         for n in reader.output]  # fmt: skip
                found.update(before, after)
    return found


def _is_normalised(node: onnx.NodeProto | None, makers: Mapping[str, onnx.NodeProto], file: OnnxFile) -> bool:
    """Whether an operation divides by the root of something that is computed, as a norm does."""
    if node is None or node.op_type not in ("Div", "Mul"):
        return False
    roots = [makers[name] for name in node.input if name in makers and name not in file.constants]
    return any(root.op_type in ("Sqrt", "Reciprocal", "Pow") for root in roots)
