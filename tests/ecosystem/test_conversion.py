"""A tiny BERT converted in Hugging Face's Trainer and in Lightning. Random weights, no network."""

import copy
import os

import pytest
import torch
from torch.utils.data import DataLoader

from normfuse.convert import Distillation, lightning_callback, progressive, trainer_callback
from normfuse.nn import RepBatchNorm

MISSING = "not installed: pip install --no-deps -r requirements/ecosystem.txt"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
STEPS, BATCH, WORDS, TOKENS = 12, 4, 60, 10


def sentences(count=STEPS * BATCH):
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, TOKENS + 1, (count, 1), generator=generator)
    mask = (torch.arange(TOKENS) < lengths).long()
    ids = torch.randint(5, WORDS, (count, TOKENS), generator=generator) * mask
    return [{"input_ids": i, "attention_mask": m} for i, m in zip(ids, mask, strict=True)]


def setup(steps=STEPS):
    transformers = pytest.importorskip("transformers", reason=MISSING)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=WORDS, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    teacher = transformers.BertModel(config, add_pooling_layer=False).eval()
    student = copy.deepcopy(teacher)
    conversion = progressive(student, schedule=steps, frozen=True)
    conversion.calibrate(DataLoader(sentences(), batch_size=BATCH))
    return student, conversion, Distillation(student, teacher, conversion)


def train(folder, steps, until, resume=None):
    transformers = pytest.importorskip("transformers", reason=MISSING)
    pytest.importorskip("accelerate", reason=MISSING)
    student, conversion, distillation = setup(steps)
    losses = []

    def loss(*arguments, **options):
        losses.append(distillation.compute_loss(*arguments, **options))
        return losses[-1]

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, arguments, state, control, **others):
            control.should_training_stop = state.global_step == until

    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=1e-3, save_steps=6,
        report_to=[], disable_tqdm=True, use_cpu=True, lr_scheduler_type="constant", full_determinism=False, seed=3,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=student, args=arguments, train_dataset=sentences(), compute_loss_func=loss,
        callbacks=[trainer_callback(conversion), Stop()],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return student, conversion, torch.stack(losses).detach()


@pytest.mark.filterwarnings("ignore")
def test_hugging_face_trainer_and_resuming(tmp_path):
    student, conversion, losses = train(tmp_path / "through", STEPS, STEPS)
    assert conversion.share == 0 and len(losses) == STEPS
    assert losses[0] < 1e-9 and losses[8:].min() > 0
    train(tmp_path / "first", STEPS, 6)
    resumed, again, rest = train(tmp_path / "first", STEPS, STEPS, resume=str(tmp_path / "first" / "checkpoint-6"))
    assert again.share == 0 and again.norms[next(iter(again.norms))].step.item() == STEPS
    assert torch.equal(rest, losses[6:])
    for (name, one), other in zip(student.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    report = conversion.finish()
    assert len(report.swaps) == 5 and sum(isinstance(m, RepBatchNorm) for m in student.modules()) == 5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulate", [1, 3])
def test_lightning(tmp_path, accumulate):
    pl = pytest.importorskip("lightning", reason=MISSING)
    student, conversion, distillation = setup(STEPS // accumulate)

    class Task(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.student, self.losses, self.shares = student, [], []

        def training_step(self, batch, index):
            self.student(**batch)
            loss = distillation.loss()
            self.losses.append(loss.item())
            self.shares.append(conversion.share)
            return loss

        def configure_optimizers(self):
            return torch.optim.Adam([p for n, p in self.student.named_parameters() if ".original." not in n], lr=1e-3)

    task = Task()
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=tmp_path, accumulate_grad_batches=accumulate,
        callbacks=[lightning_callback(conversion)],
    )  # fmt: skip
    trainer.fit(task, DataLoader(sentences(), batch_size=BATCH))
    assert len(task.losses) == STEPS and conversion.share == 0
    assert task.shares[:accumulate] == [1] * accumulate and (accumulate == 1 or task.shares[accumulate] < 1)
    assert task.losses[0] < 1e-9 and min(task.losses[accumulate:]) > 0
