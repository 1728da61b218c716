import importlib

import numpy as np
import onnx
import onnx_text
import pytest
import tiny_models
import torch
from torch import nn
from torch.export import Dim

import normfuse.onnx
from normfuse.checkpoint import CheckpointError, load, save
from normfuse.onnx import ExportError, VerificationError, WriteError, export
from normfuse.onnx.publish import data_beside

steps = importlib.import_module("normfuse.onnx.steps")
writer = importlib.import_module("normfuse.onnx.writer")
ROWS = {"x": {0: "batch"}}


def perceptron():
    return tiny_models.trained(tiny_models.Perceptron())


def encoder_inputs(mask: bool):
    batch, seq = Dim("batch"), Dim("seq", max=16)
    tokens, pad_mask = torch.randint(11, (2, 6)), torch.arange(6).expand(2, 6) > 3
    shapes = {"tokens": {0: batch, 1: seq}, "pad_mask": {0: batch, 1: seq}}
    return ((tokens, pad_mask), shapes) if mask else ((tokens,), {"tokens": shapes["tokens"]})


@pytest.mark.parametrize(("norm", "placement"), [("unified", "pre"), ("power", "post"), ("unified", "peri")])
def test_every_placement_ends_without_norms_and_without_per_channel_arithmetic(tmp_path, norm, placement):
    model = tiny_models.trained(tiny_models.Encoder(depth=2, norm=norm, placement=placement))
    example, shapes = encoder_inputs(mask=False)
    result = export(model, tmp_path / "m.onnx", example_inputs=example, dynamic_shapes=shapes)
    assert result.graph.norms == [] and result.graph.affines == []
    assert result.report.norms and not result.report.remaining
    assert result.verification.worst("ONNX file") < 1e-4
    assert sum("random" in label for label in result.verification.shapes) == 4
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_float16_keeps_norms_whose_scales_would_use_up_its_exponents(tmp_path):
    model = tiny_models.trained(tiny_models.Perceptron())
    model.norm.weight.data[0] = 3000.0
    kept = export(model, tmp_path / "half.onnx", example_inputs=torch.randn(3, 4), dtype="float16", rtol=0.1)
    assert [record.status for record in kept.report.norms] == ["kept"]
    folded = export(model, tmp_path / "single.onnx", example_inputs=torch.randn(3, 4))
    assert not folded.report.remaining


def test_masked_attention_stays_one_node(tmp_path):
    """Padding masks [batch, 1, 1, keys] broadcast over the queries, which ONNX Runtime wants written out."""
    example, shapes = encoder_inputs(mask=True)
    model = tiny_models.trained(tiny_models.Encoder())
    result = export(model, tmp_path / "m.onnx", example_inputs=example, dynamic_shapes=shapes)
    assert result.opset == 23 and not result.rejected
    operations = [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node]
    assert operations.count("Attention") == 1 and "Softmax" not in operations


def test_the_newest_opset_that_runs_is_chosen_and_the_others_say_why(tmp_path, monkeypatch):
    # As torch writes them, ONNX Runtime 1.32 runs no mask that broadcasts in the Attention node of opset 23.
    monkeypatch.setattr(writer, "expand_attention_masks", lambda model: 0)
    example, shapes = encoder_inputs(mask=True)
    model = tiny_models.trained(tiny_models.Encoder())
    result = export(model, tmp_path / "m.onnx", example_inputs=example, dynamic_shapes=shapes)
    opset = onnx.load(tmp_path / "m.onnx").opset_import[0].version
    assert opset == result.opset == result.graph.opset
    assert list(result.rejected) == [number for number in (23, 20, 18) if number > opset]
    assert all("Attention" in why and "\n" not in why for why in result.rejected.values())
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_without_any_opset_that_passes_every_reason_is_given(tmp_path, monkeypatch):
    def refuse(*_, opset, **__):
        raise WriteError(f"no such thing in {opset}")

    monkeypatch.setattr(steps, "write_staged", refuse)
    with pytest.raises(VerificationError, match=r"23: no such thing in 23; 20: .*; 18: no such thing in 18"):
        export(perceptron(), tmp_path / "m.onnx", example_inputs=torch.ones(3, 4))
    assert not list(tmp_path.iterdir())


def test_batchnorm_in_a_convolution_network_and_a_single_example_image(tmp_path):
    model = tiny_models.trained(tiny_models.ConvNet())
    result = export(
        model, tmp_path / "m.onnx", example_inputs=torch.randn(1, 3, 8, 8), dynamic_shapes={"image": {0: "batch"}}
    )
    assert result.graph.norms == [] and result.graph.affines == []
    assert "random inputs [1,3,8,8]" in result.verification.shapes
    assert len({shape for shape in result.verification.shapes if "random" in shape}) > 1


def test_a_live_module_is_not_changed(tmp_path):
    model = perceptron().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export(model, tmp_path / "m.onnx", example_inputs=torch.ones(3, 4), dynamic_shapes=ROWS, opset=20)
    assert model.training and model.norm.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_modules_of_other_dtypes_are_exported_in_float32(tmp_path, dtype):
    result = export(perceptron().to(dtype), tmp_path / "m.onnx", example_inputs=torch.ones(3, 4, dtype=dtype), opset=20)
    assert result.dtype == "float32"
    assert onnx.load(tmp_path / "m.onnx").graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_bfloat16_is_refused_because_nothing_could_verify_it(tmp_path):
    with pytest.raises(ExportError, match=r"dtype 'bfloat16' .*float32, float16.*no bfloat16 products"):
        export(perceptron(), tmp_path / "m.onnx", example_inputs=torch.ones(3, 4), dtype="bfloat16")
    assert not list(tmp_path.iterdir())
    body = "a = Cast <to: int = 16> (x) b = MatMul (a, a) y = Cast <to: int = 1> (b)"
    with pytest.raises(Exception, match=r"Could not find an implementation for MatMul\(13\)"):
        onnx_text.run(onnx_text.model("float[4, 4] x", "float[4, 4] y", body), {"x": np.ones((4, 4), np.float32)})


def test_float16_is_verified_against_the_float32_module(tmp_path):
    result = export(perceptron(), tmp_path / "m.onnx", example_inputs=torch.randn(3, 4), dtype="float16", opset=20)
    assert result.graph.dtype == "float16" and 0 < result.verification.worst("ONNX file") < 2e-2


def test_keyword_inputs_and_a_program_from_a_pt2_file(tmp_path):
    class Shifted(tiny_models.Perceptron):
        def forward(self, x, gain=None, shift=None):
            return super().forward(x) + shift

    example = {"x": torch.randn(3, 4), "shift": torch.randn(3, 3)}
    shapes = {"x": {0: "batch"}, "shift": {0: "batch"}}
    model = tiny_models.trained(Shifted())
    result = export(model, tmp_path / "m.onnx", example_inputs=example, dynamic_shapes=shapes, opset=20)
    assert [i.name for i in onnx.load(result.path).graph.input] == ["x", "shift"]
    program = torch.export.export(perceptron(), (torch.ones(3, 4),), dynamic_shapes={"x": {0: Dim("batch")}})
    torch.export.save(program, tmp_path / "p.pt2")
    assert export(load(tmp_path / "p.pt2", trust=True), tmp_path / "p.onnx", opset=20).graph.affines == []


def test_the_result_is_json_and_complete(tmp_path):
    import json

    save(perceptron(), tmp_path / "m.pt", example_inputs=torch.ones(3, 4))
    data = json.loads(json.dumps(export(load(tmp_path / "m.pt"), tmp_path / "m.onnx", opset=20).to_dict()))
    assert data["fold"]["norms"][0]["name"] == "norm" and data["opset"] == 20
    assert data["verification"]["cases"] and data["graph"]["nodes"] and data["growth"] is None


def test_existing_files_stay_as_they_are_when_verification_fails(tmp_path, monkeypatch):
    (tmp_path / "m.onnx").write_text("the one before")
    real = steps.fold

    def wrong(program, **options):
        folded, report = real(program, **options)
        with torch.no_grad():
            folded.state_dict["head.weight_folded"].add_(1)
        return folded, report

    monkeypatch.setattr(steps, "fold", wrong)
    with pytest.raises(VerificationError, match="folded program differs"):
        export(perceptron(), tmp_path / "m.onnx", example_inputs=torch.ones(3, 4))
    assert (tmp_path / "m.onnx").read_text() == "the one before" and len(list(tmp_path.iterdir())) == 1


def test_external_weights_arrive_beside_the_file(tmp_path, monkeypatch):
    real = steps.write_staged
    monkeypatch.setattr(steps, "write_staged", lambda *a, **k: real(*a, **k, one_file_limit=10))
    model = perceptron()
    result = export(model, tmp_path / "m.onnx", example_inputs=torch.ones(3, 4), opset=20)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", *data_beside(result.path)]
    checkpoint = normfuse.ExportableModel.from_model(model, torch.ones(3, 4))
    assert normfuse.onnx.verify(checkpoint, result.path).cases


def test_refusals_leave_nothing_behind(tmp_path):
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    nan = perceptron()
    nan.norm.running_var[0] = float("nan")
    x = torch.ones(3, 4)
    target = tmp_path / "m.onnx"
    cases = [
        (ExportError, "needs example_inputs", perceptron(), target, {}),
        (ExportError, "'int4' is not one of", perceptron(), target, {"dtype": "int4"}),
        (ExportError, "opset 17 is outside 18 to 23", perceptron(), target, {"opset": 17}),
        (ExportError, "no folder", perceptron(), tmp_path / "absent" / "m.onnx", {"example_inputs": x}),
        (ExportError, "it is a folder", perceptron(), tmp_path, {"example_inputs": x}),
        (CheckpointError, "cannot trace Branching", Branching(), target, {"example_inputs": x}),
        (CheckpointError, "norm.running_var holds NaN", nan, target, {"example_inputs": x}),
    ]
    for kind, because, model, path, options in cases:
        with pytest.raises(kind, match=because) as caught:
            export(model, path, **options)
        assert "\n" not in str(caught.value)
        assert not list(tmp_path.iterdir())


def test_a_program_from_elsewhere_is_exported_as_a_file_of_ours_is(tmp_path):
    model = perceptron()
    program = torch.export.export(model, (torch.ones(3, 4),), dynamic_shapes=({0: torch.export.Dim("n", max=64)},))
    torch.export.save(program, tmp_path / "m.pt2")
    result = export(load(tmp_path / "m.pt2"), tmp_path / "m.onnx")
    assert not result.report.remaining and result.graph.norms == []


def test_a_size_that_the_model_fixes_is_a_number_in_every_input(tmp_path):
    class Unrolled(nn.Module):
        def forward(self, x, mask):
            return sum(x[:, i] / (i + 1) for i in range(x.shape[1])) + mask.sum(1)

    shapes = ({0: "batch", 1: "length"},) * 2
    inputs = (torch.randn(2, 3), torch.ones(2, 3))
    result = export(Unrolled(), tmp_path / "m.onnx", example_inputs=inputs, dynamic_shapes=shapes, opset=20)
    assert any(note.startswith("length is fixed at 3: the model runs step by step along it (") for note in result.notes)
    dims = [value.type.tensor_type.shape.dim for value in onnx.load(result.path).graph.input]
    assert [[dim.dim_param or dim.dim_value for dim in each] for each in dims] == [["batch", 3]] * 2


class Nested(nn.Module):
    """A dictionary in, a dictionary out."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        self.layers[1].running_var.uniform_(0.5, 2)

    def forward(self, batch, offset):
        return {"y": self.layers(batch["x"]) + offset}


@pytest.mark.parametrize("decomposed", [False, True])
def test_a_program_in_memory_is_exported(tmp_path, decomposed):
    model, x = Nested().eval(), torch.randn(3, 4)
    shapes = {"batch": {"x": {0: Dim("batch")}}, "offset": None}
    program = torch.export.export(model, ({"x": x},), {"offset": torch.ones(2)}, dynamic_shapes=shapes)
    result = export(program.run_decompositions() if decomposed else program, tmp_path / "m.onnx")
    assert not result.report.remaining and not result.graph.norms
    (name,) = (value.name for value in onnx.load(result.path).graph.output)
    assert name == "y"
    x = torch.randn(5, 4)
    (got,) = normfuse.onnx.runtime.Session(result.path).run({"batch_x": x.numpy(), "offset": np.ones(2, np.float32)})
    np.testing.assert_allclose(got, model({"x": x}, torch.ones(2))["y"].detach(), rtol=1e-5, atol=1e-6)


def test_what_is_no_model_is_named(tmp_path):
    module, path = nn.Linear(4, 2), tmp_path / "m.onnx"
    with pytest.raises(ExportError, match=r"model is the path 'm\.pt'; give what normfuse\.load makes of it"):
        export("m.pt", path)
    program = torch.export.export(module, (torch.ones(3, 4),))
    for traced in (program, normfuse.ExportableModel.from_model(module, torch.ones(3, 4))):
        with pytest.raises(ExportError, match="what is traced has its own"):
            export(traced, path, dynamic_shapes=({0: "batch"},))
    for call, name in (
        (lambda: normfuse.onnx.write(module, path), "program"),
        (lambda: normfuse.fold(module), "program"),
        (lambda: normfuse.onnx.verify(module, path), "model"),
    ):
        with pytest.raises(TypeError, match=f"{name} is of type Linear; give .*normfuse"):
            call()
    assert not path.exists()
