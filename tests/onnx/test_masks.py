"""Rows of attention that are masked altogether, in every form of mask, against PyTorch."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from normfuse.onnx import export, write

LOWEST, INFINITY = torch.finfo(torch.float32).min, float("-inf")


class Attention(nn.Module):
    """By a mask that is added, and by what it shows."""

    def forward(self, q, k, v, mask, shown):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask), F.scaled_dot_product_attention(v, q, k, shown)


class Spelled(nn.Module):
    """By hand: a row of -inf is NaN here, in PyTorch too."""

    def forward(self, q, k, v, mask):
        return torch.softmax(q @ k.transpose(-1, -2) / 8**0.5 + mask, -1) @ v


class Constant(nn.Module):
    """Masks that are part of the model: a window, with a row outside of it."""

    def __init__(self):
        super().__init__()
        self.masks = nn.ParameterList(additive(hidden)[0, 0] for hidden in (LOWEST, INFINITY, -1e9))

    def forward(self, q, k, v, mask):
        return [F.scaled_dot_product_attention(q, k + mask.sum(), v, attn_mask=constant) for constant in self.masks]


def additive(hidden):
    """Row 1 of sample 0 hides everything, row 2 of sample 1 all but its first entry."""
    mask = torch.zeros(2, 1, 5, 5)
    mask[0, 0, 1], mask[1, 0, 2, 1:] = hidden, hidden
    return mask


def mixed():
    mask = additive(LOWEST)
    mask[0, 0, 1, 2:] = INFINITY
    return mask


MASKS = {
    "lowest": additive(LOWEST),
    "infinity": additive(INFINITY),
    "both": mixed(),
    "half of the lowest": additive(LOWEST / 2),
    "-1e9": additive(-1e9),
    "-1e4": additive(-1e4),
    "none": additive(0.0),
    "all lowest": torch.full((2, 1, 5, 5), LOWEST),
    "all infinity": torch.full((2, 1, 5, 5), INFINITY),
    "a bias": torch.linspace(-3, 3, 50).reshape(2, 1, 5, 5),
}


def check(module, masks, opset, tmp_path):
    """`masks` are sequences of what the module takes after queries, keys and values."""
    generator = torch.Generator().manual_seed(0)
    given = tuple(torch.randn(2, 4, 5, 8, generator=generator) for _ in range(3))
    program = torch.export.export(module.eval(), given + masks["none"])
    (path,) = write(program, tmp_path / "m.onnx", opset=opset)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    for name, further in masks.items():
        wanted = pytree.tree_leaves(module(*given, *further))
        feeds = dict(zip(names, (x.numpy() for x in given + further), strict=True))
        for got, want in zip(session.run(None, feeds), wanted, strict=True):
            # Five products and a sum of five: ten roundings of 6e-8 on values below 3.
            np.testing.assert_allclose(got, want.detach().numpy(), rtol=0, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("opset", [23, 21, 20, 18])
def test_additive_and_boolean_masks(tmp_path, opset):
    check(Attention(), {name: (mask, mask > -1) for name, mask in MASKS.items()}, opset, tmp_path)


@pytest.mark.parametrize("opset", [23, 18])
def test_masks_that_are_added_by_hand_stay_as_they_are(tmp_path, opset):
    check(Spelled(), {name: (mask,) for name, mask in MASKS.items()}, opset, tmp_path)


@pytest.mark.parametrize("opset", [23, 18])
def test_masks_of_the_model_itself(tmp_path, opset):
    check(Constant(), {"none": (MASKS["none"],)}, opset, tmp_path)


@pytest.mark.parametrize("opset", [23, 18])
def test_attention_without_a_mask_is_left_alone(tmp_path, opset):
    class Causal(nn.Module):
        def forward(self, q, k, v, mask):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True) + mask.sum()

    check(Causal(), {"none": (MASKS["none"],)}, opset, tmp_path)
    content = (tmp_path / "m.onnx").read_bytes()
    assert b"IsNaN" not in content and b"IsInf" not in content


class _Attends(nn.Module):
    """Attention that a boolean input limits, by constants in the usual places."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x, keep):
        scores, keep = self.query(x) @ self.key(x).mT, keep[:, None, :]
        lowest = torch.finfo(scores.dtype).min
        hidden = {
            "lowest": scores.masked_fill(~keep, lowest),
            "infinity": (2 * scores).masked_fill(~keep, -torch.inf),
            "added": 3 * scores + (1.0 - keep.float()) * lowest,
            "positive": 4 * scores + (keep.float() - 1.0) * 1e9,
            "where": torch.where(keep, 5 * scores, -1e30),
        }
        return {name: masked.softmax(-1) @ self.value(x) for name, masked in hidden.items()}


def test_constants_that_hide_are_no_weights_beyond_float16(tmp_path):
    keep = torch.tensor([[True, True, False, True], [True, False, False, True]])
    example = torch.randn(2, 4, 8), keep
    result = export(_Attends().eval(), tmp_path / "m.onnx", example_inputs=example, dtype="float16", opset=20)
    usual = [case for case in result.verification.cases if "random" in case.inputs and case.form == "ONNX file"]
    assert {case.output for case in usual} == {f"output {number}" for number in range(5)}
    assert all(case.error < 2e-2 for case in usual)
