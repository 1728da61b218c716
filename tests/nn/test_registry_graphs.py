"""Graphs that people build around a norm, for every row of the registry: low precision, several at once, ensembles."""

import copy

import pytest
import torch
from registry_cases import EVERY, LAYERS, copies, every, in_dtype, inputs_of, loss, model_of, same
from torch.func import functional_call, stack_module_state, vmap

from normfuse.nn import ProgressiveNorm

STATEFUL = [entry for entry in LAYERS if list(entry.make(8).parameters())]


def off(found, wanted):
    """The largest difference, in units of the largest number."""
    return ((found.double() - wanted).abs().max() / wanted.abs().max()).item()


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_rounds_a_few_times(entry, dtype):
    """Against the same numbers in float64. Compositions round after every operation."""
    (norm,) = copies(entry, 1, dtype)
    wide = copy.deepcopy(norm).double()
    inputs = in_dtype(inputs_of(entry), dtype)
    for training in (True, False):
        norm.train(training), wide.train(training)
        x, exact = inputs[0].clone().requires_grad_(), inputs[0].double().requires_grad_()
        y, expected = norm(x, *inputs[1:]), wide(exact, *in_dtype(inputs[1:], torch.float64))
        loss(y.float()).backward(), loss(expected).backward()
        assert y.dtype == x.grad.dtype == dtype
        assert off(y, expected) <= 4 * torch.finfo(dtype).eps
        assert off(x.grad, exact.grad) <= 16 * torch.finfo(dtype).eps


@EVERY
def test_what_is_kept_for_backward_may_live_elsewhere(entry):
    plain, moved = copies(entry)
    x, *others = inputs_of(entry)
    leaves = x.clone().requires_grad_(), x.clone().requires_grad_()
    loss(plain(leaves[0], *others)).backward()
    with torch.autograd.graph.save_on_cpu():
        y = moved(leaves[1], *others)
    loss(y).backward()
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad)
    assert same(moved.state_dict(), plain.state_dict())


@EVERY
def test_a_copy_in_the_middle_of_a_step_and_graphs_in_any_order(entry):
    (norm,) = copies(entry, 1)
    x, *others = inputs_of(entry)
    first = loss(norm(x.clone().requires_grad_(), *others))
    twin = copy.deepcopy(norm)
    second = loss(norm((2 * x).requires_grad_(), *others))
    first.backward(retain_graph=True), second.backward(), first.backward()
    with torch.inference_mode():
        twin(x, *others)
    loss(twin(x.clone().requires_grad_(), *others)).backward()
    assert all(value.isfinite().all() for value in (*norm.state_dict().values(), *twin.state_dict().values()))


@every(STATEFUL)
def test_an_ensemble_is_its_members(entry):
    members = [copies(entry, 1)[0] for _ in range(3)]
    with torch.no_grad():
        for i, member in enumerate(members):
            for parameter in member.parameters():
                parameter.add_(0.1 * i)
    parameters, buffers = stack_module_state([copy.deepcopy(member) for member in members])
    base = copy.deepcopy(members[0]).to("meta")
    x, *others = inputs_of(entry)

    def call(parameters, buffers):
        return functional_call(base, (parameters, buffers), (x, *others))

    if not entry.exact:
        with pytest.raises(RuntimeError, match=r"torch\.func\.vmap cannot run"):
            vmap(call, randomness="different")(parameters, buffers)
        return
    found = vmap(call, randomness="different")(parameters, buffers)
    torch.testing.assert_close(found, torch.stack([m(x, *others) for m in members]), rtol=1e-4, atol=1e-5)
    for name, buffer in buffers.items():  # each has moved its own
        torch.testing.assert_close(buffer, torch.stack([m.get_buffer(name) for m in members]), rtol=1e-4, atol=1e-5)


@EVERY
def test_a_training_step_is_exported(entry):
    model, inputs = model_of(entry).train(), inputs_of(entry)
    if isinstance(model.norm, ProgressiveNorm):
        pytest.skip("it is exported when its conversion is done")
    program = torch.export.export(copy.deepcopy(model), inputs)
    torch.testing.assert_close(program.module()(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)
