"""An ONNX file and its weights change as one, and of what was there before nothing stays that nobody needs."""

import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from normfuse.files import Output
from normfuse.onnx.publish import data_beside, external_files, publish
from normfuse.onnx.writer import save_model


def model(value, count=128):
    weight = onnx.numpy_helper.from_array(np.full(count, value, np.float32), "w")
    info = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [count]) for name in "xy"]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", ["x", "w"], ["y"])], "g", [info[0]], [info[1]], [weight]
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)


def write(path, value, *, apart=True, reads=()):
    with Output(path, reads=reads) as output:
        save_model(ir.from_proto(model(value)), output.staged, 0 if apart else 10**6)
        publish(output)


def value_of(path):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.zeros(128, np.float32)})[0][0]


def foreign(path, location, value=7.0):
    """As other tools write it, with a name of their own for the weights."""
    onnx.save_model(
        model(value),
        path,
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location=location,
        size_threshold=0,
    )


def names(folder):
    return sorted(os.listdir(folder))


def test_every_write_names_its_weights_apart_and_takes_the_last_ones_away(tmp_path):
    seen = set()
    for value in (1.0, 2.0, 3.0):
        write(tmp_path / "m.onnx", value)
        (data,) = data_beside(tmp_path / "m.onnx")
        assert names(tmp_path) == ["m.onnx", data] and value_of(tmp_path / "m.onnx") == value
        seen.add(data)
    assert len(seen) == 3
    write(tmp_path / "m.onnx", 4.0, apart=False)
    assert names(tmp_path) == ["m.onnx"] and value_of(tmp_path / "m.onnx") == 4.0


@pytest.mark.parametrize("location", ["m.onnx.data", "weights.bin", "./w"])
def test_weights_that_the_replaced_file_named_go(tmp_path, location):
    foreign(tmp_path / "m.onnx", location)
    assert len(names(tmp_path)) == 2
    write(tmp_path / "m.onnx", 1.0, apart=False)
    assert names(tmp_path) == ["m.onnx"]


def test_weights_of_a_damaged_file_go_too_if_they_are_named_after_it(tmp_path):
    for name in ("m.onnx", "m.onnx.data", "other.data"):
        (tmp_path / name).write_text("old")
    write(tmp_path / "m.onnx", 1.0, apart=False)
    assert names(tmp_path) == ["m.onnx", "other.data"]


def test_through_a_link_the_pair_changes_where_it_lies(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link.onnx").symlink_to("real/m.onnx")
    foreign(tmp_path / "real" / "m.onnx", "weights.bin")
    write(tmp_path / "link.onnx", 2.0)
    assert names(tmp_path) == ["link.onnx", "real"]
    assert names(tmp_path / "real") == ["m.onnx", *data_beside(tmp_path / "real" / "m.onnx")]
    assert value_of(tmp_path / "real" / "m.onnx") == 2.0


def test_weights_that_another_file_names_stay(tmp_path):
    write(tmp_path / "m.onnx", 1.0)
    shutil.copy(tmp_path / "m.onnx", tmp_path / "copy.onnx")
    write(tmp_path / "m.onnx", 2.0)
    assert value_of(tmp_path / "copy.onnx") == 1.0 and value_of(tmp_path / "m.onnx") == 2.0
    foreign(tmp_path / "one.onnx", "shared.bin")
    foreign(tmp_path / "two.onnx", "./shared.bin")
    (tmp_path / "one.onnx").rename(tmp_path / "three.onnx")
    write(tmp_path / "three.onnx", 3.0, apart=False)
    assert value_of(tmp_path / "two.onnx") == 7.0


def test_weights_that_are_read_stay(tmp_path):
    foreign(tmp_path / "m.onnx", "weights.bin")
    shutil.move(tmp_path / "m.onnx", tmp_path / "source")
    shutil.copy(tmp_path / "source", tmp_path / "m.onnx")
    write(tmp_path / "m.onnx", 1.0, apart=False, reads=external_files(tmp_path / "source"))
    assert names(tmp_path) == ["m.onnx", "source", "weights.bin"]


def test_files_with_a_header_of_their_own_and_files_elsewhere_stay(tmp_path):
    (tmp_path / "below").mkdir()
    for location, offset in (("model.safetensors", 256), ("below/w.bin", 0)):
        (tmp_path / location).write_bytes(bytes(256) + np.full(128, 7, np.float32).tobytes())
        proto = model(7.0)
        onnx.external_data_helper.set_external_data(proto.graph.initializer[0], location, offset, 512)
        proto.graph.initializer[0].ClearField("raw_data")
        (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
        assert [path.name for path in external_files(tmp_path / "m.onnx")] == [Path(location).name]
        write(tmp_path / "m.onnx", 1.0, apart=False)
        assert (tmp_path / location).exists()


def test_links_and_folders_named_like_weights_stay(tmp_path):
    (tmp_path / "elsewhere").write_text("")
    (tmp_path / "a.onnx.data").symlink_to("elsewhere")
    (tmp_path / "b.onnx.data").mkdir()
    for name in ("a.onnx", "b.onnx"):
        (tmp_path / name).write_text("old")
        write(tmp_path / name, 1.0, apart=False)
    assert names(tmp_path) == ["a.onnx", "a.onnx.data", "b.onnx", "b.onnx.data", "elsewhere"]


def killed_at(step, action):
    """Runs an action in a process that ends before its renaming or removing number `step`; whether it got so far."""
    child = os.fork()
    if not child:
        left = [step]

        def counted(real):
            def call(*arguments, **options):
                left[0] -= 1
                if left[0] < 0:
                    os._exit(3)
                return real(*arguments, **options)

            return call

        for name in ("replace", "unlink", "rmdir"):
            setattr(os, name, counted(getattr(os, name)))
        try:
            action()
        except BaseException:
            os._exit(4)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 3)
    return status == 3


def test_killed_at_any_moment_a_whole_pair_is_left_and_the_next_run_clears_the_rest(tmp_path):
    step = 0
    while True:
        folder = tmp_path / str(step)
        folder.mkdir()
        write(folder / "m.onnx", 1.0)
        killed = killed_at(step, lambda folder=folder: write(folder / "m.onnx", 2.0))
        assert value_of(folder / "m.onnx") in (1.0, 2.0)
        with Output(folder / "something else"):
            pass
        assert names(folder) == ["m.onnx", *data_beside(folder / "m.onnx")]
        assert value_of(folder / "m.onnx") in (1.0, 2.0)
        if not killed:
            break
        step += 1
    assert step >= 4  # data in place, file in place, old data gone, folder gone


def test_what_fails_halfway_leaves_the_old_pair(tmp_path, monkeypatch):
    write(tmp_path / "m.onnx", 1.0)
    before = names(tmp_path)
    real = os.replace

    def fails(source, target):
        if str(target).endswith(".onnx"):
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "m.onnx", 2.0)
    assert names(tmp_path) == before and value_of(tmp_path / "m.onnx") == 1.0


def test_runs_at_the_same_time_leave_one_whole_pair(tmp_path):
    def writes(value):
        for number in range(40):
            write(tmp_path / "m.onnx", value, apart=number % 3 != 2 or number == 39)

    children = []
    for value in (1.0, 2.0, 3.0):
        child = os.fork()
        if not child:
            status = 1
            try:
                writes(value)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    assert names(tmp_path) == ["m.onnx", *data_beside(tmp_path / "m.onnx")]
    assert value_of(tmp_path / "m.onnx") in (1.0, 2.0, 3.0)
