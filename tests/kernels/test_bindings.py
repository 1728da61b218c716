"""What the operations refuse, in words a caller can act on."""

import pytest
import torch
from native import needs_kernels

pytestmark = needs_kernels

ROWS, CHANNELS, WINDOW = 6, 8, 4


def unified_forward(**changes):
    arguments = {
        "x": torch.ones(ROWS, CHANNELS),
        "pad_mask": None,
        "weight": torch.ones(CHANNELS),
        "bias": torch.zeros(CHANNELS),
        "running_var": torch.ones(CHANNELS),
        "buffer_x2": torch.ones(WINDOW, CHANNELS),
        "iters": torch.zeros(1, dtype=torch.int64),
        "skip_counter": torch.zeros(1, dtype=torch.int64),
    }
    return torch.ops.normfuse.unified_norm_forward(*(arguments | changes).values(), 5, False, 1e-5, 0.9)


def test_the_arguments_are_right_to_begin_with():
    y, stats, step = unified_forward()
    assert y.shape == (ROWS, CHANNELS) and stats.shape == (2, CHANNELS) and step.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(())}, "x must be contiguous of shape .* x.contiguous()"),
        ({"x": torch.ones(CHANNELS, ROWS).t()}, "x must be contiguous of shape"),
        ({"x": torch.ones(ROWS, 0)}, "x has no channels"),
        ({"x": torch.ones(ROWS, CHANNELS, dtype=torch.int64)}, "x is int64; float32, bfloat16, float16 and float64"),
        ({"weight": torch.ones(CHANNELS, dtype=torch.float64)}, "weight is float64; .* it must be float32"),
        ({"x": torch.ones(ROWS, CHANNELS).double()}, "weight is float32; with x of float64 it must be float64"),
        ({"bias": torch.ones(CHANNELS + 1)}, r"bias must be contiguous of shape \[8\]"),
        ({"pad_mask": torch.zeros(ROWS)}, "pad_mask is float32; .* it must be bool"),
        ({"pad_mask": torch.zeros(ROWS + 1, dtype=torch.bool)}, r"pad_mask must be contiguous of shape \[6\]"),
        ({"buffer_x2": torch.ones(0, CHANNELS)}, "buffer_x2 must have shape .* window >= 1"),
        ({"buffer_x2": torch.ones(WINDOW, CHANNELS + 1)}, r"buffer_x2 must be contiguous of shape \[4, 8\]"),
        ({"iters": torch.zeros(1)}, "iters is float32; .* it must be int64"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(RuntimeError, match=message):
        unified_forward(**changes)


@pytest.mark.parametrize("groups", [3, -1])
def test_groups_divide_the_channels(groups):
    ones = torch.ones(CHANNELS)
    arguments = (torch.ones(ROWS, CHANNELS), None, ones, ones, ones.clone(), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(RuntimeError, match=f"group_num is {groups}; it must divide the 8 channels, or be 0"):
        torch.ops.normfuse.power_norm_forward(*arguments, 5, groups, 1e-5, 1e-5, 0.9)


@pytest.mark.parametrize(
    "wrong", [torch.ones(ROWS * CHANNELS), torch.ones(ROWS // 2, 2, CHANNELS), torch.ones(1, CHANNELS)]
)
def test_the_gradient_has_the_shape_of_x(wrong):
    x, ones, window = torch.ones(ROWS, CHANNELS), torch.ones(CHANNELS), torch.ones(WINDOW, CHANNELS)
    _, stats, step = unified_forward()
    with pytest.raises(RuntimeError, match="grad_y must be contiguous and of the shape of x"):
        torch.ops.normfuse.unified_norm_backward(wrong, x, ones, stats, step, ones.clone(), window, 5, 0.9)
