"""Models of timm and transformers with exchanged norms, in plain loops, Hugging Face Trainer and Lightning.

Random weights, synthetic data, no network. What they need is in requirements/ecosystem.txt; without it these
tests are skipped, and say so.
"""

import json
import os

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from normfuse.convert import from_pretrained, swap_norms
from normfuse.nn import PowerNorm, UnifiedNorm

MISSING = "not installed: pip install --no-deps -r requirements/ecosystem.txt"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
STEPS, BATCH, CLASSES = 30, 16, 3


class Examples(Dataset):
    """One batch's worth of each class many times over, noise added: ``inputs`` and ``labels``."""

    def __init__(self, make):
        generator = torch.Generator().manual_seed(1)
        self.labels = torch.arange(STEPS * BATCH) % CLASSES
        self.inputs = make(self.labels, generator)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"inputs": self.inputs[index], "labels": self.labels[index]}


def images(labels, generator):
    patterns = torch.randn(CLASSES, 3, 16, 16, generator=generator)
    return patterns[labels] + torch.randn(len(labels), 3, 16, 16, generator=generator)


def sentences(labels, generator):
    words = torch.randint(5, 60, (len(labels), 12), generator=generator)
    return torch.where(torch.rand(words.shape, generator=generator) < 0.4, labels[:, None] + 1, words)


@pytest.mark.parametrize("auto", [False, True])
def test_exchanged_norms_come_back_from_a_folder(tmp_path, auto):
    transformers = pytest.importorskip("transformers", reason=MISSING)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    model = transformers.BertForMaskedLM(config)
    swap_norms(model, to="unified", warmup_iters=1)
    ids = torch.randint(30, (4, 7))
    for _ in range(3):  # statistics move
        model.train()(ids).logits.sum().backward()
    expected = model.eval()(ids).logits
    model.save_pretrained(tmp_path)
    plain = transformers.BertForMaskedLM.from_pretrained(tmp_path).eval()
    assert (plain(ids).logits - expected).abs().max() > 1e-2  # LayerNorms, and no error
    cls = transformers.AutoModelForMaskedLM if auto else transformers.BertForMaskedLM
    again = from_pretrained(cls, tmp_path, lambda m: swap_norms(m, to="unified", warmup_iters=1)).eval()
    assert type(again) is transformers.BertForMaskedLM
    torch.testing.assert_close(again(ids).logits, expected)
    with pytest.raises(ValueError, match=r"the folder lacks .*running_phi"):
        from_pretrained(cls, tmp_path, lambda m: swap_norms(m, to="power"))
    with pytest.raises(ValueError, match=r"the changed model does not have .*buffer_gz"):
        from_pretrained(cls, tmp_path, lambda m: None)


class Classifier(nn.Module):
    """One signature for all: inputs and labels in, loss and logits out."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, inputs, labels=None):
        output = self.network(inputs)
        logits = output if isinstance(output, torch.Tensor) else output.logits
        result = {"logits": logits}
        if labels is not None:
            result = {"loss": nn.functional.cross_entropy(logits, labels), **result}
        return result


def make_vit(to):
    pytest.importorskip("timm", reason=MISSING)
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    network = VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=CLASSES)
    report = swap_norms(network, to=to, warmup_iters=10)
    assert {s.name for s in report.swaps} == {f"blocks.{i}.norm{j}" for i in (0, 1) for j in (1, 2)} | {"norm"}
    return Classifier(network), Examples(images)


def make_bert(to):
    transformers = pytest.importorskip("transformers", reason=MISSING)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=16, num_labels=CLASSES,
    )  # fmt: skip
    network = transformers.BertForSequenceClassification(config)
    report = swap_norms(network, to=to, warmup_iters=10)
    assert len(report.swaps) == 5 and all(s.name.endswith("LayerNorm") for s in report.swaps)
    return Classifier(network), Examples(sentences)


def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), lr=3e-3)


def plain_loop(model, data, folder):
    losses = []
    optimizer = optimizer_of(model)
    for batch in DataLoader(data, batch_size=BATCH):
        loss = model(**batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    torch.save(model.state_dict(), folder / "model.pt")
    return losses, torch.load(folder / "model.pt", weights_only=True)


def hugging_face(model, data, folder):
    transformers = pytest.importorskip("transformers", reason=MISSING)
    pytest.importorskip("accelerate", reason=MISSING)
    from safetensors.torch import load_file

    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=3e-3,
        logging_steps=1, save_steps=STEPS, report_to=[], disable_tqdm=True, use_cpu=True, remove_unused_columns=False,
        lr_scheduler_type="constant",
    )  # fmt: skip
    transformers.Trainer(model=model, args=arguments, train_dataset=data).train()
    stored = folder / f"checkpoint-{STEPS}"
    history = json.loads((stored / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry], load_file(stored / "model.safetensors")


def lightning(model, data, folder):
    pl = pytest.importorskip("lightning", reason=MISSING)

    class Task(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.losses = model, []

        def training_step(self, batch, index):
            loss = self.model(**batch)["loss"]
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return optimizer_of(self.model)

    task = Task()
    trainer = pl.Trainer(
        max_steps=STEPS, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(task, DataLoader(data, batch_size=BATCH))
    trainer.save_checkpoint(folder / "task.ckpt")
    stored = torch.load(folder / "task.ckpt", weights_only=True)["state_dict"]
    return task.losses, {name.removeprefix("model."): value for name, value in stored.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("train", [plain_loop, hugging_face, lightning])
@pytest.mark.parametrize("to", ["unified", "power"])
@pytest.mark.parametrize("make", [make_vit, make_bert], ids=["timm ViT", "transformers BERT"])
def test_training(make, to, train, tmp_path):
    model, data = make(to)
    losses, stored = train(model, data, tmp_path)
    assert len(losses) == STEPS
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5]), losses
    norms = [module for module in model.modules() if isinstance(module, (UnifiedNorm, PowerNorm))]
    assert [norm.iters.item() for norm in norms] == [STEPS] * 5
    for norm in norms:
        for name, value in norm.named_buffers():
            assert value.isfinite().all(), name
    fresh, _ = make(to)
    fresh.load_state_dict(stored)
    inputs = data[0]["inputs"][None]
    with torch.no_grad():
        assert torch.equal(fresh.eval()(inputs)["logits"], model.eval()(inputs)["logits"])


def test_gradient_checkpointing_of_transformers():
    """``gradient_checkpointing_enable`` changes neither losses nor statistics."""
    runs = []
    for enabled in (False, True):
        model, data = make_bert("unified")
        if enabled:
            model.network.gradient_checkpointing_enable()
        losses = []
        torch.manual_seed(1)
        optimizer = optimizer_of(model.train())
        for batch in list(DataLoader(data, batch_size=BATCH))[:6]:
            loss = model(**batch)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        runs.append((losses, model.state_dict()))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(value, runs[1][1][name]) for name, value in runs[0][1].items())
