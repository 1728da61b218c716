"""reconstruct: least squares that can be checked by hand, on a small post-norm encoder whose tokens differ in scale."""

import copy

import pytest
import torch
from torch import nn

from normfuse.convert import Distillation, Schedule, distill, progressive, reconstruct
from normfuse.convert.fitting import static_alone

DIM, WORDS, TOKENS = 8, 40, 6


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.up, self.down = nn.Linear(DIM, DIM), nn.Linear(DIM, 24), nn.Linear(24, DIM)
        self.norm = nn.LayerNorm(DIM)

    def hidden(self, x):
        return torch.relu(self.up(self.mix(x)))

    def forward(self, x):
        return self.norm(x + self.down(self.hidden(x)))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.blocks = nn.Embedding(WORDS, DIM), nn.Sequential(Block(), Block())

    def forward(self, input_ids, attention_mask):
        return self.blocks(self.embed(input_ids))


def batches(count=30, dtype=torch.int64):
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        lengths = torch.randint(2, TOKENS + 1, (10, 1), generator=generator)
        ids = torch.randint(WORDS, (10, TOKENS), generator=generator)
        found.append({"input_ids": ids, "attention_mask": (torch.arange(TOKENS) < lengths).to(dtype)})
    return found


def writer(name):
    return name.replace("norm", "down")


@pytest.fixture
def pair():
    torch.manual_seed(0)
    teacher = Encoder().double()
    for block in teacher.blocks:  # branches that change the scale of a token
        block.down.weight.data *= 4
    student = copy.deepcopy(teacher)
    return teacher, student


@pytest.mark.parametrize("to", ["rep_batch", "unified", "power"])
def test_it_comes_closer_to_the_teacher_and_says_by_how_much(pair, to):
    teacher, student = pair
    conversion = progressive(student, to=to, schedule=1, frozen=True)
    conversion.calibrate(batches())
    conversion.step()
    fitted = errors_at_the_end(teacher, student)
    errors = reconstruct(conversion, teacher, batches(), writer)
    assert list(errors) == ["blocks.0.norm", "blocks.1.norm"]
    assert all(after < before for before, after in errors.values())
    final = errors_at_the_end(teacher, student)
    assert final < 0.5 * fitted, (final, fitted)
    # The error that the moments give is that of the model: both in float64, over the same rows.
    assert errors["blocks.1.norm"][1] == pytest.approx(final, rel=1e-6)
    assert conversion.share == 0 and student.training


@pytest.mark.parametrize("frozen", [True, False])
def test_a_learning_rate_of_zero_keeps_what_it_gave(pair, frozen):
    teacher, student = pair
    conversion = progressive(student, schedule=Schedule(60, end=0.5), frozen=frozen)
    conversion.calibrate(batches())
    reconstruct(conversion, teacher, batches(), writer)
    with static_alone(conversion.norms):
        reconstructed = errors_at_the_end(teacher, student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.0)
    distill(Distillation(student, teacher, conversion), batches(), steps=60, optimizer=optimizer, conversion=conversion)
    assert conversion.share == 0
    # Running statistics are means over the last ten batches of some 40 valid tokens: within 1/20 of a deviation.
    assert errors_at_the_end(teacher, student) <= reconstructed * (1 if frozen else 1.2)


def errors_at_the_end(teacher, student):
    left, total = 0.0, []
    for batch in batches():
        valid = batch["attention_mask"].bool()
        with torch.no_grad():
            s, t = (model.eval()(**batch)[valid] for model in (student, teacher))
        left += (s - t).square().sum().item()
        total.append(t)
    student.train()
    values = torch.cat(total)
    return left / (values - values.mean(0)).square().sum().item()


def test_with_hardly_a_penalty_the_first_layer_is_ordinary_least_squares(pair):
    teacher, student = pair
    conversion = progressive(student, schedule=1, frozen=True)
    errors = reconstruct(conversion, teacher, batches(), writer, ridge=1e-9, rounds=30)
    # One output channel at a time: v ~ slope · skip + weights · h + shift is linear in all unknowns together.
    ids = torch.cat([b["input_ids"][b["attention_mask"] == 1] for b in batches()])
    with torch.no_grad():
        skip = teacher.embed(ids)
        block = teacher.blocks[0]
        h, v = block.hidden(skip), block(skip)
    left = 0.0
    for channel in range(DIM):
        design = torch.cat([skip[:, channel : channel + 1], h, torch.ones_like(h[:, :1])], 1)
        solution = torch.linalg.lstsq(design, v[:, channel : channel + 1], driver="gelsd").solution
        left += (design @ solution - v[:, channel : channel + 1]).square().sum().item()
    best = left / (v - v.mean(0)).square().sum().item()
    before, after = errors["blocks.0.norm"]
    # Coordinate descent on a bilinear problem: it approaches the joint optimum from above.
    assert best * (1 - 1e-9) <= after < best + 0.05 * (before - best), (best, after, before)


def test_a_channel_that_is_constant_at_the_teacher(pair):
    teacher, student = pair
    for model in pair:
        model.blocks[1].norm.weight.data[2] = 0
        model.blocks[1].norm.bias.data[2] = 0.7
    conversion = progressive(student, schedule=1, frozen=True)
    reconstruct(conversion, teacher, batches(), writer)
    conversion.step()
    got = student(**batches(1)[0])[..., 2]
    # A tenth of a usual channel's slope stays, so that folding need not divide by 0.
    assert (got - 0.7).square().mean() < 0.2**2
    static = conversion.norms["blocks.1.norm"].static
    slopes = (static.weight * (static.running_var + static.eps).rsqrt() + static.alpha).abs()
    assert slopes[2] == slopes.min() and slopes[2] > 0.01 * slopes.max()


def test_refusals(pair):
    teacher, student = pair
    conversion = progressive(student, schedule=1)
    with pytest.raises(ValueError, match="loader gave no batch"):
        reconstruct(conversion, teacher, [], writer)
    with pytest.raises(ValueError, match=r"writer gives 'blocks\.0\.x' for blocks\.0\.norm, which does not exist"):
        reconstruct(conversion, teacher, batches(1), lambda name: name.replace("norm", "x"))
    with pytest.raises(ValueError, match="which is a ProgressiveNorm; give the name of"):
        reconstruct(conversion, teacher, batches(1), lambda name: name)
    with pytest.raises(ValueError, match="ridge=0 is not allowed"):
        reconstruct(conversion, teacher, batches(1), writer, ridge=0)
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(ValueError, match=r"the layer before blocks\.0\.norm is not added"):
        reconstruct(conversion, teacher, batches(), lambda name: name.replace("norm", "mix"))
    torch.testing.assert_close(student.blocks[0].mix.weight, before["blocks.0.mix.weight"])
    with pytest.raises(ValueError, match=r"with 24 outputs for 8 channels"):
        reconstruct(conversion, teacher, batches(1), lambda name: name.replace("norm", "up"))
    silent = Encoder().double()
    silent.blocks = nn.Sequential(silent.blocks[0], nn.Identity())
    silent.blocks[1].norm = nn.Identity()
    with pytest.raises(ValueError, match=r"blocks\.1\.norm of the teacher ran 0 times in 2 batches; it must run once"):
        reconstruct(conversion, silent, batches(2), writer)
    groups = progressive(copy.deepcopy(teacher), to="power", schedule=1, group_num=2)
    with pytest.raises(ValueError, match="reconstruct needs group_num=None"):
        reconstruct(groups, teacher, batches(1), writer)
