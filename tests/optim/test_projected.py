"""AdamP and SGDP against the paper's algorithm in NumPy, one channel at a time."""

import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from normfuse.nn import BatchChannelNorm, RegionNorm
from normfuse.optim import SGDP, AdamP, no_decay

# 40 steps of some hundred roundings in float64.
EXACT = {"rtol": 1e-10, "atol": 1e-12}
SHAPES = ((4, 3), (5,), (3, 2, 3, 3), (1, 6), (), (2, 3, 2), (0, 3))


class Spec:
    """Parameters, gradients and moments as arrays; ``step`` is one step of AdamP or SGDP."""

    def __init__(self, params, lr, weight_decay=0.0, eps=1e-8, delta=0.1, wd_ratio=0.1, **others):
        self.params = [p.detach().numpy().copy() for p in params]
        self.lr, self.weight_decay, self.eps, self.delta, self.wd_ratio = lr, weight_decay, eps, delta, wd_ratio
        self.options, self.t, self.moments = others, 0, [{} for _ in params]
        self.seen = set()

    def update(self, g, moments):
        nesterov = self.options.get("nesterov", False)
        if "betas" in self.options:
            b1, b2 = self.options["betas"]
            m = moments["m"] = b1 * moments.get("m", 0) + (1 - b1) * g
            v = moments["v"] = b2 * moments.get("v", 0) + (1 - b2) * g * g
            root = np.sqrt(v) / math.sqrt(1 - b2**self.t) + self.eps
            return ((b1 * m + (1 - b1) * g) if nesterov else m) / (1 - b1**self.t) / root
        momentum = self.options["momentum"]
        v = moments["v"] = momentum * moments.get("v", 0) + (1 - self.options.get("dampening", 0.0)) * g
        return g + momentum * v if nesterov else v

    def step(self, grads):
        self.t += 1
        decay = self.weight_decay / (1 - self.options.get("momentum", 0.0))
        for i, (w, g) in enumerate(zip(self.params, grads, strict=True)):
            p, scale, nesterov = self.update(g, self.moments[i]), 1.0, self.options.get("nesterov", False)
            if w.ndim > 1 and w.size:
                for name, view in (("channel", (w.shape[0], -1)), ("layer", (1, -1))):
                    wv, gv, pv = (a.reshape(view) for a in (w, g, p))
                    cosines = [
                        abs(a @ b) / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in zip(gv, wv, strict=True)
                    ]
                    if max(cosines) < self.delta / math.sqrt(wv.shape[1]):
                        unit = [a / (np.linalg.norm(a) + self.eps) for a in wv]
                        p = np.stack([b - (b @ u) * u for b, u in zip(pv, unit, strict=True)]).reshape(w.shape)
                        scale = self.wd_ratio
                        if self.options.get("project_buffer", "momentum" in self.options) and not nesterov:
                            self.moments[i]["v"] = p  # the authors' update is the velocity itself
                        self.seen.add(name)
                        break
                else:
                    self.seen.add("none")
            self.params[i] = w * (1 - self.lr * decay * scale) - self.lr * p


OPTIMIZERS = {
    "AdamP": (AdamP, {"lr": 0.02, "betas": (0.8, 0.95), "weight_decay": 0.1}),
    "AdamP, nesterov": (AdamP, {"lr": 0.02, "betas": (0.8, 0.95), "weight_decay": 0.1, "nesterov": True}),
    "AdamP, options": (
        AdamP,
        {"lr": 0.02, "betas": (0.5, 0.9), "weight_decay": 0.2, "eps": 1e-3, "delta": 0.3, "wd_ratio": 0.5},
    ),
    "SGDP": (SGDP, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}),
    "SGDP of the paper": (SGDP, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1, "project_buffer": False}),
    "SGDP, nesterov": (SGDP, {"lr": 0.05, "momentum": 0.5, "dampening": 0.2, "nesterov": True}),
    "SGDP, plain": (SGDP, {"lr": 0.05, "momentum": 0.0, "weight_decay": 0.1, "delta": 0.3, "wd_ratio": 0.5}),
}


def parameters(dtype=torch.float64):
    torch.manual_seed(2)
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]


def gradients(params, step):
    """Gradients of every kind: orthogonal to each channel, to the whole weight only, and to neither."""
    found = []
    for p in params:
        w, g = p.detach(), torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(step))
        if w.dim() > 1 and w.numel():
            view = (w.shape[0], -1) if step % 3 == 0 else (1, -1)
            wv, gv = w.reshape(view), g.reshape(view)
            along = (gv * wv).sum(1, keepdim=True) / wv.square().sum(1, keepdim=True)
            g = (gv - (step % 3 < 2) * along * wv).reshape(w.shape)
        found.append(g)
    return found


def step(optimizer, params, grads):
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    optimizer.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_steps_are_the_papers(kind):
    make, options = OPTIMIZERS[kind]
    params = parameters()
    optimizer, spec = make(params, **options), Spec(params, **options)
    for number in range(40):
        grads = gradients(params, number)
        step(optimizer, params, grads)
        spec.step([g.numpy() for g in grads])
        for have, want in zip(params, spec.params, strict=True):
            np.testing.assert_allclose(have.detach().numpy(), want, **EXACT)
    assert spec.seen == {"channel", "layer", "none"}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_climbing_is_descending_along_negative_gradients(kind):
    make, options = OPTIMIZERS[kind]
    params, others = parameters(), parameters()
    up, down = make(params, maximize=True, **options), make(others, **options)
    for number in range(4):
        grads = gradients(params, number)
        step(up, params, grads)
        step(down, others, [-g for g in grads])
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(params, parameters(), strict=True) if p.numel())


def test_without_projection_it_is_adamw():
    params, others = parameters(), parameters()
    ours = AdamP(params, lr=0.02, weight_decay=0.1, delta=0.0)
    theirs = torch.optim.AdamW(others, lr=0.02, weight_decay=0.1)
    for number in range(5):
        grads = gradients(params, number)
        step(ours, params, grads)
        step(theirs, others, grads)
    for a, b in zip(params, others, strict=True):
        torch.testing.assert_close(a, b)
    assert all(set(ours.state[p]) == {"step", "exp_avg", "exp_avg_sq"} for p in params)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_small_batches_of_parameters_and_a_tensor_for_the_learning_rate_change_nothing(kind, monkeypatch):
    make, options = OPTIMIZERS[kind]
    params, others = parameters(), parameters()
    optimizer, other = make(params, **options), make(others, **{**options, "lr": torch.tensor(options["lr"]).double()})
    for number in range(4):
        grads = gradients(params, number)
        step(optimizer, params, grads)
        with monkeypatch.context() as patch:
            patch.setattr("normfuse.optim.projection.CPU_ENTRIES", 1)
            step(other, others, grads)
    for a, b in zip(params, others, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_resumes_bit_for_bit(kind):
    make, options = OPTIMIZERS[kind]
    params = parameters()
    optimizer = make(params, **options)
    for number in range(3):
        step(optimizer, params, gradients(params, number))
    stored = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "params": [p.detach() for p in params]}, stored)
    stored.seek(0)
    loaded = torch.load(stored, weights_only=True)
    again = [nn.Parameter(p.clone()) for p in loaded["params"]]
    resumed = make(again, **options)
    resumed.load_state_dict(loaded["optimizer"])
    twin = copy.deepcopy(params)
    pickled = pickle.loads(pickle.dumps(optimizer))
    pickled.param_groups[0]["params"], pickled.state = (
        twin,
        type(pickled.state)(
            dict, {new: pickled.state[old] for new, old in zip(twin, pickled.param_groups[0]["params"], strict=True)}
        ),
    )
    for number in range(3, 6):
        grads = gradients(params, number)
        for run, held in ((optimizer, params), (resumed, again), (pickled, twin)):
            step(run, held, grads)
    for a, b, c in zip(params, again, twin, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_training_goes_on_from_adamw(amsgrad):
    params, others = parameters(), parameters()
    theirs = torch.optim.AdamW(others, lr=0.02, weight_decay=0.1, amsgrad=amsgrad)
    for number in range(3):
        step(theirs, others, gradients(params, number))
    ours = AdamP(others, delta=0.0)
    if amsgrad:
        with pytest.raises(ValueError, match="amsgrad=True, which AdamP does not have"):
            ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
        return
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    expected = [copy.deepcopy(others), None]
    expected[1] = torch.optim.AdamW(expected[0])
    expected[1].load_state_dict(copy.deepcopy(theirs.state_dict()))
    for number in range(3, 6):
        grads = gradients(params, number)
        step(ours, others, grads)
        step(expected[1], expected[0], grads)
    for a, b in zip(others, expected[0], strict=True):
        torch.testing.assert_close(a, b)
    assert ours.param_groups[0]["lr"] == 0.02 and ours.param_groups[0]["wd_ratio"] == 0.1


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_training_goes_on_from_sgd(momentum):
    params, others = parameters(), parameters()
    theirs = torch.optim.SGD(others, lr=0.05, momentum=momentum)
    for number in range(3):
        step(theirs, others, gradients(params, number))
    ours = SGDP(others, delta=0.0)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    twins = copy.deepcopy(others)
    goes_on = torch.optim.SGD(twins, lr=1.0)
    goes_on.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for number in range(3, 6):
        grads = gradients(params, number)
        step(ours, others, grads)
        step(goes_on, twins, grads)
    for a, b in zip(others, twins, strict=True):
        torch.testing.assert_close(a, b)


def test_states_of_the_authors_programs_load():
    """Their steps are ints, and SGDP's velocity is called momentum."""
    params = parameters()
    for kind, options, renamed in (
        (AdamP, {"lr": 0.02, "weight_decay": 0.1}, {}),
        (SGDP, {"lr": 0.02, "momentum": 0.9}, {"momentum_buffer": "momentum"}),
    ):
        held, again = parameters(), None
        ours = kind(held, **options)
        for number in range(3):
            step(ours, held, gradients(params, number))
        state = copy.deepcopy(ours.state_dict())
        for entries in state["state"].values():
            for name, theirs in renamed.items():
                entries[theirs] = entries.pop(name)
            if "step" in entries:
                entries["step"] = int(entries["step"])
        for group in state["param_groups"]:
            for name in ("maximize", "project_buffer"):
                group.pop(name, None)
        again = copy.deepcopy(held)
        resumed = kind(again)
        resumed.load_state_dict(state)
        grads = gradients(params, 3)
        step(ours, held, grads)
        step(resumed, again, grads)
        assert all(torch.equal(a, b) for a, b in zip(held, again, strict=True))


def test_gains_of_more_axes_neither_decay_nor_are_projected():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(
        shared, RegionNorm(4), nn.LayerNorm((3, 4)), shared, BatchChannelNorm(4, 2), nn.Embedding(5, 4)
    )
    model[5].weight.requires_grad_(False)
    weights, exempt = no_decay(model, weight_decay=0.3)
    assert [id(p) for p in weights["params"]] == [id(shared.weight)] and weights["weight_decay"] == 0.3
    assert {id(p) for p in exempt["params"]} == {
        id(p) for p in model.parameters() if p.requires_grad and p is not shared.weight
    }
    optimizer = AdamP([weights, exempt], lr=0.1)
    gain = model[1].weight
    start = torch.randn(2, 4)
    with torch.no_grad():
        gain.copy_(start)
    gain.grad = torch.stack([-start[:, 1], start[:, 0], torch.zeros(2), torch.zeros(2)], 1)  # orthogonal
    optimizer.step()
    # Adam's first step has length lr: without projection every entry with a gradient moves by it.
    torch.testing.assert_close((gain - start).abs(), 0.1 * (gain.grad != 0))
    with pytest.raises(ValueError, match="weight_decay=-1 is not allowed"):
        no_decay(model, weight_decay=-1)


@pytest.mark.parametrize("kind", ["AdamP", "SGDP"])
def test_a_compiled_step_is_an_eager_step(kind):
    make, options = OPTIMIZERS[kind]
    params, others = parameters()[:3], parameters()[:3]
    optimizer, compiled = make(params, **options), make(others, **options)
    run = torch.compile(compiled.step, backend="aot_eager", fullgraph=True)
    for number in range(2):
        grads = gradients(params, number)
        step(optimizer, params, grads)
        for p, g in zip(others, grads, strict=True):
            p.grad = g.clone()
        run()
    for a, b in zip(params, others, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["AdamP", "SGDP"])
def test_low_precision_and_other_memory_formats(kind, dtype):
    make, options = OPTIMIZERS[kind]
    for format in (torch.contiguous_format, torch.channels_last):
        weight = nn.Parameter(torch.randn(4, 3, 2, 2).to(dtype).to(memory_format=format))
        wide = nn.Parameter(weight.detach().double().contiguous())
        low, high = make([weight], **options), make([wide], **options)
        (grad,) = gradients([wide], 0)
        weight.grad, wide.grad = grad.to(dtype).to(memory_format=format), grad.to(dtype).double()
        low.step()
        high.step()
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(weight.double(), wide, rtol=4 * eps, atol=4 * eps)


def test_closures_groups_and_parameters_without_a_gradient():
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
    groups = [{"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.01}]
    groups.append({"params": [p for p in model.parameters() if p.dim() == 1]})
    unused = nn.Parameter(torch.ones(2, 2))
    groups[0]["params"].append(unused)
    optimizer = AdamP(groups, lr=0.02)
    x = torch.randn(64, 3)
    y = x.prod(1, keepdim=True)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0] and (unused == 1).all() and unused not in optimizer.state
    norms = [SGDP([p := nn.Parameter(torch.randn(6, 4))], lr=0.1), p.detach().norm(dim=1)]
    p.grad = p.detach().roll(1, 1) * torch.tensor([1.0, -1.0, 1.0, -1.0])
    p.grad -= (p.grad * p).sum(1, keepdim=True) / p.square().sum(1, keepdim=True) * p.detach()
    norms[0].step()
    assert (p.norm(dim=1) >= norms[1]).all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda p: AdamP(p, lr=-1.0), r"lr=-1\.0 is not allowed; give a number of at least 0"),
        (lambda p: AdamP(p, betas=(0.9, 1.0)), r"betas\[1\]=1\.0 is not allowed; give a number from 0 to less than 1"),
        (lambda p: SGDP(p, momentum=1.0), r"momentum=1\.0 is not allowed"),
        (lambda p: SGDP(p, delta=-0.1), r"delta=-0\.1 is not allowed"),
        (lambda p: AdamP(p, eps=float("nan")), "eps=nan is not allowed"),
    ],
)
def test_refused_options(build, message):
    with pytest.raises(ValueError, match=message):
        build(parameters())


def test_refused_gradients():
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(
        TypeError, match=r"AdamP takes dense real gradients; a parameter of shape \(4, 2\) has a sparse"
    ):
        AdamP(embedding.parameters()).step()
    weight = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
    weight.grad = torch.ones_like(weight)
    with pytest.raises(TypeError, match="has a complex one"):
        SGDP([weight]).step()
    part = nn.Parameter(torch.ones(2, 2))
    part.grad = torch.ones_like(part)
    part.__class__ = type("DTensor", (nn.Parameter,), {})
    with pytest.raises(TypeError, match=r"one of shape \(2, 2\) is spread over processes.*DistributedDataParallel"):
        AdamP([part]).step()
