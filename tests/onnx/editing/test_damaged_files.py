"""Files that are damaged, or made to harm, end in one line: nothing is imported, nothing outside is read or written."""

import os
import pickle
import random
import resource
import sys
import time
import traceback
from pathlib import Path

import pytest
from onnx import AttributeProto, TensorProto, helper
from onnx_files import images

from normfuse.errors import NormfuseError
from normfuse.onnx import fold_file

COPIES = 12  # of each kind, at places drawn at random: 30 kinds make 360 files
SECONDS, MEGABYTES = 20, 2000


def pick(chance, entries):
    return entries[chance.randrange(len(entries))]


def cut(proto, chance):
    """The file ends early."""
    data = proto.SerializeToString()
    return data[: chance.randrange(len(data) - 12)]


def overwrite(proto, chance):
    """Bytes that begin every message are others."""
    data = bytearray(proto.SerializeToString())
    for place in range(chance.randrange(1, 5)):
        data[place] = 0xFF
    return bytes(data)


def empty(proto, chance):
    """Something else is called .onnx."""
    return pick(chance, [b"", b"\0" * 64, b"PK\x03\x04" * 9, b"{}", pickle.dumps({"a": 1}), os.urandom(99)])


def unread(proto, chance):
    """An operation reads what nothing writes."""
    pick(chance, proto.graph.node).input[0] = f"nowhere{chance.random()}"


def unwritten(proto, chance):
    """The output is written by nothing."""
    proto.graph.output[0].name = f"nowhere{chance.random()}"


def cycle(proto, chance):
    """An operation reads what is made from its own result."""
    later = chance.randrange(1, 4)
    earlier = chance.randrange(later)
    proto.graph.node[earlier].input[0] = proto.graph.node[later].output[0]


def repeated_result(proto, chance):
    """Two operations write one name."""
    first, second = chance.sample(range(len(proto.graph.node)), 2)
    proto.graph.node[first].output[0] = proto.graph.node[second].output[0]


def repeated_weight(proto, chance):
    """Two weights have one name."""
    proto.graph.initializer.append(pick(chance, proto.graph.initializer))


def repeated_input(proto, chance):
    """Two inputs have one name."""
    proto.graph.input.append(proto.graph.input[0])


def no_results(proto, chance):
    """No output, or no operation."""
    pick(chance, [proto.graph.output, proto.graph.node]).pop()
    del proto.graph.output[:]


def no_version(proto, chance):
    """It is not said which operators are meant."""
    del proto.opset_import[:]


def version_of_the_future(proto, chance):
    proto.opset_import[0].version = chance.randrange(1000, 10**9)


def no_type(proto, chance):
    """An operation without a type."""
    pick(chance, proto.graph.node).op_type = ""


def unheard_type(proto, chance):
    """An operation that nobody knows."""
    node = pick(chance, proto.graph.node)
    node.op_type, node.domain = "Unheard", pick(chance, ["", "com.microsoft", "org.example"])


def wrong_rank(proto, chance):
    """A kernel with an axis less, or an image with one more."""
    if chance.random() < 0.5:
        tensor = proto.graph.initializer[0]
        tensor.dims[:] = [tensor.dims[0], -(-len(tensor.raw_data) // 4 // tensor.dims[0])]
    else:
        proto.graph.input[0].type.tensor_type.shape.dim.add(dim_value=chance.randrange(1, 9))


def wrong_channels(proto, chance):
    """An image that the kernel does not fit."""
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value = chance.randrange(4, 99)


def wrong_length(proto, chance):
    """A weight with less, or more, data than its sizes say."""
    tensor = pick(chance, proto.graph.initializer)
    tensor.raw_data = tensor.raw_data[: -chance.randrange(1, 9)] if chance.random() < 0.5 else tensor.raw_data + b"\0"


def no_data(proto, chance):
    pick(chance, proto.graph.initializer).ClearField("raw_data")


def negative_size(proto, chance):
    pick(chance, proto.graph.initializer).dims[0] = -chance.randrange(1, 2**40)


def huge_weight(proto, chance):
    """A weight of more bytes than there are."""
    pick(chance, proto.graph.initializer).dims[0] = chance.randrange(2**31, 2**62)


def huge_input(proto, chance):
    for dim in proto.graph.input[0].type.tensor_type.shape.dim[2:]:
        dim.dim_value = chance.randrange(2**20, 2**40)


def huge_value(proto, chance):
    """A small file whose values are larger than any memory."""
    sizes = helper.make_tensor("sizes", TensorProto.INT64, [4], [1, 3, 2 ** chance.randrange(17, 20), 2**17])
    proto.graph.initializer.append(sizes)
    proto.graph.node.insert(0, helper.make_node("Expand", ["small", "sizes"], ["x"]))
    proto.graph.input[0].name = "small"
    for dim in proto.graph.input[0].type.tensor_type.shape.dim:
        dim.dim_value = 1


def unknown_type_of_weight(proto, chance):
    pick(chance, proto.graph.initializer).data_type = chance.choice([0, 99, 1000])


def other_type_of_weight(proto, chance):
    """Numbers of another type than the operation computes with."""
    tensor = proto.graph.initializer[chance.randrange(5)]
    tensor.data_type = chance.choice([TensorProto.INT32, TensorProto.UINT32])


def unknown_type_of_input(proto, chance):
    proto.graph.input[0].type.tensor_type.elem_type = chance.choice([0, 99, 2**30])


def attribute_of_another_kind(proto, chance):
    """Padding as text, or as nothing."""
    attribute = proto.graph.node[0].attribute[0]
    attribute.ClearField("ints")
    attribute.type = chance.choice([AttributeProto.STRING, AttributeProto.UNDEFINED, AttributeProto.GRAPH])


def too_many_operands(proto, chance):
    node = proto.graph.node[chance.randrange(2)]
    node.input.extend(["x"] * chance.randrange(6, 40))


def outside(proto, chance):
    """Weights are said to lie outside of the folder."""
    place = ["../../etc/passwd", "/etc/passwd", "../secret", "a/../../secret", "./../secret", "link", "..", "."]
    beside(pick(chance, proto.graph.initializer), pick(chance, place))


def missing(proto, chance):
    """The file with the weights is not there, or is something that can be read for ever."""
    beside(
        pick(chance, proto.graph.initializer),
        pick(chance, ["gone.data", "", "/dev/zero", "pipe", "a/b", "gone\n.data", "a\0b", "long" * 99, "long" * 2000]),
    )


def short(proto, chance):
    """The file with the weights is shorter than they are, or what is said of it is no number."""
    entries = [
        {"offset": "4"},
        {"offset": "-4"},
        {"length": "3"},
        {"offset": "x"},
        {"offset": str(2**63)},
        {"length": "1e3"},
    ]
    beside(pick(chance, proto.graph.initializer), "short.data", **pick(chance, entries))


def beside(tensor, location, **entries):
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=value)


KINDS = [
    cut, overwrite, empty, unread, unwritten, cycle, repeated_result, repeated_weight, repeated_input, no_results,
    no_version, version_of_the_future, no_type, unheard_type, wrong_rank, wrong_channels, wrong_length, no_data,
    negative_size, huge_weight, huge_input, huge_value, unknown_type_of_weight, other_type_of_weight,
    unknown_type_of_input, attribute_of_another_kind, too_many_operands, outside, missing, short,
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A folder with what damaged files point at; beside it a secret."""
    (tmp_path / "secret").write_bytes(b"secret" * 200)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "short.data").write_bytes(b"1234")
    os.mkfifo(folder / "pipe")
    return folder


def in_a_child(function):
    """What a function returns, run in a process of its own with bounded memory, and how that ended."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(reading)
            now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (now + MEGABYTES * 2**20,) * 2)
            with os.fdopen(writing, "wb") as stream:
                stream.write(pickle.dumps(function()))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        found = stream.read()
    _, status = os.waitpid(child, 0)
    return pickle.loads(found) if found else f"the process ended with {status}"


def refused(folder, data):
    """What is wrong with the way a file is refused; empty if nothing is."""
    (folder / "in.onnx").write_bytes(data)
    files, modules = sorted(os.listdir(folder)), set(sys.modules)
    started = time.process_time()
    try:
        fold_file(folder / "in.onnx", folder / "out.onnx")
        wrong = "it was not refused"
    except NormfuseError as error:
        wrong = f"more than one line: {error}" if "\n" in str(error) or len(str(error)) > 800 else ""
    except Exception as error:
        wrong = f"{type(error).__name__}: {error}"
    if sorted(os.listdir(folder)) != files:
        wrong = wrong or "files were left"
    if time.process_time() - started > SECONDS:
        wrong = wrong or "it took too long"
    imported = {name for name in set(sys.modules) - modules if not name.startswith(("normfuse", "torch", "sympy"))}
    return wrong or (f"imported {sorted(imported)}" if imported else "")


@pytest.mark.parametrize("damage", KINDS, ids=lambda damage: damage.__name__)
def test_damage_is_refused_in_one_line(folder, damage):
    def attempt():
        found = {}
        for number in range(COPIES):
            proto = images()
            data = damage(proto, random.Random(number))
            data = data if data is not None else proto.SerializeToString()
            if wrong := refused(folder, data):
                found[number] = wrong
        return found

    assert in_a_child(attempt) == {}


def test_an_undamaged_file_is_not_refused(folder):
    assert in_a_child(lambda: refused(folder, images().SerializeToString())) == "it was not refused"


def test_functions_that_double_are_refused_before_anybody_writes_them_out(folder):
    proto = images()
    own = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    for level in range(40):
        inner = [(f"f{level - 1}", "own")] * 2 if level else [("Neg", "")]
        names = [*"at"[: len(inner)], "z"]
        nodes = [
            helper.make_node(kind, [before], [after], domain=domain)
            for (kind, domain), before, after in zip(inner, names, names[1:], strict=False)
        ]
        proto.functions.append(helper.make_function("own", f"f{level}", ["a"], ["z"], nodes, own))
    proto.opset_import.append(own[1])
    proto.graph.node.append(helper.make_node("f39", ["y"], ["unread"], domain="own"))
    (folder / "in.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(NormfuseError, match="functions stand for more than 1000000 operations"):
        fold_file(folder / "in.onnx", folder / "out.onnx")
