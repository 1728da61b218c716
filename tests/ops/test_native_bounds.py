"""What compiled operations refuse before they touch memory, by the argument's name; and what loading refuses."""

import copy

import pytest
import torch
from native import needs_kernels
from raw_operations import OPERATIONS, Sizes, arguments, call

from normfuse.nn import MaskedBatchNorm, MovingAverageBatchNorm, PowerNorm, ProgressiveNorm, RepBatchNorm, UnifiedNorm

pytestmark = needs_kernels

TENSORS = [
    (name, argument)
    for name in OPERATIONS
    for argument, value in arguments(name).items()
    if isinstance(value, torch.Tensor)
]
every_tensor = pytest.mark.parametrize(("name", "argument"), TENSORS)


def refused(name, argument, given, message=""):
    with pytest.raises(RuntimeError, match=rf"normfuse: .*\b{argument}\b.*{message}"):
        call(name, given)


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_arguments_are_allowed(name):
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        assert call(name, arguments(name, dtype))


@every_tensor
def test_freed_storage(name, argument):
    given = arguments(name)
    given[argument].untyped_storage().resize_(0)
    refused(name, argument, given, "its storage holds 0 bytes")


@every_tensor
def test_storage_that_ends_before_the_tensor(name, argument):
    given = arguments(name)
    value = given[argument]
    behind = torch.empty(value.numel() + 3, dtype=value.dtype)[3:].view(value.shape).copy_(value)
    given[argument] = behind
    assert call(name, given)
    behind.untyped_storage().resize_((value.numel() + 2) * value.element_size())
    refused(name, argument, given, "its storage holds")


CHANGES = {
    "dtype": lambda value: value.to(torch.int32),
    "size": lambda value: torch.cat([value.reshape(-1), value.reshape(-1)]).view(*value.shape[:-1], -1),
    "dimensions": lambda value: torch.stack([value, value]),
    "strides": lambda value: value.repeat_interleave(2, -1)[..., ::2],
}


@every_tensor
@pytest.mark.parametrize("change", CHANGES)
def test_another_tensor(name, argument, change):
    given = arguments(name)
    if change == "strides" and given[argument].numel() == 1:
        pytest.skip("one number has any strides")
    if (name, argument, change) == ("dynamic_activation_forward", "x", "dimensions"):
        pytest.skip("x has any dimensions, and nothing else depends on them")
    given[argument] = CHANGES[change](given[argument])
    with pytest.raises(RuntimeError, match="normfuse: "):
        call(name, given)


@pytest.mark.parametrize(
    ("name", "argument"),
    [(name, argument) for name, argument in TENSORS if argument in ("iters", "skip_counter", "num_batches_tracked")],
)
def test_counters_from_zero_on(name, argument):
    given = arguments(name)
    given[argument].fill_(-4)
    refused(name, argument, given, "is -4; it counts steps and must be at least 0")
    given[argument].fill_(2**63 - 1)
    call(name, given)


@pytest.mark.parametrize("step", [-(2**63), -4, 2**63 - 1])
@pytest.mark.parametrize("name", ["unified_norm_backward", "moving_average_norm_backward"])
def test_any_step_stays_inside_the_window(name, step):
    given = arguments(name)
    window = torch.full((4 + 5, Sizes.channels), 3.0)
    given["buffer_gz"] = window[2:5]
    given["step"].fill_(step)
    call(name, given)
    assert (window[:2] == 3).all() and (window[5:] == 3).all()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("row_norm_forward", {"kind": 3}),
        ("row_norm_backward", {"kind": -1}),
        ("dynamic_activation_forward", {"curve": 2}),
        ("power_norm_forward", {"group_num": 3}),
        ("power_norm_forward", {"group_num": -(2**63)}),
        ("power_norm_backward", {"group_num": 2**62}),
        ("batch_norm_forward", {"group_size": -1}),
        ("stat_group_norm_forward", {"correction": -(2**63)}),
        ("batch_norm_backward", {"correction": 2}),
    ],
)
def test_numbers(name, options):
    (argument,) = options
    refused(name, argument, {**arguments(name), **options})


def test_groups_larger_than_the_batch_are_one():
    given = arguments("batch_norm_forward")
    one = call("batch_norm_forward", {**copy.deepcopy(given), "group_size": 0})
    for size in (4, 5, 2**62, 2**63 - 1):
        torch.testing.assert_close(call("batch_norm_forward", {**copy.deepcopy(given), "group_size": size}), one)


@pytest.mark.parametrize("shape", [(0, 2**62), (0, 2**40 + 1), (2**40, 0)])
def test_sizes_without_a_product(shape):
    x = torch.empty(shape)
    with pytest.raises(RuntimeError, match="channels"):
        torch.ops.normfuse.row_norm_forward(x, None, None, None, 0, 1e-5)
    with pytest.raises(RuntimeError, match="channels"):
        torch.ops.normfuse.stat_group_norm_forward(x[..., None], None, None, None, None, 0, 0, 1e-5)


COUNTED = {
    "iters": [UnifiedNorm, PowerNorm, MovingAverageBatchNorm],
    "skip_counter": [UnifiedNorm],
    "num_batches_tracked": [MaskedBatchNorm, RepBatchNorm],
    "step": [lambda c: ProgressiveNorm(torch.nn.LayerNorm(c), RepBatchNorm(c), end=10)],
}


@pytest.mark.parametrize(("counter", "make"), [(name, make) for name, makes in COUNTED.items() for make in makes])
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_with_a_negative_counter(counter, make, assign):
    model = torch.nn.Sequential(make(4))
    before = copy.deepcopy(model.state_dict())
    state = {**before, f"0.{counter}": torch.full_like(before[f"0.{counter}"], -4)}
    with pytest.raises(RuntimeError, match=rf"0\.{counter} is \[-4\]; it counts steps and must be at least 0"):
        model.load_state_dict(state, assign=assign)
    torch.testing.assert_close(model.state_dict(), before)
    model.load_state_dict({**before, f"0.{counter}": torch.full_like(before[f"0.{counter}"], 4)}, assign=assign)
    assert model.state_dict()[f"0.{counter}"].item() == 4
