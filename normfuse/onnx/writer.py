"""From a folded program to an ONNX file."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import sympy
import torch
from onnx_ir.passes.common import (
    ClearMetadataAndDocStringPass,
    NameFixPass,
    RemoveUnusedNodesPass,
    TopologicalSortPass,
)
from torch.utils import _pytree as pytree

from normfuse.checkpoint import Dimension, InputSpec
from normfuse.checkpoint.archive import one_line, some_of
from normfuse.checkpoint.tracing import user_sizes
from normfuse.errors import NormfuseError, check_kind
from normfuse.files import Output
from normfuse.onnx.graph_passes import run_passes
from normfuse.onnx.graph_passes.running import run
from normfuse.onnx.masks import mask_as_torch
from normfuse.onnx.norms import RMS_NORM_SINCE, adopt, spell_out, translations
from normfuse.onnx.publish import data_beside, data_name, publish
from normfuse.onnx.workarounds.ort_bfloat16 import widen_bfloat16
from normfuse.onnx.workarounds.ort_broadcasting import expand_attention_masks, expand_rotary_caches
from normfuse.onnx.workarounds.ort_float16 import float32_only, lift_weights
from normfuse.onnx.workarounds.torch_onnx_refusals import translatable
from normfuse.onnx.workarounds.torch_onnx_table import kept_table
from normfuse.options import DTYPES, OPSETS
from normfuse.quiet import quiet

INPUTS = "normfuse.inputs"  # in the file's metadata: what ONNX has no place for, such as the bounds of dimensions
# A protobuf message ends at 2 GiB; what is not weights (nodes, names, shapes) stays far below this margin.
_ONE_FILE_LIMIT = 2**31 - 2**25
_FLOAT16_MAX = float(np.finfo(np.float16).max)


class WriteError(NormfuseError):
    """A program has no ONNX form (an operation that ONNX lacks, a weight beyond float16). One line."""


class UnwritableError(WriteError):
    """What no older operator set would change: none need be tried."""


def write(
    program: torch.export.ExportedProgram,
    path: str | os.PathLike[str],
    *,
    opset: int | None = None,
    dtype: str = "float32",
    inputs: Sequence[InputSpec] = (),
    outputs: Sequence[str] = (),
    passes: Collection[str] = (),
    one_file_limit: int = _ONE_FILE_LIMIT,
) -> list[Path]:
    """Write a program as ONNX and check the file with ``onnx.checker``. The file appears when it is complete.

    Args:
        program: an exported program, folded or not.
        path: the ``.onnx`` file.
        opset: version of the operator set, 18 to 23; None takes the newest of 23, 20 and 18 that the program can be
            written in.
        dtype: ``float32``, or ``float16`` to convert weights and operations while inputs and outputs stay
            float32.
        inputs: names for the inputs and their dynamic dimensions; without them the file shows the program's own. Its
            metadata has them with their bounds, under ``normfuse.inputs``: a line for each, as `--input` takes it.
        outputs: names for the outputs; without them keys of a dictionary, else ``output_0``, ``output_1``, …
        passes: names of graph passes to run before the file is saved, see :data:`normfuse.onnx.graph_passes.PASSES`.
        one_file_limit: weights of more bytes than this go to a file beside it, ``<path>.<random>.data``.

    Returns:
        The files written: the ONNX file, and the one with its weights if they are apart.

    Raises:
        WriteError: an operation has no translation, a weight does not fit float16, the checker objects, `path` cannot
            be written. TypeError: `program` is no exported program.

    Example:
        >>> import normfuse
        >>> program = torch.export.export(nn.Linear(4, 2).eval(), (torch.randn(3, 4),))
        >>> [path.name for path in normfuse.onnx.write(program, "linear.onnx", opset=20)]
        ['linear.onnx']
    """
    way_out = "an exported program, such as normfuse.fold returns; normfuse.onnx.export takes modules"
    check_kind("program", program, torch.export.ExportedProgram, way_out)
    path, translator = Path(path), Translator(inputs, outputs)
    with Output(path, error=WriteError) as output:
        problems: list[str] = []
        for candidate in OPSETS if opset is None else (opset,):
            try:
                write_staged(
                    program,
                    output.staged,
                    translator,
                    opset=candidate,
                    dtype=dtype,
                    passes=passes,
                    one_file_limit=one_file_limit,
                )
                break
            except WriteError as error:
                if opset is not None or isinstance(error, UnwritableError):
                    raise
                problems.append(str(error))
        else:
            raise WriteError("no opset can be written: " + "; ".join(problems))
        publish(output)
    return [path, *(output.target.with_name(name) for name in data_beside(output.target))]


def write_staged(
    program: torch.export.ExportedProgram,
    path: Path,
    translator: Translator,
    *,
    opset: int,
    dtype: str,
    passes: Collection[str] = (),
    one_file_limit: int = _ONE_FILE_LIMIT,
) -> dict[str, int]:
    """What :func:`write` does, at the place of the file itself: for a folder that nobody looks into.

    Returns:
        How often each graph pass applied.
    """
    if dtype not in DTYPES:
        raise WriteError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    with quiet():
        model = translator(program, opset, dtype)
        applied = optimise(model, passes)
        finish(model, opset, translator.inputs)
        save(model, path, dtype, one_file_limit)
        try:
            onnx.checker.check_model(str(path), full_check=True)
        except Exception as error:  # ValidationError, InferenceError and others without a common base
            raise WriteError(f"opset {opset}: onnx.checker objects: {one_line(error)}") from error
    return applied


class Translator:
    """Translates every program once for an operator set, however many files come of it.

    Args:
        inputs: names for the inputs and their dynamic dimensions.
        outputs: names for the outputs.
    """

    def __init__(self, inputs: Sequence[InputSpec] = (), outputs: Sequence[str] = ()) -> None:
        self.inputs, self.outputs = inputs, outputs
        self._made: dict[tuple[int, int, str], tuple[torch.export.ExportedProgram, ir.Model]] = {}

    def __call__(self, program: torch.export.ExportedProgram, opset: int, dtype: str) -> ir.Model:
        """A copy that may be changed. Raises WriteError."""
        key = (id(program), opset, dtype)
        if key not in self._made:
            self._made[key] = program, translate(program, opset, dtype, self.inputs, self.outputs)
        return self._made[key][1].clone()


def translate(
    program: torch.export.ExportedProgram,
    opset: int,
    dtype: str,
    inputs: Sequence[InputSpec] = (),
    outputs: Sequence[str] = (),
) -> ir.Model:
    """A program in the operations of ONNX, in float32, as ONNX Runtime computes what PyTorch does.

    Raises:
        WriteError: an operation has no translation.
    """
    try:
        with translatable(program), kept_table():
            exported = torch.onnx.export(
                program,
                (),
                dynamo=True,
                opset_version=opset,
                input_names=[spec.name for spec in inputs] or None,
                output_names=list(outputs) or output_names(program),
                verbose=False,
                custom_translation_table=translations(),
            )
    except Exception as error:  # the exporter wraps whatever a translation raises
        raise _translation_problem(opset, error) from error
    model = exported.model
    names = partial(_name_dimensions, program=program, inputs=inputs)
    run(
        model,
        [
            NameFixPass(),  # an output may be called as an inner value is
            adopt,
            partial(mask_as_torch, half=dtype == "float16"),
            expand_attention_masks,
            expand_rotary_caches,
            widen_bfloat16,
            names,
        ],
    )
    return model


def optimise(model: ir.Model, passes: Collection[str]) -> dict[str, int]:
    """Run graph passes, in place; how often each applied.

    Raises:
        WriteError: a pass cannot take the graph.
    """
    try:
        return run_passes(model, passes)
    except Exception as error:  # must cost the passes, not the export
        raise WriteError(f"a graph pass failed: {type(error).__name__}: {one_line(error)}") from error


def finish(model: ir.Model, opset: int, inputs: Sequence[InputSpec]) -> None:
    """What is left to do in a model before it is saved: only standard operations, nothing superfluous, metadata."""
    run(
        model,
        [
            *([spell_out] if opset < RMS_NORM_SINCE else []),
            RemoveUnusedNodesPass(),  # and initializers that nothing uses, on which ONNX Runtime would remark
            ClearMetadataAndDocStringPass(),  # stack traces of the exporting machine, often larger than the graph
        ],
    )
    if inputs:
        model.metadata_props[INPUTS] = "\n".join(map(str, inputs))


def save(model: ir.Model, path: Path, dtype: str, one_file_limit: int = _ONE_FILE_LIMIT) -> None:
    """Save a model of float32, with weights and operations in another type if that is asked for.

    Raises:
        WriteError: a weight does not fit float16.
    """
    if dtype == "float16":
        refuse_overflow(model)
    save_model(model, path, one_file_limit)
    if dtype == "float16":
        save_model(as_float16(path), path, one_file_limit)


def output_names(program: torch.export.ExportedProgram) -> list[str]:
    """``output``, or one name per output: the keys of a dictionary, else ``output_0`` and so on."""
    spec = program.call_spec.out_spec
    count = spec.num_leaves
    if count == 1:
        return ["output"]
    tree = pytree.tree_unflatten(list(range(count)), spec)
    names = []
    for keys, index in pytree.tree_flatten_with_path(tree)[0]:
        label = "_".join(re.findall(r"\w+", pytree.keystr(keys)))
        names.append(f"output_{index}" if not label or label[0].isdigit() else label)
    taken = set(program.graph_signature.user_inputs)
    return [f"{name}_out" if name in taken else name for name in names]


def _name_dimensions(model: ir.Model, program: torch.export.ExportedProgram, inputs: Sequence[InputSpec]) -> None:
    """Replaces torch's symbols (``s27``) by the names that the dimensions were given."""
    symbols = {}
    for spec, sizes in zip(inputs, user_sizes(program), strict=False):
        for dim, size in zip(spec.dims, sizes, strict=True):
            if not isinstance(dim, int) and isinstance(size, sympy.Symbol):
                symbols[str(size)] = dim.name if isinstance(dim, Dimension) else str(dim)
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, symbols)) + r")\b") if symbols else None
    for value in _values(model.graph):
        if value.shape is not None:
            value.shape = ir.Shape([_dimension(dim, pattern, symbols) for dim in value.shape])


def _dimension(
    dim: int | ir.SymbolicDim, pattern: re.Pattern[str] | None, names: Mapping[str, str]
) -> int | str | ir.SymbolicDim:
    """A dimension with names in the place of torch's symbols; torch.onnx writes fixed ones as texts, too."""
    if isinstance(dim, int) or dim.value is None:
        return dim
    if dim.value.isdecimal():
        return int(dim.value)
    return dim if pattern is None else pattern.sub(partial(_named, names, dim.value), dim.value)


def _named(names: Mapping[str, str], whole: str, symbol: re.Match[str]) -> str:
    name = names[symbol[0]]
    return name if symbol[0] == whole or name.isidentifier() else f"({name})"


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in graph.all_nodes():
        yield from node.outputs


def refuse_overflow(model: ir.Model) -> None:
    """UnwritableError naming the weights with numbers beyond float16's largest, 65504.

    Constants that hide what a mask takes out are none of them: infinity is a float16, and a number such as
    ``torch.finfo(torch.float32).min`` becomes the float16 of largest magnitude, which hides as well.
    """
    beyond = []
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype == ir.DataType.FLOAT and tensor.size:
            numbers = tensor.numpy()
            if not (np.abs(numbers) <= _FLOAT16_MAX).all() and not _hides(numbers):
                users = [str(use.node.name) for use in value.uses()]
                beyond.append(f"{value.name} of {some_of(users, 1)} (up to {np.abs(numbers).max():.3g})")
    if beyond:
        raise UnwritableError(
            f"float16 holds numbers up to {_FLOAT16_MAX:.0f}, and {len(beyond)} weight(s) exceed it: "
            f"{some_of(beyond)}; "
            "export float32"
        )


def _hides(numbers: np.ndarray) -> bool:
    """Whether a constant can be a mask, or a part of one: it has one number beyond float16, and no other but zero."""
    large = numbers.flat[np.abs(numbers).argmax()]
    return bool(np.isin(numbers, (0.0, large)).all())


def as_float16(path: Path) -> ir.Model:
    """The model in a file with weights and operations in float16; inputs and outputs keep their types."""
    from onnxruntime.transformers import float16

    left = float32_only(onnx.load(path, load_external_data=False), float16.ALWAYS_FLOAT_INPUTS)
    left |= {*float16.DEFAULT_OP_BLOCK_LIST}
    # By path, because the converter's shape inference on a model in memory ends at 2 GiB.
    converted = float16.convert_float_to_float16(str(path), keep_io_types=True, op_block_list=sorted(left))
    lift_weights(converted)
    model = ir.from_proto(converted)
    TopologicalSortPass()(model)  # the converter appends its casts at the end
    return model


def save_model(model: ir.Model, path: Path, one_file_limit: int = _ONE_FILE_LIMIT) -> None:
    """Saves a model in a folder of our own, weights of more bytes than the limit apart; removes those that were there.

    :func:`normfuse.onnx.publish.publish` puts both in their place.
    """
    before = data_beside(path)
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    ir.save(model, path, external_data=data_name(path) if size > one_file_limit else None)
    for name in before:
        path.with_name(name).unlink()


def _translation_problem(opset: int, error: BaseException) -> WriteError:
    """The operation without translation if that is the trouble, else the innermost error in one line."""
    causes: list[Any] = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    missing = sorted(
        {
            m
            for cause in causes
            for m in re.findall(r"No ONNX function found for <?OpOverload\(op='([\w.:]+)'", str(cause))
        }
    )
    if missing:
        return UnwritableError(
            f"opset {opset}: ONNX has no translation of {some_of(missing)}; "
            "write that part of the model with other operations"
        )
    return WriteError(f"opset {opset}: torch.onnx could not translate the program: {one_line(causes[-1])}")
