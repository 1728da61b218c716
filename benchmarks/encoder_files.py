"""ONNX files of one encoder with every kind of norm, for benchmarks/inference.py."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import runtimes
import torch
from onnxruntime.quantization import quantize_dynamic
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F

import normfuse
from normfuse import onnx as to_onnx
from normfuse.nn import UnifiedNorm
from normfuse.onnx import graph_passes

VOCABULARY, POSITIONS = 1000, 512
TOOLS = ("layer, transformers.optimizer", "layer, optimize_for_ort")
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda width: nn.Identity(),
    "layer": nn.LayerNorm,
    "static": UnifiedNorm,
}


class Block(nn.Module):
    def __init__(self, width: int, norm: str, post: bool) -> None:
        super().__init__()
        self.heads, self.post = max(2, width // 64), post
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = NORMS[norm](width), NORMS[norm](width)

    def attention(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            self.qkv(x).reshape(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))

    def forward(self, x: Tensor) -> Tensor:
        if self.post:
            x = self.norm1(x + self.attention(x))
            return self.norm2(x + self.feed_forward(x))
        x = x + self.attention(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))


class Encoder(nn.Module):
    """Tokens [B, S] to features [B, S, width]; pre-norm with a norm at the end, post-norm with one at the start."""

    def __init__(self, width: int, depth: int, norm: str, post: bool, positions: int = POSITIONS) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Parameter(0.1 * torch.randn(1, positions, width))
        self.first = NORMS[norm](width) if post else nn.Identity()
        self.blocks = nn.ModuleList(Block(width, norm, post) for _ in range(depth))
        self.last = nn.Identity() if post else NORMS[norm](width)
        self.head = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.first(self.embedding(tokens) + self.positions[:, : tokens.shape[1]])
        for block in self.blocks:
            x = block(x)
        return self.head(self.last(x))


def trained(width: int, depth: int, norm: str, post: bool, positions: int = POSITIONS) -> Encoder:
    """An encoder with gains between 1/2 and 2, biases, and statistics that match its activations."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = Encoder(width, depth, norm, post, positions).eval()
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm | UnifiedNorm)]
    with torch.no_grad():
        for module in norms:
            gains = torch.rand(width, generator=generator)
            module.weight.copy_(torch.exp2(2 * gains - 1))
            module.bias.copy_(0.2 * torch.randn(width, generator=generator))
        hooks = [module.register_forward_pre_hook(_measure) for module in norms if isinstance(module, UnifiedNorm)]
        model(torch.randint(VOCABULARY, (4, 64), generator=generator))
        for hook in hooks:
            hook.remove()
    return model


def _measure(norm: UnifiedNorm, args: tuple[Tensor, ...]) -> None:
    norm.running_var.copy_(args[0].square().flatten(0, -2).mean(0))


@dataclass(frozen=True)
class Variant:
    """A file, what its module gives for the sample, and which of ONNX Runtime's optimisations are off with it."""

    path: Path
    expected: np.ndarray
    disabled: tuple[str, ...] = ()


def sample() -> Tensor:
    """The tokens [2, 32] on which errors are measured."""
    return torch.randint(VOCABULARY, (2, 32), generator=torch.Generator().manual_seed(1))


def write_variants(
    folder: Path, width: int, depth: int, post: bool, positions: int = POSITIONS, runtime: str = "onnxruntime"
) -> tuple[dict[str, Variant], dict[str, str]]:
    """All float32 files of an encoder by variant, and why tools that are compared have none."""
    variants: dict[str, Variant] = {}
    absent: dict[str, str] = {}
    shapes = ({0: Dim("batch"), 1: Dim("seq", max=positions)},)
    for norm in NORMS:
        model = trained(width, depth, norm, post, positions)
        with torch.inference_mode():
            expected = model(sample()).numpy()
        program = torch.export.export(model, (sample(),), dynamic_shapes=shapes)
        for name, make in _forms(norm, program, model, width).items():
            path = folder / f"{name.replace(' ', '-').replace(',', '')}.onnx"
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    make(path)
                session(Variant(path, expected), 1, runtime)
            except Exception as error:  # whatever other tools raise for graphs that they cannot take
                if name not in TOOLS and runtime == "onnxruntime":
                    raise
                absent[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            else:
                variants[name] = Variant(path, expected)
    if runtime == "onnxruntime":
        plain = variants["layer"]
        variants["layer, no SkipLayerNorm"] = Variant(plain.path, plain.expected, ("SkipLayerNormFusion",))
    return variants, absent


def quantized(variants: dict[str, Variant]) -> dict[str, Variant]:
    """The variants with dynamically quantised products."""
    return {
        name: Variant(quantize_file(variant.path), variant.expected, variant.disabled)
        for name, variant in variants.items()
    }


def quantize_file(path: Path) -> Path:
    """Beside a file, the same with dynamically quantised products."""
    target = path.with_suffix(".int8.onnx")
    if not target.exists():
        proto = onnx.load(path)
        proto.graph.ClearField("value_info")  # the quantizer infers shapes anew, and trips over torch's names
        with _without_remarks():
            types = {"DefaultTensorType": onnx.TensorProto.FLOAT}  # behind operations that shape inference lacks
            quantize_dynamic(proto, target, op_types_to_quantize=["MatMul"], extra_options=types)
    return target


def error(variant: Variant, runtime: str = "onnxruntime") -> float:
    """Root of the summed squared differences from the module ÷ that of the module's outputs."""
    loaded = session(variant, 1, runtime)
    got = loaded.run(None, {loaded.get_inputs()[0].name: sample().numpy()})[0]
    return float(math.sqrt(np.square(got - variant.expected).sum() / np.square(variant.expected).sum()))


def executed_nodes(variant: Variant) -> int:
    """How many nodes ONNX Runtime executes after its own optimisations."""
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = f"{folder}/optimized.onnx"
        onnxruntime.InferenceSession(
            str(variant.path), options, ["CPUExecutionProvider"], disabled_optimizers=list(variant.disabled)
        )
        return len(onnx.load(options.optimized_model_filepath, load_external_data=False).graph.node)


def _forms(norm: str, program: ExportedProgram, model: Encoder, width: int) -> dict[str, Callable]:
    """How the files of one kind of norm are made, by the name of the variant."""
    plain = partial(_write, program, 23)
    if norm == "none":
        return {"floor": plain}
    if norm == "layer":
        return {
            "layer": plain,
            "layer, opset 20": partial(_write, program, 20),
            "layer, transformers.optimizer": partial(_transformers_optimizer, program, width),
            "layer, optimize_for_ort": partial(_optimize_for_ort, program),
            "layer, shaped": partial(_write, program, 23, target="cpu"),
            "layer, shaped, single": partial(_write, program, 23, target="cpu-single"),
            "layer, shaped, long": partial(_write, program, 23, target="cpu-long"),
        }
    folded, _ = normfuse.fold(program)
    return {
        "static": plain,
        "folded": partial(_write, folded, 23),
        "folded and shaped": partial(_export, model, "cpu"),
        "folded and shaped, single": partial(_export, model, "cpu-single"),
        "folded and shaped, long": partial(_export, model, "cpu-long"),
    }


def _write(program: ExportedProgram, opset: int, path: Path, target: str = "portable") -> None:
    to_onnx.write(program, path, opset=opset, passes=graph_passes.TARGETS[target])


def _export(model: Encoder, target: str, path: Path) -> None:
    """What a user gets: normfuse.onnx.export with its checks."""
    shapes = {"tokens": {0: Dim("batch"), 1: Dim("seq", max=model.positions.shape[1])}}
    result = to_onnx.export(model, path, example_inputs=sample(), dynamic_shapes=shapes, target=target)
    if not result.passes:
        raise ValueError(f"not shaped: {result.notes}")


def _transformers_optimizer(program: ExportedProgram, width: int, path: Path) -> None:
    from onnxruntime.transformers.optimizer import optimize_model

    _write(program, 20, path)
    logging.disable(logging.WARNING)
    try:
        optimize_model(str(path), "bert", num_heads=max(2, width // 64), hidden_size=width).save_model_to_file(
            str(path)
        )
    finally:
        logging.disable(logging.NOTSET)


def _optimize_for_ort(program: ExportedProgram, path: Path) -> None:
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    _write(program, 20, path)
    model, _ = optimize_for_ort(ir.load(path))
    ir.save(model, path)


@contextlib.contextmanager
def _without_remarks() -> Iterator[None]:
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def session(variant: Variant, threads: int, runtime: str = "onnxruntime") -> Any:
    return runtimes.open_file(variant.path, threads, runtime, variant.disabled)
