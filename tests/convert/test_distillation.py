"""Distillation: what is compared, that it lowers the loss, that it stays out of the way, that it can be resumed."""

import copy

import pytest
import torch
from torch import nn

from normfuse.convert import Distillation, distill, output_error, progressive, relative_error
from normfuse.nn import UnifiedNorm

DIM, WORDS, TOKENS = 8, 20, 6


class Encoder(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.embed, self.drop = nn.Embedding(WORDS, DIM), nn.Dropout(dropout)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM)) for _ in range(2)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(2))

    def forward(self, input_ids, attention_mask=None):
        x = self.drop(self.embed(input_ids))
        for branch, norm in zip(self.branches, self.norms, strict=True):
            x = norm(x + branch(x))
        return {"states": x, "loss": x.sum()}


class Checkpointed(nn.Module):
    def __init__(self, inner, use_reentrant=False):
        super().__init__()
        self.inner, self.use_reentrant = inner, use_reentrant

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=self.use_reentrant)


def batches(count=4):
    found = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(2, TOKENS + 1, (8, 1), generator=generator)
        found.append(
            {
                "input_ids": torch.randint(WORDS, (8, TOKENS), generator=generator),
                "attention_mask": (torch.arange(TOKENS) < lengths).long(),
            }
        )
    return found


def setup(dropout=0.0, schedule=20, **options):
    torch.manual_seed(0)
    teacher = Encoder(dropout)
    student = copy.deepcopy(teacher)
    conversion = progressive(student, schedule=schedule, frozen=True)
    conversion.calibrate(batches())
    distillation = Distillation(student, teacher, conversion, **options)
    trained = [p for name, p in student.named_parameters() if ".original." not in name]
    return student, teacher, conversion, distillation, torch.optim.Adam(trained, lr=3e-3)


def test_errors_by_hand():
    teacher = torch.randn(5, 4, DIM)
    student = teacher + torch.randn(5, 4, DIM)
    valid = torch.rand(5, 4) < 0.5
    s, t = student[valid], teacher[valid]
    expected = (s - t).square().mean() / t.var(0, correction=0).mean()
    torch.testing.assert_close(relative_error(student, teacher, valid), expected)
    assert relative_error(teacher, teacher) == 0
    outputs = [{"loss": torch.ones(()), "a": x, "b": (x, torch.arange(3))} for x in (student, teacher)]
    torch.testing.assert_close(output_error(*outputs), relative_error(student, teacher))
    with pytest.raises(ValueError, match="no floating tensor to compare; give output_loss"):
        output_error({"ids": torch.arange(3)}, {"ids": torch.arange(3)})


def test_the_loss_is_zero_as_long_as_the_student_is_the_original():
    student, teacher, conversion, distillation, _ = setup(hidden_weight=2.0, output_weight=3.0)
    batch = batches()[0]
    student(**batch)
    assert distillation.loss() == 0 and distillation.terms == {"output": 0, "hidden": 0}
    conversion.step(20)
    got = student(**batch)["states"]
    valid = batch["attention_mask"] == 1
    with torch.no_grad():
        inside = [teacher.norms[0](x + teacher.branches[0](x)) for x in [teacher.embed(batch["input_ids"])]]
        inside.append(teacher.norms[1](inside[0] + teacher.branches[1](inside[0])))
        mine = student.norms[0](
            student.embed(batch["input_ids"]) + student.branches[0](student.embed(batch["input_ids"]))
        )
    hidden = (relative_error(mine, inside[0], valid) + relative_error(got, inside[1], valid)) / 2
    expected = 2 * hidden + 3 * relative_error(got, inside[1])
    torch.testing.assert_close(distillation.loss(), expected)
    student(batch["input_ids"], batch["attention_mask"])  # the mask by position
    torch.testing.assert_close(distillation.loss(), expected)


def test_the_loop_lowers_the_loss_and_ends_with_static_norms():
    _, _, conversion, distillation, optimizer = setup(schedule=80)
    seen = []
    losses = distill(
        distillation, batches(), steps=160, optimizer=optimizer, conversion=conversion,
        after_step=lambda step, loss: seen.append((step, loss)),
    )  # fmt: skip
    assert losses.shape == (160,) and [step for step, _ in seen] == list(range(1, 161)) and conversion.share == 0
    jump = losses[64:68].mean()  # λ has just reached 0
    assert losses[0] == 0 and losses[-4:].mean() < 0.6 * jump, (jump, losses[-4:])
    conversion.finish()


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_a_wrapped_student_is_compared_at_the_same_modules(wrap):
    student, teacher, conversion, distillation, _ = setup()
    conversion.step(20)
    student(**batches()[0])
    expected = distillation.loss()
    distillation.close()
    wrapped = wrap(student)
    with Distillation(wrapped, teacher, conversion) as again:
        wrapped(**batches()[0])
        torch.testing.assert_close(again.loss(), expected)


def test_without_training_it_stays_out_of_the_way():
    student, _, _, distillation, _ = setup()
    calls = []
    distillation.teacher.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        student(**batches()[0])
    assert not calls
    with pytest.raises(RuntimeError, match="no forward of the student to compare"):
        distillation.loss()
    student(**batches()[0])
    distillation.loss()
    assert calls == [1]
    with pytest.raises(RuntimeError, match="no forward of the student to compare"):
        distillation.loss()
    with distillation:
        pass
    student(**batches()[0])
    assert calls == [1] and not student.norms[0]._forward_hooks


def test_a_checkpointed_block_is_compared_once():
    student, _, conversion, distillation, _ = setup()
    conversion.step(8)
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            run = student.norms[1]  # its hooks run once more in the backward pass
            student.norms[1] = Checkpointed(run)
        student.zero_grad()
        student(**batches()[0])
        distillation.loss().backward()
        gradients.append([p.grad.clone() for p in student.branches.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_states_inside_a_reentrant_checkpoint_are_refused():
    student, *_ = setup()
    student.norms[1] = Checkpointed(student.norms[1], use_reentrant=True)
    with pytest.raises(RuntimeError, match=r"the loss at norms\.1 has no gradient inside a reentrant checkpoint"):
        student(**batches()[0])


@pytest.mark.parametrize("dropout", [False, True])
def test_dropout_is_off_unless_asked_for_and_modes_are_restored(dropout):
    student, _, _, distillation, optimizer = setup(dropout=0.5)
    student.eval()
    modes = []
    student.drop.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    student.norms[0].register_forward_pre_hook(
        lambda module, _: modes.append((module.training, module.static.training))
    )
    distill(distillation, batches(1), steps=1, optimizer=optimizer, dropout=dropout)
    assert modes == [dropout, (True, False)]
    assert not any(module.training for module in student.modules())


def test_running_statistics_move_in_the_loop():
    torch.manual_seed(0)
    teacher = Encoder()
    student = copy.deepcopy(teacher)
    conversion = progressive(student, to="unified", schedule=2, frozen=False)
    distillation = Distillation(student, teacher, at=["norms.0"])
    optimizer = torch.optim.Adam(student.parameters())
    distill(distillation, batches(), steps=3, optimizer=optimizer, conversion=conversion)
    assert isinstance(student.norms[0].static, UnifiedNorm) and student.norms[0].static.iters.item() == 3


def test_resuming_is_bit_exact():
    def run(steps, stored=None):
        student, _, conversion, distillation, optimizer = setup()
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        parts, data = (student, optimizer, scheduler), batches()
        if stored is not None:
            for part, state in zip(parts, stored, strict=True):
                part.load_state_dict(state)
            data = data[3:] + data[:3]
        distill(distillation, data, steps=steps, optimizer=optimizer, scheduler=scheduler, conversion=conversion)
        return [copy.deepcopy(part.state_dict()) for part in parts]

    through = run(8)
    resumed = run(5, run(3))
    assert all(torch.equal(value, resumed[0][name]) for name, value in through[0].items())


def test_autocast():
    _, _, conversion, distillation, optimizer = setup()
    conversion.step(16)
    losses = distill(distillation, batches(), steps=2, optimizer=optimizer, autocast=torch.bfloat16)
    assert losses.isfinite().all() and losses.dtype == torch.float32


def test_refusals():
    student, teacher, _, distillation, optimizer = setup()
    with pytest.raises(ValueError, match="at names 'nothing', which the student of class Encoder does not have"):
        Distillation(student, teacher, at=["nothing"])
    with pytest.raises(ValueError, match="steps=0 is not allowed"):
        distill(distillation, batches(), steps=0, optimizer=optimizer)
    with pytest.raises(ValueError, match="loader gave no batch"):
        distill(distillation, [], steps=1, optimizer=optimizer)


@pytest.mark.parametrize("rate", [1e-3, 10.0])
def test_with_a_validation_set_it_never_ends_worse_than_it_began(rate):
    student, _, conversion, distillation, _ = setup()
    held_out = batches()[2:]
    before = distillation.error(held_out)
    optimizer = torch.optim.AdamW(student.parameters(), lr=rate)
    options = {"optimizer": optimizer, "conversion": conversion, "validation": held_out, "validate_every": 4}
    distill(distillation, batches()[:2], steps=30, **options)
    after = distillation.error(held_out)
    assert after == before if rate > 1 else after < before
    assert conversion.share == 0 and conversion.norms["norms.0"].step == 30
    assert all(parameter.requires_grad for parameter in student.branches.parameters())


def test_the_error_is_that_of_the_static_norms_alone():
    student, _, conversion, distillation, _ = setup()
    error = distillation.error(batches())
    assert error > 0 and conversion.share == 1 and student.training
    conversion.step(20)
    losses = []
    for batch in batches():
        student.eval()(**batch)
        losses.append(distillation.loss())
    assert error == pytest.approx(torch.stack(losses).mean().item())
    with pytest.raises(ValueError, match="there is no batch to measure the error on"):
        distillation.error([])
