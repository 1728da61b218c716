"""Norms with statistics of each input in ONNX files: standard operations, and one node each in ONNX Runtime."""

import pytest
import torch
from onnx_text import executed
from torch import nn
from torch.export import Dim
from torch.nn import functional as F

from normfuse.onnx import export, summarize, write
from tests.folding.networks import Transformer, look_trained


class Norms(nn.Module):
    """RMSNorm and GroupNorm, with gain and shift of one input, without of another."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.rand(8) + 0.5) for _ in range(2))

    def forward(self, x, y):
        return (
            F.rms_norm(x, (8,), self.weight, 1e-3),
            F.rms_norm(y, (8,), None, 1e-3),
            F.group_norm(x.mT, 2, self.weight, self.bias, 1e-3).mT,
            F.group_norm(y.mT, 2, None, None, 1e-3).mT,
        )


@pytest.mark.parametrize("opset", [18, 20, 23])
def test_translations(opset, tmp_path):
    model, x, y = Norms().eval(), torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    program = torch.export.export(model, (x, y), dynamic_shapes=({0: Dim("batch")},) * 2)
    write(program, tmp_path / "norm.onnx", opset=opset)
    session, nodes = executed(tmp_path / "norm.onnx", tmp_path)
    for batch in (1, 3):
        given = {"x": x[:batch], "y": y[:batch]}
        got = session.run(None, {name: tensor.numpy() for name, tensor in given.items()})
        for value, want in zip(got, model(**given), strict=True):
            torch.testing.assert_close(torch.from_numpy(value), want.detach(), rtol=1e-5, atol=1e-5)
    rms = "RMSNormalization" if opset == 23 else "SimplifiedLayerNormalization"
    assert nodes[rms] == nodes["InstanceNormalization"] == 2 and nodes["Mul"] == nodes["Add"] == 1
    assert not {"Pow", "Div", "Sqrt", "ReduceMean"} & set(nodes)
    assert len(summarize(tmp_path / "norm.onnx").norms) == 4


def test_the_default_eps_is_the_dtypes(tmp_path):
    class Default(nn.Module):
        def forward(self, x):
            return F.rms_norm(x, (8,))

    x = torch.full((2, 8), 1e-4)
    write(torch.export.export(Default(), (x,)), tmp_path / "norm.onnx", opset=18)
    (got,) = executed(tmp_path / "norm.onnx", tmp_path)[0].run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), F.rms_norm(x, (8,)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("target", ["portable", "cpu-single"])
def test_a_pre_norm_transformer_ends_with_rms_norms_only(target, opset, tmp_path):
    """Against the same export with its LayerNorms: every node but the norms is the same, before and after fusion."""
    torch.manual_seed(0)
    model = look_trained(Transformer("layer", "pre", depth=1, vocabulary=None, classes=5)).float()
    shapes = ({0: "batch", 1: Dim("length", max=30)},)
    options = {"example_inputs": torch.randn(3, 7, 6), "dynamic_shapes": shapes, "opset": opset, "target": target}
    result = export(model, tmp_path / "rms.onnx", **options)
    assert {(r.core, r.gain, r.shift) for r in result.report.dynamic} == {("RMSNorm", "folded", "folded")}
    kept = export(model, tmp_path / "layer.onnx", keep_dynamic_norms=True, **options)
    assert kept.report.centred == [] and {r.core for r in kept.report.dynamic} == {"LayerNorm"}
    (_, new), (_, old) = (executed(r.path, tmp_path) for r in (result, kept))
    norms = {"RMSNormalization", "SimplifiedLayerNormalization", "LayerNormalization"}
    skips = {"SkipLayerNormalization", "SkipSimplifiedLayerNormalization"}
    assert not {"LayerNormalization", "SkipLayerNormalization"} & set(new)
    assert sum(new[kind] for kind in norms | skips) == sum(old[kind] for kind in norms | skips) == 3
    # ONNX Runtime fuses the last addition, and the bias before it, into a LayerNorm but not into an RMSNorm.
    assert sum(new.values()) == sum(old.values()) + 2 * old["SkipLayerNormalization"], (new, old)
    assert not (target == "cpu-single" and old["SkipLayerNormalization"])


def test_float16(tmp_path):
    model = look_trained(Transformer("layer", "pre", depth=1, vocabulary=None, classes=5)).float()
    result = export(model, tmp_path / "half.onnx", example_inputs=torch.randn(3, 7, 6), dtype="float16")
    assert {r.core for r in result.report.dynamic} == {"RMSNorm"} and len(result.graph.norms) == 3
