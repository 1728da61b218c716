"""balance="int8": scales chosen for integers change nothing in float32, and lower the error of quantised products."""

import pytest
import torch
from torch import nn

import normfuse
from normfuse.folding.balance import Prediction, observe
from normfuse.folding.program import Program
from normfuse.nn import UnifiedNorm

WIDTH = 16


@pytest.fixture(autouse=True)
def fewer_steps(monkeypatch):
    monkeypatch.setattr("normfuse.folding.balance.STEPS", 40)


class Block(nn.Module):
    def __init__(self, post):
        super().__init__()
        self.post, self.norm = post, UnifiedNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, x):
        if self.post:
            return self.norm(x + self.down(torch.relu(self.up(x))))
        return x + self.down(torch.relu(self.up(self.norm(x))))


def measure(norm, args):
    norm.running_var.copy_(args[0].square().mean((0, 1)))


def network(post, spread=6.0, seed=0, depth=3):
    """Widely spread gains, and statistics that match."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, WIDTH), *(Block(post) for _ in range(depth)), nn.Linear(WIDTH, 4)).eval()
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, UnifiedNorm):
                norm.weight.copy_(spread ** (2 * torch.rand(WIDTH) - 1))
                norm.bias.copy_(0.2 * torch.randn(WIDTH))
                norm.register_forward_pre_hook(measure)
        model(inputs(9))
        for norm in model.modules():
            norm._forward_pre_hooks.clear()
    return model


def inputs(seed, rows=64):
    return torch.randn(rows, 3, 8, generator=torch.Generator().manual_seed(seed))


def rounded(model, x, per_tensor):
    """What a program gives with its products rounded as ONNX Runtime's dynamic quantisation does."""

    class Rounding(torch.fx.Interpreter):
        def call_function(self, target, args, kwargs):
            if target is torch.ops.aten.linear.default:
                x, weight, *rest = args
                step = (x.amax().clamp(min=0) - x.amin().clamp(max=0)) / 255
                size = weight.abs().amax() if per_tensor else weight.abs().amax(1, keepdim=True)
                args = ((x / step).round() * step, (weight / size * 127).round() * size / 127, *rest)
            return super().call_function(target, args, kwargs)

    program = model
    own = {**program.constants, **program.state_dict}
    specs = program.graph_signature.input_specs
    operands = [own.get(spec.target, x) if spec.target else x for spec in specs]
    with torch.no_grad():
        return Rounding(program.graph_module).run(*operands, enable_io_processing=False)[0]


def error(program, x, expected, per_tensor=False):
    return ((rounded(program, x, per_tensor) - expected).square().mean() / expected.square().mean()).sqrt().item()


@pytest.mark.parametrize("balance", ["int8", "int8-per-tensor"])
@pytest.mark.parametrize("post", [True, False])
def test_it_costs_integers_less_than_the_norms_did(post, balance):
    model = network(post)
    program = torch.export.export(model, (inputs(0),))
    x, per_tensor = inputs(1), balance == "int8-per-tensor"
    expected = model(x).detach()
    unfolded, plain = error(program, x, expected, per_tensor), error(normfuse.fold(program)[0], x, expected, per_tensor)
    folded, report = normfuse.fold(program, balance=balance, example_inputs=[(inputs(2),), (inputs(3),)])
    got = error(folded, x, expected, per_tensor)
    assert got < unfolded and got < (plain if post else 1.1 * plain)  # pre-norm costs little in any scales
    assert len(report.remaining) <= 2 and report.int8_error < 1
    # In float32 it is the same function: to the rounding of a few dozen operations.
    torch.testing.assert_close(folded.module()(x), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("per_tensor", [True, False])
def test_the_prediction_is_close_to_the_error_of_rounding(per_tensor):
    x = inputs(0, rows=256)
    model = network(post=True, spread=2.0)
    program = torch.export.export(model, (x,))
    expected = model(x).detach()
    opened = Program(program)
    prediction = Prediction(None, opened, observe(opened, [((x,), {})]), per_tensor)
    predicted = prediction(torch.zeros(1, dtype=torch.float64)).item() / expected.double().square().sum().item()
    # First order, and noise as if it were independent: within a fifth where it is a few hundredths.
    assert predicted**0.5 == pytest.approx(error(program, x, expected, per_tensor), rel=0.2)


def test_what_stays_says_why():
    # Gains that alternate between channels along the stream: no factor per channel suits all readers.
    model = network(post=True)
    with torch.no_grad():
        for number, block in enumerate(model[1:-1]):
            block.norm.weight.copy_(torch.logspace(-4, 4, WIDTH).roll(number * WIDTH // 2))
            block.norm.running_var.fill_(1.0)
    program = torch.export.export(model, (inputs(0),))
    assert not normfuse.fold(program)[1].remaining
    _, report = normfuse.fold(program, balance="int8")
    assert report.remaining
    assert {record.reason for record in report.remaining} == {
        "its scales would cost int8 products more accuracy than the norm takes time"
    }


def test_scales_that_float16_bounds_keep_their_bounds():
    model = network(post=True)
    program = torch.export.export(model.half(), (inputs(0).half(),))
    folded, report = normfuse.fold(program, balance="int8")
    assert 2**-6 <= report.scale_range[0] <= report.scale_range[1] <= 2**6
    x = inputs(1).half()
    expected = model(x).detach()
    # Ten bits behind the point, and some dozen roundings in a row.
    torch.testing.assert_close(folded.module()(x), expected, rtol=0, atol=0.02 * expected.abs().max().item())


class Dead(nn.Module):
    """Gains of zero, in front of which channels hold large values that something else reads as well."""

    def __init__(self, norm):
        super().__init__()
        self.first, self.branch, self.norm = nn.Linear(8, WIDTH), nn.Linear(WIDTH, WIDTH), norm(WIDTH)
        self.last = nn.Linear(WIDTH, 4)
        with torch.no_grad():
            self.norm.weight.copy_(torch.logspace(-1, 1, WIDTH))
            self.norm.weight[3:7] = 0
            self.norm.bias.normal_()
            self.first.weight[3:7] *= 30

    def forward(self, x):
        h = self.first(x)
        return self.last(self.norm(h + self.branch(h)))


@pytest.mark.parametrize("norm", [UnifiedNorm, nn.LayerNorm])
@pytest.mark.parametrize("balance", ["int8", "int8-per-tensor"])
def test_channels_with_a_gain_of_zero_take_no_part_in_steps(norm, balance):
    torch.manual_seed(0)
    model, x, per_tensor = Dead(norm).eval(), inputs(0), balance == "int8-per-tensor"
    program, expected = torch.export.export(model, (x,)), model(x).detach()
    folded, _ = normfuse.fold(program, balance=balance, verify=False)
    torch.testing.assert_close(folded.module()(x), expected, rtol=1e-4, atol=1e-4)
    assert error(folded, x, expected, per_tensor) < 1.05 * error(program, x, expected, per_tensor)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"balance": "int4"}, ValueError, "balance='int4' is unknown; give 'int8' or 'int8-per-tensor' or None"),
        (
            {"example_inputs": (inputs(0),)},
            ValueError,
            "example_inputs are only used by balance; give balance='int8'",
        ),
        ({"balance": "int8", "example_inputs": []}, normfuse.FoldError, "example_inputs holds no inputs"),
        ({"balance": "int8", "example_inputs": [()]}, normfuse.FoldError, r"\[0\] holds 0 inputs; the program takes 1"),
        ({"balance": "int8", "example_inputs": {"x": inputs(0)}}, normfuse.FoldError, "is no sequence of tensors"),
        ({"balance": "int8", "example_inputs": [(inputs(0).numpy(),)]}, normfuse.FoldError, "a ndarray is no tensor"),
        (
            {"balance": "int8", "example_inputs": inputs(0).double()},
            normfuse.FoldError,
            "is torch.float64, not torch.fl",
        ),
        (
            {"balance": "int8", "example_inputs": inputs(0)[..., :5]},
            normfuse.FoldError,
            r"\[64, 3, 5\], not \[64, 3, 8\]",
        ),
        (
            {"balance": "int8", "example_inputs": inputs(0) * torch.nan},
            normfuse.FoldError,
            "typical inputs give values that are not finite in front of '0'; give others",
        ),
    ],
)
def test_what_it_refuses(options, error, message):
    program = torch.export.export(network(post=True), (inputs(0),))
    with pytest.raises(error, match=message):
        normfuse.fold(program, **options)


class Masked(nn.Module):
    """Attention with a mask that is given by name, integers among the inputs, and an integer output."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(20, WIDTH), UnifiedNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, ids, attention_mask):
        x = self.norm(self.embed(ids))
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask.bool()[:, None, None])
        y = x + self.out(mixed[:, 0])
        return {"states": y, "best": y.argmax(-1)}


def test_arguments_by_name_masks_and_integers():
    torch.manual_seed(0)
    model = Masked().eval()
    model.norm.weight.data = torch.logspace(-1, 1, WIDTH)
    given = {"ids": torch.randint(20, (4, 6)), "attention_mask": (torch.arange(6) < 4).long().expand(4, 6).contiguous()}
    program = torch.export.export(model, (), given)
    folded, report = normfuse.fold(program, balance="int8")
    expected, got = model(**given), folded.module()(**given)
    torch.testing.assert_close(got["states"], expected["states"], rtol=1e-4, atol=1e-4)
    assert torch.equal(got["best"], expected["best"]) and report.int8_error > 0


class Around(nn.Module):
    """A norm between two products, and something of another kind in front and behind."""

    def __init__(self, before=lambda x: x, behind=lambda y: y):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, WIDTH), UnifiedNorm(WIDTH), nn.Linear(WIDTH, 4)
        self.before, self.behind = before, behind

    def forward(self, x):
        h = self.norm(self.first(self.before(x))[None])[0]
        return self.behind(self.last(h))


MATRIX = torch.arange(64).reshape(8, 8)


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (Around(), torch.randn(8)),
        (Around(lambda x: (x @ MATRIX).remainder(5).float()), torch.arange(24).reshape(3, 8)),
        (Around(behind=lambda y: (y - y).sqrt() + y), inputs(0)),  # with a derivative that is not finite
        (Around(behind=lambda y: y.exp().mul_(2).sigmoid_()), inputs(0)),
    ],
)
def test_vectors_integers_and_derivatives_that_are_not_finite(model, x):
    model = model.eval()
    model.norm.weight.data = torch.logspace(-1, 1, WIDTH)
    folded, report = normfuse.fold(torch.export.export(model, (x,)), balance="int8", example_inputs=x)
    assert report.int8_error <= 1 and not report.remaining
    torch.testing.assert_close(folded.module()(x), model(x), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_run_or_has_no_derivative_is_one_line():
    program = torch.export.export(Around(behind=lambda y: torch.igamma(y.abs() + 1, y.abs())).eval(), (inputs(0),))
    with pytest.raises(normfuse.FoldError, match=r"int8 needs the derivative of the program, which has none: .*igamma"):
        normfuse.fold(program, balance="int8")
    program = torch.export.export(nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 2)), (torch.arange(5),))
    with pytest.raises(
        normfuse.FoldError, match=r"the program fails on the typical inputs: index out of range in self$"
    ):
        normfuse.fold(program, balance="int8", example_inputs=torch.arange(5) + 1)


def test_without_products_or_examples_it_says_so():
    program = torch.export.export(nn.Sequential(UnifiedNorm(8)).eval(), (inputs(0),))
    with pytest.raises(normfuse.FoldError, match=r"int8 needs products with constant weights .* leave balance out"):
        normfuse.fold(program, balance="int8")
    program = torch.export.export(network(post=True), (inputs(0),))
    program._example_inputs = None
    with pytest.raises(ValueError, match="balance needs typical inputs to choose by; give example_inputs"):
        normfuse.fold(program, balance="int8")
