"""What benchmarks/quality.py trains: data, models, norms."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfuse.convert.swap import put
from normfuse.nn import DyT, MaskedBatchNorm, PowerNorm, RegularizedBatchNorm, UnifiedNorm

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from normfuse_examples import LanguageModel, VisionTransformer

CONTEXT = 128
PLACEMENTS = ("pre", "post")


@dataclass(frozen=True)
class Norm:
    """One contender.

    Attributes:
        title: its name in tables.
        folds: whether it folds away after the training: "yes", "no", "all but one", or "half".
        make: builds it for so many channels and so many training steps; None: LayerNorm stays.
        late: the same for the second half of the norms; None: as the first.
        conversion: a way from LayerNorm to a static norm within the training.
        moving: share of the training in which statistics move; then they are frozen.
        variant: whether it is an experiment with another contender, which runs only where it is asked for.
    """

    title: str
    folds: str
    make: Callable[[int, int], nn.Module] | None = None
    late: Callable[[int, int], nn.Module] | None = None
    conversion: str | None = None
    moving: float = 1.0
    variant: bool = False


def _unified(dim: int, steps: int, **options: Any) -> UnifiedNorm:
    return UnifiedNorm(dim, warmup_iters=steps // 10, **options)


def _power(dim: int, steps: int, group_num: int | None = None) -> PowerNorm:
    return PowerNorm(dim, group_num=group_num, warmup_iters=steps // 10)


NORMS = {
    "layer": Norm("LayerNorm", "no"),
    "rms": Norm("RMSNorm", "no", lambda dim, steps: nn.RMSNorm(dim, eps=1e-5)),
    "unified": Norm("UnifiedNorm", "yes", _unified),
    "unified_batch": Norm(
        "UnifiedNorm, statistics of the batch throughout",
        "yes",
        lambda dim, steps: UnifiedNorm(dim, warmup_iters=steps),
        variant=True,
    ),
    "unified_long": Norm(
        "UnifiedNorm, window 16, momentum 0.99",
        "yes",
        partial(_unified, window_size=16, momentum=0.99),
        variant=True,
    ),
    "unified_frozen": Norm(
        "UnifiedNorm, statistics frozen in the last fifth", "yes", _unified, moving=0.8, variant=True
    ),
    "power": Norm("PowerNorm(group_num=None)", "yes", _power),
    "power_groups": Norm("PowerNorm", "no", partial(_power, group_num=1)),
    "power_early": Norm(
        "PowerNorm, group scaling in the first half of the norms",
        "half",
        partial(_power, group_num=1),
        late=_power,
        variant=True,
    ),
    "batch": Norm("MaskedBatchNorm", "yes", lambda dim, steps: MaskedBatchNorm(dim)),
    "batch_slow": Norm(
        "MaskedBatchNorm, momentum 0.01", "yes", lambda dim, steps: MaskedBatchNorm(dim, momentum=0.01), variant=True
    ),
    "regularized": Norm("RegularizedBatchNorm", "yes", lambda dim, steps: RegularizedBatchNorm(dim)),
    "progressive": Norm("LayerNorm → RepBatchNorm", "yes", conversion="progressive"),
    "tapered": Norm("LayerNorm tapered, the last one kept", "all but one", conversion="tapered"),
    "tapered_wholly": Norm("LayerNorm tapered, the last one too", "yes", conversion="tapered_wholly"),
    "dyt": Norm("DyT", "no", lambda dim, steps: DyT(dim)),
}


def apply_norm(model: nn.Module, norm: Norm, steps: int) -> None:
    """Put the contender in the place of every LayerNorm, before the optimiser is made."""
    if norm.make is None:
        return
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
    for index, (name, module) in enumerate(layers):
        make = norm.late if norm.late is not None and 2 * index >= len(layers) else norm.make
        put(model, name, make(module.normalized_shape[0], steps))


@dataclass(frozen=True)
class Task:
    """Data and model of a training.

    Attributes:
        title: for tables.
        build: the model with LayerNorm, from the placement.
        batch: inputs and targets of one training step, drawn with a generator.
        parts: inputs and targets of the splits "validation" and "test", in batches.
        rates: learning rates to choose from, the middle one is the default of the examples.
        constant: the loss of predicting how frequent each class is, whatever the input: a training that ends there or
            above has diverged.
        tokens_per_step: positions that enter a step.
    """

    title: str
    build: Callable[[str], nn.Module]
    batch: Callable[[torch.Generator], tuple[Tensor, Tensor]]
    parts: dict[str, list[tuple[Tensor, Tensor]]]
    rates: tuple[float, ...]
    constant: float
    tokens_per_step: int

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())

    @torch.no_grad()
    def score(self, model: nn.Module, split: str, batches: int | None = None) -> dict[str, float]:
        """Mean loss and accuracy on a split or its first batches, in evaluation mode; the model's mode is restored."""
        training, device = model.training, next(model.parameters()).device
        model.eval()
        loss, right, count = 0.0, 0, 0
        for inputs, targets in self.parts[split][:batches]:
            logits, wanted = model(inputs.to(device)).flatten(0, -2), targets.to(device).flatten()
            loss += F.cross_entropy(logits, wanted, reduction="sum").item()
            right += (logits.argmax(-1) == wanted).sum().item()
            count += wanted.numel()
        model.train(training)
        return {"loss": loss / count, "accuracy": right / count}


def _entropy(targets: Tensor, classes: int) -> float:
    """The loss of always predicting the frequencies of the classes."""
    share = torch.bincount(targets.flatten(), minlength=classes).double() / targets.numel()
    return float(-(share * share.clamp(min=1e-12).log()).sum())


def library_text() -> dict[str, Tensor]:
    """Bytes of the standard library's top-level modules. Every tenth is held out, in turns to choose and to test."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    held_out = files[::10]
    parts = {"training": [f for f in files if f not in held_out], "validation": held_out[::2], "test": held_out[1::2]}
    joined = {name: b"\n".join(file.read_bytes() for file in part) for name, part in parts.items()}
    return {name: torch.frombuffer(bytearray(text), dtype=torch.uint8) for name, text in joined.items()}


def _windows(text: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    pieces = text[starts[:, None] + torch.arange(CONTEXT + 1)].long()
    return pieces[:, :-1], pieces[:, 1:]


def language_model(width: int = 128, depth: int = 4, batch: int = 16, held_out: int = 512) -> Task:
    """A byte-level decoder on Python's standard library.

    Args:
        width: of the decoder.
        depth: of the decoder, in blocks.
        batch: pieces of ``CONTEXT`` bytes in a step.
        held_out: pieces of each of the two held-out splits, evenly spaced over it.
    """
    text = library_text()

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return _windows(text["training"], torch.randint(len(text["training"]) - CONTEXT, (batch,), generator=generator))

    def part(name: str) -> list[tuple[Tensor, Tensor]]:
        starts = torch.linspace(0, len(text[name]) - CONTEXT - 1, held_out).long()
        starts = starts[torch.randperm(held_out, generator=torch.Generator().manual_seed(0))]
        return [_windows(text[name], some) for some in starts.split(batch)]

    parts = {name: part(name) for name in ("validation", "test")}
    return Task(
        f"byte-level language model, {depth} blocks of width {width}, context {CONTEXT}",
        lambda placement: LanguageModel(
            CONTEXT, dim=width, depth=depth, heads=width // 32, norm="layer", placement=placement
        ),
        draw,
        parts,
        (1e-3, 2e-3, 4e-3),
        _entropy(torch.cat([targets for _, targets in parts["validation"]]), 256),
        batch * CONTEXT,
    )


class ChannelsLastNorm(nn.Module):
    """A norm over the channels of [N, C, H, W], as ConvNeXt has it."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


class ConvolutionBlock(nn.Module):
    """Two convolutions in a residual branch; "pre" as in ResNet v2, "post" as in v1."""

    def __init__(self, width: int, placement: str) -> None:
        super().__init__()
        self.placement = placement
        self.convolutions = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.norms = nn.ModuleList(ChannelsLastNorm(nn.LayerNorm(width)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        (first, second), (norm, other) = self.convolutions, self.norms
        if self.placement == "pre":
            return x + second(F.relu(other(first(F.relu(norm(x))))))
        return F.relu(other(x + second(F.relu(norm(first(x))))))


class ConvolutionalNetwork(nn.Module):
    """Grey pictures [N, 1, 8, 8] to the logits of ten classes."""

    def __init__(self, placement: str, width: int = 32, depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.Sequential(*(ConvolutionBlock(width, placement) for _ in range(depth)))
        self.norm = ChannelsLastNorm(nn.LayerNorm(width)) if placement == "pre" else nn.Identity()
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = F.avg_pool2d(self.stem(images), 2)
        return self.head(self.norm(self.blocks(x)).mean((2, 3)))


@cache
def _digits() -> dict[str, tuple[Tensor, Tensor]]:
    """scikit-learn's pictures: 1137 to train on, 300 to choose with, 360 to test on; the same in every run."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float().div(8).sub(1).unsqueeze(1)
    labels = torch.from_numpy(data.target)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(labels)))
    parts = dict(zip(("test", "validation", "training"), order.split([360, 300, 1137]), strict=True))
    return {name: (images[part], labels[part]) for name, part in parts.items()}


def digits(build: Callable[[str], nn.Module], title: str, batch: int = 32) -> Task:
    """Classification of handwritten digits, shifted by up to one pixel in training."""
    data = _digits()
    images, labels = data["training"]

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(labels), (batch,), generator=generator)
        down, right = torch.randint(-1, 2, (2,), generator=generator).tolist()
        shifted = F.pad(images[chosen], (1 + right, 1 - right, 1 + down, 1 - down))[:, :, 1:-1, 1:-1]
        return shifted, labels[chosen]

    parts = {name: [data[name]] for name in ("validation", "test")}
    constant = _entropy(data["validation"][1], 10)
    return Task(title, build, draw, parts, (1e-3, 2e-3, 4e-3), constant, batch)


TASKS: dict[str, Callable[[], Task]] = {
    "lm": language_model,
    "transformer": partial(
        digits,
        lambda placement: VisionTransformer(norm="layer", placement=placement),
        "vision transformer on digits, 4 blocks of width 64",
    ),
    "cnn": partial(digits, ConvolutionalNetwork, "convolutional network on digits, 3 blocks of width 32"),
    "lm512": partial(language_model, 512, 6),
}
