"""PT2 archives read as data: what comes back."""

import errno
import io
import json

import pytest
import torch
from archives import MODEL
from pt2_archives import changed, good_archive, read, refusal, saved
from torch import nn

from normfuse.checkpoint.pt2.reader import Archive, read_samples
from normfuse.checkpoint.pt2.writer import write_archive


@pytest.fixture(scope="module")
def good():
    return good_archive()


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


@pytest.mark.parametrize("room", [0, 100, 3000, 9000])
def test_a_full_disk_is_an_error(room):
    """torch's own writer ends the process (SIGABRT) when a write raises while it is taken down."""

    class Full(io.BytesIO):
        def write(self, data):
            if self.tell() + len(data) > room:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    program = torch.export.export(nn.Linear(4, 300), (torch.randn(2, 4),))
    with pytest.raises(OSError, match="No space left"):
        write_archive(Full(), program, {"records": {}}, {})
