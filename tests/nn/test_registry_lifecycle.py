"""What a user does with a norm besides training it, for every row of the registry."""

import copy

import pytest
import torch
from torch import nn

import normfuse
from normfuse.nn.registry import NORMS

C = 8
EVERY = pytest.mark.parametrize("entry", NORMS, ids=lambda entry: entry.name)


def inputs_of(entry, seed=0):
    x = torch.randn(
        (4, C, 5, 3) if entry.layout == "image" else (4, 7, C), generator=torch.Generator().manual_seed(seed)
    )
    return x, *entry.others(x)


def train(norm, inputs, steps=3):
    norm.train()
    for _ in range(steps):
        x, *others = inputs
        norm(x.clone().requires_grad_(), *others).square().sum().backward()
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    norm.zero_grad()
    return norm


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left.values(), right.values(), strict=True))


class Model(nn.Module):
    def __init__(self, row: int):
        super().__init__()
        self.norm = NORMS[row].make(C)

    def forward(self, x, other=None):
        return self.norm(x) if other is None else self.norm(x, other)


@EVERY
def test_a_copy_and_a_stored_model_give_the_same_and_go_their_own_way(entry, tmp_path):
    inputs = inputs_of(entry)
    model = Model(NORMS.index(entry))
    train(model, inputs)
    twin = copy.deepcopy(model)
    normfuse.save(model, tmp_path / "model.pt", example_inputs=inputs)
    stored = Model(NORMS.index(entry))
    normfuse.load(tmp_path / "model.pt", model=stored)
    expected = model.eval()(*inputs)
    for other in (twin, stored):
        assert other.state_dict().keys() == model.state_dict().keys()
        assert same(other.state_dict(), model.state_dict())
        assert torch.equal(other.eval()(*inputs), expected)
    before = copy.deepcopy(model.state_dict())
    train(twin, inputs_of(entry, seed=1))
    assert same(model.state_dict(), before) and (not before or not same(twin.state_dict(), before))


@EVERY
def test_training_goes_on_from_a_state_dict_bit_for_bit(entry):
    inputs, more = inputs_of(entry), inputs_of(entry, seed=1)
    norm, resumed = train(entry.make(C), inputs), entry.make(C)
    resumed.load_state_dict(norm.state_dict())
    for module in (norm, resumed):
        torch.manual_seed(3)
        train(module, more)
    assert same(norm.state_dict(), resumed.state_dict())


@EVERY
def test_a_norm_made_on_the_meta_device_takes_a_state_dict(entry):
    inputs = inputs_of(entry)
    norm = train(entry.make(C), inputs).eval()
    with torch.device("meta"):
        empty = entry.make(C)
    assert all(value.is_meta for value in (*empty.parameters(), *empty.buffers()))
    filled = empty.to_empty(device="cpu")
    filled.load_state_dict(norm.state_dict())
    assert torch.equal(filled.eval()(*inputs), norm(*inputs))


@EVERY
def test_compiled_code_has_no_break_and_gives_the_same(entry):
    inputs = inputs_of(entry)
    norm = train(entry.make(C), inputs)
    inside = copy.deepcopy(norm)
    compiled = torch.compile(inside, fullgraph=True, backend="eager")
    for training in (True, False):
        norm.train(training), inside.train(training)
        torch.testing.assert_close(compiled(*inputs), norm(*inputs))
    torch.testing.assert_close(dict(inside.named_buffers()), dict(norm.named_buffers()))


@EVERY
def test_autocast_trains_with_wide_statistics(entry):
    inputs = inputs_of(entry)
    norm = train(entry.make(C), inputs)
    wide = copy.deepcopy(norm)
    x = inputs[0].clone().requires_grad_()
    expected = wide(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = norm(x, *inputs[1:])
    y.float().sum().backward()
    # Where a composition runs in bfloat16 it rounds its inputs, and sums of some twenty of their products.
    tolerance = 32 * torch.finfo(torch.bfloat16).eps * expected.abs().amax().item()
    assert (y.float() - expected).abs().max() <= tolerance
    assert x.grad.dtype == torch.float32 and x.grad.isfinite().all()
    for name, buffer in norm.named_buffers():
        assert buffer.dtype in (torch.float32, torch.int64), name
        assert buffer.isfinite().all(), name


@EVERY
def test_conversions_keep_statistics_wide_and_come_back(entry):
    norm = train(entry.make(C), inputs_of(entry))
    statistics = {name: buffer.clone() for name, buffer in norm.named_buffers() if name.rpartition(".")[2] not in "uv"}
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.float32):
        norm.to(dtype)
        assert {p.dtype for p in norm.parameters()} <= {dtype}
        for name in statistics:
            wanted = torch.float64 if dtype == torch.float64 else torch.float32
            assert norm.get_buffer(name).dtype in (wanted, torch.int64), name
    for name, value in statistics.items():
        assert torch.equal(norm.get_buffer(name), value), name
