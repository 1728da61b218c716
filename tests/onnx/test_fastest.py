"""target auto: the fastest of the files for all targets, and never one that is slower than portable."""

import dataclasses
import importlib
from collections import Counter

import pytest
import torch
from torch import nn

import normfuse
import normfuse.onnx
from normfuse.checkpoint import ExportableModel
from normfuse.files import Output
from normfuse.nn import UnifiedNorm
from normfuse.onnx import fastest
from normfuse.onnx.benchmark import Timing
from normfuse.onnx.publish import publish
from normfuse.onnx.verifier import session
from normfuse.options import AUTO, ExportError

steps = importlib.import_module("normfuse.onnx.steps")


def timing(*milliseconds):
    return Timing([str(number) for number in range(len(milliseconds))], {"x": [1, 4]}, 1, list(milliseconds))


@pytest.mark.parametrize(
    ("times", "chosen"),
    [
        ([[2, 2, 2, 2], [1, 1, 1, 1], [3, 3, 3, 3]], 1),
        ([[2, 2, 2, 2], [1, 1, 3, 3], [4, 4, 4, 4]], 0),  # faster in half of the rounds only
        ([[2, 20, 2, 20], [1.9, 19, 1.9, 19]], 1),  # a busy machine meets both
        ([[2, 2, 2, 2], [2, 2, 2, 2]], 0),
    ],
)
def test_the_fastest_is_chosen_if_it_is_faster_in_most_rounds(times, chosen):
    assert fastest.choose(timing(*times)) == chosen


def test_a_size_of_no_dimension_is_refused_before_anything_is_written(tmp_path):
    stages = []
    with pytest.raises(ExportError, match="size 'bath' names no dynamic dimension of the inputs; there are batch"):
        normfuse.onnx.export(
            nn.Linear(4, 2).eval(), tmp_path / "m.onnx", example_inputs=torch.randn(3, 4),
            dynamic_shapes=({0: "batch"},), target=AUTO, sizes={"bath": 7}, progress=stages.append,
        )  # fmt: skip
    assert not any("portable" in stage for stage in stages)


def test_the_file_is_the_one_that_was_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(fastest, "TIMED", ("portable", "cpu-single", "cpu-long"))
    run, runs, timed = ExportableModel.run, [], []

    def counted(model, tensors):
        runs.append(tuple((tensor.shape, tensor.numpy().tobytes()) for tensor in tensors))
        return run(model, tensors)

    monkeypatch.setattr(ExportableModel, "run", counted)
    calls = Counter()
    for module, name in ((torch.onnx, "export"), (steps, "fold")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, name=name, real=real, **k: calls.update([name]) or real(*a, **k))

    def bench(paths, *, sizes, rounds, threads):
        timed.extend(path.read_bytes() for path in paths)
        assert (sizes, threads) == ({"batch": 7}, 2)
        return timing(*([1.0 + (number != 1)] * 4 for number in range(3)))

    monkeypatch.setattr(fastest, "bench", bench)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), UnifiedNorm(8), nn.ReLU(), nn.Linear(8, 2)).eval()
    x = torch.randn(3, 5, 4)
    path = tmp_path / "m.onnx"
    result = normfuse.onnx.export(
        model, path, example_inputs=x, dynamic_shapes=({0: "batch"},), target=AUTO, sizes={"batch": 7}, threads=2
    )
    assert (
        result.target == "cpu-single"
        and "target cpu-single was chosen for x [1, 4] and 1 thread(s)" in result.notes[-1]
    )
    assert path.read_bytes() == timed[1] != timed[0] and result.path == path
    assert list(tmp_path.iterdir()) == [path]
    assert len(runs) == len(set(runs)), "the model ran twice on the same inputs"
    assert calls == {"fold": 1, "export": 2}, "a program with biases that travel and one without, for three targets"


@dataclasses.dataclass(frozen=True)
class Result:
    target: str
    notes: list[str] = dataclasses.field(default_factory=list)


def test_weights_beside_the_fastest_come_along(tmp_path, monkeypatch):
    monkeypatch.setattr(fastest, "TIMED", ("portable", "cpu"))
    monkeypatch.setattr(fastest, "bench", lambda paths, **options: timing([2.0] * 4, [1.0] * 4))
    programs = {name: torch.export.export(nn.Linear(32, 8), (torch.randn(3, 32),)) for name in fastest.TIMED}

    def export(target, path, progress):
        normfuse.onnx.write(programs[target], path, one_file_limit=0)
        return Result(target)

    with Output(tmp_path / "m.onnx") as output:
        chosen = fastest.fastest(export, output, {}, 1, print)
        publish(output)
    x = torch.randn(3, 32)
    (got,) = session(tmp_path / "m.onnx").run({"input": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), programs["cpu"].module()(x))
    assert chosen.target == "cpu" and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("options", [{"sizes": {"batch": 2}}, {"threads": 2}])
def test_sizes_and_threads_are_for_auto(tmp_path, options):
    model = nn.Linear(2, 2)
    with pytest.raises(normfuse.NormfuseError, match="are for timing with target 'auto', not 'portable'"):
        normfuse.onnx.export(model, tmp_path / "m.onnx", example_inputs=torch.randn(1, 2), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "threads is 0; give a whole number from 1 to 1024"),
        ({"threads": 1.5}, "threads is 1.5; give a whole number"),
        ({"threads": 10**6}, "threads is 1000000; give a whole number"),
        ({"sizes": {"batch": 0}}, "size 'batch' is 0; give a whole number of at least 1"),
        ({"sizes": {"batch": "two"}}, "size 'batch' is 'two'; give a whole number"),
        ({"sizes": ["batch"]}, "sizes is a list; give a mapping"),
    ],
)
def test_sizes_and_threads_that_nothing_can_be_timed_with(tmp_path, options, message):
    with pytest.raises(normfuse.NormfuseError, match=message):
        normfuse.onnx.export(
            nn.Linear(2, 2), tmp_path / "m.onnx", example_inputs=torch.randn(1, 2), target=AUTO, **options
        )
    with pytest.raises(normfuse.NormfuseError, match=message):
        normfuse.onnx.bench([tmp_path / "m.onnx"], **options)


@pytest.mark.parametrize("size", [10**13, 10**30])
def test_sizes_beyond_the_memory(tmp_path, size):
    normfuse.onnx.export(
        nn.Linear(2, 2), tmp_path / "m.onnx", example_inputs=torch.randn(3, 2), dynamic_shapes=({0: "batch"},)
    )
    with pytest.raises(normfuse.NormfuseError, match=r"input 'input' of shape \[10+, 2\] does not fit in memory; give"):
        normfuse.onnx.bench([tmp_path / "m.onnx"], sizes={"batch": size})


def test_what_cannot_be_timed_is_refused_by_name(tmp_path):
    with pytest.raises(normfuse.NormfuseError, match="only export can choose one"):
        normfuse.onnx.fold_file(tmp_path / "a.onnx", tmp_path / "b.onnx", target=AUTO)
