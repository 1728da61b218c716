"""int8: the products of an ONNX file quantised by ONNX Runtime's own tool, and what that costs."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from normfuse.checkpoint import ExportableModel
from normfuse.checkpoint.archive import one_line
from normfuse.onnx.publish import data_beside
from normfuse.onnx.runtime import failure
from normfuse.onnx.verifier import Case, compare_int8
from normfuse.onnx.writer import WriteError
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
        target.unlink(missing_ok=True)
        raise WriteError(f"onnxruntime.quantization cannot quantise the file: {one_line(error)}") from error
    finally:
        logging.disable(logging.NOTSET)
    target.replace(path)


def read_calibration(path: Path, model: ExportableModel) -> list[tuple[torch.Tensor, ...]]:
    """Inputs from an .npz file: for each input of the model an array of its name, rows along the first axis.

    They are cut into batches of as many rows as the example inputs have.

    Raises:
        ExportError: the file cannot be read, or does not hold what the model takes.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError) as error:
        raise ExportError(f"cannot read {path} as .npz: {one_line(error)}") from error
    missing = [name for name in model.input_names if name not in found]
    if missing:
        raise ExportError(
            f"{path} has no array {missing[0]!r}; the model takes {', '.join(model.input_names)}, the file has "
            f"{', '.join(found) or 'nothing'}"
        )
    ordered = [found[name] for name in model.input_names]
    lengths = {len(array) if array.ndim else 0 for array in ordered}
    rows = model.example_inputs[0].shape[0] if model.example_inputs[0].dim() else 1
    if len(lengths) != 1 or max(lengths) < rows:
        raise ExportError(
            f"the arrays in {path} have {' and '.join(map(str, sorted(lengths)))} rows; give as many of each, and at "
            f"least {rows}, the rows of the example inputs"
        )
    return list(_batches(ordered, rows, model))


def _batches(arrays: Sequence[np.ndarray], rows: int, model: ExportableModel) -> Iterator[tuple[torch.Tensor, ...]]:
    for start in range(0, len(arrays[0]) - rows + 1, rows):
        parts = (torch.from_numpy(array[start : start + rows]) for array in arrays)
        yield tuple(part.to(like.dtype) for part, like in zip(parts, model.example_inputs, strict=True))


def typical_inputs(
    model: ExportableModel, dtype: str, calibrate: str | os.PathLike[str] | Sequence[Sequence[torch.Tensor]] | None
) -> list[tuple[torch.Tensor, ...]]:
    """The inputs by which scales are chosen for integers; none for other types."""
    if dtype != "int8":
        return []
    if calibrate is None:
        return [tuple(model.example_inputs)]
    if isinstance(calibrate, str | os.PathLike):
        return read_calibration(Path(calibrate), model)
    if not calibrate:
        raise ExportError("calibrate holds no inputs; give at least one sequence of tensors")
    return [tuple(tensors) for tensors in calibrate]


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
