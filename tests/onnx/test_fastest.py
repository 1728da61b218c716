"""target auto: the fastest of the files for all targets, and never one that is slower than portable."""

import onnx
import pytest
import torch
from torch import nn

import normfuse
import normfuse.onnx
from normfuse.nn import UnifiedNorm
from normfuse.onnx import fastest
from normfuse.onnx.benchmark import Timing
from normfuse.options import AUTO


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


def operations(path):
    return [node.op_type for node in onnx.load(path).graph.node]


def test_the_file_is_that_of_the_chosen_target(tmp_path, monkeypatch):
    monkeypatch.setattr(fastest, "TARGETS", {"portable": (), "cpu-single": ()})
    timed = []

    def bench(paths, *, sizes, rounds, threads):
        timed.append([operations(path) for path in paths])
        assert (sizes, threads) == ({"batch": 7}, 2)
        return timing(*([1.0 + (number != 1)] * 4 for number in range(2)))

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
    assert operations(path) == timed[0][1] and timed[0][0] != timed[0][1]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("options", [{"sizes": {"batch": 2}}, {"threads": 2}])
def test_sizes_and_threads_are_for_auto(tmp_path, options):
    model = nn.Linear(2, 2)
    with pytest.raises(normfuse.NormfuseError, match="are what target 'auto' times with, not 'portable'"):
        normfuse.onnx.export(model, tmp_path / "m.onnx", example_inputs=torch.randn(1, 2), **options)


def test_what_cannot_be_timed_is_refused_by_name(tmp_path):
    with pytest.raises(normfuse.NormfuseError, match="auto is for the export of a model"):
        normfuse.onnx.fold_file(tmp_path / "a.onnx", tmp_path / "b.onnx", target=AUTO)
