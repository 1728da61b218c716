"""PT2 archives read as data: what comes back, and one test for everything that is refused."""

import io
import json
import struct
import zipfile

import archive_mutations as mutations
import pytest
import torch
from archive_mutations import CONSTANTS, MODEL, WEIGHTS
from torch import nn
from torch.export import Dim

from normfuse.checkpoint import CheckpointError
from normfuse.checkpoint.pt2.reader import Archive, read_program, read_samples
from normfuse.checkpoint.pt2.shapes import ShapeRunner
from normfuse.checkpoint.pt2.writer import write_archive


class Everything(nn.Module):
    """One of each: a tied weight, both kinds of buffers, a constant, a region, several results, sizes in arithmetic."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.tied = self.first
        self.register_buffer("table", torch.randn(6), persistent=False)
        self.scale = torch.rand(6)

    def forward(self, x, mask=None):
        y = self.norm(self.tied(x)) * self.scale + self.table
        left, right = y.split(3, -1)
        with torch.no_grad():
            y = torch.cat([left, right], -1).reshape(x.shape[0] * 2, 3).reshape(x.shape[0], -1)
        return {"logits": self.second(y), "half": y.to(torch.float16), "none": None, "n": 3}


@pytest.fixture(scope="module")
def good():
    return saved(Everything(), (torch.randn(3, 4), None), dynamic_shapes=({0: Dim("batch", max=64)}, None))


def saved(model, args, **options) -> bytes:
    torch.manual_seed(0)
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(model.eval(), args, **options), buffer)
    return buffer.getvalue()


def read(data: bytes):
    return read_program(Archive(io.BytesIO(data), "m.pt2"))


def refusal(data: bytes, samples: bool = False) -> str:
    with pytest.raises(CheckpointError) as caught:
        archive = Archive(io.BytesIO(data), "m.pt2")
        read_samples(archive) if samples else read_program(archive)
    message = str(caught.value)
    assert message.startswith("m.pt2") and message.isprintable() and len(message) <= 400
    return message


def changed(good: bytes, record: str, change) -> bytes:
    """The archive after a function has changed the JSON of a record."""
    contents = mutations.unpack(good)
    content = json.loads(contents[record])
    change(content)
    return mutations.pack(contents | {record: json.dumps(content).encode()})


def with_node(good: bytes, name: str, **fields) -> bytes:
    def change(model):
        (node,) = (node for node in model["graph_module"]["graph"]["nodes"] if node["name"] == name)
        node.update(fields)

    return changed(good, MODEL, change)


# What comes back


def test_a_program_comes_back_flat_and_gives_the_same_numbers(good):
    flat = read(good)
    reference = torch.export.load(io.BytesIO(good)).module()
    for rows in (1, 3, 7):
        x = torch.randn(rows, 4)
        want, got = reference(x, None), flat.program.module()(x)
        assert torch.equal(got[0], want["logits"]) and torch.equal(got[1], want["half"]) and len(got) == 2
    assert flat.input_names == ("x",) and flat.arguments == (True, False)


def test_module_paths_stay_and_nothing_else_that_was_said_of_operations(good):
    for node in read(good).program.graph.nodes:
        assert not {"stack_trace", "source_fn_stack", "from_node", "custom"} & set(node.meta)
    stacks = [node.meta["nn_module_stack"] for node in read(good).program.graph.nodes if node.op == "call_function"]
    assert any(("norm", "torch.nn.modules.batchnorm.BatchNorm1d") in stack.values() for stack in stacks)


def test_tied_weights_share_their_memory(good):
    state = read(good).program.state_dict
    assert state["first.weight"].data_ptr() == state["tied.weight"].data_ptr()


def test_regions_without_gradients_are_opened(good):
    assert all("wrap_with" not in str(node.target) for node in read(good).program.graph.nodes)


def test_example_inputs_come_back(good):
    args, kwargs = read_samples(Archive(io.BytesIO(good), "m.pt2"))
    assert args[0].shape == (3, 4) and args[1] is None and kwargs == {}


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool],
)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (2, 3)])
def test_every_dtype_and_empty_tensors(dtype, shape):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("held", torch.ones(shape).to(dtype))

        def forward(self, x):
            return x.to(dtype) + self.held

    back = read(saved(Holder(), (torch.ones(shape),))).program.state_dict["held"]
    assert back.dtype == dtype and back.shape == shape and torch.equal(back, torch.ones(shape).to(dtype))


def test_strided_weights_keep_their_strides():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.arange(12.0).reshape(3, 4).t())

        def forward(self, x):
            return x @ self.w

    weight = read(saved(Turned(), (torch.ones(2, 4),))).program.state_dict["w"]
    assert weight.stride() == (1, 4) and torch.equal(weight, torch.arange(12.0).reshape(3, 4).t())


def test_recurrent_networks_are_read():
    for model in (nn.LSTM(4, 5, 2, bidirectional=True, proj_size=3), nn.GRU(4, 5, batch_first=True), nn.RNN(4, 5)):
        x = torch.randn(7, 2, 4)
        want = model(x)
        got = read(saved(model, (x,))).program.module()(x)
        assert torch.equal(got[0], want[0]) and len(got) == (3 if isinstance(model, nn.LSTM) else 2)


def test_recurrent_networks_have_all_their_weights():
    def fewer(model):
        for node in model["graph_module"]["graph"]["nodes"]:
            for item in node["inputs"]:
                if item["name"] == "params":
                    item["arg"]["as_tensors"].pop()

    assert "other shapes or dtypes" in refusal(changed(saved(nn.GRU(4, 5), (torch.randn(7, 2, 4),)), MODEL, fewer))


def test_python_that_the_structure_names_is_not_needed(good):
    # transformers' outputs, a user's dataclass: torch.export.load wants them to be importable
    text = json.dumps([1, {"type": "no_such.Output", "context": "null", "children_spec": []}])

    def change(model):
        model["graph_module"]["module_call_graph"][0]["signature"]["out_spec"] = text

    assert len(read(changed(good, MODEL, change)).program.module()(torch.randn(3, 4))) == 2


# What is written


def test_what_we_write_is_read_by_torch_and_says_nothing_of_the_machine(good):
    buffer = io.BytesIO()
    write_archive(buffer, torch.export.load(io.BytesIO(good)), {"format": "test"}, {"x_0": torch.ones(2)})
    data = buffer.getvalue()
    x = torch.randn(5, 4)
    want = torch.export.load(io.BytesIO(good)).module()(x, None)
    assert torch.equal(torch.export.load(io.BytesIO(data)).module()(x, None)["logits"], want["logits"])
    assert torch.equal(read(data).program.module()(x)[0], want["logits"])
    assert b".py" in good and b".py" not in data and b"stack_trace" not in data


def test_a_view_is_written_without_its_surroundings():
    model = nn.Linear(64, 64, bias=False)
    model.weight = nn.Parameter(torch.zeros(1000, 64)[:64])
    buffer = io.BytesIO()
    write_archive(buffer, torch.export.export(model, (torch.ones(1, 64),)), {}, {})
    assert len(buffer.getvalue()) < 2 * 64 * 64 * 4


# What is refused: the container


def test_archives_that_torch_does_not_write(good):
    contents = mutations.unpack(good)
    assert "compressed" in refusal(mutations.zipped(contents.items(), packed=MODEL))
    assert "twice" in refusal(mutations.zipped([*contents.items(), (MODEL, b"{}")]))
    assert "is called" in refusal(mutations.zipped([*contents.items(), ("../x", b"")]))
    assert "holds 2 programs" in refusal(mutations.pack(contents | {"models/other.json": b"{}"}))
    assert "compiled" in refusal(mutations.pack(contents | {"data/aotinductor/model/a.so": b"\x7fELF"}))
    assert "no record" in refusal(mutations.pack({name: data for name, data in contents.items() if name != WEIGHTS}))
    assert "version" in refusal(mutations.pack(contents | {"archive_version": b"9"}))
    for length in (10, len(good) // 2, len(good) - 1):
        assert "damaged" in refusal(good[:length])
    flipped = bytearray(good)
    flipped[good.index(b"linear")] ^= 1
    assert "checksum" in refusal(bytes(flipped))


def test_a_small_archive_that_unpacks_to_a_large_one(good):
    contents = mutations.unpack(good) | {MODEL: bytes(1 << 24)}
    assert "compressed" in refusal(mutations.zipped(contents.items(), packed=MODEL))


def test_records_in_one_place(good):
    assert "overlaps" in refusal(mutations.overlapping(mutations.unpack(good), 0, 3))


def test_a_directory_that_promises_too_much(good):
    data = mutations.pack(mutations.unpack(good))
    assert "directory" in refusal(data[:-14] + struct.pack("<HHII", 65535, 65535, 1 << 31, 0)[:10] + data[-4:])


# What is refused: pickles


def test_pickled_weights_and_objects_are_refused_with_the_way_out(good):
    for config, name in ((WEIGHTS, "first.weight"), (CONSTANTS, "scale")):
        message = refusal(changed(good, config, lambda c, n=name: c["config"][n].update(use_pickle=True)))
        assert "can run code" in message and "--trust" in message and name in message
    legacy = mutations.unpack(good) | {"data/weights/model.pt": b"\x80\x04."}
    assert "can run code" in refusal(mutations.pack(legacy))


def test_example_inputs_that_are_no_data_are_refused_and_do_not_run(good, tmp_path):
    class Canary:
        def __reduce__(self):
            return open, (str(tmp_path / "canary"), "w")

    for samples in (Canary(), ((Canary(),), {})):
        buffer = io.BytesIO()
        torch.save(samples, buffer)
        data = mutations.pack(mutations.unpack(good) | {"data/sample_inputs/model.pt": buffer.getvalue()})
        assert "can run code" in refusal(data, samples=True)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(1 << 24))
    data = mutations.pack(mutations.unpack(good) | {"data/sample_inputs/model.pt": packed.getvalue()})
    assert "compressed" in refusal(data, samples=True)
    assert not list(tmp_path.iterdir())


# What is refused: weights


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"sizes": [{"as_int": 2**62}, {"as_int": 4}]}, "no natural numbers"),
        ({"sizes": [{"as_int": 2**40}, {"as_int": 4}]}, "does not fit the 96 bytes"),
        ({"sizes": [{"as_int": 7}, {"as_int": 4}]}, "does not fit the 96 bytes"),
        ({"sizes": [{"as_int": -6}, {"as_int": 4}]}, "no natural numbers"),
        ({"sizes": [{"as_int": 6}]}, "1 sizes and 2 strides"),
        ({"strides": [{"as_int": -4}, {"as_int": 1}]}, "no natural numbers"),
        ({"strides": [{"as_int": 5}, {"as_int": 1}]}, "does not fit the 96 bytes"),
        ({"storage_offset": {"as_int": 1}}, "does not fit the 96 bytes"),
        ({"storage_offset": {"as_int": 2**61}}, "does not fit the 96 bytes"),
        ({"sizes": [{"as_int": 2**20}] * 2, "strides": [{"as_int": 0}] * 2}, "32 times over"),
        ({"sizes": [{"as_int": 0}] * 2, "storage_offset": {"as_int": 2**40}}, "does not fit"),
        ({"dtype": 8}, "does not fit the 96 bytes"),
        ({"dtype": 0}, "UNKNOWN"),
        ({"dtype": 12}, "other bytes than 0 and 1"),
        ({"dtype": 99}, "no ScalarType"),
        ({"dtype": True}, "bool where int belongs"),
        ({"layout": 1}, "SparseCoo"),
        ({"sizes": [{"as_expr": {"expr_str": "9**9", "hint": None}}, {"as_int": 4}]}, "no natural numbers"),
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
        ("", "no JSON"),
        ("\ufeff{}", "no JSON"),
    ],
)
def test_json_is_strict(good, text, why):
    assert why in refusal(mutations.pack(mutations.unpack(good) | {WEIGHTS: text.encode()}))


def test_json_is_utf8(good):
    assert "no JSON" in refusal(mutations.pack(mutations.unpack(good) | {WEIGHTS: '{"config": {}}'.encode("utf-16")}))


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
        mutations.insert(model["graph_module"]["graph"], 0, full, inputs, "made", shape)

    assert why in refusal(changed(good, MODEL, change))


def test_operations_that_would_not_end(good):
    def parts(model):
        graph = model["graph_module"]["graph"]
        mutations.insert(graph, 0, "torch.ops.aten.zeros.default", {"size": {"as_ints": [2**26]}}, "long", [2**26])
        inputs = [mutations.item("self", {"as_tensor": {"name": "long"}})]
        outputs = [{"as_tensors": [{"name": "part"}]}]
        node = {"target": "torch.ops.aten.unbind.int", "inputs": inputs, "outputs": outputs, "metadata": {}}
        graph["nodes"].insert(1, node)

    def doubled(model):
        graph = model["graph_module"]["graph"]
        mutations.insert(graph, 0, "torch.ops.aten.ones.default", {"size": {"as_ints": [4]}}, "d0", [4])
        for n in range(1, 50):
            operands = {"tensors": {"as_tensors": [{"name": f"d{n - 1}"}] * 2}}
            mutations.insert(graph, n, "torch.ops.aten.cat.default", operands, f"d{n}", [4 << n])

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
    contents = mutations.unpack(good)
    text = contents[MODEL].decode().replace('"linear_1"', json.dumps(name))
    assert "is no name" in refusal(mutations.pack(contents | {MODEL: text.encode()}))


@pytest.mark.parametrize("name", ["torch", "lambda", "device", "self", "output", "input", "None", "print"])
def test_names_that_python_or_torch_use_are_made_others(good, name):
    contents = mutations.unpack(good)
    text = contents[MODEL].decode().replace('"linear_1"', json.dumps(name))
    x = torch.randn(3, 4)
    assert torch.equal(
        read(mutations.pack(contents | {MODEL: text.encode()})).program.module()(x)[0],
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
