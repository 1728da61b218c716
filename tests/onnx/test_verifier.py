import onnx
import pytest
import tiny_models
import torch
from onnx import numpy_helper
from torch import nn

from normfuse.checkpoint import ExportableModel
from normfuse.onnx import VerificationError, export, verify, write
from normfuse.onnx.references import References


def made(model, *example, dims=("batch",)):
    shapes = [dict(enumerate(dims)) for _ in example]
    return ExportableModel.from_model(model, example, shapes)


def exported(checkpoint, path):
    write(checkpoint.program, path, inputs=checkpoint.inputs)
    return checkpoint.program


@pytest.fixture(scope="module")
def perceptron(tmp_path_factory):
    checkpoint = made(tiny_models.trained(tiny_models.Perceptron()), torch.randn(3, 4))
    path = tmp_path_factory.mktemp("perceptron") / "m.onnx"
    return checkpoint, exported(checkpoint, path), path


def changed(path, target, change):
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor).copy()
        if array.dtype == "float32" and array.size > 1:
            tensor.CopyFrom(numpy_helper.from_array(change(array), tensor.name))
            break
    onnx.save(model, target)
    return target


def test_equal_forms_pass_on_the_example_and_on_random_shapes(perceptron):
    checkpoint, program, path = perceptron
    proof = verify(checkpoint, path, program=program, rounds=5)
    assert "example" in proof.shapes[0] and sum("random" in label for label in proof.shapes) == 5
    assert "random inputs [1,4]" in proof.shapes
    assert len(proof.cases) == 2 * len(proof.shapes) and proof.worst("ONNX file") < 1e-5
    assert proof.worst("folded program") == 0.0


@pytest.mark.parametrize("planted", [1e-2, float("nan")])
def test_a_planted_difference_in_the_file_is_caught(perceptron, tmp_path, planted):
    checkpoint, _, path = perceptron

    def plant(array):
        array.reshape(-1)[0] += planted
        return array

    with pytest.raises(VerificationError, match=r"ONNX file differs .* on the example inputs \[3,4\]"):
        verify(checkpoint, changed(path, tmp_path / "m.onnx", plant))


def test_a_difference_within_the_tolerance_passes_and_tightening_it_fails(perceptron, tmp_path):
    checkpoint, _, path = perceptron
    slightly = changed(path, tmp_path / "m.onnx", lambda array: array * 1.001)
    assert verify(checkpoint, slightly, rtol=1e-2).worst("ONNX file") > 1e-5
    assert verify(checkpoint, slightly, rtol=0, atol=1e-1).worst("ONNX file") > 1e-5
    with pytest.raises(VerificationError, match="allowed are"):
        verify(checkpoint, slightly, rtol=1e-6)


def test_a_planted_difference_in_the_program_is_caught(perceptron):
    checkpoint, _, path = perceptron
    other = tiny_models.trained(tiny_models.Perceptron(), seed=1)
    wrong = made(other, *checkpoint.example_inputs).program
    with pytest.raises(VerificationError, match="folded program differs"):
        verify(checkpoint, path, program=wrong)


def test_a_difference_that_only_another_shape_shows_is_caught(tmp_path):
    class Sized(nn.Module):
        def forward(self, x):
            return x * x.shape[0]

    class Specialised(nn.Module):
        def forward(self, x):
            return x * 3

    path = tmp_path / "m.onnx"
    exported(made(Specialised(), torch.randn(3, 4)), path)
    with pytest.raises(VerificationError, match=r"random inputs \[1,4\]"):
        verify(made(Sized(), torch.randn(3, 4)), path)


def test_integer_outputs_must_be_equal(tmp_path):
    class Best(nn.Module):
        def forward(self, x):
            return x.argmax(-1)

    class Worst(nn.Module):
        def forward(self, x):
            return x.argmin(-1)

    path = tmp_path / "m.onnx"
    checkpoint = made(Best(), torch.randn(3, 4))
    exported(checkpoint, path)
    assert verify(checkpoint, path).worst("ONNX file") == 0
    with pytest.raises(VerificationError, match="output 0"):
        verify(made(Worst(), torch.randn(3, 4)), path)


def test_infinities_count_as_equal_and_nan_is_never_verified(tmp_path):
    class Masked(nn.Module):
        def forward(self, x):
            return torch.where(x > 0, x, float("-inf"))

    class Plain(nn.Module):
        def forward(self, x):
            return x + 1

    checkpoint = made(Masked(), torch.randn(3, 4))
    exported(checkpoint, tmp_path / "m.onnx")
    assert verify(checkpoint, tmp_path / "m.onnx").worst("ONNX file") == 0
    with pytest.raises(VerificationError, match="itself gives NaN"):
        verify(made(Plain(), torch.full((3, 4), float("nan"))), tmp_path / "m.onnx")


def test_files_that_cannot_be_compared(perceptron, tmp_path):
    checkpoint, _, path = perceptron
    (tmp_path / "text.onnx").write_bytes(b"\xff" * 99)
    with pytest.raises(VerificationError, match="ONNX Runtime cannot load") as caught:
        verify(checkpoint, tmp_path / "text.onnx")
    assert "\n" not in str(caught.value) and str(caught.value).count("text.onnx") == 1

    class Two(nn.Module):
        def forward(self, x, y):
            return x + y

    two = made(Two(), torch.ones(3, 4), torch.ones(3, 4))
    exported(two, tmp_path / "two.onnx")
    with pytest.raises(VerificationError, match="wants an input 'y'"):
        verify(checkpoint, tmp_path / "two.onnx")

    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(VerificationError, match="has 1 outputs, the module 2"):
        verify(made(Pair(), torch.ones(3, 4)), path)


def test_inputs_may_have_other_names_in_the_file(tmp_path):
    class Difference(nn.Module):
        def forward(self, x, y):
            return x - y

    model, path = made(Difference(), torch.randn(3, 4), torch.randn(3, 4)), tmp_path / "m.onnx"
    exported(model, path)
    proto = onnx.load(path)
    (node,) = proto.graph.node
    for place, name in enumerate(("left", "right")):
        node.input[place] = proto.graph.input[place].name = name
    onnx.save(proto, path)
    with pytest.raises(VerificationError, match=r"name those that are the same \(mapping={module: file}\)") as caught:
        verify(model, path)
    assert caught.value.advice == ("--map x=left", "--map y=right")
    verify(model, path, mapping={"x": "left", "y": "right"})
    with pytest.raises(VerificationError, match="differs"):
        verify(model, path, mapping={"x": "right", "y": "left"})
    with pytest.raises(VerificationError, match="the module has no input 'z' to map; it takes x, y"):
        verify(model, path, mapping={"z": "left"})


def test_a_network_that_loses_digits_itself_is_told_apart_from_a_wrong_fold(perceptron, tmp_path):
    class Cancelling(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(factor))

        def forward(self, x):
            return (x + 1e4 * self.factor) - 1e4 * self.factor

    other = made(Cancelling(30.0), torch.randn(3, 4), dims=()).program
    with pytest.raises(VerificationError, match="own rounding"):
        verify(made(Cancelling(1.7), torch.randn(3, 4), dims=()), None, program=other, rtol=1e-4)
    checkpoint, _, path = perceptron
    with pytest.raises(VerificationError) as caught:
        verify(checkpoint, changed(path, tmp_path / "m.onnx", lambda array: array * 2))
    assert "own rounding" not in str(caught.value)


class EinsumAttention(nn.Module):
    def forward(self, q, k):
        return torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1)


def test_an_empty_batch_that_would_end_the_process_is_noted(tmp_path):
    """Where two values are multiplied by Einsum, ONNX Runtime divides by the size of the batch."""
    axes = {0: "batch", 2: "seq"}
    model = ExportableModel.from_model(EinsumAttention(), (torch.randn(2, 2, 3, 4),) * 2, (axes, axes))
    write(model.program, tmp_path / "m.onnx", inputs=model.inputs)
    assert "Einsum" in {node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node}
    report = verify(model, tmp_path / "m.onnx")
    assert any("fails on an empty batch" in note and "ONNX Runtime crashed" in note for note in report.notes)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_model_runs_once_for_all_forms(tmp_path, monkeypatch, dtype):
    model = tiny_models.trained(tiny_models.Perceptron())
    checkpoint = ExportableModel.from_model(model, torch.ones(2, 4), ({0: "batch"},))
    runs = []
    run = ExportableModel.run
    monkeypatch.setattr(ExportableModel, "run", lambda self, tensors: runs.append(tensors) or run(self, tensors))
    references = References(checkpoint)
    trials = [trial.label for trial, _ in references.on()]
    once = len(runs)
    assert len(trials) <= once
    assert [trial.label for trial, _ in references.on()] == trials and len(runs) == once
    runs.clear()
    export(checkpoint, tmp_path / "m.onnx", dtype=dtype)
    assert len(runs) <= once + 1  # and once to see how long it takes at the largest sizes


def test_references_that_were_not_all_taken_are_computed_again():
    checkpoint = ExportableModel.from_model(nn.Linear(4, 3), torch.ones(2, 4))
    references = References(checkpoint)
    next(iter(references.on()))
    assert len(list(references.on())) == len(list(References(checkpoint).on()))
