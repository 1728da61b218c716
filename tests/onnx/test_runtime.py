"""A file on which ONNX Runtime crashes, or never ends, costs one line and no more."""

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx_text import model
from torch import nn

from normfuse import ExportableModel
from normfuse.onnx import BenchError, GraphError, VerificationError, bench, benchmark, fold_file, runtime, verify
from normfuse.onnx.editing import trial
from normfuse.onnx.runtime import RuntimeEnded, RuntimeFailure, Session

ONE = {"x": np.ones((1, 3), np.float32)}
#: The smallest integer ÷ -1 is none, which a processor answers with SIGFPE (not where it takes four at a time).
CRASH = (
    "z = Mul (x, none) i = Cast <to = 6> (z) s = Add (i, smallest) m = Add (i, minus) d = Div (s, m) "
    "y = Cast <to = 1> (d)"
)
INTEGERS = {"none": np.float32(0), "smallest": np.int32(-(2**31)), "minus": np.int32(-1)}
FOR_EVER = (
    "y = Loop (trips, on, x) <body = body (int64 i, bool c, float[n, 3] a) => (bool d, float[n, 3] b) "
    "{ d = Identity (c) b = Neg (a) }>"
)
TRIPS = {"trips": np.int64(2**40), "on": np.bool_(True)}
PLAIN = "float[n, 3] x", "float y"


class Same(nn.Module):
    def forward(self, x):
        return x + 0


@pytest.fixture
def crash(tmp_path):
    onnx.save(model(*PLAIN, CRASH, 17, **INTEGERS), tmp_path / "crash.onnx")
    return tmp_path / "crash.onnx"


@pytest.fixture
def for_ever(tmp_path, monkeypatch):
    onnx.save(model(*PLAIN, FOR_EVER, 17, **TRIPS), tmp_path / "loop.onnx")
    monkeypatch.setattr(trial, "_ONE_RUN", 0.5)
    monkeypatch.setattr(trial, "_SECONDS", 1.0)
    monkeypatch.setattr(benchmark, "_LONGEST_RUN", 0.5)
    monkeypatch.setattr("normfuse.onnx.verifier.LONGEST_RUN", 0.5)
    return tmp_path / "loop.onnx"


@pytest.fixture
def relu():
    return Session(model(*PLAIN, "y = Relu (x)").SerializeToString())


@pytest.mark.parametrize(
    ("file", "words"), [("crash", r"ONNX Runtime crashed \(SIGFPE\)"), ("for_ever", "did not end")]
)
def test_one_line_for_a_file_that_does_not_end_well(file, words, request, monkeypatch, tmp_path):
    path = request.getfixturevalue(file)
    monkeypatch.setattr(trial, "_SECONDS", 1.0)
    example = ExportableModel.from_model(Same(), torch.ones(2, 3), dynamic_shapes={"x": {0: "batch"}})
    calls = {
        VerificationError: lambda: verify(example, path),
        BenchError: lambda: bench([path, path], rounds=4),
        GraphError: lambda: fold_file(path, tmp_path / "out.onnx"),
    }
    for kind, call in calls.items():
        with pytest.raises(kind, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.onnx").exists()


def test_a_size_at_which_a_file_crashes_is_not_tried_in_other_ways(tmp_path, monkeypatch):
    """Every crash costs a process."""
    body = CRASH.replace("Mul (x, none)", "Mul (r, none)").replace("y = Cast", "f = Cast")
    proto = model("float[?, ?, ?, ?] x", "float y", f"r = ReduceMax (x) {body} y = Add (x, f)", 17, **INTEGERS)
    onnx.save(proto, tmp_path / "crash.onnx")
    real, sizes = trial.Search.run, []
    monkeypatch.setattr(trial, "_BASES", (5, 7))
    monkeypatch.setattr(trial.Search, "run", lambda *given, **more: sizes.append(given[1]) or real(*given, **more))
    with pytest.raises(GraphError, match=r"ONNX Runtime crashed \(SIGFPE\)"):
        fold_file(tmp_path / "crash.onnx", tmp_path / "out.onnx")
    assert [size["x[1]"] for size in sizes] == [5, 7]


def test_a_run_may_take_as_long_as_that_of_the_model_suggests(tmp_path, monkeypatch):
    any_run = 0.1
    monkeypatch.setattr("normfuse.onnx.verifier.LONGEST_RUN", any_run)
    onnx.save(model(*PLAIN, FOR_EVER, 17, **TRIPS | {"trips": np.int64(500_000)}), tmp_path / "slow.onnx")
    start = time.perf_counter()
    Session(tmp_path / "slow.onnx").run(ONE)
    assert time.perf_counter() - start > any_run
    example = ExportableModel.from_model(Same(), torch.ones(2, 3))
    plain = example.run

    def slowly(tensors):
        time.sleep(0.5)
        return plain(tensors)

    object.__setattr__(example, "run", slowly)
    verify(example, tmp_path / "slow.onnx", rounds=0, edges=False)


def test_sessions_outlive_the_process(relu, crash):
    for _ in range(2):
        with pytest.raises(RuntimeEnded, match="SIGFPE"):
            Session(crash).run(ONE)
        np.testing.assert_array_equal(relu.run(ONE)[0], ONE["x"])
    child = runtime._Process.living()._child
    child.kill()
    child.wait()
    np.testing.assert_array_equal(relu.run(ONE)[0], ONE["x"])


def test_a_session_is_dropped_with_its_last_user(relu):
    Session(model(*PLAIN, "y = Neg (x)").SerializeToString())
    assert not runtime._Process._forgotten


def test_threads_and_forks_do_not_mix_their_answers(relu):
    got = []
    threads = [
        threading.Thread(target=lambda n=n: got.append((n, relu.run({"x": np.full((1, 3), n, np.float32)})[0].max())))
        for n in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == [(n, n) for n in range(20)]
    child = os.fork()
    if not child:
        os._exit(int(relu.run({"x": np.full((1, 3), 7, np.float32)})[0].max()))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    np.testing.assert_array_equal(relu.run(ONE)[0], ONE["x"])


def test_strings_sequences_nothing_and_no_numbers_come_back():
    texts = Session(model("string[n] x", "string y", "y = Identity (x)").SerializeToString())
    assert texts.run({"x": np.array(["ä", ""], object)})[0].tolist() == ["ä", ""]
    pair = Session(model("float[n] x", "seq(float[n]) y", "y = SequenceConstruct (x, x)").SerializeToString())
    assert [array.shape for array in pair.run({"x": np.zeros(0, np.float32)})[0]] == [(0,), (0,)]
    empty = Session(
        model("float[n] x", "optional(float[n]) y", "y = Optional <type = float[n]> ()").SerializeToString()
    )
    assert empty.run({"x": np.zeros(1, np.float32)}) == [None]
    turned = Session(model("float[n, 3] x", "float y", "y = Relu (x)").SerializeToString())
    x = np.arange(6, dtype=np.float32).reshape(3, 2).T
    np.testing.assert_array_equal(turned.run({"x": x})[0], x)


def test_arrays_that_come_back_can_be_written_to(relu):
    relu.run(ONE)[0][:] = 0


def test_failures_leave_the_process_alone(relu):
    child = runtime._Process.living()._child
    with pytest.raises(RuntimeFailure, match="'x'"):
        relu.run({"y": ONE["x"]})
    with pytest.raises(RuntimeFailure):
        Session(b"nothing")
    relu.run(ONE)
    assert runtime._Process.living()._child is child


def test_an_interrupted_run_ends_its_process(relu, for_ever, monkeypatch):
    loop = Session(for_ever)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(runtime._Process.living()._connection, "poll", interrupt)
    with pytest.raises(KeyboardInterrupt):
        loop.run(ONE)
    np.testing.assert_array_equal(relu.run(ONE)[0], ONE["x"])


def test_the_process_imports_nothing_from_the_working_folder_and_ends_with_the_one_that_asks(
    for_ever, tmp_path, monkeypatch
):
    (tmp_path / "onnxruntime.py").write_text("open('imported', 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")  # as in an interpreter at work
    told, tells = os.pipe()
    asks = os.fork()
    if not asks:
        try:
            session = Session(for_ever)
            os.write(tells, str(runtime._Process._now._child.pid).encode())
            session.run(ONE)
        finally:
            os._exit(1)
    os.close(tells)
    child = Path("/proc", os.read(told, 20).decode())
    os.close(told)
    assert child.name.isdecimal() and child.exists()
    assert not (tmp_path / "imported").exists()
    time.sleep(0.5)  # for ever has begun
    os.kill(asks, signal.SIGKILL)
    os.waitpid(asks, 0)
    deadline = time.monotonic() + 20
    while child.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not child.exists()
