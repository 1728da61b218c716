"""PT2 archives that are refused: one test for everything that the reader checks."""

import io
import json
import struct
import zipfile

import archive_mutations as mutations
import archives
import pytest
import torch
from archives import CONSTANTS, MODEL, WEIGHTS
from pt2_archives import changed, good_archive, read, refusal, saved, with_node
from torch import nn

from normfuse.checkpoint import CheckpointError
from normfuse.checkpoint.pt2.shapes import ShapeRunner


@pytest.fixture(scope="module")
def good():
    return good_archive()


# What is refused: the container


def test_archives_that_torch_does_not_write(good):
    contents = archives.unpack(good)
    assert "compressed" in refusal(archives.zipped(contents.items(), packed=MODEL))
    assert "twice" in refusal(archives.zipped([*contents.items(), (MODEL, b"{}")]))
    assert "is called" in refusal(archives.zipped([*contents.items(), ("../x", b"")]))
    assert "holds 2 programs" in refusal(archives.pack(contents | {"models/other.json": b"{}"}))
    assert "compiled" in refusal(archives.pack(contents | {"data/aotinductor/model/a.so": b"\x7fELF"}))
    assert "no record" in refusal(archives.pack({name: data for name, data in contents.items() if name != WEIGHTS}))
    assert "version" in refusal(archives.pack(contents | {"archive_version": b"9"}))
    for length in (10, len(good) // 2, len(good) - 1):
        assert "damaged" in refusal(good[:length])
    flipped = bytearray(good)
    flipped[good.index(b"linear")] ^= 1
    assert "checksum" in refusal(bytes(flipped))


def test_a_small_archive_that_unpacks_to_a_large_one(good):
    contents = archives.unpack(good) | {MODEL: bytes(1 << 24)}
    assert "compressed" in refusal(archives.zipped(contents.items(), packed=MODEL))


def test_records_in_one_place(good):
    assert "overlaps" in refusal(archives.overlapping(archives.unpack(good), 0, 3))


def test_a_directory_that_promises_too_much(good):
    data = archives.pack(archives.unpack(good))
    assert "directory" in refusal(data[:-14] + struct.pack("<HHII", 65535, 65535, 1 << 31, 0)[:10] + data[-4:])


# What is refused: pickles


def test_pickled_weights_and_objects_are_refused_with_the_way_out(good):
    for config, name in ((WEIGHTS, "first.weight"), (CONSTANTS, "scale")):
        message = refusal(changed(good, config, lambda c, n=name: c["config"][n].update(use_pickle=True)))
        assert "can run code" in message and "--trust" in message and name in message
    legacy = archives.unpack(good) | {"data/weights/model.pt": b"\x80\x04."}
    assert "can run code" in refusal(archives.pack(legacy))


def test_example_inputs_that_are_no_data_are_refused_and_do_not_run(good, tmp_path):
    class Canary:
        def __reduce__(self):
            return open, (str(tmp_path / "canary"), "w")

    for samples in (Canary(), ((Canary(),), {})):
        buffer = io.BytesIO()
        torch.save(samples, buffer)
        data = archives.pack(archives.unpack(good) | {"data/sample_inputs/model.pt": buffer.getvalue()})
        assert "can run code" in refusal(data, samples=True)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(1 << 24))
    data = archives.pack(archives.unpack(good) | {"data/sample_inputs/model.pt": packed.getvalue()})
    assert "compressed" in refusal(data, samples=True)
    assert not list(tmp_path.iterdir())


# What is refused: weights


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"sizes": [{"as_int": 2**62}, {"as_int": 4}]}, "not natural numbers"),
        ({"sizes": [{"as_int": 2**40}, {"as_int": 4}]}, "does not fit the 96 bytes"),
        ({"sizes": [{"as_int": 7}, {"as_int": 4}]}, "does not fit the 96 bytes"),
        ({"sizes": [{"as_int": -6}, {"as_int": 4}]}, "not natural numbers"),
        ({"sizes": [{"as_int": 6}]}, "1 sizes and 2 strides"),
        ({"strides": [{"as_int": -4}, {"as_int": 1}]}, "not natural numbers"),
        ({"strides": [{"as_int": 5}, {"as_int": 1}]}, "does not fit the 96 bytes"),
        ({"storage_offset": {"as_int": 1}}, "does not fit the 96 bytes"),
        ({"storage_offset": {"as_int": 2**61}}, "does not fit the 96 bytes"),
        ({"sizes": [{"as_int": 2**20}] * 2, "strides": [{"as_int": 0}] * 2}, "32 times over"),
        ({"sizes": [{"as_int": 0}] * 2, "storage_offset": {"as_int": 2**40}}, "does not fit"),
        ({"dtype": 8}, "does not fit the 96 bytes"),
        ({"dtype": 0}, "UNKNOWN"),
        ({"dtype": 12}, "other bytes than 0 and 1"),
        ({"dtype": 99}, "not a ScalarType"),
        ({"dtype": True}, "bool where int belongs"),
        ({"layout": 1}, "SparseCoo"),
        ({"sizes": [{"as_expr": {"expr_str": "9**9", "hint": None}}, {"as_int": 4}]}, "not natural numbers"),
    ],
)
def test_weights_that_do_not_fit_their_bytes(good, change, why):
    assert why in refusal(changed(good, WEIGHTS, lambda c: c["config"]["tied.weight"]["tensor_meta"].update(change)))


@pytest.mark.parametrize(
    "record", ["../weight_0", "weight_0/../../x", "model.pt", "custom_obj_0", "weight_99", "weight_²"]
)
def test_weights_lie_in_records_of_weights(good, record):
    assert "record" in refusal(changed(good, WEIGHTS, lambda c: c["config"]["tied.weight"].update(path_name=record)))


# What is refused: JSON


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[" * 100_000, "recursion"),
        ('{"config": {}, "config": {}}', "twice"),
        ('{"config": NaN}', "NaN"),
        ('{"config": 1e999}', "too large"),
        ('{"config": ' + "9" * 5000 + "}", "64 bits"),
        ('{"config": 9223372036854775808}', "64 bits"),
        ('{"config": {}} x', "Extra data"),
        ('{"config": {}, "more": 1}', "has no 'more'"),
        ("{}", "lacks 'config'"),
        ('{"config": []}', "list where dict belongs"),
        ("", "is not JSON"),
        ("\ufeff{}", "is not JSON"),
    ],
)
def test_json_is_strict(good, text, why):
    assert why in refusal(archives.pack(archives.unpack(good) | {WEIGHTS: text.encode()}))


def test_json_is_utf8(good):
    assert "is not JSON" in refusal(archives.pack(archives.unpack(good) | {WEIGHTS: '{"config": {}}'.encode("utf-16")}))


# What is refused: the graph


@pytest.mark.parametrize("target", mutations.TARGETS)
def test_only_operations_of_aten_and_arithmetic_on_sizes(good, target):
    refusal(with_node(good, "linear", target=target))


@pytest.mark.parametrize(
    ("target", "inputs", "shape", "why"),
    [
        ("full", {"size": {"as_ints": [10**12]}, "fill_value": {"as_float": 1.0}}, [10**12], "bytes; "),
        ("arange", {"end": {"as_int": 10**12}}, [10**12], "bytes; "),
        ("zeros", {"size": {"as_ints": [2**31, 2**31]}}, [2**31, 2**31], "overflowed"),
        ("zeros", {"size": {"as_ints": [2**31]}}, [2**31], "bytes; "),
        ("eye", {"n": {"as_int": 2**20}}, [2**20, 2**20], "bytes; "),
        ("zeros", {"size": {"as_ints": [-1]}}, [1], "cannot be called so"),
        ("zeros", {"size": {"as_ints": [3]}}, [4], "is said to be"),
        ("zeros", {"size": {"as_int": 3}}, [3], "not List[int]"),
        ("zeros", {"size": {"as_ints": [3]}, "sizes": {"as_ints": [3]}}, [3], "takes size"),
        ("zeros", {"size": {"as_ints": [3]}, "dtype": {"as_int": 6}}, [3], "is as_int"),
        ("zeros", {"size": {"as_ints": [3]}, "layout": {"as_layout": 1}}, [3], "cannot be in a file"),
        ("zeros", {"size": {"as_custom_obj": {"name": "x", "class_fqn": "y"}}}, [3], "cannot be in a file"),
        ("zeros", {"size": {"as_operator": "torch.load"}}, [3], "cannot be in a file"),
        ("empty", {"size": {"as_ints": [3]}, "pin_memory": {"as_tensor": {"name": "x"}}}, [3], "not Optional[bool]"),
    ],
)
def test_operations_that_would_be_too_large_or_do_not_fit(good, target, inputs, shape, why):
    overload = "memory_format" if target == "empty" else "default"

    def change(model):
        full = f"torch.ops.aten.{target}.{overload}"
        archives.insert(model["graph_module"]["graph"], 0, full, inputs, "made", shape)

    assert why in refusal(changed(good, MODEL, change))


def test_operations_that_would_not_end(good):
    def parts(model):
        graph = model["graph_module"]["graph"]
        archives.insert(graph, 0, "torch.ops.aten.zeros.default", {"size": {"as_ints": [2**26]}}, "long", [2**26])
        inputs = [archives.item("self", {"as_tensor": {"name": "long"}})]
        outputs = [{"as_tensors": [{"name": "part"}]}]
        node = {"target": "torch.ops.aten.unbind.int", "inputs": inputs, "outputs": outputs, "metadata": {}}
        graph["nodes"].insert(1, node)

    def doubled(model):
        graph = model["graph_module"]["graph"]
        archives.insert(graph, 0, "torch.ops.aten.ones.default", {"size": {"as_ints": [4]}}, "d0", [4])
        for n in range(1, 50):
            operands = {"tensors": {"as_tensors": [{"name": f"d{n - 1}"}] * 2}}
            archives.insert(graph, n, "torch.ops.aten.cat.default", operands, f"d{n}", [4 << n])

    assert "tensors; 4096 are allowed" in refusal(changed(good, MODEL, parts))
    runner = ShapeRunner(0)
    x = runner.tensor(torch.float32, [3], [1])
    with pytest.raises(CheckpointError, match="called more than 5000 times by one operation"):
        runner.run(lambda: [x.add(1) for _ in range(10**9)], (), {}, False)
    assert "constants that are too large" in refusal(changed(good, MODEL, doubled))


def test_values_are_defined_once_and_before_they_are_read(good):
    def backwards(model):
        model["graph_module"]["graph"]["nodes"].reverse()

    def twice(model):
        nodes = model["graph_module"]["graph"]["nodes"]
        nodes.append(nodes[1])

    def itself(model):
        model["graph_module"]["graph"]["nodes"][1]["inputs"][0]["arg"] = {"as_tensor": {"name": "linear"}}

    assert "read before" in refusal(changed(good, MODEL, backwards))
    assert "computed twice" in refusal(changed(good, MODEL, twice))
    assert "read before" in refusal(changed(good, MODEL, itself))


@pytest.mark.parametrize("name", ["a b", "x;import os", "x\n", "__class__", "ｘ", "1x", "", "x" * 400])
def test_names_are_words(good, name):
    contents = archives.unpack(good)
    text = contents[MODEL].decode().replace('"linear_1"', json.dumps(name))
    assert "is not a valid name" in refusal(archives.pack(contents | {MODEL: text.encode()}))


@pytest.mark.parametrize("name", ["torch", "lambda", "device", "self", "output", "input", "None", "print"])
def test_names_that_python_or_torch_use_are_made_others(good, name):
    contents = archives.unpack(good)
    text = contents[MODEL].decode().replace('"linear_1"', json.dumps(name))
    x = torch.randn(3, 4)
    assert torch.equal(
        read(archives.pack(contents | {MODEL: text.encode()})).program.module()(x)[0],
        read(good).program.module()(x)[0],
    )


def test_shapes_are_what_operations_give(good):
    def larger(model):
        model["graph_module"]["graph"]["tensor_values"]["linear"]["sizes"][1] = {"as_int": 7}

    def another(model):
        meta = model["graph_module"]["graph"]["tensor_values"]["linear"]
        meta["sizes"][0]["as_expr"]["expr_str"] = "Mul(Integer(2), Symbol('s77', positive=True, integer=True))"

    assert "is said to be" in refusal(changed(good, MODEL, larger))
    assert "is said to be" in refusal(changed(good, MODEL, another))


@pytest.mark.parametrize("text", mutations.EXPRESSIONS[:12])
def test_sizes_are_not_evaluated(good, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def change(model):
        model["graph_module"]["graph"]["tensor_values"]["linear"]["sizes"][0]["as_expr"]["expr_str"] = text

    assert "cannot be used" in refusal(changed(good, MODEL, change))
    assert not list(tmp_path.iterdir())


def test_code_in_places_that_torch_evaluates_is_not_read(good, tmp_path):
    code = f"open({str(tmp_path / 'canary')!r}, 'w')"

    def change(model):
        model["guards_code"] = [code]
        model["verifiers"] = ["nothing"]
        for node in model["graph_module"]["graph"]["nodes"]:
            node["metadata"].update(source_fn_stack=f"x,{code}", custom="{", from_node="[", stack_trace=code)

    read(changed(good, MODEL, change)).program.module()(torch.randn(3, 4))
    assert not list(tmp_path.iterdir())


def test_programs_that_write_their_buffers_are_refused():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count.add_(1)
            return x + self.count

    program = torch.export.export(Counts(), (torch.ones(2),)).run_decompositions({})
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    assert "while it runs" in refusal(buffer.getvalue())


def test_sizes_that_depend_on_values_are_refused():
    class Picks(nn.Module):
        def forward(self, x):
            return x[x > 0]

    assert "depends on values" in refusal(saved(Picks(), (torch.randn(5),)))
