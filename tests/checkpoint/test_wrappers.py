"""What trainings put around a model is looked through, or named as the reason."""

import functools

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from normfuse.checkpoint import CheckpointError, ExportableModel, load, save

X = torch.randn(3, 4)
eager = functools.partial(torch.compile, backend="eager")


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, x, scale=None):
        return {"y": self.linear(self.norm(x))}


class Holder(nn.Module):
    """A moving average as timm, ultralytics and others keep it: the name of the class tells where the model is."""

    def __init__(self, model):
        super().__init__()
        self.module = self.ema = self.ema_model = model

    def forward(self, *args, **kwargs):
        raise NotImplementedError


def kept_in_place(model):
    model.compile(backend="eager")
    return model


def compiled_forward(model):
    model.forward = eager(model.forward)
    return model


WRAPPERS = {
    "DataParallel": (nn.DataParallel, "DataParallel"),
    "AveragedModel": (AveragedModel, "AveragedModel"),
    "torch.compile": (eager, "OptimizedModule"),
    "a compiled average": (lambda model: eager(AveragedModel(model)), "OptimizedModule, AveragedModel"),
    "ModelEmaV3": (type("ModelEmaV3", (Holder,), {}), "ModelEmaV3"),
    "EMA": (type("EMA", (Holder,), {}), "EMA"),
    "ModelEMA": (type("ModelEMA", (Holder,), {}), "ModelEMA"),
    "compiled in place": (kept_in_place, None),
    "compiled forward": (compiled_forward, None),
}


@pytest.mark.parametrize("case", WRAPPERS)
def test_the_model_inside_is_traced(case):
    wrap, note = WRAPPERS[case]
    model = Inner()
    expected = model.eval()(X)["y"]
    checkpoint = ExportableModel.from_model(wrap(model), {"x": X})
    assert checkpoint.input_names == ("x",) and checkpoint.outputs == ("y",)
    assert torch.equal(checkpoint.expected_outputs[0], expected)
    assert set(checkpoint.program.state_dict) == set(Inner().state_dict())
    assert list(checkpoint.notes) == ([f"looked through {note}"] if note else [])


def test_compiled_parts_run_as_they_are_and_lose_their_prefix():
    model = nn.Sequential(eager(nn.LayerNorm(4)), nn.Linear(4, 2))
    checkpoint = ExportableModel.from_model(model, X)
    assert set(checkpoint.program.state_dict) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert "_orig_mod" in dict(model[0].named_children())


def test_an_autocast_around_forward_is_left_out_and_stays_on_the_model():
    """As accelerate's `prepare` does with mixed_precision="bf16"."""
    model = Inner().eval()
    expected = model(X)["y"]
    original = model._original_forward = model.forward
    model.forward = torch.autocast("cpu", torch.bfloat16)(lambda *args, **kwargs: original(*args, **kwargs))
    around = model.forward
    assert not torch.equal(model(X)["y"], expected)
    checkpoint = ExportableModel.from_model(model, X)
    assert checkpoint.input_names == ("x",) and torch.equal(checkpoint.expected_outputs[0], expected)
    assert checkpoint.notes == ("without the autocast that accelerate put around forward",)
    assert model.forward is around


class Cast(nn.Module):
    """Attention and a linear layer, in bfloat16."""

    def __init__(self):
        super().__init__()
        self.attention, self.last = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            tokens = x[:, None].expand(-1, 3, -1)
            return self.last(self.attention(tokens, tokens, tokens)[0].mean(1)).float()


def test_an_autocast_inside_is_saved_as_its_casts(tmp_path):
    model = Cast().eval()
    save(model, tmp_path / "m.pt", example_inputs=X, dynamic_shapes=({0: "batch"},))
    for x in (X, torch.randn(5, 4)):
        assert torch.equal(load(tmp_path / "m.pt").run((x,))[0], model(x))


class Adapted(nn.Module):
    """As PEFT's PeftModel: adapters inside, and a method that gives the model with their weights merged."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.shift = nn.Parameter(torch.ones(2))
        base.register_forward_hook(lambda module, args, output: {"y": output["y"] + self.shift})

    def get_base_model(self):
        return self.base

    def merge_and_unload(self):
        self.base._forward_hooks.clear()
        self.base.linear.bias.data += self.shift
        return self.base

    def forward(self, *args, **kwargs):
        return self.base(*args, **kwargs)


def test_adapters_are_merged_into_a_copy_and_compared_with_the_live_model():
    model = Adapted(Inner()).eval()
    bias, expected = model.base.linear.bias.clone(), model(X)["y"]
    checkpoint = ExportableModel.from_model(model, X, ({0: "batch"},))
    assert checkpoint.input_names == ("x",) and checkpoint.notes == ("the adapters of Adapted are merged",)
    assert torch.equal(checkpoint.expected_outputs[0], expected) and torch.equal(model.base.linear.bias, bias)
    assert set(checkpoint.program.state_dict) == set(Inner().state_dict())
    torch.testing.assert_close(checkpoint.run([X])[0], expected)


def test_weights_that_are_spread_over_processes_are_the_reason():
    sharded = type("FullyShardedDataParallel", (Inner,), {})()
    with pytest.raises(CheckpointError, match=r"spread over processes: .*full_state_dict"):
        ExportableModel.from_model(nn.Sequential(sharded), X)
    model = Inner()
    model.linear.weight.__class__ = type("DTensor", (nn.Parameter,), {})
    with pytest.raises(CheckpointError, match=r"tensor 'linear.weight' is spread over processes \(DTensor\)"):
        ExportableModel.from_model(model, X)


@pytest.mark.filterwarnings("ignore")
def test_quantised_models_are_refused_with_the_way_out():
    model = Inner().eval()
    with pytest.raises(CheckpointError, match=r"^linear is quantised \(Linear of torch\.ao\): .*--dtype int8"):
        ExportableModel.from_model(torch.ao.quantization.quantize_dynamic(model, {nn.Linear}), X)
    own = {"__torch_dispatch__": classmethod(lambda cls, function, *_: NotImplemented)}  # it computes by itself
    model.linear.weight.__class__ = type("Packed", (nn.Parameter,), own)
    with pytest.raises(CheckpointError, match=r"^tensor 'linear\.weight' is a Packed of .*, no plain one: .*before"):
        ExportableModel.from_model(model, X)
