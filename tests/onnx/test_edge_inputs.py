"""Verification catches what random inputs do not: forms that are wrong for masked rows, edges, and state."""

import random

import pytest
import torch
from tiny_models import MaskedAttention
from torch import nn
from torch.nn import functional as F

from normfuse.checkpoint import CheckpointError, ExportableModel
from normfuse.onnx import VerificationError, export, verify, writer
from normfuse.programs import Runner, own_rounding, relative_difference

LOWEST = torch.finfo(torch.float32).min
ROWS = ({0: "batch"}, {0: "batch"})


def additive(mask):
    return (1.0 - mask[:, None, None].float()) * LOWEST


def boolean(mask):
    return (mask != 0)[:, None, None]


def inputs():
    torch.manual_seed(0)
    mask = torch.ones(2, 5, dtype=torch.int64)
    mask[0, 3:] = 0
    return torch.randn(2, 5, 8), mask


@pytest.mark.parametrize("opset", [23, 18])
@pytest.mark.parametrize("see", [additive, boolean])
def test_masked_rows_and_empty_batches_are_tried_in_every_form(tmp_path, see, opset):
    result = export(
        MaskedAttention(see), tmp_path / "m.onnx", example_inputs=inputs(), dynamic_shapes=ROWS, opset=opset
    )
    tried = result.verification.shapes
    assert any("mask mask with a row 0" in label for label in tried)
    # ONNX Runtime refuses the node of opset 23 an empty batch.
    assert any("an empty batch" in text for text in (result.notes if opset == 23 else tried))
    assert opset == 23 or result.notes == []


def test_a_form_that_is_wrong_for_masked_rows_gives_way_to_another(tmp_path, monkeypatch):
    """As torch.onnx writes them: opset 23 is wrong for additive masks, 20 and 18 for boolean ones."""
    monkeypatch.setattr(writer, "mask_as_torch", lambda *_, **__: 0)
    model = MaskedAttention(additive).eval()
    result = export(model, tmp_path / "m.onnx", example_inputs=inputs(), dynamic_shapes=ROWS)
    assert result.opset == 20 and "mask mask with" in result.rejected[23]
    with pytest.raises(VerificationError, match=r"mask mask with .* 0 "):
        export(model, tmp_path / "n.onnx", example_inputs=inputs(), dynamic_shapes=ROWS, opset=23)
    with pytest.raises(VerificationError, match=r"mask mask with .* 0 "):
        export(MaskedAttention(boolean), tmp_path / "n.onnx", example_inputs=inputs(), dynamic_shapes=ROWS, opset=18)
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_masks_with_a_number_that_float16_lacks_are_tried_in_float16(tmp_path):
    x, _ = inputs()
    mask = torch.zeros(2, 1, 5, 5)
    mask[0, ..., 3:] = LOWEST
    model = MaskedAttention(lambda mask: mask)
    result = export(
        model, tmp_path / "m.onnx", example_inputs=(x, mask), dynamic_shapes=ROWS, dtype="float16", opset=23
    )
    assert any("mask mask with a row -3.4e+38" in label for label in result.verification.shapes)
    assert all("empty" in note for note in result.notes)


def test_where_the_model_gives_nan_nothing_is_compared_and_elsewhere_everything(tmp_path):
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 3)

        def forward(self, x, mask):
            m = mask.float().unsqueeze(-1)
            return (self.inner(x) * m).sum(1) / m.sum(1)

    model = Pooled().eval()
    checkpoint = ExportableModel.from_model(model, inputs(), ROWS)
    assert any(
        "NaN" in note and "a row 0" in note for note in verify(checkpoint, None, program=checkpoint.program).notes
    )
    other = Pooled().eval()
    other.load_state_dict(model.state_dict())
    real = other.forward
    other.forward = lambda x, mask: torch.where(mask.sum() == 0, 1.0, real(x, mask))
    wrong = ExportableModel.from_model(other, inputs(), ROWS).program
    assert verify(checkpoint, None, program=wrong).cases  # the model has no value where this one gives 1
    other.forward = lambda x, mask: torch.where(mask.sum(1)[0] == 0, 1.0, real(x, mask))
    wrong = ExportableModel.from_model(other, inputs(), ROWS).program
    with pytest.raises(VerificationError, match=r"folded program differs .* a row 0"):
        verify(checkpoint, None, program=wrong)


def planted(change):
    """A program that is wrong for few inputs."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.inner = nn.Embedding(9, 4), nn.Linear(4, 4)

        def forward(self, x, tokens):
            y = self.inner(x) + self.table(tokens)
            return y + change(x, tokens).to(y.dtype).reshape(()) if change else y

    torch.manual_seed(0)
    example = torch.randn(3, 4), torch.tensor([1, 2, 3])
    seq = torch.export.Dim("batch", max=7)
    return ExportableModel.from_model(Net().eval(), example, ({0: seq}, {0: seq}))


EDGES = {
    "all integers at their highest": lambda x, tokens: (tokens == 8).all(),
    "all integers at their lowest": lambda x, tokens: (tokens == 0).all(),
    "zeros": lambda x, tokens: (x == 0).all(),
    "ones": lambda x, tokens: (x == 1).all(),
    "large numbers": lambda x, tokens: x.abs().max() > 30,
    "largest sizes": lambda x, tokens: x.new_ones(x.shape[0]).sum() == 7,
}


@pytest.mark.parametrize("edge", EDGES)
def test_a_difference_that_only_an_edge_shows_is_caught(edge):
    right, wrong = planted(None), planted(EDGES[edge])
    assert verify(right, None, program=right.program, rounds=0).cases
    with pytest.raises(VerificationError, match=edge):
        verify(right, None, program=wrong.program, rounds=0)


# The live model comes first


def test_the_recorded_outputs_are_the_reference():
    checkpoint = planted(None)
    object.__setattr__(checkpoint, "expected_outputs", (checkpoint.expected_outputs[0] * 1.001,))
    with pytest.raises(VerificationError, match="traced program differs from the live model on the example inputs"):
        verify(checkpoint, None, program=checkpoint.program)


def test_a_model_that_computes_otherwise_when_traced_is_caught():
    class Net(nn.Module):
        def forward(self, x):
            return x if torch.compiler.is_compiling() else 2 * x

    checkpoint = ExportableModel.from_model(Net(), (torch.randn(3, 4),))
    with pytest.raises(VerificationError, match="does not see a part"):
        verify(checkpoint, None, program=checkpoint.program)


class Net(nn.Module):
    """What a function makes of a linear layer."""

    def __init__(self, function):
        super().__init__()
        self.function, self.inner = function, nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        return self.function(self, self.inner(x))


def counted(net, x):
    net.count.add_(1)
    return x * net.count


TRAINING = {
    "F.dropout in Net drops at random": lambda net, x: F.dropout(x),
    "F.alpha_dropout in Net drops at random": lambda net, x: F.alpha_dropout(x, training=True),
    "F.rrelu in Net drops at random": lambda net, x: F.rrelu(x, training=True),
    "F.batch_norm in Net takes the statistics of the batch": lambda net, x: F.batch_norm(
        x, net.mean, net.var, training=True
    ),
    "F.scaled_dot_product_attention in Net drops at random": lambda net, x: F.scaled_dot_product_attention(
        x[None, None], x[None, None], x[None, None], dropout_p=0.1
    ),
    "randn_like in Net draws random numbers": lambda net, x: x + torch.randn_like(x),
    "is not deterministic": lambda net, x: x * random.random(),
    "keeps a state from one call to the next": counted,
}


@pytest.mark.parametrize("because", TRAINING)
def test_what_trains_or_is_random_in_evaluation_is_refused_by_name(because):
    model, x = Net(TRAINING[because]).eval(), torch.randn(3, 4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=because) as caught:
        ExportableModel.from_model(model, (x,))
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 400
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


INERT = {
    "dropout": lambda net, x: F.dropout(x, training=net.training),
    "dropout of nothing": lambda net, x: F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None]),
    "batch_norm": lambda net, x: F.batch_norm(x, net.mean, net.var),
    "instance_norm": lambda net, x: F.instance_norm(x[:, None]),
    "rrelu": lambda net, x: F.rrelu(x),
}


@pytest.mark.parametrize("name", INERT)
def test_what_rests_in_evaluation_is_taken(name):
    assert ExportableModel.from_model(Net(INERT[name]).eval(), (torch.randn(3, 4),)).outputs == ("output",)


def test_a_model_that_changes_its_input_is_said_to_and_nothing_of_the_user_changes(tmp_path):
    model, x = Net(lambda net, x: x).eval(), torch.randn(3, 4)
    model.register_forward_pre_hook(lambda module, args: args[0].mul_(2))
    before = x.clone()
    result = export(model, tmp_path / "m.onnx", example_inputs=(x,), dynamic_shapes=({0: "batch"},), opset=20)
    assert torch.equal(x, before)
    assert any("changes its input" in note for note in result.notes)
    assert result.verification.worst("ONNX file") < 1e-5


def test_running_a_program_changes_neither_its_state_nor_its_arguments():
    model, x = Net(counted).eval(), torch.ones(3, 4)
    program = torch.export.export(model, (x,))
    first, second = Runner(program)(x), Runner(program)(x)
    runner = Runner(program)
    assert torch.equal(first[0], second[0]) and torch.equal(runner(x)[0], runner(x)[0])
    assert model.count == 0 and program.state_dict["count"] == 0


def test_differences_are_relative_and_count_nan_as_equal_to_nan_only():
    nan, inf = float("nan"), float("inf")
    assert relative_difference(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])) == 0.5
    assert relative_difference(torch.tensor([nan, 4.0, inf]), torch.tensor([nan, 4.0, inf])) == 0
    for got, want in (([1.0], [nan]), ([nan], [1.0]), ([inf], [-inf]), ([1.0], [inf]), ([inf], [1.0])):
        assert not relative_difference(torch.tensor(got), torch.tensor(want)) < 1e9
    assert relative_difference(torch.tensor([1, 2]), torch.tensor([1, 3])) == 0.5
    assert relative_difference(torch.ones(2), torch.ones(3)) == inf
    assert relative_difference(torch.ones(0), torch.ones(0)) == 0


def test_the_rounding_of_a_program_is_measured():
    class Cancelling(nn.Module):
        def forward(self, x):
            return (x + 1e4) - 1e4

    x = torch.randn(3, 4)
    plain, cancelling = (torch.export.export(module, (x,)) for module in (nn.Linear(4, 4), Cancelling()))
    # A sum of four products of float32 against one that adds 1e4, of which the last place is 1e-3.
    assert own_rounding(plain, Runner(plain)(x), (x,))[0] < 1e-6
    assert own_rounding(cancelling, Runner(cancelling)(x), (x,))[0] > 1e-5


def test_the_deviation_of_equal_numbers_is_all_rounding():
    """Behind a convolution of zeros. An InstanceNorm makes 300 times as much of what rounding leaves of them."""
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.InstanceNorm2d(2, affine=True)).eval()
    nn.init.constant_(model[0].bias, 0.1)
    nn.init.constant_(model[1].bias, 0.01)
    zeros, varied = torch.zeros(1, 2, 4, 4), torch.randn(1, 2, 4, 4)
    program = torch.export.export(model, (zeros,))
    # 0.1 * 2^-23 / sqrt(1e-5) against 0.01 in the output is 4e-4; rounding of numbers near one otherwise
    assert own_rounding(program, Runner(program)(zeros), (zeros,))[0] > 2e-4
    assert own_rounding(program, Runner(program)(varied), (varied,))[0] < 5e-6
