"""How well models train with each norm: a study that any machine can run, go on with, and draw.

    python benchmarks/quality.py --state quality                      # everything; days on one core
    python benchmarks/quality.py --state quality --only lm:pre --tokens 1000000

For every task (a language model, two networks on digits), placement and norm: three learning rates in short trainings,
the best by the validation split; then full trainings with several seeds at that rate, scored on the test split. A
finished training is one line of ``quality.jsonl`` in the folder of results. A training that is under way is stored in
the folder ``--state`` every minute: after a kill, the same command goes on from there and repeats nothing that is
finished. ``benchmarks/quality_report.py`` makes docs/quality.md from the results.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import statistics
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from quality_tasks import NORMS, PLACEMENTS, TASKS, Task, apply_norm
from torch import nn

from normfuse.convert import Conversion, Schedule, progressive, taper
from normfuse.nn import ProgressiveNorm, RegularizedBatchNorm, batch_norm_penalty, calibrate, monitor
from normfuse.nn._running_norm import ChannelNorm

from normfuse_examples.training import optimizer_and_schedule  # isort: skip  (quality_tasks puts it on the path)

ROOT = Path(__file__).parent.parent
CALIBRATING_BATCHES = 50
POINTS = 12  # of a curve
CURVE_BATCHES = 4  # of the validation split in each of them; the end is measured on all
CHOOSING_SEED = 1000  # of the short trainings, so that no seed is both chosen with and judged by
STORE_EVERY = 60.0  # seconds
DIGIT_STEPS = 700
# What is most useful first, so that a study that was cut short says something: (task, placement, norms, seeds).
MAIN = ("layer", "unified", "power", "batch", "tapered", "progressive")
ALL = tuple(name for name, norm in NORMS.items() if not norm.variant)
PHASES: list[tuple[str, str, tuple[str, ...], int]] = [
    ("transformer", "pre", ALL, 3),
    ("lm", "pre", MAIN, 1),
    ("transformer", "post", ALL, 3),
    ("lm", "post", MAIN, 1),
    ("cnn", "pre", ALL, 3),
    ("cnn", "post", ALL, 3),
    ("lm", "pre", ALL, 3),
    ("lm", "post", ALL, 3),
    ("transformer", "pre", ALL, 10),
    ("transformer", "post", ALL, 10),
    ("cnn", "pre", ALL, 10),
    ("cnn", "post", ALL, 10),
]


@dataclass(frozen=True)
class Training:
    """What identifies a training. ``stage`` is "choose" for the short ones, "judge" for the full ones."""

    task: str
    placement: str
    norm: str
    stage: str
    steps: int
    rate: float
    seed: int

    @property
    def name(self) -> str:
        return "-".join(f"{value:g}" if isinstance(value, float) else str(value) for value in asdict(self).values())


class Results:
    """The lines of finished trainings. A line is written at once; what a crash left of one is cut off."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[Training, dict[str, Any]] = {}
        if path.exists():
            text = path.read_bytes()
            whole = text[: text.rfind(b"\n") + 1]
            if whole != text:
                path.write_bytes(whole)
            for line in whole.splitlines():
                record = json.loads(line)
                self.found[Training(**record["training"])] = record

    def add(self, training: Training, record: dict[str, Any]) -> None:
        record = {"training": asdict(training), **record}
        with open(self.path, "ab") as file:
            file.write((json.dumps(record, allow_nan=False) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
        self.found[training] = record


def convert(model: nn.Module, norm: str, steps: int) -> Conversion | None:
    match NORMS[norm].conversion:
        case "progressive":
            return progressive(model, to="rep_batch", schedule=Schedule(steps), frozen=False)
        case "tapered":
            return taper(model, steps)
        case "tapered_wholly":
            return taper(model, steps, keep_last=False)
    return None


def fluctuations(model_watch: Any) -> list[list[float]]:
    """[step, |ln(batch's statistic ÷ running one)|] of each record of a monitor, all norms together."""
    layers = model_watch.to_json()["layers"].values()
    return [
        [step, abs(math.log(ratio))]
        for layer in layers
        for step, ratio in zip(layer["step"], layer["ratio"], strict=True)
        if ratio
    ]


class Trainer:
    """One training, which can be stored and taken up again."""

    def __init__(self, training: Training, task: Task, state: Path, device: str = "cpu") -> None:
        self.training, self.task = training, task
        self.file = state / f"{training.name}.pt"
        torch.manual_seed(training.seed)
        self.generator = torch.Generator().manual_seed(training.seed)
        self.device = device
        self.model = task.build(training.placement).to(device)
        apply_norm(self.model, NORMS[training.norm], training.steps)
        self.conversion = convert(self.model, training.norm, training.steps)
        self.optimizer, self.schedule = optimizer_and_schedule(self.model, training.rate, training.steps)
        self.penalty = any(isinstance(module, RegularizedBatchNorm) for module in self.model.modules())
        self.step, self.seconds, self.train_loss = 0, 0.0, math.nan
        self.curve: list[list[float | None]] = []
        self.fluctuation: list[list[float]] = []
        if self.file.exists():
            self._load(torch.load(self.file, weights_only=True, map_location=device))

    def _load(self, stored: dict[str, Any]) -> None:
        self.model.load_state_dict(stored["model"])
        self.optimizer.load_state_dict(stored["optimizer"])
        self.schedule.load_state_dict(stored["schedule"])
        self.generator.set_state(stored["generator"].cpu())
        torch.set_rng_state(stored["random"].cpu())
        for name in ("step", "seconds", "train_loss", "curve", "fluctuation"):
            setattr(self, name, stored[name])

    def _store(self) -> None:
        schedule = {k: v for k, v in self.schedule.state_dict().items() if k != "lr_lambdas"}
        stored = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": {**schedule, "lr_lambdas": [None] * len(self.optimizer.param_groups)},
            "generator": self.generator.get_state(),
            "random": torch.get_rng_state(),
            **{name: getattr(self, name) for name in ("step", "seconds", "train_loss", "curve", "fluctuation")},
        }
        partial = self.file.with_suffix(".part")
        torch.save(stored, partial)
        partial.replace(self.file)

    def run(self) -> dict[str, Any]:
        """Train to the end; what is to be known of it."""
        steps = self.training.steps
        self.model.train()
        watch = self._watch()
        began = stored = time.monotonic()
        before = self.seconds
        while self.step < steps and math.isfinite(self.train_loss if self.step else 0.0):
            self._take_step()
            if self.step % max(1, steps // POINTS) == 0 or self.step == steps:
                validation = self.task.score(self.model, "validation", CURVE_BATCHES)
                self.curve.append([self.step, _number(self.train_loss), _number(validation["loss"])])
            if time.monotonic() - stored > STORE_EVERY:
                stored = time.monotonic()
                self.seconds = before + stored - began
                self.fluctuation += fluctuations(watch) if watch else []
                if watch:
                    watch.close()
                self._store()
                watch = self._watch()
        self.fluctuation += fluctuations(watch) if watch else []
        if watch:
            watch.close()
        self.seconds = before + time.monotonic() - began
        self.file.unlink(missing_ok=True)
        return self._summary()

    def _watch(self) -> Any:
        if not self._watch_possible():
            return None
        return monitor(self.model, every=max(1, self.training.steps // 100), drift=1e9)

    def _watch_possible(self) -> bool:
        """Whether statistics run in training; tapered ones are constants."""
        frozen = {m.static for m in self.model.modules() if isinstance(m, ProgressiveNorm) and m.frozen}
        return any(isinstance(m, ChannelNorm) and m not in frozen for m in self.model.modules())

    def _calibrated(self) -> float | None:
        """The test loss with statistics of many training batches in the place of those of the last ones."""
        batches = [self.task.batch(self.generator)[0] for _ in range(CALIBRATING_BATCHES)]
        calibrate(self.model, batches, device=self.device, progress=False)
        return _number(self.task.score(self.model, "test")["loss"])

    def _take_step(self) -> None:
        if self.step >= NORMS[self.training.norm].moving * self.training.steps:
            for module in self.model.modules():
                if isinstance(module, ChannelNorm):
                    module.eval()
        inputs, targets = self.task.batch(self.generator)
        loss = total = self.task.loss(self.model, inputs.to(self.device), targets.to(self.device))
        if self.penalty:
            total = loss + batch_norm_penalty(self.model)
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        if self.conversion is not None:
            self.conversion.step()
        self.step += 1
        found = loss.item()
        # Exponential mean over some twenty steps, for the curve.
        self.train_loss = found if math.isnan(self.train_loss) else 0.95 * self.train_loss + 0.05 * found

    def _summary(self) -> dict[str, Any]:
        scores = {split: self.task.score(self.model, split) for split in self.task.parts}
        validation = scores["validation"]["loss"]
        calibrated = self._calibrated() if self._watch_possible() else None
        late = [value for step, value in self.fluctuation if step > self.training.steps // 2]
        return {
            **{split: {name: _number(value) for name, value in score.items()} for split, score in scores.items()},
            "diverged": not validation < self.task.constant,
            "curve": [[step, *(None if v is None else round(v, 4) for v in rest)] for step, *rest in self.curve],
            "calibrated": calibrated,
            "fluctuation": round(statistics.fmean(late), 5) if late else None,
            "seconds": round(self.seconds, 1),
        }


def _number(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None


def here(device: str) -> dict[str, str]:
    """The machine, for every line."""
    if device != "cpu":
        return {"machine": torch.cuda.get_device_name(), "torch": torch.__version__, "date": str(datetime.date.today())}
    names = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.partition(": ")[2] for line in names if line.startswith("model name")), platform.processor())
    return {"machine": f"{cpu}, 1 thread", "torch": torch.__version__, "date": datetime.date.today().isoformat()}


@cache
def _task(name: str) -> Task:
    return TASKS[name]()


class Study:
    """Which training comes next, given those that are finished."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        options.state.mkdir(parents=True, exist_ok=True)
        options.results.mkdir(parents=True, exist_ok=True)
        self.results = Results(options.results / "quality.jsonl")

    def steps(self, task: str, stage: str) -> int:
        options = self.options
        if task.startswith("lm"):
            tokens = options.tokens if stage == "judge" else options.choosing_tokens
            return max(POINTS, tokens // _task(task).tokens_per_step)
        return options.digit_steps if stage == "judge" else max(POINTS, options.digit_steps // 2)

    def plan(self) -> Iterator[Training]:
        for task, placement, norms, seeds in self.phases():
            for norm in norms if self.options.rate is None else ():
                for rate in _task(task).rates:
                    yield Training(task, placement, norm, "choose", self.steps(task, "choose"), rate, CHOOSING_SEED)
            for seed in range(seeds):
                for norm in norms:
                    rate = self.best_rate(task, placement, norm)
                    yield Training(task, placement, norm, "judge", self.steps(task, "judge"), rate, seed)

    def phases(self) -> Iterator[tuple[str, str, tuple[str, ...], int]]:
        only = [entry.split(":") for entry in self.options.only or ["*"]]
        given = {parts[0] for parts in only} - {"*"} - {task for task, *_ in PHASES}
        extra = [(task, place, ALL, 3) for task in sorted(given) for place in PLACEMENTS]
        variants = {name for parts in only for name in parts[2:] if name not in ("*", *ALL)}
        for task, placement, norms, seeds in [*PHASES, *extra]:
            chosen = tuple(
                norm
                for norm in (*norms, *sorted(variants))
                if any(_matches(entry, task, placement, norm) for entry in only)
            )
            if chosen:
                yield task, placement, chosen, min(seeds, self.options.seeds or seeds)

    def best_rate(self, task: str, placement: str, norm: str) -> float:
        """By the validation loss of the short trainings; one that ended without a number counts as infinite."""
        if self.options.rate is not None:
            return self.options.rate

        def loss(rate: float) -> float:
            steps = self.steps(task, "choose")
            found = self.results.found[Training(task, placement, norm, "choose", steps, rate, CHOOSING_SEED)]
            value = found["validation"]["loss"]
            return math.inf if value is None else value

        return min(_task(task).rates, key=loss)

    def run(self) -> None:
        for training in self.plan():
            if training in self.results.found:
                continue
            record = Trainer(training, _task(training.task), self.options.state, self.options.device).run()
            self.results.add(training, record | here(self.options.device))
            loss, test = record["validation"]["loss"], record["test"]
            print(
                f"{datetime.datetime.now():%H:%M:%S} {training.name}: validation {loss}, test {test['loss']} "
                f"({test['accuracy']:.4f} right), {record['seconds']} s",
                flush=True,
            )


def _matches(entry: list[str], *names: str) -> bool:
    return all(wanted in ("*", name) for wanted, name in zip(entry, names, strict=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=Path, required=True, help="folder for trainings that are under way")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of quality.jsonl")
    parser.add_argument("--tokens", type=int, default=5_000_000, help="of a full training of the language model")
    parser.add_argument("--choosing-tokens", type=int, default=500_000, help="of a training that chooses the rate")
    parser.add_argument("--digit-steps", type=int, default=DIGIT_STEPS, help="of a full training on digits")
    parser.add_argument("--rate", type=float, help="learning rate of all trainings; nothing is chosen then")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--seeds", type=int, help="at most so many at the best rate")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="TASK[:PLACEMENT[:NORM]]",
        help=f"tasks: {', '.join(TASKS)}; * for any but variants: {', '.join(sorted(NORMS.keys() - ALL))}",
    )
    options = parser.parse_args()
    for name in ("tokens", "choosing_tokens", "digit_steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)} is not allowed; give at least 1")
    for entry in options.only or ():
        names = entry.split(":")
        for name, known in zip(names, (TASKS, PLACEMENTS, NORMS), strict=False):
            if name != "*" and name not in known:
                parser.error(f"--only {entry}: {name!r} is unknown; give one of {', '.join(known)}")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=RuntimeWarning)
    Study(options).run()


if __name__ == "__main__":
    main()
