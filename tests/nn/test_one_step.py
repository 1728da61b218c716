"""One training step moves the statistics once, whatever runs it: checkpointing above all, bit for bit."""

import copy
import gc
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from normfuse.nn import EstimatedBatchNorm, MovingAverageBatchNorm, keep_norms, sigma_reparam
from tests.norms import running

C = 6
NORMS = running(C, "unified", "unified, filtered", "power", "power, paper")


@pytest.fixture(params=NORMS)
def make(request):
    return NORMS[request.param]


class Stack(nn.Module):
    """Three blocks; the middle one calls its norm twice and drops some of its values."""

    def __init__(self, make):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(C, C), make(), nn.GELU())
        self.norm, self.linear = make(), nn.Linear(C, C)
        self.last = nn.Sequential(nn.Linear(C, C), make())

    def middle(self, x):
        return x + nn.functional.dropout(self.norm(self.linear(self.norm(x))), 0.2)

    def forward(self, x, wrap=lambda function, x: function(x)):
        return wrap(self.last, wrap(self.middle, wrap(self.first, x)))


def wrapped(reentrant, **options):
    return lambda function, x: checkpoint(function, x, use_reentrant=reentrant, **options)


def plain(function, x):
    return function(x)


def equal(a, b, exact=True):
    """``exact=False`` allows parameter gradients to be sums of up to 6 float32 numbers in another order."""
    for (name, left), right in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(left, right), name
    for (name, left), right in zip(a.named_parameters(), b.parameters(), strict=True):
        scale = right.grad.abs().max().item()
        tolerance = 0.0 if exact else 6 * 1.2e-7 * scale
        torch.testing.assert_close(left.grad, right.grad, rtol=0, atol=tolerance, msg=f"gradient of {name}")


def statistics(module):
    return {name: value.clone() for name, value in module.named_buffers()}


def moved(module, before):
    return {name for name, value in module.named_buffers() if not torch.equal(value, before[name])}


def losses_of(model, wrap, scenario, step):
    """One optimisation step's passes, in one of the ways people arrange them; returns the inputs' gradients."""
    torch.manual_seed(step)
    inputs = torch.randn(3, 4, 5, C).unbind()
    if scenario == "one forward":
        model(inputs[0].requires_grad_(), wrap).square().sum().backward()
    elif scenario == "two forwards, one backward":
        outputs = [model(x.requires_grad_(), wrap) for x in inputs[:2]]
        (outputs[0].square().sum() + outputs[1].sin().sum()).backward()
    elif scenario == "the same input twice":
        inputs = [inputs[0], inputs[0].clone()]
        outputs = [model(x.requires_grad_(), wrap) for x in inputs]
        (outputs[0].square().sum() + outputs[1].sin().sum()).backward()
    elif scenario == "accumulation":
        for x in inputs:
            model(x.requires_grad_(), wrap).square().sum().backward()
    elif scenario == "backwards in the order of the forwards":
        losses = [model(x.requires_grad_(), wrap).square().sum() for x in inputs]
        for loss in losses:
            loss.backward()
    elif scenario == "backward twice":
        loss = model(inputs[0].requires_grad_(), wrap).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
    return [x.grad for x in inputs if x.grad is not None]


SCENARIOS = (
    "one forward",
    "two forwards, one backward",
    "the same input twice",
    "accumulation",
    "backwards in the order of the forwards",
    "backward twice",
)


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize(
    ("reentrant", "options"),
    [(True, {}), (False, {}), (False, {"early_stop": False})],
    ids=["reentrant", "not reentrant", "not reentrant, whole"],
)
@pytest.mark.parametrize("name", ["unified, filtered", "power"])
def test_checkpointing_changes_no_bit(name, reentrant, options, scenario):
    wrap = wrapped(reentrant, **options)
    kept = Stack(NORMS[name])
    dropped = copy.deepcopy(kept)
    for step in range(4):
        expected = losses_of(kept, plain, scenario, step)
        actual = losses_of(dropped, wrap, scenario, step)
        assert actual and all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
        # A reentrant checkpoint adds each call's share to the gradient by itself.
        equal(dropped, kept, exact=not reentrant)


@pytest.mark.parametrize("outer", [True, False], ids=["reentrant", "not reentrant"])
def test_a_reentrant_checkpoint_inside_another(make, outer):
    kept = nn.Sequential(Stack(make), nn.Linear(C, C), make())
    dropped = copy.deepcopy(kept)

    def inner(model, x):
        return model[2](model[1](model[0](x, wrapped(True))))

    for step in range(4):
        x = torch.randn(4, 5, C)
        torch.manual_seed(step)
        kept(x.clone().requires_grad_()).square().sum().backward()
        torch.manual_seed(step)
        checkpoint(inner, dropped, x.clone().requires_grad_(), use_reentrant=outer).square().sum().backward()
        equal(dropped, kept, exact=False)


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("early_stop", [True, False])
def test_checkpoints_inside_others_without_reentrance_change_no_bit(make, depth, early_stop):
    """Each level has norms of its own; one of the levels also keeps its tensors through hooks of its own."""
    kept = nn.ModuleList(nn.Sequential(nn.Linear(C, C), make(), nn.Linear(C, C), make()) for _ in range(depth))
    dropped = copy.deepcopy(kept)

    def run(model, level, x, wrap):
        if level == depth:
            return x
        with save_on_cpu() if level == 1 else nullcontext():
            return model[level][2:](wrap(lambda h: run(model, level + 1, h, wrap), model[level][:2](x)))

    for _ in range(4):
        x = torch.randn(9, C)
        given = [x.clone().requires_grad_() for _ in range(2)]
        wraps = plain, wrapped(False, early_stop=early_stop)
        for model, own, wrap in zip((kept, dropped), given, wraps, strict=True):
            wrap(lambda h, model=model, wrap=wrap: run(model, 0, h, wrap), own).square().sum().backward()
        assert torch.equal(given[0].grad, given[1].grad)
        equal(dropped, kept, exact=True)


class OwnCheckpoint(torch.autograd.Function):
    """A checkpoint as other libraries write them: forward without gradients, run again in backward."""

    @staticmethod
    def forward(ctx, function, x):
        ctx.function = function
        ctx.save_for_backward(x)
        with torch.no_grad():
            return function(x)

    @staticmethod
    def backward(ctx, dy):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.function(x)
        torch.autograd.backward(y, dy)
        return None, x.grad


def test_a_checkpoint_of_another_library(make):
    kept = nn.Sequential(nn.Linear(C, C), make(), nn.Linear(C, C), make())
    dropped = copy.deepcopy(kept)
    for _ in range(5):
        for_two = torch.randn(2, 9, C)
        sum(kept(x.clone().requires_grad_()).square().sum() for x in for_two).backward()
        sum(OwnCheckpoint.apply(dropped, x.clone().requires_grad_()).square().sum() for x in for_two).backward()
        equal(dropped, kept, exact=False)


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_a_checkpoint_leaves_behind_goes_with_its_graph(make, reentrant):
    def objects_of_operations():
        gc.collect()
        return sum(str(type(found).__module__).startswith("normfuse.ops.") for found in gc.get_objects())

    gc.freeze()  # only what comes from now on is looked at
    try:
        loss = Stack(make)(torch.randn(4, 5, C).requires_grad_(), wrapped(reentrant)).sum()
        assert objects_of_operations() >= 3  # one for each call
        loss.backward()
        del loss
        assert objects_of_operations() == 0
    finally:
        gc.unfreeze()


INSIDE = {
    "inside": {"use_reentrant": False},
    "inside, reentrant": {"use_reentrant": True},
    "inside, kept": {"use_reentrant": False, "context_fn": keep_norms},
}
FAMILY = {
    "estimated": lambda: EstimatedBatchNorm(C),
    "spectral": lambda: sigma_reparam(nn.Linear(C, C)),
    "moving average": lambda: MovingAverageBatchNorm(C, channel_dim=-1, warmup_iters=1, window_size=2),
}


@pytest.mark.parametrize(
    ("name", "arranged", "backend"),
    [
        *(
            (name, arranged, "aot_eager_decomp_partition")
            for name in ("unified", "power")
            for arranged in (*INSIDE, "around", "around, reentrant")
        ),
        *((name, "inside", "aot_eager_decomp_partition") for name in FAMILY if name != "spectral"),
        # Where it is no part of an autograd function, torch 2.11 asks nobody what to recompute.
        *(("spectral", arranged, "aot_eager_decomp_partition") for arranged in ("inside, kept", "around")),
        *(pytest.param(name, "inside", "inductor", marks=pytest.mark.slow) for name in ("unified", "power")),
    ],
)
def test_checkpointing_and_compilation(name, arranged, backend):
    torch.compiler.reset()
    make = {**NORMS, **FAMILY}[name]
    kept = nn.Sequential(nn.Linear(C, C), make(), nn.Linear(C, C), make()).double()
    dropped = copy.deepcopy(kept)

    def checkpointed(x):
        return checkpoint(dropped, x, **INSIDE[arranged])

    compiled = torch.compile(checkpointed if arranged in INSIDE else dropped, backend=backend, fullgraph=True)

    def around(x):
        return checkpoint(compiled, x, use_reentrant=arranged == "around, reentrant")

    run = compiled if arranged in INSIDE else around
    for _ in range(4):
        x = torch.randn(7, C, dtype=torch.float64)
        results = [call(x.clone().requires_grad_()) for call in (kept, run)]
        for y in results:
            y.square().sum().backward()
        torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
        for (label, left), right in zip(dropped.state_dict().items(), kept.state_dict().values(), strict=True):
            torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12, msg=lambda m, label=label: f"{label}: {m}")
        for left, right in zip(dropped.parameters(), kept.parameters(), strict=True):
            torch.testing.assert_close(left.grad, right.grad, rtol=1e-12, atol=1e-12)


def test_keeping_what_norms_return(make):
    kept = Stack(make)
    dropped = copy.deepcopy(kept)
    for step in range(4):
        losses_of(kept, plain, "two forwards, one backward", step)
        losses_of(dropped, wrapped(False, context_fn=keep_norms), "two forwards, one backward", step)
        equal(dropped, kept)


FORWARD = {"running_var", "buffer_x2", "iters", "running_phi"}
BACKWARD = {"ema_gz", "buffer_gz"}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_forward_alone_moves_the_forward_statistics(make, mode):
    norm, twin = make(), make()
    for x in torch.randn(4, 9, C):
        before = statistics(norm)
        with mode():
            norm(x)
        assert moved(norm, before) - {"skip_counter"} == FORWARD & before.keys()
        twin(x.clone().requires_grad_())
    assert all(torch.equal(a, b) for a, b in zip(norm.buffers(), twin.buffers(), strict=True))
    norm(x.clone().requires_grad_()).square().sum().backward()  # and training goes on
    assert all(value.isfinite().all() for value in norm.buffers())


def test_an_exception_before_the_backward_leaves_the_backward_statistics(make):
    norm = make()
    norm(torch.randn(9, C).requires_grad_()).square().sum().backward()
    before = statistics(norm)
    with pytest.raises(ZeroDivisionError):
        loss = norm(torch.randn(9, C).requires_grad_()).square().sum()
        raise ZeroDivisionError(loss)
    assert moved(norm, before) - {"skip_counter"} == FORWARD & before.keys()
    before = statistics(norm)
    norm(torch.randn(9, C).requires_grad_()).square().sum().backward()
    assert norm.iters.item() == 3 and moved(norm, before) - {"skip_counter"} == (FORWARD | BACKWARD) & before.keys()


def test_a_refused_forward_moves_nothing(make):
    norm = make()
    before = statistics(norm)
    with pytest.raises(ValueError, match="expected 6"):
        norm(torch.randn(9, C + 1))
    assert moved(norm, before) == set()


def test_every_forward_and_every_backward_counts_once(make):
    """Two forwards before a backward are two forward steps, then two backward steps; each accumulated one too."""
    norm, twin = make(), make()
    x, y = torch.randn(2, 9, C)
    (norm(x.requires_grad_()).square().sum() + norm(y.requires_grad_()).square().sum()).backward()
    assert norm.iters.item() == 2
    first = twin(x.detach().requires_grad_())
    second = twin(y.detach().requires_grad_())
    second.square().sum().backward()
    middle = statistics(twin)
    first.square().sum().backward()
    assert moved(twin, middle) == BACKWARD & middle.keys()
    assert all(torch.equal(a, b) for a, b in zip(norm.buffers(), twin.buffers(), strict=True))


def test_a_forward_inside_a_backward_moves_nothing(make):
    norm = make()

    class Peek(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            before = statistics(norm)
            norm(torch.randn(9, C))
            assert moved(norm, before) == set()
            return dy

    Peek.apply(torch.randn(9, C).requires_grad_()).sum().backward()
    assert norm.iters.item() == 0
