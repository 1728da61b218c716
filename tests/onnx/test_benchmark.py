import pytest
import tiny_models
import torch
from torch import nn

from normfuse.checkpoint import parse_input
from normfuse.onnx import BenchError, bench, write


class Table(nn.Module):
    """x [batch, seq, width], seq up to 16."""

    def __init__(self, width):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(16, width))
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        return self.linear(x[..., :1] + self.table[: x.shape[1]])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    shapes = {"x": {0: torch.export.Dim("batch"), 1: torch.export.Dim("seq", max=16)}}
    for name, width in (("small", 8), ("large", 512)):
        program = torch.export.export(Table(width).eval(), (torch.ones(3, 6, 1),), dynamic_shapes=shapes)
        write(program, folder / f"{name}.onnx", inputs=[parse_input("x:float32[batch,seq,1]")])
    return folder / "small.onnx", folder / "large.onnx"


def test_two_files_are_timed_round_by_round(files):
    timing = bench(files, sizes={"seq": 16}, rounds=20)
    assert timing.shapes == {"x": [1, 16, 1]}
    assert [len(times) for times in timing.milliseconds] == [20, 20]
    middle, low, high = timing.ratio()
    assert low <= middle <= high
    assert middle > 2, "a network 64 times as wide is slower"


def test_a_file_against_itself_is_about_as_fast(files):
    middle, _, _ = bench([files[1], files[1]], sizes={"seq": 16}, rounds=40).ratio()
    assert 0.7 < middle < 1.4


def test_what_cannot_be_timed(files, tmp_path):
    with pytest.raises(BenchError, match="at least 4"):
        bench(files, rounds=3)
    with pytest.raises(BenchError, match="'length' names no dynamic dimension"):
        bench(files, sizes={"length": 3})
    with pytest.raises(BenchError, match="give other sizes") as caught:
        bench(files, sizes={"seq": 17}, rounds=4)
    assert "\n" not in str(caught.value)
    write(torch.export.export(tiny_models.Perceptron().eval(), (torch.ones(3, 4),)), tmp_path / "p.onnx")
    with pytest.raises(BenchError, match="takes other inputs"):
        bench([files[0], tmp_path / "p.onnx"], sizes={"seq": 16})
