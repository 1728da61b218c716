"""The arithmetic of the inference benchmark, and its smallest run."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def inference():
    import inference

    return inference


def test_results_have_one_record_on_a_line(tmp_path):
    import records

    content = {
        "date": "2026",
        "machine": {"cpu": "a\nb"},
        "settings": [{"times": [0.1, 1e-9]}, {"times": []}],
        "none": [],
    }
    records.write(tmp_path / "r.json", content)
    text = (tmp_path / "r.json").read_text()
    assert json.loads(text) == content and [path.name for path in tmp_path.iterdir()] == ["r.json"]
    assert '\n  {"times": [0.1, 1e-09]},\n' in text and len(text.splitlines()) == 11


@pytest.mark.parametrize("path", sorted((BENCHMARKS / "results").glob("*.json")), ids=lambda path: path.name)
def test_stored_results_are_compact(path):
    import records

    text = path.read_text()
    assert text == records.dumps(json.loads(text))


def test_ratios_are_taken_within_rounds(inference):
    """A busy moment that makes a round three times as long leaves its ratio as it is."""
    floor, half = [1.0, 3.0, 1.0, 1.0, 9.0], [0.5, 1.5, 0.5, 0.5, 4.5]
    assert inference.ratios(half, floor) == [0.5, 0.5, 0.5]


def test_the_fastest_layer_norm_is_one_that_users_get_without_us(inference):
    times = {"floor": 2.0, "layer": 4.0, "layer, opset 20": 3.0, "layer, shaped": 1.0, "folded and shaped": 1.5}
    summary = inference.summarize({name: [value] * 4 for name, value in times.items()}, 2, 1, 32)
    assert summary["fastest_layer_norm"] == "layer, opset 20"
    assert summary["shaped_to_fastest_layer_norm"][1] == 0.5
    assert summary["shaped_to_shaped_layer_norm"][1] == 1.5 and summary["to_floor"]["folded and shaped"][1] == 0.75


@pytest.mark.parametrize(
    ("threads", "batch", "length", "form"),
    [(1, 8, 250, ", single"), (2, 8, 128, ""), (1, 8, 251, ""), (1, 8, 512, ", long"), (2, 1, 1024, ", long")],
)
def test_what_is_compared_is_what_the_documentation_advises(inference, threads, batch, length, form):
    assert inference.advised("folded and", threads, batch, length) == f"folded and shaped{form}"
    assert inference.advised("layer,", threads, batch, length) == f"layer, shaped{form}"


def test_every_round_runs_each_variant_once(inference):
    calls = []

    class Session:
        def __init__(self, name):
            self.name = name

        def run(self, outputs, feeds):
            calls.append((self.name, feeds[self.name]))

    names = ["a", "b", "c"]
    times = inference.run_in_turns({name: Session(name) for name in names}, {name: {name: 5} for name in names}, 0.0, 9)
    assert {len(values) for values in times.values()} == {9}
    rounds = np.array([name for name, _ in calls]).reshape(-1, 3)
    assert all(sorted(names_of_round) == names for names_of_round in rounds)
    assert len({tuple(names_of_round) for names_of_round in rounds}) > 1 and {fed for _, fed in calls} == {5}


def test_sessions_are_opened_in_another_order_each_time_and_the_floor_twice(inference):
    orders = []
    for opening in range(4):
        opened: list[str] = []
        sessions = inference.open_sessions(["floor", "layer", "folded"], opening, opened.append)
        assert list(sessions) == ["floor", "layer", "folded", "floor again"]
        assert opened[0] == "floor" and sorted(opened) == ["floor", "floor", "floor", "folded", "layer"]
        orders.append(tuple(opened))
    assert len(set(orders)) > 1


def test_a_small_run_times_every_variant(inference, tmp_path, monkeypatch):
    options = "--widths 32 --sequences 8 --placements post --batches 1 --threads 1 --depth 1 --seconds 0 --openings 2"
    monkeypatch.setattr(sys, "argv", ["inference.py", *options.split(), "--note", "n", "--results", str(tmp_path)])
    inference.main()
    run = json.loads((tmp_path / "inference-cpu.json").read_text())
    assert [setting["precision"] for setting in run["settings"]] == ["fp32", "int8"] and run["note"] == "n"
    nodes, errors = run["files"][0]["executed_nodes"], run["files"][0]["relative_error"]
    assert [setting["rounds"] for setting in run["settings"]] == [10, 10]  # two openings of half of nine, rounded up
    assert nodes["folded and shaped"] < nodes["folded"] == nodes["floor"] < nodes["static"]
    assert max(errors.values()) < 1e-5
    assert {*nodes, "floor again"} == set(run["settings"][0]["to_floor"]) and len(nodes) + len(
        run["files"][0]["absent"]
    ) == 14


def test_a_run_goes_on_where_it_was_cut_short(inference, monkeypatch, tmp_path):
    """What the file has is kept, what is missing of a setting is measured, and other software is refused."""
    where = {"width": 64, "placement": "pre", "precision": "fp32", "threads": 1, "batch": 1, "sequence": 32}
    monkeypatch.setattr(sys, "argv", ["inference.py", "--threads", "1"])
    args = argparse.Namespace(depth=4, note="n", resume=True, memory=True, retry=None, runtime="onnxruntime")
    path = tmp_path / "inference-cpu.json"
    first = inference.Results(path, args)
    assert inference.missing(args, first, where) == {"to_floor", "peak_megabytes"}
    first.add("settings", where, {"to_floor": {"floor again": [0.9, 1.2, 1.3]}})
    second = inference.Results(path, argparse.Namespace(**{**vars(args), "note": ""}))
    assert inference.missing(args, second, where) == {"peak_megabytes"}
    second.add("settings", where, {"peak_megabytes": 2.0})
    run = json.loads(path.read_text())
    assert [setting["peak_megabytes"] for setting in run["settings"]] == [2.0]
    busy = argparse.Namespace(**{**vars(args), "retry": 0.1})
    assert inference.missing(busy, second, where) == {"to_floor"}
    second.add("settings", where, {"to_floor": {"floor again": [0.9, 1.05, 1.3]}})
    assert inference.missing(busy, second, where) == set()
    assert run["note"] == "n" and [command[:29] for command in run["commands"]] == ["python inference.py --threads"] * 2
    assert inference.missing(args, inference.Results(path, args), where) == set()
    with pytest.raises(SystemExit, match="measured with another depth"):
        inference.Results(path, argparse.Namespace(**{**vars(args), "depth": 2}))
    fresh = inference.Results(path, argparse.Namespace(**{**vars(args), "resume": False}))
    assert fresh.find(where) is None


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_peak_memory_grows_with_the_tensors_inside(tmp_path):
    """A table of 4 kB, and its rows for all tokens, twice: 2 x 8 MB, which must show; the process itself must not."""
    import peak_memory

    text = "<ir_version: 10, opset_import: ['' : 20]> graph (int64[b, s] t) => (float[b, s, 64] y)".replace("'", '"')
    proto = onnx.parser.parse_model(text + " { e = Gather (w, t) y = Exp (e) }")
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((16, 64), np.float32), "w"))
    onnx.save(proto, tmp_path / "m.onnx")
    small, large = (
        peak_memory.peak_megabytes(tmp_path / "m.onnx", batch, 4096, vocabulary=16, threads=1) for batch in (1, 9)
    )
    assert 0 < small < 64 and 12 < large - small < 40


def test_a_chart_has_a_panel_for_each_kind_of_setting(tmp_path):
    import inference_chart

    quartiles = {name: [0.8, 0.9, 1.0] for name in ("static", "folded", "folded and shaped", "layer")}
    settings = [
        {"placement": placement, "precision": "fp32", "batch": 1, "threads": 2, "width": width, "sequence": 32,
         "fastest_layer_norm": "layer", "advised": "folded and shaped",
         "to_floor": {**quartiles, "layer": [1.0, 1.1, 1.2]}}
        for placement in ("pre", "post") for width in (64, 192)
    ]  # fmt: skip
    run = {"settings": settings, "machine": {"cpu": "c", "onnxruntime": "1"}, "date": "d", "note": ""}
    assert list(inference_chart.panels(run)) == [f"{p}-norm, fp32, batch 1, 2 threads" for p in ("pre", "post")]
    assert inference_chart.height(settings[0], "fastest LayerNorm") == 1.1
    assert inference_chart.height(settings[0], "folded") == 0.9
    inference_chart.draw(run, tmp_path / "images" / "chart.png")
    assert (tmp_path / "images" / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_a_table_leaves_out_what_was_disturbed():
    import inference_chart

    def setting(width, ratio, again):
        of_floor = {name: [0, ratio, 9] for name in ("static", "folded", "folded and shaped")}
        return {"width": width, "precision": "fp32", "batch": 1, "threads": 2, "fastest_layer_norm": "layer",
            "advised": "folded and shaped", "to_floor": of_floor | {"floor again": [0, again, 9]},
            "shaped_to_fastest_layer_norm": [0, 1.05, 9]}  # fmt: skip

    run = {"settings": [setting(64, 0.9, 1.0), setting(64, 0.8, 1.04), setting(64, 0.3, 0.4), setting(192, 0.99, 1.0)]}
    lines = inference_chart.table(run).splitlines()
    assert lines[0] == "| | width 64 | width 192 |" and len(lines) == 2 + 4
    assert lines[2] == "| fp32, 2 threads, batch 1: shaped ÷ floor | .80 to .90 | .99 |"
    assert lines[3].endswith("| 1.05 | 1.05 |")
    counts = inference_chart.counts(run)
    assert "2 threads: 3 of 4 settings undisturbed" in counts and "at most 0.96: 2 of 3" in counts
    assert "fastest LayerNorm at most 1.00: 0 of 3" in counts and "at most 0.90 at width 64: 2 of 2" in counts
