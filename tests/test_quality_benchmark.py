"""The study of training: it goes on after a kill, repeats nothing, and judges on a split that chose nothing."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from normfuse.nn import PowerNorm, UnifiedNorm

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def quality():
    import quality

    return quality


@pytest.fixture
def training(quality):
    return quality.Training("cnn", "pre", "progressive", "judge", 12, 2e-3, 0)


def without_time(record):
    return {name: value for name, value in record.items() if name not in ("seconds", "fluctuation")}


def test_a_killed_training_goes_on_bit_for_bit(quality, training, tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "CALIBRATING_BATCHES", 1)
    task = quality.TASKS["cnn"]()
    whole = quality.Trainer(training, task, tmp_path).run()
    monkeypatch.setattr(quality, "STORE_EVERY", -1.0)

    def until_the_seventh(generator):
        if killed.step == 7:
            raise KeyboardInterrupt
        return task.batch(generator)

    killed = quality.Trainer(training, replace(task, batch=until_the_seventh), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    torch.rand(3)  # the state of the process is not what the training goes on with
    again = quality.Trainer(training, task, tmp_path)
    assert again.step == 7
    assert without_time(again.run()) == without_time(whole)
    assert not list(tmp_path.iterdir())


def test_a_line_that_a_crash_cut_off_is_forgotten(quality, training, tmp_path):
    file = tmp_path / "quality.jsonl"
    results = quality.Results(file)
    results.add(training, {"validation": {"loss": 1.0}})
    with file.open("a") as lines:
        lines.write('{"training": {"task": "cn')
    again = quality.Results(file)
    assert list(again.found) == [training]
    again.add(quality.Training("cnn", "pre", "layer", "judge", 12, 2e-3, 0), {})
    assert [json.loads(line)["training"]["norm"] for line in file.read_text().splitlines()] == ["progressive", "layer"]


def test_the_best_rate_is_that_of_the_validation_split(quality, tmp_path):
    options = quality.argparse.Namespace(
        state=tmp_path / "state", results=tmp_path, digit_steps=40, only=["cnn:pre:layer"], seeds=2, rate=None
    )
    study = quality.Study(options)
    expected = []
    for training in study.plan():
        expected.append(training)
        loss = {1e-3: None, 2e-3: 1.0, 4e-3: 2.0}[training.rate]
        study.results.add(training, {"validation": {"loss": loss}, "test": {"loss": -training.rate}})
        if len(expected) == 5:
            break
    assert [(t.stage, t.rate, t.seed) for t in expected] == [
        *(("choose", rate, quality.CHOOSING_SEED) for rate in (1e-3, 2e-3, 4e-3)),
        ("judge", 2e-3, 0),
        ("judge", 2e-3, 1),
    ]


def test_variants_run_only_where_they_are_asked_for(quality, tmp_path):
    def planned(*only):
        options = quality.argparse.Namespace(
            state=tmp_path / "state", results=tmp_path, digit_steps=40, only=list(only), seeds=1, rate=1e-3
        )
        return {training.norm for training in quality.Study(options).plan()}

    assert planned("cnn:pre") == set(quality.ALL)
    assert planned("cnn:pre:power_early", "cnn:pre:layer") == {"power_early", "layer"}


def test_a_variant_has_another_norm_in_the_second_half_and_freezes_statistics(quality, tmp_path):
    def training(norm, rate=1e-3):
        return quality.Training("cnn", "pre", norm, "judge", 5, rate, 0)

    task = quality.TASKS["cnn"]()
    early = quality.Trainer(training("power_early"), task, tmp_path).model
    assert [m.group_num for m in early.modules() if isinstance(m, PowerNorm)] == [1] * 4 + [None] * 3
    frozen = quality.Trainer(training("unified_frozen"), task, tmp_path)
    frozen.run()
    assert {int(m.iters) for m in frozen.model.modules() if isinstance(m, UnifiedNorm)} == {4}


def test_no_picture_that_is_judged_on_is_trained_on(quality):
    task = quality.TASKS["cnn"]()
    validation, test = (
        {row.numpy().tobytes() for inputs, _ in task.parts[split] for row in inputs} for split in ("validation", "test")
    )
    assert len(validation) == 300 and len(test) == 360 and not validation & test
    generator = torch.Generator().manual_seed(0)
    seen = {row.numpy().tobytes() for _ in range(60) for row in task.batch(generator)[0]}
    assert not seen & (validation | test)


def test_no_text_that_is_judged_on_is_trained_on(quality):
    import quality_tasks

    text = {name: bytes(part.numpy()) for name, part in quality_tasks.library_text().items()}
    assert len({len(part) for part in text.values()}) == 3
    for split, others in (("validation", ("training", "test")), ("test", ("training", "validation"))):
        assert not any(text[split][at : at + 2000] in text[other] for at in (0, 100_000) for other in others)


def test_the_page_is_what_the_results_say(quality):
    import quality_report

    page = (BENCHMARKS.parent / "docs" / "quality.md").read_text()
    shown = page.partition("<!-- quality: begin -->\n")[2].partition("\n<!-- quality: end -->")[0]
    groups = quality_report.read(BENCHMARKS / "results" / "quality.jsonl")
    assert shown == quality_report.text(groups), "run benchmarks/quality_report.py"


def test_a_ratio_is_over_common_seeds_and_leaves_out_what_diverged(quality):
    import quality_report

    def run(seed, loss, diverged=False):
        return {"training": {"seed": seed}, "test": {"loss": loss}, "diverged": diverged}

    base = [run(0, 1.0), run(1, 2.0), run(2, 100.0)]
    assert quality_report.ratio([run(0, 1.1), run(1, 2.2), run(3, 50.0)], base) == "1.100"
    assert quality_report.ratio([run(0, 1.1), run(1, None, diverged=True)], base) == "1.100"
    assert quality_report.ratio([run(5, 1.0)], base) == "–"


def test_trainings_are_compared_at_one_rate_where_layer_norm_has_several(quality, tmp_path):
    import quality_report

    def line(norm, rate, task="lm", stage="judge", seed=0):
        training = quality.Training(task, "pre", norm, stage, 12, rate, seed)
        return json.dumps({"training": quality.asdict(training)}) + "\n"

    file = tmp_path / "quality.jsonl"
    lines = [line("layer", 2e-3), line("layer", 4e-3), line("unified", 4e-3), line("layer", 1e-3, stage="choose")]
    pictures = [line("power", 2e-3, "cnn"), *(line("power", 4e-3, "cnn", seed=seed) for seed in range(2))]
    file.write_text("".join([*lines, line("layer", 2e-3, "cnn"), *pictures]))
    groups = quality_report.read(file)
    assert [run["training"]["rate"] for run in groups["cnn", "pre", 12, 0.0]["power"]] == [4e-3] * 2
    assert {group: sorted(runs) for group, runs in groups.items()} == {
        ("lm", "pre", 12, 2e-3): ["layer"],
        ("lm", "pre", 12, 4e-3): ["layer", "unified"],
        ("cnn", "pre", 12, 0.0): ["layer", "power"],
    }
