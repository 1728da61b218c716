"""int8: the products of an ONNX file quantised by ONNX Runtime's own tool, and what that costs."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import onnx
import onnx_ir as ir
import torch

from normfuse.checkpoint import ExportableModel
from normfuse.checkpoint.archive import one_line
from normfuse.folding.typical import typical_runs
from normfuse.onnx.publish import data_beside
from normfuse.onnx.runtime import failure
from normfuse.onnx.verifier import Case, compare_int8
from normfuse.onnx.writer import WriteError, save_model
from normfuse.options import ExportError
from normfuse.quiet import quiet

_CHOOSE_BY = 8  # batches of calibration inputs, at most, that scales are chosen by
_PRODUCTS = ["MatMul", "Gemm"]


class _Reader:
    """Hands inputs to the tool, one call after another: what it calls a CalibrationDataReader."""

    def __init__(self, inputs: Sequence[Mapping[str, np.ndarray]]) -> None:
        self._left = iter(inputs)

    def get_next(self) -> Mapping[str, np.ndarray] | None:
        return next(self._left, None)


def quantize(path: Path, calibration: Sequence[Mapping[str, np.ndarray]] | None = None) -> None:
    """Replace a file of ours by one whose products with weights are int8, weights per output channel.

    Args:
        path: in a folder that nobody else looks into.
        calibration: inputs by name, from which the steps of activations are measured once and for all; None: they are
            measured whenever the file runs (dynamic quantisation).

    Raises:
        WriteError: the tool refuses the file; it is as it was then.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic, quantize_static

    def fresh() -> onnx.ModelProto:  # the tool changes what it is given
        proto = onnx.load(path)
        proto.graph.ClearField("value_info")  # the tool infers shapes anew, and trips over torch's names of dimensions
        return proto

    target = path.with_suffix(".int8.onnx")
    types = {"DefaultTensorType": onnx.TensorProto.FLOAT}  # behind operations that shape inference lacks
    options = {
        "op_types_to_quantize": _PRODUCTS,
        "per_channel": True,
        "weight_type": QuantType.QInt8,
        "use_external_data_format": bool(data_beside(path)),
    }
    logging.disable(logging.WARNING)  # its advice to preprocess
    try:
        with quiet():
            if calibration is None:
                quantize_dynamic(fresh(), target, extra_options=types, **options)
            else:
                options["activation_type"] = QuantType.QUInt8
                for own_domain in (False, True):
                    extra = {**types, "UseQDQContribOps": own_domain}
                    quantize_static(fresh(), target, _Reader(calibration), extra_options=extra, **options)
                    if failure(target) is None:  # 1.23 lacks opset 23's QuantizeLinear, but not its own
                        break
    except Exception as error:  # whatever the tool raises
        for left in target.parent.glob(f"{target.name}*"):
            left.unlink()
        raise WriteError(f"onnxruntime.quantization cannot quantise the file: {one_line(error)}") from error
    finally:
        logging.disable(logging.NOTSET)
    save_model(ir.from_proto(onnx.load(target)), path)  # names its weights apart, if it has to store any beside it
    for name in (*data_beside(target), target.name):
        target.with_name(name).unlink()


def read_calibration(path: Path, model: ExportableModel) -> list[tuple[torch.Tensor, ...]]:
    """Inputs from an .npz file: for each input of the model an array of its name, rows along the first axis.

    Each is cut into parts of as many rows as its example has, one part for each run of the model; the rest is left out.
    An array of one part (a number, a table of positions) goes into every run.

    Raises:
        ExportError: the file cannot be read, or does not hold what the model takes.
    """
    try:
        arrays = np.load(path, allow_pickle=False)
        if not isinstance(arrays, np.lib.npyio.NpzFile):
            raise ValueError("it holds one array; save it by name with numpy.savez")
        with arrays:
            names = list(arrays.files)
            found = {name: arrays[name] for name in names if name in model.input_names}
    except (OSError, EOFError, ValueError, BadZipFile) as error:
        raise ExportError(f"cannot read {path} as .npz: {one_line(error)}") from error
    missing = [name for name in model.input_names if name not in found]
    if missing:
        raise ExportError(
            f"{path} has no array {missing[0]!r}; the model takes {', '.join(model.input_names)}, the file has "
            f"{', '.join(names) or 'nothing'}"
        )
    parts = {}
    for name, like in zip(model.input_names, model.example_inputs, strict=True):
        parts[name] = _parts(_as_input(found[name], name, like, path), like)
        if not parts[name]:
            raise ExportError(
                f"array {name!r} in {path} has {len(found[name])} rows; give at least {len(like)}, as the example has"
            )
    longest = max(parts, key=lambda name: len(parts[name]))
    runs = len(parts[longest])
    for name, found_parts in parts.items():
        if len(found_parts) not in (1, runs):
            raise ExportError(
                f"array {name!r} in {path} is enough for {len(found_parts)} runs, array {longest!r} for {runs}; give "
                "rows for as many, or for one run what is the same in all"
            )
    return [tuple(every[run % len(every)] for every in parts.values()) for run in range(runs)]


def _parts(tensor: torch.Tensor, like: torch.Tensor) -> list[torch.Tensor]:
    """A tensor cut along its first axis into parts as long as `like`; numbers are parts of their own."""
    if not tensor.dim():
        return [tensor]
    if not like.dim():
        return list(tensor)
    rows = max(1, len(like))
    return [part for part in tensor.split(rows) if len(part) == rows]


def _as_input(array: np.ndarray, name: str, like: torch.Tensor, path: Path) -> torch.Tensor:
    """An array as a tensor of an input's type. Raises ExportError where numbers would change by more than rounding."""
    wanted = str(like.dtype).removeprefix("torch.")
    kinds = "biuf" if like.is_floating_point() else "b" if like.dtype == torch.bool else "iu"
    if array.dtype.kind not in kinds:
        raise ExportError(f"array {name!r} in {path} is {array.dtype}; input {name!r} of the model is {wanted}")
    tensor = torch.from_numpy(array.astype(array.dtype.newbyteorder("="))).to(like.dtype)
    floating = like.is_floating_point()
    if ((tensor.isfinite().numpy() != np.isfinite(array)) if floating else (tensor.numpy() != array)).any():
        raise ExportError(f"array {name!r} in {path} holds numbers beyond {wanted}, the type of that input")
    return tensor


def typical_inputs(
    model: ExportableModel, dtype: str, calibrate: str | os.PathLike[str] | Sequence[Sequence[torch.Tensor]] | None
) -> list[tuple[torch.Tensor, ...]]:
    """The inputs by which scales are chosen for integers; none for other types."""
    if dtype != "int8":
        return []
    if calibrate is None:
        return [tuple(model.example_inputs)]
    if isinstance(calibrate, str | os.PathLike):
        calibrate = read_calibration(Path(calibrate), model)
    return typical_runs(model.program, calibrate, "calibrate")


def balancing(typical: Sequence[tuple[torch.Tensor, ...]]) -> dict[str, Any]:
    """The options of :func:`normfuse.fold` that choose scales by typical inputs, if there are any."""
    return {"balance": "int8", "example_inputs": typical[:_CHOOSE_BY]} if typical else {}


def quantized(
    model: ExportableModel, path: Path, typical: Sequence[tuple[torch.Tensor, ...]], *, static: bool, rtol: float | None
) -> list[Case]:
    """Quantise the file at `path`; how far its outputs are off."""
    named = [{n: t.numpy() for n, t in zip(model.input_names, tensors, strict=True)} for tensors in typical]
    quantize(path, named if static else None)
    return compare_int8(model, path, typical, rtol)
