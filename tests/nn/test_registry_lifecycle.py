"""What a user does with a norm besides training it, for every row of the registry."""

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from norms import has_statistics
from registry_cases import (
    EVERY,
    LAYERS,
    C,
    copies,
    every,
    has_running_statistics,
    inputs_of,
    loss,
    model_of,
    same,
    train,
)
from torch import nn
from torch.nn.utils import parametrize, skip_init
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint

import normfuse
from normfuse.nn import EstimatedBatchNorm, MaskedBatchNorm, MovingAverageBatchNorm, ProgressiveNorm, UnifiedNorm
from normfuse.nn._running_norm import ChannelNorm
from normfuse.nn.registry import NORMS


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
    torch.save(model.state_dict(), tmp_path / "state.pt")
    stored = Model(NORMS.index(entry))
    stored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    expected = model.eval()(*inputs)
    if not isinstance(model.norm, ProgressiveNorm):  # which is saved when its conversion is done
        normfuse.save(model, tmp_path / "model.pt", example_inputs=inputs)
        (again,) = normfuse.load(tmp_path / "model.pt").run(list(inputs))
        torch.testing.assert_close(again, expected)
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


def layouts(entry, x):
    """x in the layouts of memory that people have; leaves."""
    forms = [x, x.transpose(0, 1).contiguous().transpose(0, 1), torch.stack([x, x], -1)[..., 0]]
    if x.dim() == 4:
        forms.append(x.contiguous(memory_format=torch.channels_last))
    return [form.detach().requires_grad_() for form in forms]


@EVERY
def test_every_layout_gives_the_same_and_takes_an_activation_in_place(entry):
    x, *others = inputs_of(entry)
    for form in layouts(entry, x):
        plain, changed = copies(entry)
        inputs = x.clone().requires_grad_(), form
        loss(torch.relu(plain(inputs[0], *others))).backward()
        y = changed(inputs[1], *others)
        assert entry.layout == "weight" or not y._is_view()
        loss(torch.relu_(y)).backward()
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
        torch.testing.assert_close(
            [p.grad for p in changed.parameters()], [p.grad for p in plain.parameters()], rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(dict(changed.named_buffers()), dict(plain.named_buffers()))


@every(LAYERS)
def test_batches_without_a_valid_row_move_nothing(entry):
    (norm,) = copies(entry, 1)
    for module in norm.modules():
        if hasattr(module, "num_batches_tracked"):
            module.momentum = None
    before = copy.deepcopy(norm.state_dict())
    x, *others = (value[:0] for value in inputs_of(entry))
    norm(x.requires_grad_(), *others).sum().backward()
    norms = [module for module in norm.modules() if has_statistics(module)]
    for module in norms:
        x, *_ = inputs_of(entry)
        x = x.movedim(1, module.channel_dim) if x.dim() == 4 else x
        mask = torch.ones([size for i, size in enumerate(x.shape) if i != module.channel_dim % x.dim()]).bool()
        if not isinstance(module, EstimatedBatchNorm):
            module(x.requires_grad_(), mask).sum().backward()
    assert same(norm.state_dict(), before)


@EVERY
def test_a_symbolic_trace_holds_the_norm_whole(entry):
    model, inputs = model_of(entry), inputs_of(entry)
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    assert "norm" in [node.target for node in traced.graph.nodes if node.op == "call_module"]
    if entry.layout != "weight" and entry.name != "DomainSplitNorm":  # which takes any number of arguments
        with pytest.raises(TypeError, match=r"cannot be traced symbolically on its own.*nn\.Sequential"):
            torch.fx.symbolic_trace(entry.make(C))
    for training in (True, False):
        model.train(training), traced.train(training)
        torch.manual_seed(0)
        expected = model(*inputs)
        torch.manual_seed(0)
        assert torch.equal(traced(*inputs), expected)
    assert same(traced.state_dict(), model.state_dict())


@EVERY
def test_a_jit_trace_in_evaluation_takes_other_batches(entry):
    model = model_of(entry).eval()
    traced = torch.jit.trace(model, inputs_of(entry))
    more = tuple(torch.cat([value, value]) for value in inputs_of(entry, seed=1))
    torch.testing.assert_close(traced(*more), model(*more))


@pytest.mark.parametrize("make", [MaskedBatchNorm, MovingAverageBatchNorm])
def test_a_jit_trace_in_training_is_refused(make):
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace cannot record a training step.*call model\.eval\(\)"):
        torch.jit.trace(make(C), torch.randn(2, C))


@EVERY
def test_script_is_refused_with_the_way_out(entry):
    with pytest.raises(TypeError, match=r"torch\.jit\.script cannot compile .*torch\.jit\.trace\(model\.eval\(\), x\)"):
        torch.jit.script(model_of(entry))


@EVERY
def test_a_norm_leaves_the_meta_device_with_its_state_dict(entry):
    inputs = inputs_of(entry)
    norm = train(entry.make(C), inputs)
    with torch.device("meta"):
        filled = entry.make(C)
    filled.load_state_dict(copy.deepcopy(norm.state_dict()), assign=True)
    assert not any(value.is_meta for value in (*filled.parameters(), *filled.buffers()))
    assert torch.equal(filled.eval()(*inputs), norm.eval()(*inputs))
    train(filled, inputs)


@EVERY
def test_a_pickled_norm_goes_on(entry):
    if entry.layout == "weight":
        pytest.skip("a parametrised module cannot be pickled, in PyTorch")
    norm = entry.make(C)
    if any(isinstance(module, ProgressiveNorm) for module in norm.modules()):
        norm.advance(7)
    train(norm, inputs_of(entry))
    loaded = pickle.loads(pickle.dumps(norm))
    for module in (norm, loaded):
        torch.manual_seed(3)
        train(module, inputs_of(entry, seed=1))
    assert same(norm.state_dict(), loaded.state_dict())


@EVERY
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_moves_statistics_once(entry, reentrant):
    plain, inside = copies(entry)
    x, *others = inputs_of(entry)
    loss(plain(x.clone().requires_grad_(), *others)).backward()
    loss(checkpoint(inside, x.clone().requires_grad_(), *others, use_reentrant=reentrant)).backward()
    if not parametrize.is_parametrized(plain):  # σReparam iterates on its weight, not on a batch
        torch.testing.assert_close(dict(inside.named_buffers()), dict(plain.named_buffers()))
    torch.testing.assert_close([p.grad for p in inside.parameters()], [p.grad for p in plain.parameters()])


@EVERY
def test_hooks_see_and_change_what_passes(entry):
    plain, hooked = copies(entry)
    seen = []
    hooked.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2, *inputs[1:]))
    hooked.register_forward_hook(lambda module, inputs, y: y + 1)
    hooked.register_full_backward_hook(lambda module, gx, gy: seen.append((gx[0].shape, gy[0].shape)))
    x, *others = inputs_of(entry)
    torch.manual_seed(0)
    expected = plain(x * 2, *others) + 1
    torch.manual_seed(0)
    y = hooked(x.clone().requires_grad_(), *others)
    assert torch.equal(y, expected)
    y.sum().backward()
    assert seen == [(x.shape, x.shape)]


@EVERY
def test_an_average_of_weights(entry):
    """Statistics of the average: ``use_buffers``, or normfuse.nn.calibrate, which update_bn names."""
    model, inputs = model_of(entry), inputs_of(entry)
    if not model.state_dict():
        pytest.skip("nothing to average")
    average = AveragedModel(model, use_buffers=True)
    average.update_parameters(model)
    train(model, inputs_of(entry, seed=1))
    average.update_parameters(model)
    assert all(value.isfinite().all() for value in average.state_dict().values())
    assert average.eval()(*inputs).isfinite().all()
    if has_running_statistics(entry):
        with pytest.raises(
            RuntimeError, match=r"update_bn sets .* call normfuse\.nn\.calibrate\(model, loader\) instead"
        ):
            update_bn([inputs], average)
    else:
        update_bn([inputs], average)


@every(LAYERS)
def test_a_reset_makes_a_norm_as_new(entry):
    """Also a trained one, and one that left the meta device without numbers."""

    def reset(module):
        torch.manual_seed(0)  # for the convolutions of LearnableRegionNorm
        for part in module.modules():
            if any(True for _ in (*part.parameters(recurse=False), *part.buffers(recurse=False))):
                part.reset_parameters()
        return module

    inputs = inputs_of(entry)
    trained = train(entry.make(C), inputs)
    for part in trained.modules():
        if isinstance(part, ProgressiveNorm):
            part.advance(7)
    with torch.device("meta"):
        empty = entry.make(C)
    new = reset(entry.make(C))
    torch.manual_seed(0)
    assert same(new.state_dict(), entry.make(C).state_dict())
    for module in (trained, empty.to_empty(device="cpu")):
        assert same(reset(module).state_dict(), new.state_dict())
        assert torch.equal(module.eval()(*inputs), new.eval()(*inputs))


@pytest.mark.parametrize(
    "entry", [entry for entry in NORMS if isinstance(entry.make(C), ChannelNorm)], ids=lambda entry: entry.name
)
def test_options_of_every_kind_are_in_the_signature(entry):
    kind = type(entry.make(C))
    assert {"eps", "affine", "channel_dim", "device", "dtype"} <= inspect.signature(kind).parameters.keys()
    skipped = skip_init(kind, C)
    assert skipped.state_dict().keys() == kind(C).state_dict().keys()
    skipped.reset_parameters()
    assert same(skipped.state_dict(), kind(C).state_dict())


def test_a_subclass_with_options_of_its_own_shows_them_and_the_rest():
    class Mine(UnifiedNorm):
        def __init__(self, channels: int, extra: int = 1, eps: float = 1e-3, **options: Any) -> None:
            super().__init__(channels, eps=eps, **options)

    parameters = inspect.signature(Mine).parameters
    assert list(parameters)[:3] == ["channels", "extra", "eps"]
    assert parameters["eps"].default == 1e-3 and "num_features" not in parameters
    assert {"window_size", "skip_nonfinite", "device"} <= parameters.keys()


def test_a_subclass_that_hands_everything_on_keeps_its_own_signature():
    class Mine(UnifiedNorm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)

    assert list(inspect.signature(Mine).parameters) == ["args", "options"]
