"""dtype int8: scales chosen for integers, verified in float32, quantised, refused where that costs too much."""

import os
import re

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import normfuse
import normfuse.onnx
from normfuse.checkpoint import ExportableModel
from normfuse.nn import UnifiedNorm
from normfuse.onnx.publish import data_beside
from normfuse.onnx.quantize import quantize, read_calibration
from normfuse.onnx.runtime import RuntimeFailure
from normfuse.onnx.verifier import compare_int8, session
from normfuse.onnx.writer import save_model
from normfuse.options import INT8_FILE


class Network(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.first, self.norm = nn.Linear(8, width), UnifiedNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, 4)

    def forward(self, x):
        h = self.norm(self.first(x))
        return self.down(torch.relu(self.up(h))), h.mean(-1)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    net = Network().eval()
    net.norm.weight.data = torch.logspace(-1, 1, 16)
    return ExportableModel.from_model(net, inputs(0), {"x": {0: torch.export.Dim("batch")}})


def inputs(seed, rows=32):
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def result(model, tmp_path_factory):
    return normfuse.onnx.export(model, tmp_path_factory.mktemp("int8") / "m.onnx", dtype="int8")


def test_products_are_int8_and_the_error_is_told_for_every_output(model, result):
    path = result.path
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert kinds.count("MatMulInteger") == 3 and "MatMul" not in kinds and "Gemm" not in kinds
    assert result.dtype == result.graph.dtype == "int8" and not result.graph.norms and not result.graph.affines
    cases = [case for case in result.verification.cases if case.form == INT8_FILE]
    assert [case.output for case in cases] == ["output 0", "output 1"] and result.verification.worst("ONNX file") < 1e-4
    x = inputs(0)
    got = normfuse.onnx.verifier.session(path).run({"x": x.numpy()})
    for case, value, want in zip(cases, got, model.run([x]), strict=True):
        off = np.linalg.norm(value - want.numpy()) / np.linalg.norm(want.numpy())
        assert 1e-4 < case.error < 0.1 and case.error == pytest.approx(off, rel=1e-3)
    assert [path] == list(path.parent.iterdir())


def test_steps_are_constants_after_calibration(model, tmp_path):
    file = tmp_path / "typical.npz"
    np.savez(file, x=inputs(1, rows=100).numpy())
    path = tmp_path / "m.onnx"
    normfuse.onnx.export(model, path, dtype="int8", calibrate=file)
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert "QuantizeLinear" in kinds and "DynamicQuantizeLinear" not in kinds
    assert [len(batch[0]) for batch in read_calibration(file, model)] == [32] * 3


def test_an_onnx_runtime_without_the_newest_quantisation_gets_its_own(model, tmp_path, monkeypatch):
    """1.23 runs files of opset 23, but not QuantizeLinear of that opset."""

    def older(path):
        if any(node.op_type == "QuantizeLinear" and not node.domain for node in onnx.load(path).graph.node):
            raise RuntimeFailure("NOT_IMPLEMENTED")

    file, path = tmp_path / "typical.npz", tmp_path / "m.onnx"
    np.savez(file, x=inputs(1, 96).numpy())
    monkeypatch.setattr("normfuse.onnx.runtime.Session", older)
    normfuse.onnx.export(model, path, dtype="int8", calibrate=file)
    nodes = onnx.load(path).graph.node
    assert {node.domain for node in nodes if node.op_type == "QuantizeLinear"} == {"com.microsoft"}


def test_too_large_an_error_writes_nothing(model, tmp_path):
    with pytest.raises(
        normfuse.NormfuseError, match=r"int8 changes output \d by \d\.\d% of its size .* allowed are 0%"
    ):
        normfuse.onnx.export(model, tmp_path / "m.onnx", dtype="int8", rtol=1e-4)
    assert not list(tmp_path.iterdir())


def test_an_error_is_over_all_inputs_together(model, result):
    path = result.path
    batches = [(inputs(1),), (10 * inputs(2),)]
    alone = [compare_int8(model, path, [batch], 1.0)[0] for batch in batches]
    both = compare_int8(model, path, batches, 1.0)[0]
    assert both.difference == pytest.approx((alone[0].difference ** 2 + alone[1].difference ** 2) ** 0.5)


def test_a_file_is_verified_again_as_it_was_exported(model, result):
    told = [case for case in result.verification.cases if case.form == INT8_FILE]
    report = normfuse.onnx.verify(model, result.path)
    assert normfuse.onnx.summarize(result.path).dtype == "int8"
    assert [case.error for case in report.cases] == pytest.approx([case.error for case in told])
    with pytest.raises(normfuse.NormfuseError, match="int8 changes output"):
        normfuse.onnx.verify(model, result.path, rtol=1e-4)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y": np.zeros((40, 8), np.float32)}, "has no array 'x'; the model takes x, the file has y"),
        ({"x": np.zeros((4, 8), np.float32)}, "array 'x' in .* has 4 rows; give at least 32, as the example has"),
        ({"x": np.array([object()])}, "cannot read .* as .npz"),
        ({"x": np.float32(1)}, r"calibrate\[0\], input 'x': its shape is \[\], not \[any, 8\]"),
        ({"x": np.full((40, 8), "text")}, "array 'x' in .* is <U4; input 'x' of the model is float32"),
        ({"x": np.zeros((40, 8), complex)}, "array 'x' in .* is complex128; input 'x'"),
        ({"x": np.full((40, 8), 1e300)}, "array 'x' in .* holds numbers beyond float32"),
        ({"x": np.zeros((40, 5), np.float32)}, r"calibrate\[0\], input 'x': its shape is \[32, 5\], not \[any, 8\]"),
        ({"x": np.full((40, 8), np.nan, np.float32)}, "values that are not finite in front of 'first'; give others"),
        ({"x": np.zeros((0, 8), np.float32)}, "array 'x' in .* has 0 rows; give at least 32, as the example has"),
    ],
)
def test_calibration_files_that_do_not_fit(model, tmp_path, arrays, message):
    file = tmp_path / "typical.npz"
    np.savez(file, **arrays)
    with pytest.raises(normfuse.NormfuseError, match=message):
        normfuse.onnx.export(model, tmp_path / "m.onnx", dtype="int8", calibrate=file)


@pytest.mark.parametrize("content", [b"", b"PK\3\4 no zip", "array"])
def test_calibration_files_of_other_kinds(model, tmp_path, content):
    file = tmp_path / "typical.npz"
    if content == "array":
        with file.open("wb") as stream:
            np.save(stream, inputs(0).numpy())
    else:
        file.write_bytes(content)
    with pytest.raises(normfuse.NormfuseError, match=r"cannot read .*typical.npz as .npz: "):
        normfuse.onnx.export(model, tmp_path / "m.onnx", dtype="int8", calibrate=file)


def test_arrays_that_hold_the_same_numbers_in_another_type_and_others_are_taken(model, tmp_path):
    x = inputs(0, 70).numpy()
    np.savez(tmp_path / "a.npz", x=x)
    for number, other in enumerate((x.astype(np.float64), x.astype(">f4"))):
        np.savez(tmp_path / f"{number}.npz", x=other, labels=np.array([object()]))
        for got, want in zip(*(read_calibration(tmp_path / f"{n}.npz", model) for n in (number, "a")), strict=True):
            assert torch.equal(got[0], want[0])


class Shifted(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x, table, number):
        return self.last(torch.relu(self.first(x)) * number + table[1])


def test_inputs_without_rows_go_into_every_run(tmp_path):
    x, table, numbers = inputs(0, 7).numpy(), inputs(1, 2).numpy(), np.float32([0.5, 1, 2])
    given = ExportableModel.from_model(Shifted().eval(), (inputs(0, 2), inputs(1, 2), torch.tensor(1.0)), None)
    np.savez(tmp_path / "a.npz", x=x, table=table, number=numbers)
    runs = read_calibration(tmp_path / "a.npz", given)
    for number, run in enumerate(runs):
        want = x[2 * number : 2 * number + 2], table, numbers[number]
        assert all((got.numpy() == part).all() for got, part in zip(run, want, strict=True))
    np.savez(tmp_path / "one.npz", x=x, table=table, number=np.float32(0.5))
    result = normfuse.onnx.export(given, tmp_path / "m.onnx", dtype="int8", calibrate=tmp_path / "one.npz")
    assert len(runs) == 3 and result.graph.dtype == "int8"
    np.savez(tmp_path / "a.npz", x=x, table=table, number=numbers[:2])
    with pytest.raises(normfuse.NormfuseError, match=r"array 'number' in .* is enough for 2 runs, array 'x' for 3"):
        read_calibration(tmp_path / "a.npz", given)


def test_the_calibration_file_is_not_written_over(model, tmp_path):
    file = tmp_path / "typical.npz"
    np.savez(file, x=inputs(0).numpy())
    with pytest.raises(normfuse.NormfuseError, match="this command reads it too"):
        normfuse.onnx.export(model, file, dtype="int8", calibrate=file)


@pytest.mark.parametrize("limit", [0, 10**6])
def test_weights_beside_an_int8_file_are_named_as_any_others(tmp_path, monkeypatch, limit):
    program = torch.export.export(nn.Linear(64, 64), (torch.randn(3, 64),))
    monkeypatch.setattr(save_model, "__defaults__", (limit,))
    for number in range(2):
        path = tmp_path / str(number) / "m.onnx"
        path.parent.mkdir()
        normfuse.onnx.write(program, path, one_file_limit=0)
        quantize(path)
    names = [sorted(os.listdir(tmp_path / str(number))) for number in range(2)]
    if limit:
        assert names == [["m.onnx"]] * 2
    else:
        assert all(re.fullmatch(r"m\.onnx\.\w{8}\.data", pair[1]) for pair in names) and names[0] != names[1]
        assert [data_beside(tmp_path / str(n) / "m.onnx") for n in range(2)] == [pair[1:] for pair in names]
    assert len(session(path).run({"input": np.zeros((3, 64), np.float32)})) == 1


class Answers:
    """What gives fixed outputs, as a model and as a file."""

    def __init__(self, *outputs):
        self.outputs = [torch.tensor(output) for output in outputs]

    def run(self, tensors):
        return self.outputs


@pytest.mark.parametrize(
    ("want", "got", "errors"),
    [
        (([1.0, 1.0], [1, 2, 3, 4]), ([1.0, 1.1], [1, 2, 3, 5]), [0.0707, 0.25]),
        (([1.0, 0.0], [True, False]), ([1.0, 0.0], [True, False]), [0.0, 0.0]),
        (([1.0], [2.0], [3.0]), ([1.0], [np.nan], [3.0]), None),
    ],
)
def test_integers_count_by_share_and_no_output_may_be_nan(monkeypatch, want, got, errors):
    monkeypatch.setattr("normfuse.onnx.verifier.onnx_runner", lambda *_, **__: Answers(*got).run)
    if errors is None:
        with pytest.raises(normfuse.NormfuseError, match="int8 changes output 1 by nan%"):
            compare_int8(Answers(*want), None, [[inputs(0)]], 0.3)
    else:
        cases = compare_int8(Answers(*want), None, [[inputs(0)]], 0.3)
        assert [case.error for case in cases] == pytest.approx(errors, rel=1e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibrate": [[inputs(0)]]}, "calibrate is for dtype 'int8', not 'float32'; leave it out"),
        ({"dtype": "int8", "calibrate": []}, "calibrate holds no inputs; give at least one"),
        ({"dtype": "int8", "calibrate": [[]]}, r"calibrate\[0\] holds 0 inputs; the program takes 1"),
        ({"dtype": "int8", "calibrate": {"x": inputs(0)}}, "calibrate is no sequence of tensors"),
    ],
)
def test_what_is_refused(model, tmp_path, options, message):
    with pytest.raises(normfuse.NormfuseError, match=message):
        normfuse.onnx.export(model, tmp_path / "m.onnx", **options)


def test_an_onnx_file_is_folded_in_its_own_type(tmp_path):
    with pytest.raises(normfuse.NormfuseError, match="an ONNX file is folded in its own type; quantise the result"):
        normfuse.onnx.fold_file(tmp_path / "a.onnx", tmp_path / "b.onnx", dtype="int8")
