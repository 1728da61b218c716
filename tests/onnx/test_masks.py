"""Rows of attention that are masked altogether, in every form of mask, against PyTorch."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from normfuse.onnx import export, write

LOWEST, INFINITY = torch.finfo(torch.float32).min, float("-inf")


class Attention(nn.Module):
    def forward(self, q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Spelled(nn.Module):
    """By hand: a row of -inf is NaN here, in PyTorch too."""

    def forward(self, q, k, v, mask):
        return torch.softmax(q @ k.transpose(-1, -2) / 8**0.5 + mask, -1) @ v


class Constant(nn.Module):
    """A mask that is part of the model: a window, with a row outside of it."""

    def __init__(self, hidden):
        super().__init__()
        self.register_buffer("mask", additive(hidden)[0, 0])

    def forward(self, q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask) + mask.sum()


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
BOOLEAN = {name: mask > -1 for name, mask in MASKS.items()}


def check(module, mask, masks, opset, tmp_path):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 5, 8, generator=generator) for _ in range(3))
    (path,) = write(torch.export.export(module, (q, k, v, mask)), tmp_path / "m.onnx", opset=opset)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for name, given in masks.items():
        want = module(q, k, v, given)
        got = session.run(None, {"q": q.numpy(), "k": k.numpy(), "v": v.numpy(), "mask": given.numpy()})[0]
        # Five products and a sum of five: ten roundings of 6e-8 on values below 3.
        np.testing.assert_allclose(got, want.numpy(), rtol=0, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("opset", [23, 21, 20, 18])
def test_additive_masks(tmp_path, opset):
    check(Attention(), MASKS["none"], MASKS, opset, tmp_path)


@pytest.mark.parametrize("opset", [23, 21, 20, 18])
def test_boolean_masks(tmp_path, opset):
    check(Attention(), BOOLEAN["none"], BOOLEAN, opset, tmp_path)


@pytest.mark.parametrize("opset", [23, 18])
def test_masks_that_are_added_by_hand_stay_as_they_are(tmp_path, opset):
    check(Spelled(), MASKS["none"], MASKS, opset, tmp_path)


@pytest.mark.parametrize("opset", [23, 18])
@pytest.mark.parametrize("hidden", [LOWEST, INFINITY, -1e9])
def test_masks_of_the_model_itself(tmp_path, hidden, opset):
    check(Constant(hidden), MASKS["none"], {"none": MASKS["none"]}, opset, tmp_path)


@pytest.mark.parametrize("opset", [23, 18])
def test_attention_without_a_mask_is_left_alone(tmp_path, opset):
    class Causal(nn.Module):
        def forward(self, q, k, v, mask):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True) + mask.sum()

    check(Causal(), MASKS["none"], {"none": MASKS["none"]}, opset, tmp_path)
    content = (tmp_path / "m.onnx").read_bytes()
    assert b"IsNaN" not in content and b"IsInf" not in content


class _Attends(nn.Module):
    """Attention that a boolean input limits, by a constant in one of the usual places."""

    def __init__(self, hide):
        super().__init__()
        self.hide, self.query, self.key, self.value = hide, *(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x, keep):
        scores = self.query(x) @ self.key(x).mT
        return self.hide(scores, keep[:, None, :]).softmax(-1) @ self.value(x)


@pytest.mark.parametrize(
    "hide",
    [
        lambda scores, keep: scores.masked_fill(~keep, torch.finfo(scores.dtype).min),
        lambda scores, keep: scores.masked_fill(~keep, -torch.inf),
        lambda scores, keep: scores + (1.0 - keep.float()) * torch.finfo(scores.dtype).min,
        lambda scores, keep: scores + (keep.float() - 1.0) * 1e9,
        lambda scores, keep: torch.where(keep, scores, -1e30),
    ],
    ids=["lowest", "infinity", "added", "positive", "where"],
)
def test_constants_that_hide_are_no_weights_beyond_float16(tmp_path, hide):
    keep = torch.tensor([[True, True, False, True], [True, False, False, True]])
    result = export(
        _Attends(hide).eval(),
        tmp_path / "m.onnx",
        example_inputs=(torch.randn(2, 4, 8), keep),
        dtype="float16",
        opset=20,
    )
    usual = [case for case in result.verification.cases if "random" in case.inputs and case.form == "ONNX file"]
    assert usual and all(case.error < 2e-2 for case in usual)
