import pytest
import tiny_models
import torch

from normfuse.onnx import BenchError, bench, write


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    shapes = {"tokens": {0: torch.export.Dim("batch"), 1: torch.export.Dim("seq", max=16)}}
    for name, width in (("small", 8), ("large", 256)):
        model = tiny_models.Encoder(width=width).eval()
        program = torch.export.export(model, (torch.ones(3, 6, dtype=torch.int64),), dynamic_shapes=shapes)
        from normfuse.checkpoint import parse_input

        write(program, folder / f"{name}.onnx", inputs=[parse_input("tokens:int64[batch,seq]")])
    return folder / "small.onnx", folder / "large.onnx"


def test_two_files_are_timed_round_by_round(files):
    timing = bench(files, sizes={"seq": 16}, rounds=20)
    assert timing.shapes == {"tokens": [1, 16]}
    assert [len(times) for times in timing.milliseconds] == [20, 20]
    middle, low, high = timing.ratio()
    assert low <= middle <= high
    assert middle > 2, "a network 32 times as wide is slower"


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
