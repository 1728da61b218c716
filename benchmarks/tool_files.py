"""Folds small models as tools write them: exporters, simplifiers, optimisers, converters to float16 and int8.

    python benchmarks/tool_files.py [--folder FOLDER]

Needs onnxsim, onnxslim and onnxconverter-common for their rows; rows of what is not installed are left out. Prints a
table in Markdown: for each tool and model, norms folded of those that the file has, and operations before and after.
Files stay in FOLDER.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from normfuse.nn import UnifiedNorm
from normfuse.onnx import fold_file

_ROWS = 3  # of the inputs that static quantisation looks at


class Convolutions(nn.Module):
    """BatchNorm behind convolutions, grouped and transposed ones among them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.grouped, self.norm2, self.slope = nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.BatchNorm2d(8), nn.PReLU(8)
        self.up, self.norm3 = nn.ConvTranspose2d(8, 8, 2, 2), nn.BatchNorm2d(8)
        self.shuffle, self.narrow, self.head = nn.PixelShuffle(2), nn.Conv2d(2, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.conv(x)))
        y = self.slope(self.norm2(self.grouped(y)) + y)
        y = self.narrow(self.shuffle(torch.relu(self.norm3(self.up(y)))))
        return self.head(nn.functional.adaptive_avg_pool2d(y, 1).flatten(1))


class PreActivation(nn.Module):
    """BatchNorm in front of convolutions, on a residual stream; the first one stands between a sum and a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.ModuleList((nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)))
        self.norm = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv[0](x)
        for conv, norm in zip(self.conv[1:], self.norm, strict=False):
            x = x + conv(torch.relu(norm(x)))
        return self.head(self.norm[2](x).mean((2, 3)))


class Recurrent(nn.Module):
    """BatchNorm between an embedding, LSTMs, a GRU and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(50, 12), nn.BatchNorm1d(12)
        self.lstm, self.norm2 = nn.LSTM(12, 10, 2, batch_first=True, bidirectional=True), nn.BatchNorm1d(20)
        self.gru, self.norm3, self.head = nn.GRU(20, 20, batch_first=True), nn.BatchNorm1d(20), nn.Linear(20, 7)

    def forward(self, ids: Tensor) -> Tensor:
        x = self._over_channels(self.norm, self.table(ids))
        x = self._over_channels(self.norm2, self.lstm(x)[0])
        return self.head(self._over_channels(self.norm3, self.gru(x)[0]))

    def _over_channels(self, norm: nn.Module, x: Tensor) -> Tensor:
        return norm(x.transpose(1, 2)).transpose(1, 2)


class Block(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.norm, self.norm2 = (
            nn.Linear(32, 96),
            nn.Linear(32, 32),
            UnifiedNorm(32),
            UnifiedNorm(32),
        )
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, tokens, 3, 4, 8).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.transpose(-1, -2) / 8**0.5 + hidden).softmax(-1) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """An encoder of two blocks with static norms."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(50, 32), nn.Embedding(64, 32)
        self.blocks, self.norm, self.head = nn.ModuleList((Block(), Block())), UnifiedNorm(32), nn.Linear(32, 9)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = (1 - mask[:, None, None].float()) * -1e4
        x = self.table(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))[None]
        for block in self.blocks:
            x = block(x, hidden)
        return self.head(self.norm(x))


_PICTURES, _TOKENS = {0: "batch", 2: "height", 3: "width"}, {0: "batch", 1: "seq"}
MODELS: dict[str, tuple[type[nn.Module], tuple[tuple[int, ...], ...], tuple[dict[int, str], ...]]] = {
    "convolutions": (Convolutions, ((2, 3, 16, 16),), (_PICTURES,)),
    "pre-activation": (PreActivation, ((2, 3, 16, 16),), (_PICTURES,)),
    "recurrent": (Recurrent, ((2, 6),), (_TOKENS,)),
    "transformer": (Transformer, ((2, 6), (2, 6)), (_TOKENS, _TOKENS)),
}


def trained(kind: type[nn.Module]) -> nn.Module:
    """A model whose statistics, gains and shifts are as those of a trained one: none at its initial value."""
    torch.manual_seed(0)
    model = kind()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if "running_var" in name:
                buffer.uniform_(0.5, 2)
            elif "running_mean" in name:
                buffer.normal_(0, 0.3)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


class Exported:
    """One model, and what tools make of it."""

    def __init__(self, name: str, folder: Path) -> None:
        kind, shapes, self._axes = MODELS[name]
        self._model, self._folder = trained(kind), folder
        if len(shapes[0]) == 2:
            self._inputs = (torch.randint(0, 50, shapes[0]), *(torch.ones(s, dtype=torch.int64) for s in shapes[1:]))
        else:
            self._inputs = tuple(torch.randn(shape) for shape in shapes)
        self._names = [f"input_{number}" for number in range(len(shapes))]
        self._base = folder / "base.onnx"
        # As a file lies on many disks: nothing merged, nothing computed beforehand.
        self.legacy(17, training=torch.onnx.TrainingMode.PRESERVE, do_constant_folding=False)(self._base)

    def legacy(self, opset: int, **options: Any) -> Callable[[Path], None]:
        axes = dict(zip(self._names, self._axes, strict=True))
        return lambda path: torch.onnx.export(
            self._model, self._inputs, str(path), input_names=self._names, dynamic_axes=axes, opset_version=opset,
            dynamo=False, **options,
        )  # fmt: skip

    def dynamo(self, opset: int, *, optimize: bool = True) -> Callable[[Path], None]:
        shapes = tuple(dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for axes in self._axes)
        return lambda path: torch.onnx.export(
            self._model, self._inputs, str(path), dynamo=True, opset_version=opset, dynamic_shapes=shapes,
            optimize=optimize, verbose=False, external_data=False,
        )  # fmt: skip

    def tools(self) -> Iterator[tuple[str, Callable[[Path], None]]]:
        yield from ((f"torch, legacy exporter, opset {opset}", self.legacy(opset)) for opset in (11, 13, 15, 17))
        yield (
            "the same, weights listed as inputs",
            self.legacy(
                17,
                keep_initializers_as_inputs=True,
                do_constant_folding=False,
                training=torch.onnx.TrainingMode.PRESERVE,
            ),
        )
        yield from ((f"torch, dynamo exporter, opset {opset}", self.dynamo(opset)) for opset in (18, 20, 23))
        yield "the same, not optimised", self.dynamo(18, optimize=False)
        yield "onnxsim", self._simplified
        yield "onnxslim", self._slimmed
        yield "onnxruntime, basic optimisations", self._optimised("BASIC")
        yield "onnxruntime, extended optimisations", self._optimised("EXTENDED")
        yield "onnxruntime.transformers.optimizer", self._for_transformers
        yield "onnxruntime.transformers.float16", self._halved
        yield "onnxconverter-common float16", self._halved_by_common
        yield "onnxruntime, dynamic int8", self._dynamic_int8
        yield "onnxruntime, static int8, QDQ", self._static_int8("QDQ")
        yield "onnxruntime, static int8, QOperator", self._static_int8("QOperator")

    def _simplified(self, path: Path) -> None:
        import onnxsim

        onnx.save(onnxsim.simplify(str(self._base))[0], path)

    def _slimmed(self, path: Path) -> None:
        import onnxslim

        onnx.save(onnxslim.slim(str(self._base)), path)

    def _optimised(self, level: str) -> Callable[[Path], None]:
        def make(path: Path) -> None:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4
            options.optimized_model_filepath = str(path)
            options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
            onnxruntime.InferenceSession(str(self._base), options, providers=["CPUExecutionProvider"])

        return make

    def _for_transformers(self, path: Path) -> None:
        from onnxruntime.transformers.optimizer import optimize_model

        optimize_model(str(self._base), "bert", num_heads=4, hidden_size=32).save_model_to_file(str(path))

    def _halved(self, path: Path) -> None:
        from onnxruntime.transformers.float16 import convert_float_to_float16

        onnx.save(convert_float_to_float16(onnx.load(self._base)), path)

    def _halved_by_common(self, path: Path) -> None:
        from onnxconverter_common import float16

        onnx.save(float16.convert_float_to_float16(onnx.load(self._base)), path)

    def _dynamic_int8(self, path: Path) -> None:
        from onnxruntime.quantization import quantize_dynamic

        quantize_dynamic(str(self._base), str(path))

    def _static_int8(self, form: str) -> Callable[[Path], None]:
        def make(path: Path) -> None:
            from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

            names, inputs = self._names, self._inputs

            class Reader(CalibrationDataReader):
                def __init__(self) -> None:
                    self._left = _ROWS

                def get_next(self) -> dict[str, np.ndarray] | None:
                    self._left -= 1
                    given = dict(zip(names, (value.numpy() for value in inputs), strict=True))
                    return given if self._left >= 0 else None

            quantize_static(str(self._base), str(path), Reader(), quant_format=getattr(QuantFormat, form))

        return make


def outcome(make: Callable[[Path], None], folder: Path, name: str) -> str | None:
    """What becomes of a file that a tool makes, in a cell; None where the tool is not installed."""
    path = folder / f"{name}.onnx"
    try:
        make(path)
    except ImportError:
        return None
    except Exception as error:  # tools are free to fail in their own way
        return f"the tool fails ({type(error).__name__})"
    try:
        result = fold_file(path, folder / "folded.onnx")
    except ValueError as error:  # what every refusal is
        return f"refused: {str(error).partition(': ')[2][:60]}"
    report = result.report
    norms = f"{len(report.norms) - len(report.remaining)} of {len(report.norms)}, " if report.norms else ""
    return f"{norms}{report.nodes_before} → {report.nodes_after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where files are written and stay")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as scratch:
        cells: dict[str, dict[str, str | None]] = {}
        for model in MODELS:
            folder = (options.folder or Path(scratch)) / model
            folder.mkdir(parents=True, exist_ok=True)
            for number, (tool, make) in enumerate(Exported(model, folder).tools()):
                cells.setdefault(tool, {})[model] = outcome(make, folder, str(number))
    print(f"| written by | {' | '.join(MODELS)} |\n|---{'|---' * len(MODELS)}|")
    for tool, row in cells.items():
        if None not in row.values():
            print(f"| {tool} | {' | '.join(str(cell) for cell in row.values())} |")


if __name__ == "__main__":
    main()
