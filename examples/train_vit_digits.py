"""Trains a small vision transformer on scikit-learn's handwritten digits and saves it for export.

python examples/train_vit_digits.py --norm tapered --placement pre --out vit.pt
normfuse export vit.pt --out vit.onnx
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from normfuse_examples import VisionTransformer
from normfuse_examples.blocks import PLACEMENTS
from normfuse_examples.training import TAPERED, TRAININGS, tapered, train
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

import normfuse

BATCH = 32
HELD_OUT = 360


@dataclass(frozen=True)
class Digits:
    """Pictures [n, 1, 8, 8] in [-1, 1] and labels [n], for training and held out."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def digits() -> Digits:
    """1437 pictures for training and 360 held out; the split is the same in every run."""
    data = load_digits()
    images = torch.from_numpy(data.images).float().div(8).sub(1).unsqueeze(1)
    labels = torch.from_numpy(data.target)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels, test_size=HELD_OUT, stratify=labels, random_state=0
    )
    return Digits(train_images, train_labels, test_images, test_labels)


@dataclass(frozen=True)
class Run:
    """A trained model in evaluation mode, how to build it again, and the held-out accuracy of each epoch."""

    model: VisionTransformer
    accuracies: list[float]

    def save(self, path: Path, images: Tensor) -> None:
        """Saves the model with ``images`` as its example inputs; any number of pictures may come later."""
        normfuse.save(
            self.model,
            path,
            example_inputs=images,
            dynamic_shapes={"images": {0: "batch"}},
        )


def accuracy(model: VisionTransformer, data: Digits) -> float:
    """Share of the held-out pictures that the model, left in evaluation mode, classifies correctly."""
    model.eval()
    with torch.no_grad():
        return (model(data.test_images).argmax(1) == data.test_labels).float().mean().item()


def run(norm: str, placement: str, epochs: int, seed: int, data: Digits) -> Run:
    """Trains one model; the same seed gives the same start and the same batches whatever the norm."""
    torch.set_num_threads(1)  # a model this small only waits for its threads
    torch.manual_seed(seed)
    count = len(data.train_images)
    per_epoch = count // BATCH
    steps = epochs * per_epoch
    kind = "layer" if norm == TAPERED else norm
    model = VisionTransformer(norm=kind, placement=placement, warmup_iters=steps // 10)
    conversion = tapered(model, norm, steps)
    shuffle = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    accuracies: list[float] = []

    def loss_of_step(step: int) -> Tensor:
        nonlocal order
        place = step % per_epoch
        if place == 0:
            order = torch.randperm(count, generator=shuffle)
        batch = order[place * BATCH : (place + 1) * BATCH]
        # Shifting by up to one pixel keeps a model of this size from learning 1437 pictures by heart.
        down, right = torch.randint(-1, 2, (2,), generator=shuffle).tolist()
        images = F.pad(data.train_images[batch], (1 + right, 1 - right, 1 + down, 1 - down))[:, :, 1:-1, 1:-1]
        return F.cross_entropy(model(images), data.train_labels[batch])

    def after_step(step: int) -> str | None:
        if (step + 1) % per_epoch:
            return None
        accuracies.append(accuracy(model, data))
        model.train()
        return f"held-out accuracy {accuracies[-1]:.1%}"

    title = f"{norm:>7}"
    train(model, loss_of_step, steps, learning_rate=2e-3, title=title, conversion=conversion, after_step=after_step)
    return Run(model.eval(), accuracies)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--norm", choices=TRAININGS, default=TAPERED)
    parser.add_argument("--placement", choices=PLACEMENTS, default="pre")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("vit.pt"))
    args = parser.parse_args()
    if args.epochs < 1:
        parser.error(f"--epochs {args.epochs} is not allowed; give at least 1")

    data = digits()
    result = run(args.norm, args.placement, args.epochs, args.seed, data)
    result.save(args.out, data.test_images[:4])
    print(f"held-out accuracy: {result.accuracies[-1]:.2%} of {HELD_OUT} pictures")
    print(f"saved {args.out}; next: normfuse export {args.out} --out {args.out.with_suffix('.onnx')}")


if __name__ == "__main__":
    main()
