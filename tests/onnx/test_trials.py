"""Inputs that look for trouble: what a program does with its inputs, and what is tried because of it."""

from dataclasses import replace

import pytest
import torch
from tiny_models import MaskedAttention
from torch import nn

from normfuse.checkpoint import ExportableModel, InputSpec, parse_input
from normfuse.onnx import trials
from normfuse.onnx.roles import roles
from normfuse.onnx.trials import EDGE, EXAMPLE, RANDOM, SOFT

LOWEST, INFINITY = torch.finfo(torch.float32).min, float("-inf")


def captured(model, *example, shapes=None):
    return ExportableModel.from_model(model.eval(), example, shapes)


def edges(checkpoint, **options):
    return list(trials.edges(checkpoint, torch.Generator().manual_seed(0), **options))


ROWS = ({0: "batch"}, {0: "batch"})
X = torch.randn(2, 5, 8)


# What inputs are for


FORMS = {
    "int to additive": (lambda m: (1.0 - m[:, None, None].float()) * LOWEST, torch.ones(2, 5, dtype=torch.int64)),
    "int to boolean": (lambda m: (m != 0)[:, None, None].expand(-1, 1, 5, 5), torch.ones(2, 5, dtype=torch.int64)),
    "float, given": (lambda m: m, torch.zeros(2, 1, 5, 5)),
    "float, square": (lambda m: m, torch.zeros(5, 5)),
    "float, scaled": (lambda m: m[:, None, None] * -1e9, torch.zeros(2, 5)),
    "causal and padding": (lambda m: torch.full((5, 5), LOWEST).triu(1) + m[:, None, None], torch.zeros(2, 5)),
    "filled": (lambda m: torch.zeros(2, 1, 1, 5).masked_fill(m[:, None, None] > 0.5, INFINITY), torch.zeros(2, 5)),
    "picked": (lambda m: m.bool()[:, None, None, torch.arange(5)], torch.ones(2, 5, dtype=torch.int64)),
}


@pytest.mark.parametrize("form", FORMS)
def test_masks_of_attention_are_found(form):
    see, mask = FORMS[form]
    x, found = roles(captured(MaskedAttention(see), X, mask).program)
    assert x.data and not x.mask
    assert found.mask and not found.data


@pytest.mark.parametrize("weights", [True, False])
def test_padding_masks_of_multi_head_attention_are_found(weights):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x, mask):
            return self.attention(x, x, x, key_padding_mask=mask, need_weights=weights)[0]

    x, mask = roles(captured(Net(), X, torch.zeros(2, 5, dtype=torch.bool)).program)
    assert mask.mask and x.data and not x.mask


def test_masks_that_are_added_to_scores_by_hand_are_found_and_scores_are_none():
    class Net(nn.Module):
        def forward(self, x, mask, scores):
            return torch.softmax(x @ x.transpose(1, 2) + mask, -1) @ x + torch.softmax(scores, -1) @ x

    x, mask, scores = roles(captured(Net(), X, torch.zeros(2, 5, 5), torch.randn(2, 5, 5)).program)
    assert mask.mask and not mask.data and x.data and not scores.mask


def test_what_also_takes_part_in_arithmetic_is_no_mask():
    class Net(MaskedAttention):
        def forward(self, x, mask):
            return super().forward(x, mask) + self.qkv.weight.sum() * torch.relu(mask).sum()

    assert roles(captured(Net(), X, torch.zeros(2, 1, 5, 5)).program)[1].data


def test_tables_and_numbers_that_integers_are_compared_with():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.attention = nn.Embedding(20, 8), MaskedAttention()

        def forward(self, tokens):
            return self.attention(self.table(tokens), (tokens != 7)[:, None, None])

    (tokens,) = roles(captured(Net(), torch.randint(20, (2, 5))).program)
    assert tokens.rows == 20 and tokens.compared == [7] and tokens.mask
    checkpoint = captured(Net(), torch.randint(3, 9, (2, 5)))
    found = {trial.label: trial.tensors[0] for trial in edges(checkpoint)}
    assert found["all integers at their lowest [2,5]"].unique().tolist() == [0]
    assert found["all integers at their highest [2,5]"].unique().tolist() == [19]
    assert found["tokens with a row of 7 [2,5]"][0].unique().tolist() == [7]


# What is tried


def test_every_mask_shows_all_and_hides_rows_and_everything():
    example = torch.zeros(2, 1, 5, 5)
    example[0, 0, :, 4] = -1e9
    checkpoint = captured(MaskedAttention(), X, example, shapes=ROWS)
    tried = [trial.tensors[1] for trial in edges(checkpoint) if trial.label.startswith("mask mask")]
    for value in (0.0, -1e9, LOWEST, INFINITY):
        wholes = [mask for mask in tried if bool((mask == value).all())]
        rows = [mask for mask in tried if bool((mask[0] == value).all()) and not bool((mask == value).all())]
        queries = [
            mask for mask in tried if bool((mask[:, :, 0] == value).all()) and not (mask[:, :, 1] == value).all()
        ]
        assert wholes and rows and queries, value
    assert all(mask.shape == (3, 1, 5, 5) for mask in tried)  # one row more than the example, so that rows differ


def test_zeros_ones_and_large_numbers_leave_masks_alone():
    checkpoint = captured(MaskedAttention(), X, torch.zeros(2, 1, 5, 5), shapes=ROWS)
    found = {trial.label.partition(" [")[0]: trial.tensors for trial in edges(checkpoint)}
    assert not found["zeros"][0].any() and bool((found["ones"][0] == 1).all())
    assert found["large numbers"][0].abs().max() > 50 and not found["large numbers"][1].any()
    halves = [half for trial in edges(checkpoint) if (half := trial.in_half()) is not None]
    assert "large numbers" not in {t.label.partition(" [")[0] for t in halves}
    kinds = {t.kind for t in halves if t.label.startswith("mask") and t.tensors[1].min() < -1e9}
    assert kinds == {SOFT}  # float16 has no such number


def test_sizes_at_their_ends_and_an_empty_batch():
    class Net(nn.Module):
        def forward(self, x, y):
            return x.sum(1) + y

    checkpoint = captured(
        Net(),
        torch.randn(2, 5, 4),
        torch.randn(2, 4),
        shapes=({0: "batch", 1: torch.export.Dim("seq", max=9)}, {0: "batch"}),
    )
    shapes = {trial.label: (trial.tensors[0].shape, trial.kind) for trial in edges(checkpoint)}
    assert shapes["inputs with the smallest seq [3,1,4], [3,4]"] == ((3, 1, 4), EDGE)
    assert shapes["inputs with the smallest batch [1,5,4], [1,4]"] == ((1, 5, 4), EDGE)
    assert shapes["inputs of the largest sizes [8,9,4], [8,4]"] == ((8, 9, 4), EDGE)
    assert shapes["an empty batch [0,5,4], [0,4]"] == ((0, 5, 4), SOFT)


def test_the_largest_sizes_stay_within_what_a_run_may_take():
    class Net(nn.Module):
        def forward(self, x):
            return x.sum(1)

    dims = ({0: torch.export.Dim("batch", max=10**6), 1: torch.export.Dim("seq", max=10**6)},)
    checkpoint = captured(Net(), torch.randn(2, 5, 4), shapes=dims)
    (largest,) = [trial for trial in edges(checkpoint) if "largest" in trial.label]
    assert 40 < largest.tensors[0].numel() <= 2**21
    assert not [trial for trial in edges(checkpoint, pace=1.0) if "largest" in trial.label]


class Twice(nn.Module):
    def forward(self, n):
        return n * 2.0


@pytest.mark.parametrize(
    ("model", "spec", "ends"),
    [
        (Twice(), parse_input("n:int64[2]<30"), (0, 29)),
        (Twice(), InputSpec("n", torch.int64, (2,)), (3, 5)),
        (nn.Embedding(11, 4), InputSpec("n", torch.int64, (2,)), (0, 10)),
    ],
)
def test_integers_have_the_ends_that_are_given_or_seen(model, spec, ends):
    checkpoint = replace(captured(model, torch.tensor([3, 5])), inputs=[spec])
    found = [trial.tensors[0].tolist() for trial in edges(checkpoint) if trial.label.startswith("all integers")]
    assert found == [[end, end] for end in ends]


def test_examples_and_random_inputs_come_first():
    checkpoint = captured(nn.Linear(4, 2), torch.randn(3, 4), shapes=({0: "batch"},))
    generator = torch.Generator().manual_seed(0)
    assert trials.example(checkpoint).kind == EXAMPLE
    assert trials.random(checkpoint, 0, generator).tensors[0].shape == (1, 4)
    assert trials.random(checkpoint, 1, generator).kind == RANDOM
