"""Placements: the formulas, what the stack puts around its blocks, conversion, and what folding leaves."""

import copy

import pytest
import torch
from torch import nn

from normfuse.convert import Placed, place
from normfuse.folding import fold
from normfuse.nn import (
    MaskedBatchNorm,
    NormedBranch,
    TransformerBlock,
    TransformerStack,
    UnifiedNorm,
    layer_placements,
)

C = 8


def norm(width):
    return UnifiedNorm(width, warmup_iters=2)


def test_mix_counts_its_layers():
    assert layer_placements(3, "peri") == ["peri"] * 3
    assert layer_placements(10, "mix", fraction=0.3) == ["post"] * 3 + ["pre"] * 7
    assert layer_placements(7, "mix") == ["post"] + ["pre"] * 6
    assert layer_placements(3, "mix", count=2) == ["post", "post", "pre"]
    assert layer_placements(3, "mix") == ["pre"] * 3


@pytest.mark.parametrize("placement", ["pre", "post", "peri"])
def test_a_branch_is_its_formula(placement):
    branch = NormedBranch(nn.Linear(C, C), nn.LayerNorm(C), placement).double()
    for module in branch.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight), nn.init.normal_(module.bias)
    x, f, n, out = torch.randn(2, 3, C).double(), branch.function, branch.norm, branch.norm_out
    formulas = {"pre": lambda: x + f(n(x)), "post": lambda: n(x + f(x)), "peri": lambda: x + out(f(n(x)))}
    torch.testing.assert_close(branch(x), formulas[placement](), rtol=0, atol=0)


def test_padding_reaches_the_norms_and_the_attention():
    block = TransformerBlock(C, 2, MaskedBatchNorm, "peri")
    x, pad_mask = torch.randn(2, 5, C), torch.zeros(2, 5, dtype=torch.bool)
    pad_mask[:, 3:] = True
    other = x.clone()
    other[:, 3:] = 7.0
    twin = copy.deepcopy(block)
    torch.testing.assert_close(block(x, pad_mask)[:, :3], twin(other, pad_mask)[:, :3])
    assert all(torch.allclose(a, b) for a, b in zip(block.buffers(), twin.buffers(), strict=True))
    causal = TransformerBlock(C, 2, causal=True)
    torch.testing.assert_close(causal(x, pad_mask)[:, :3], causal(x)[:, :3])
    torch.testing.assert_close(causal(x)[:, :2], causal(x[:, :2]))


def trained(stack):
    stack.double()
    for _ in range(5):
        stack(torch.randn(4, 6, C).double())
    return stack.eval()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("placement", ["pre", "post", "peri", "mix"])
def test_every_placement_loses_its_norms(placement, shared):
    stack = TransformerStack(C, 4, 2, norm, placement, mlp_ratio=2, share_weights=shared)
    model = trained(nn.Sequential(nn.Linear(C, C), stack, nn.Linear(C, 3)))
    x = torch.randn(2, 6, C).double()
    folded, report = fold(torch.export.export(model, (x,)))
    torch.testing.assert_close(folded.module()(x), model(x), rtol=1e-11, atol=1e-11)
    extra = {"pre": 1, "post": 1, "peri": 8 + 2, "mix": 1}[placement]
    assert len(report.norms) == 8 + extra and not report.remaining
    assert (report.bytes_copied > 0) is shared


def test_shared_weights_take_one_norm_only_unless_they_may_be_copied():
    stack = TransformerStack(C, 3, 2, norm, share_weights=True)
    assert stack.blocks[2].mlp.function is stack.blocks[0].mlp.function
    assert len({id(block.mlp.norm) for block in stack.blocks}) == 3
    model = trained(nn.Sequential(stack, nn.Linear(C, 3)))
    x = torch.randn(2, 6, C).double()
    folded, report = fold(torch.export.export(model, (x,)), copy_shared=False)
    torch.testing.assert_close(folded.module()(x), model(x), rtol=1e-11, atol=1e-11)
    kept = {record.name for record in report.norms if record.status == "kept"}
    assert kept == {f"0.blocks.{i}.{branch}.norm" for i in range(3) for branch in ("attention", "mlp")}


def test_place_moves_norms_and_keeps_what_they_learned():
    stack = TransformerStack(C, 4, 2, norm)
    gain = stack.blocks[1].attention.norm.weight
    nn.init.constant_(gain, 3.0)
    model = nn.ModuleDict({"encoder": stack, "branch": NormedBranch(nn.Linear(C, C), nn.LayerNorm(C), "peri")})
    report = place(model, "mix", count=1)
    assert report[:2] == [Placed("encoder.blocks.0", "pre", "post"), Placed("encoder.blocks.1", "pre", "pre")]
    assert report[4] == Placed("branch", "peri", "post") and model["branch"].norm_out is None
    place(model, "peri")
    assert stack.blocks[1].attention.norm.weight is gain and (stack.blocks[1].attention.norm_out.weight == 1).all()
    assert stack.embedding_norm is not None and stack.final_norm is not None
    place(model, "post")
    assert stack.final_norm is None and [block.placement for block in stack.blocks] == ["post"] * 4
    expected = TransformerStack(C, 4, 2, norm, "post")
    expected.load_state_dict(stack.state_dict())
    x = torch.randn(2, 3, C)
    torch.testing.assert_close(stack.eval()(x), expected.eval()(x))


def test_place_knows_torchs_layers():
    layer = nn.TransformerEncoderLayer(C, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    assert [entry.after for entry in place(model, "mix")] == ["post", "pre", "pre", "pre"]
    assert [layer.norm_first for layer in model.layers] == [False, True, True, True]
    with pytest.raises(ValueError, match=r"layers\.0, a TransformerEncoderLayer, has no place for the outer norms"):
        place(model, "peri")
    assert [layer.norm_first for layer in model.layers] == [False, True, True, True]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: place(nn.Linear(1, 1), "pre"), "Linear has no layer whose placement can be changed"),
        (lambda: layer_placements(3, "sandwich"), "placement='sandwich' is unknown"),
        (lambda: layer_placements(3, "mix", count=4), "count=4 is more than the 3 layers"),
        (lambda: layer_placements(3, "mix", fraction=2), "fraction=2 is not allowed"),
        (lambda: NormedBranch(nn.Linear(C, C), nn.LayerNorm(C), "mix"), "placement='mix' is unknown"),
        (lambda: TransformerBlock(C, 3), "num_heads=3 is not allowed with dim=8"),
        (lambda: TransformerStack(C, 0, 2), "depth=0 is not allowed"),
    ],
)
def test_refusals(build, message):
    with pytest.raises(ValueError, match=message):
        build()
