"""A live module is traced as it stands, and nothing of it is changed."""

import copy

import pytest
import tiny_models
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

import normfuse.onnx
from normfuse.checkpoint import CheckpointError, ExportableModel

X = torch.randn(3, 4)


def agrees(checkpoint: ExportableModel, expected: torch.Tensor) -> bool:
    assert torch.equal(checkpoint.expected_outputs[0], expected)
    (computed,) = checkpoint.run(checkpoint.example_inputs)
    return torch.allclose(computed, expected, atol=1e-6)


class Stateful(nn.Module):
    """Counts its calls in a buffer, keeps a result, and is partly frozen."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.register_buffer("calls", torch.zeros(2))
        self.register_buffer("replaced", torch.zeros(2))
        self.norm.eval()

    def forward(self, x):
        self.calls += 1
        self.replaced = self.replaced + 1
        self.last = self.norm(self.linear(x))
        return self.last


def test_modes_buffers_attributes_and_examples_stay_as_they_are():
    model, x = Stateful(), X.clone()
    buffers = (model.calls, model.replaced, model.norm.num_batches_tracked)
    before = [buffer.clone() for buffer in buffers]
    modes = [part.training for part in model.modules()]
    ExportableModel.from_model(model, x)
    assert modes == [part.training for part in model.modules()] == [True, True, False]
    assert (model.calls, model.replaced, model.norm.num_batches_tracked) == buffers
    assert all(torch.equal(*pair) for pair in zip(buffers, before, strict=True))
    assert not hasattr(model, "last") and torch.equal(x, X)


def writes(program: torch.export.ExportedProgram) -> list[str]:
    return [node.name for node in program.graph.nodes if node.op == "call_function" and node.target._schema.is_mutable]


def test_a_program_that_runs_does_not_count_on():
    model = Stateful()
    checkpoint = ExportableModel.from_model(model, X)
    for _ in range(2):
        assert torch.equal(checkpoint.run([X])[0], checkpoint.expected_outputs[0])
    assert not model.calls.any() and not writes(checkpoint.program)


class Writing(nn.Module):
    """Changes a row of a buffer through a view, and returns what came of it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("rows", torch.zeros(2, 4))

    def forward(self, x):
        self.rows.view(-1)[:4].copy_(x[0])
        return x + self.rows[0], self.rows


def test_what_is_written_to_is_a_copy():
    model = Writing()
    checkpoint = ExportableModel.from_model(model, X)
    assert writes(checkpoint.program) == ["copy_"]
    for _ in range(2):
        computed = checkpoint.run([X])
        torch.testing.assert_close(computed, list(checkpoint.expected_outputs))
    assert torch.equal(computed[1][0], X[0]) and not model.rows.any()


def test_a_model_that_counts_its_calls_is_exported(tmp_path):
    result = normfuse.onnx.export(Stateful(), tmp_path / "m.onnx", example_inputs=X, opset=20)
    assert result.report.norms and not result.report.remaining


def test_a_module_that_changes_its_input_does_not_change_the_example():
    class Changing(nn.Module):
        def forward(self, x):
            return x.mul_(2)

    x = X.clone()
    checkpoint = ExportableModel.from_model(Changing(), x)
    assert torch.equal(x, X) and torch.equal(checkpoint.example_inputs[0], X)


def test_a_mode_that_does_more_than_change_happens_to_a_copy():
    class Merging(nn.Linear):
        """As some adapters do, adds to its weights when evaluation begins, which rounds."""

        def train(self, mode=True):
            if mode != self.training:
                self.weight.data += 0.1 if not mode else -0.1
            return super().train(mode)

    model = nn.Sequential(Merging(4, 4), nn.ReLU())
    weight = model[0].weight.clone()
    checkpoint = ExportableModel.from_model(model, X)
    assert torch.equal(model[0].weight, weight) and model[0].training
    assert agrees(checkpoint, copy.deepcopy(model).eval()(X))


def changed_eps():
    model = tiny_models.trained(tiny_models.Perceptron())
    model.norm.eps = 0.5
    return model


def hooked():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model.register_forward_hook(lambda module, args, output: output * 2)
    model.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model[0].register_forward_hook(lambda module, args, output: output - 1)
    return model


def plain_attribute():
    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * self.scale

    model = Scaled(4, 4)
    model.scale = torch.rand(4)
    return model


LIVE = {
    "eps changed": changed_eps,
    "hooks": hooked,
    "a tensor as attribute": plain_attribute,
    "weight_norm": lambda: weight_norm(nn.Linear(4, 4)),
    "spectral_norm": lambda: spectral_norm(nn.Linear(4, 4)),
    "a parametrisation": lambda: parametrizations.spectral_norm(nn.Linear(4, 4)),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`:FutureWarning")
@pytest.mark.parametrize("case", LIVE)
def test_what_is_traced_is_the_live_module(case):
    model = LIVE[case]().eval()
    expected = model(X)
    assert agrees(ExportableModel.from_model(model, X), expected)
    assert torch.equal(model(X), expected)


def test_attention_is_traced_without_its_fast_path():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    padding = torch.tensor([[False, False, True, True], [False] * 4])
    inputs = {"src": torch.randn(2, 4, 8), "src_key_padding_mask": padding}
    checkpoint = ExportableModel.from_model(model, inputs, {name: {0: "batch", 1: "seq"} for name in inputs})
    assert not any("transformer_encoder_layer" in str(node.target) for node in checkpoint.program.graph.nodes)
    torch.testing.assert_close(checkpoint.run(checkpoint.example_inputs)[0], checkpoint.expected_outputs[0])
    assert torch.backends.mha.get_fastpath_enabled()


class MaskedEncoder(nn.Module):
    """Makes its causal mask itself, as PyTorch's example of a language model does."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, src):
        mask = torch.log(torch.tril(torch.ones(len(src), len(src))))
        return self.encoder(src, mask=mask)


class Translator(nn.Module):
    def __init__(self):
        super().__init__()
        self.transformer = nn.Transformer(8, 2, 1, 1, 16)

    def forward(self, src, tgt, tgt_mask):
        return self.transformer(src, tgt, tgt_mask=tgt_mask)


@pytest.mark.parametrize("causal", [True, False])
def test_encoders_and_decoders_take_any_mask(causal):
    """torch looks at the numbers in a mask to choose a kernel; a program has one for all."""
    detect = nn.modules.transformer._detect_is_causal_mask
    encoder, x = MaskedEncoder().eval(), torch.randn(5, 2, 8)
    assert agrees(ExportableModel.from_model(encoder, x, ({0: "tokens"},)), encoder(x))
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    mask = mask if causal else mask.T.contiguous()
    translator = Translator().eval()
    checkpoint = ExportableModel.from_model(translator, (torch.randn(4, 2, 8), x, mask))
    for hidden in (mask, torch.zeros(5, 5), mask.T):
        inputs = (checkpoint.example_inputs[0], x, hidden)
        torch.testing.assert_close(checkpoint.run(inputs)[0], translator(*inputs))
    assert nn.modules.transformer._detect_is_causal_mask is detect


def test_names_are_those_of_the_module():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.LayerNorm(4)))
    program = ExportableModel.from_model(model, X).program
    assert set(program.state_dict) == set(model.state_dict())
    stacks = [list(node.meta["nn_module_stack"].values()) for node in program.graph.nodes if "layer_norm" in node.name]
    assert [path for path, _ in stacks[0]] == ["", "1", "1.0"] and "Sequential" in stacks[0][0][1]
    assert next(node.name for node in program.graph.nodes if node.op == "placeholder") == "p_0_weight"
    assert program.module().state_dict().keys() == model.state_dict().keys()


def test_the_program_of_an_exported_program_is_captured_again():
    program = torch.export.export(nn.Linear(4, 2), (X,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    checkpoint = ExportableModel.from_model(program.module(), X, ({0: "rows"},))
    assert agrees(checkpoint, program.module()(X)) and str(checkpoint.inputs[0]) == "input:float32[rows,4]"


class Deciding(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Diverged(nn.Linear):
    def __init__(self):
        super().__init__(4, 4)
        self.bias.data[1] = float("nan")


REFUSED = {
    "no module": (lambda: {"weight": X}, "model is a dict"),
    "torchscript": (lambda: torch.jit.script(nn.Linear(4, 4)), "model is TorchScript"),
    "torchscript part": (lambda: nn.Sequential(torch.jit.script(nn.Linear(4, 4))), r"model\.0 is TorchScript"),
    "no data": (lambda: nn.Linear(4, 4, device="meta"), "tensor 'weight' has no data"),
    "not run yet": (lambda: nn.LazyLinear(4), "tensor 'weight' is not initialised"),
    "a decision": (Deciding, r"values of a tensor \(test_capture.py, line \d+: return x if x.sum\(\) > 0 else -x\)"),
    "numbers of a diverged training": (Diverged, r"bias holds NaN \(1 of 4"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_one_line(case, capfd):
    make, because = REFUSED[case]
    with pytest.raises(CheckpointError, match=because) as caught:
        ExportableModel.from_model(make(), X)
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 400
    assert capfd.readouterr() == ("", "")


def test_the_notes_are_in_the_result(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4)).double()
    result = normfuse.onnx.export(model, tmp_path / "m.onnx", example_inputs=X.double(), opset=20)
    assert result.notes == ["traced in float32; the model has float64"]


class Mapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        at = torch.arange(x.shape[1])
        seen = torch.vmap(torch.vmap(torch.ge, in_dims=(None, 0)), in_dims=(0, None))(at, at)
        y = torch.vmap(self.linear)(self.norm(x.mT).mT)
        return nn.functional.scaled_dot_product_attention(y, y, y, attn_mask=seen)


def test_vmap_is_written_out_for_any_size(tmp_path):
    model, x = Mapped().eval(), torch.randn(2, 5, 4)
    expected = model(x)
    normfuse.save(model, tmp_path / "m.pt", example_inputs=x, dynamic_shapes=({0: "batch", 1: "length"},))
    loaded = normfuse.load(tmp_path / "m.pt")
    assert [getattr(dim, "name", dim) for dim in loaded.inputs[0].dims] == ["batch", "length", 4]
    assert agrees(loaded, expected)
    (more,) = loaded.run([x := torch.randn(3, 7, 4)])
    torch.testing.assert_close(more, model(x))
    assert [norm.status for norm in normfuse.onnx.export(loaded, tmp_path / "m.onnx").report.norms] == ["folded"]


class Router(nn.Module):
    """Converts a part to the dtype that it has, as routers of mixtures of experts do."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        self.inner = self.inner.to(x.dtype)
        return self.inner(x)


def test_a_part_that_is_converted_to_what_it_is_can_be_traced():
    model, before = Router(), nn.Module.to
    assert agrees(ExportableModel.from_model(model, X), model(X))
    assert nn.Module.to is before and list(model.state_dict()) == ["inner.weight", "inner.bias"]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        state = x[:, 0]
        for step in range(x.shape[1]):
            state = torch.tanh(self.inner(state) + x[:, step])
        return state


def test_a_loop_over_time_is_named():
    line = Recurrent.forward.__code__.co_firstlineno + 3
    checkpoint = ExportableModel.from_model(Recurrent(), torch.randn(2, 5, 4), ({0: "batch", 1: "time"},))
    why = f"time is fixed at 5: the model runs step by step along it (test_capture.py, line {line})"
    assert why in checkpoint.notes


class Energy(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.last = nn.LayerNorm(4), nn.Linear(4, 1)

    def energy(self, x):
        return self.last(torch.tanh(self.norm(x))).sum()


class FunctionalForces(Energy):
    def forward(self, x):
        return torch.func.grad(self.energy)(x)


class Forces(Energy):
    """The gradient of an energy, as models of molecules return it."""

    def forward(self, x):
        with torch.enable_grad():
            x = x.requires_grad_()
            return torch.autograd.grad(self.energy(x), x)[0]


@pytest.mark.parametrize("kind", [FunctionalForces, Forces])
def test_a_forward_that_differentiates_is_refused_with_that_reason(kind):
    with pytest.raises(CheckpointError, match=r"out of torch.export's sight.*torch.autograd.grad in forward"):
        ExportableModel.from_model(kind(), X)


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Missing(nn.Module):
    def forward(self, x, mask=None):
        return x * mask[:, None]


class Narrow(nn.Module):
    def __init__(self):
        super().__init__()
        self.narrow = nn.Linear(5, 2)

    def forward(self, x):
        return self.narrow(x)


@pytest.mark.parametrize(
    ("model", "line"),
    [
        (Branching(), r"depends on the values of a tensor \(test_capture.py, line \d+: return x if x.sum\(\) > 0"),
        (
            Missing(),
            r"fails on the example inputs.* not subscriptable \(test_capture.py, line \d+: return x \* mask",
        ),
        (Narrow(), r"\(test_capture.py, line \d+: return self.narrow\(x\)\)$"),
    ],
)
def test_the_line_of_the_model_that_fails_is_named(model, line):
    with pytest.raises(CheckpointError, match=line):
        ExportableModel.from_model(model, torch.ones(3, 4))
