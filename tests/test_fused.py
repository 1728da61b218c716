"""``normfuse.fuse``: a module that is called as the model is, without its norms."""

import copy
import dataclasses
import inspect
import io
from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import nn

import normfuse
from normfuse import ExportableModel, FoldError
from normfuse.nn import UnifiedNorm
from tests.folding.checks import difference
from tests.folding.networks import look_trained

BATCH = ({0: "batch"},)
Pair = namedtuple("Pair", "first second")


@dataclasses.dataclass
class Returned:
    mean: torch.Tensor
    parts: Any
    size: int
    kind: str = "returned"


class Structures(nn.Module):
    """Arguments and results in structures; some of both are no tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = network()

    def forward(self, batch: dict, scale: float = 1.0, *more: torch.Tensor, **named: torch.Tensor) -> Returned:
        y = self.layers(batch["x"]) * scale
        for other in (*more, *named.values()):
            y = y + other
        return Returned(y.mean(-1), Pair(y, [None, {"double": 2 * y}]), y.shape[0])


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return look_trained(nn.Sequential(nn.Linear(8, 16), UnifiedNorm(16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 4)))


@pytest.fixture
def model() -> nn.Sequential:
    return network().eval()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


def same(got: torch.Tensor, want: torch.Tensor) -> bool:
    return difference(want, got) <= 16 * torch.finfo(want.dtype).eps


@pytest.mark.parametrize("given", [lambda x: x, lambda x: (x,), lambda x: [x], lambda x: {"input": x}])
def test_arguments_are_given_in_any_form(model, x, given):
    fused = normfuse.fuse(model, given(x))
    assert same(fused(x), model(x))
    assert same(fused(input=x), model(x))


def test_nothing_of_the_norm_is_left(model, x):
    fused = normfuse.fuse(model, x)
    called = {str(node.target) for node in fused.program.graph.nodes if node.op == "call_function"}
    assert called == {"aten.linear.default", "aten.relu.default"}


@pytest.mark.parametrize("shapes", [BATCH, {"input": {0: "batch"}}, ({0: torch.export.Dim("batch")},)])
def test_sizes_with_names_vary(model, x, shapes):
    fused = normfuse.fuse(model, x, shapes)
    for size in (0, 1, 2, 7):
        y = torch.randn(size, 8)
        assert same(fused(y), model(y)) if size else fused(y).shape == (0, 4)


def test_other_sizes_are_named(model, x):
    with pytest.raises(
        ValueError, match=r"input has shape \[5, 8\], but Sequential was fused for input:float32\[3,8\]"
    ):
        normfuse.fuse(model, x)(torch.randn(5, 8))
    fused = normfuse.fuse(model, x, ({0: torch.export.Dim("batch", min=2, max=4)},))
    with pytest.raises(ValueError, match=r"input has shape \[3, 7\].*a name in dynamic_shapes"):
        fused(torch.randn(3, 7))
    with pytest.raises(ValueError, match="batch is 1, but Sequential takes 2 or more"):
        fused(torch.randn(1, 8))
    with pytest.raises(ValueError, match="batch is 5, but Sequential takes 4 at most"):
        fused(torch.randn(5, 8))


def test_a_size_that_the_model_fixes_is_named_with_the_reason(x):
    class Unrolled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return sum(row * i for i, row in enumerate(x.unbind(0)))

    fused = normfuse.fuse(Unrolled(), x, BATCH)
    assert fused.notes and "batch is fixed at 3" in fused.notes[0]
    with pytest.raises(ValueError, match="tracing decided: batch is fixed at 3"):
        fused(torch.randn(5, 8))


def test_branches_of_a_condition_keep_their_weights(x):
    class Conditional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.other = network(), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x.sum() > 0, lambda y: self.layers(y), lambda y: self.other(y), (x,))

    model = Conditional().eval()
    fused = normfuse.fuse(model, x, BATCH)
    for y in (x.abs(), -x.abs(), torch.ones(5, 8)):
        assert same(fused(y), model(y))


def test_structures_go_in_and_come_out(x):
    model = Structures().eval()
    other = torch.ones(4)
    shapes = {"batch": {"x": {0: "batch"}}}
    fused = normfuse.fuse(model, ({"x": x}, 2.0, other), shapes, kwargs={"last": other})
    y = torch.randn(6, 8)
    got, want = (f({"x": y}, 2.0, other, last=other) for f in (fused, model))
    assert type(got) is Returned and (got.kind, got.size) == ("returned", 6)
    assert same(got.mean, want.mean)
    assert type(got.parts) is Pair and got.parts.second[0] is None
    assert same(got.parts.second[1]["double"], want.parts.second[1]["double"])


def test_names_are_given_in_any_order(x):
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = network()

        def forward(self, x: torch.Tensor, *, first: torch.Tensor, second: torch.Tensor, **more: torch.Tensor) -> Any:
            return self.layers(x) * first + second - 2 * more["third"] + more["fourth"] ** 2

    model, numbers = Named().eval(), dict(zip(("first", "second", "third", "fourth"), torch.randn(4, 4), strict=True))
    fused = normfuse.fuse(model, {**dict(reversed(numbers.items())), "x": x})
    for given in (numbers, dict(reversed(numbers.items()))):
        assert same(fused(**given, x=x), model(x, **numbers))


def test_what_is_part_of_the_program_cannot_change(x):
    fused = normfuse.fuse(Structures().eval(), ({"x": x}, 2.0))
    with pytest.raises(ValueError, match=r"scale is 1\.0, but Structures was fused with 2\.0: fuse it again"):
        fused({"x": x})
    with pytest.raises(ValueError, match="x is None; Structures was fused with the tensor x:float32"):
        fused({"y": x}, 2.0)
    with pytest.raises(ValueError, match=r"more_0 is tensor.*, but Structures was fused with None"):
        fused({"x": x}, 2.0, torch.ones(4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_dtype_of_the_model_is_kept(model, x, dtype):
    model, x = model.to(dtype), x.to(dtype)
    fused = normfuse.fuse(model, x)
    assert fused(x).dtype == dtype and same(fused(x), model(x))


def through_a_file(fused: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def loaded(fused: nn.Module) -> nn.Module:
    other = copy.deepcopy(fused)
    for tensor in other.parameters():
        tensor.zero_()
    other.load_state_dict(fused.state_dict())
    return other


def compiled(fused: nn.Module) -> nn.Module:
    return torch.compile(fused, backend="eager", fullgraph=True)


@pytest.mark.parametrize("change", [copy.deepcopy, through_a_file, loaded, compiled])
def test_what_is_done_with_modules(model, x, change):
    assert same(change(normfuse.fuse(model, x, BATCH))(x), model(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_jit_trace_takes_other_batches(model, x, recwarn):
    traced = torch.jit.trace(normfuse.fuse(model, x, BATCH), x)
    y = torch.randn(5, 8)
    assert same(traced(y), model(y))
    assert not [w for w in recwarn if issubclass(w.category, torch.jit.TracerWarning)]


def test_it_moves_to_another_dtype(model, x):
    fused = normfuse.fuse(model, x).double()
    assert same(fused(x.double()).float(), model(x))


def test_fusing_what_is_fused(model, x):
    again = normfuse.fuse(normfuse.fuse(model, x), x)
    assert same(again(x), model(x))


def test_a_fused_model_is_traced_with_the_names_of_its_arguments(model, x):
    fused = normfuse.fuse(model, x)
    assert list(inspect.signature(fused).parameters) == ["input"]
    assert ExportableModel.from_model(fused, x).input_names == ("input",)


def test_it_stays_in_evaluation_and_does_not_train(model, x):
    outer = nn.Sequential(normfuse.fuse(model, x), nn.Linear(4, 2)).train()
    assert not any(part.training for part in outer[0].modules())
    outer(x).sum().backward()
    assert [name for name, p in outer.named_parameters() if p.grad is not None] == ["1.weight", "1.bias"]


def test_gradients_reach_the_inputs(model, x):
    gradients = []
    for module in (normfuse.fuse(model, x), model):
        y = x.clone().requires_grad_()
        module(y).square().sum().backward()
        gradients.append(y.grad)
    assert same(*gradients)


def test_the_model_stays_as_it_is(x):
    model = network().train()
    model[1].eval()
    modes, before = [part.training for part in model.modules()], copy.deepcopy(model.state_dict())
    normfuse.fuse(model, x)
    assert [part.training for part in model.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_attention_is_traced_without_its_fast_path():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval().requires_grad_(False)
    fused = normfuse.fuse(layer, torch.randn(2, 3, 8))
    names = {node.target for node in fused.program.graph.nodes if node.op == "call_function"}
    assert not any("transformer_encoder_layer_fwd" in str(name) for name in names)
    assert torch.backends.mha.get_fastpath_enabled()


def test_wrappers_are_looked_through(model, x):
    for wrapped in (nn.DataParallel(model), torch.compile(model), torch.optim.swa_utils.AveragedModel(model)):
        assert same(normfuse.fuse(wrapped, x)(x), model(x))


def test_what_cannot_be_traced_is_one_line(model, x):
    for given, message in (((), "example_inputs is empty"), (x[:, :5], "Sequential fails on the example inputs")):
        with pytest.raises(FoldError, match=message) as refusal:
            normfuse.fuse(model, given)
        assert "\n" not in str(refusal.value)
    with pytest.raises(FoldError, match="has no data"):
        normfuse.fuse(network().to("meta"), x)


def test_the_report_is_readable(model, x):
    norm = look_trained(nn.LayerNorm(4)).eval()
    report = normfuse.fuse(model.append(norm), x).report
    assert str(report).splitlines() == [
        "1 (UnifiedNorm): folded into 0.{weight,bias}, 4.{weight,bias}",
        "5 (LayerNorm): LayerNorm, gain kept, shift kept (gain: its result is fixed by the model's output)",
        "1 of 1 norms folded; program: 6 → 4 operations",
    ]
