"""One model of the zoo through export, folding and verification, and what came of it in numbers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

import normfuse.onnx
from normfuse.convert import swap_norms
from normfuse.folding import FoldReport, fold

from .models import Entry

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@dataclass(frozen=True)
class Outcome:
    """What folding made of one model.

    Attributes:
        report: of the float64 program.
        error64: difference of the folded program in float64, relative to the largest output.
        error32: difference of the ONNX file in ONNX Runtime in float32.
    """

    report: FoldReport
    error64: float
    error32: float

    def counts(self) -> dict[str, tuple[int, int]]:
        """The numbers of :class:`tests.zoo.models.Expected`, of those that a single run knows."""
        dynamic = self.report.dynamic
        layers = [r for r in dynamic if r.core == "LayerNorm" or (r.core == "RMSNorm" and not _was_rms(r.kind))]
        gains = [r for r in dynamic if r.gain != "none"]
        norms = [r for r in self.report.norms if r.kind != "affine"]
        return {
            "rms": (sum(r.core == "RMSNorm" for r in layers), len(layers)),
            "gains": (sum(r.gain == "folded" for r in gains), len(gains)),
            "static": (sum(r.status == "folded" for r in norms), len(norms)),
        }


def _was_rms(kind: str) -> bool:
    return "RMS" in kind or kind == "T5LayerNorm"


def built(entry: Entry) -> nn.Module:
    """The model in evaluation, every parameter and statistic away from its initial value."""
    torch.manual_seed(0)
    return look_trained(entry.build())


def swapped(entry: Entry) -> nn.Module | None:
    """The model with Unified Norms for its LayerNorms and RMSNorms, which look trained; None where it has none."""
    torch.manual_seed(0)
    model = entry.build()
    norms = [m for m in model.modules() if "norm" in type(m).__name__.lower() and not any(m.children())]
    if all(isinstance(norm, _BatchNorm) for norm in norms):
        return None
    swap_norms(model, to="unified", where=lambda name, module: not isinstance(module, _BatchNorm))
    return look_trained(model)


@torch.no_grad()
def look_trained(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1 and 0 < float(parameter.abs().max()) < 0.1:  # LayerScale as it begins
            parameter.copy_(0.5 + 0.2 * noise)
        else:
            parameter.add_(noise, alpha=0.2 if parameter.dim() == 1 else 0.05)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_var", "running_phi")):
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
        elif name.endswith("running_mean"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.3)
    return model.eval()


def run(entry: Entry, model: nn.Module, folder: Path) -> Outcome:
    """Export, fold and compare a model of the zoo: in float64 in PyTorch, in float32 in ONNX Runtime."""
    inputs = entry.inputs()
    result = normfuse.onnx.export(model, folder / "model.onnx", example_inputs=inputs, dynamic_shapes=entry.dynamic)
    report, error64 = in_float64(entry, model.double(), inputs)
    return Outcome(report, error64, result.verification.worst("ONNX file"))


def in_float64(entry: Entry, model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[FoldReport, float]:
    """Fold in float64 throughout, casts inside the model included, and compare the programs."""
    wide = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    with torch.no_grad(), everything_in_float64():
        program = torch.export.export(model, wide, dynamic_shapes=entry.dynamic)
        folded, report = fold(program)
        expected, got = program.module()(*wide), folded.module()(*wide)
    return report, float((expected - got).abs().max() / expected.abs().max())


class _InFloat64(TorchFunctionMode):
    """Casts to float32 become casts to float64: norms and softmaxes of transformers compute in float32 otherwise."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.float:
            function = Tensor.double
        args, kwargs = torch.utils._pytree.tree_map(
            lambda x: torch.float64 if x is torch.float32 else x, (args, kwargs or {})
        )
        return function(*args, **kwargs)


@contextmanager
def everything_in_float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _InFloat64():
            yield
    finally:
        torch.set_default_dtype(before)


def declare_torchvision() -> torch.library.Library | None:
    """The schemas that importing torchvision without its compiled operations needs; to be kept alive."""
    if hasattr(torch.ops.torchvision, "nms"):
        return None
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library
