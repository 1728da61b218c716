"""Damaged and malicious PT2 archives, made from a good one: deterministic functions of a seed.

Digests are made to fit afterwards, as whoever changes a file on purpose would do; only damage of the container leaves
them as they are.
"""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
from copy import deepcopy
from typing import Any

from archives import CONSTANTS, MODEL, OWN, WEIGHTS, directory, insert, item, overlapping, pack, unpack, zipped

TARGETS = [
    "torch.ops.aten.from_file.default",
    "torch.ops.aten._print.default",
    "torch.ops.aten.add.out",
    "torch.ops.aten.add_.Tensor",
    "torch.ops.aten.set_.source_Tensor",
    "torch.ops.aten.resize_.default",
    "torch.ops.aten.nonzero.default",
    "torch.ops.aten.item.default",
    "torch.ops.aten.unbind.int",
    "torch.ops.aten.repeat.default",
    "torch.ops.aten.diff.default",
    "torch.ops.aten.linear.nothing",
    "torch.ops.aten.add.__class__",
    "torch.ops.aten.__class__.mro",
    "torch.ops.aten/../../os.system",
    "torch.ops.higher_order.call_torchbind",
    "torch.ops.higher_order.triton_kernel_wrapper_functional",
    "torch.ops.higher_order.wrap_with_set_grad_enabled",
    "torch.ops.inductor.resize_storage_bytes_.default",
    "torch.ops.c10d.barrier.default",
    "torch.ops.prims.convert_element_type.default",
    "torch.ops.quantized.linear.default",
    "torch.ops.debugprims.load_tensor.default",
    "torch.ops.load_library",
    "torch.hub.load",
    "torch.load",
    "torch.compile",
    "torch.serialization.pickle.loads",
    "torch.utils.cpp_extension.load",
    "os.system",
    "builtins.eval",
    "_operator.attrgetter",
    "_operator.methodcaller",
    "_operator.add.__class__",
    "math.factorial",
    "#extension:op",
    "torch.ops.aten.linear.default\x00",
    "torch．ops.aten.linear.default",
    "",
]
EXPRESSIONS = [
    "__import__('os').system('touch CANARY')",
    "().__class__.__base__.__subclasses__()",
    "Symbol('s77', positive=True, integer=True).__class__",
    "Pow(Integer(9), Pow(Integer(9), Integer(9)))",
    "9**9**9",
    "Mul(" * 200 + "Integer(1)" + ")" * 200,
    "Integer(" + "9" * 5000 + ")",
    "FloorDiv(Symbol('s77', positive=True, integer=True), Integer(0))",
    "Symbol('u0', integer=True)",
    "Symbol('s77', positive=False, integer=True)",
    "lambda: 0",
    "Function('f')(1)",
    "Lambda(x, x)",
    "S('1')",
    "Float('nan', precision=53)",
    "Float('1e400', precision=53)",
    "Symbol('s77', commutative=False)",
    "Symbol('__import__', integer=True)",
    "Integer(-5)",
    "Add(Symbol('s77', positive=True, integer=True), Integer(1))",
    "",
    "Max()",
]
VALUES: list[Any] = [
    *(None, True, False, -1, 0, 1, 7, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63), 0.5, -0.0, 1e300),
    *("", "x", "NaN", "Infinity", "__import__('os').system('touch CANARY')", "a" * 3000, "a\nb\x1b[2J", "\ud800", "ｘ"),
    *("../../etc/passwd", "self", "torch", "lambda", "class", "weight_0", "input", "output", "as_none", "0"),
    *([], {}, [[]], [None], {"": None}, {"as_int": 2**62}, {"as_name": "x"}, {"as_tensor": {"name": "x"}}),
    *({"as_custom_obj": {"name": "x", "class_fqn": "os.system"}}, {"as_operator": "torch.load"}),
    *({"as_expr": {"expr_str": text, "hint": {"as_int": 3}}} for text in EXPRESSIONS[:3]),
]


def mutation(good: bytes, seed: int) -> tuple[str, bytes]:
    """What was done, and the archive."""
    rng = random.Random(seed)
    level = rng.choices((_container, _json, _graph, _sizes), weights=(2, 4, 3, 2))[0]
    what, data = level(good, rng)
    return f"{seed} {level.__name__[1:]}: {what}", data


# -- the container ---------------------------------------------------------------------------------------------------


def _container(good: bytes, rng: random.Random) -> tuple[str, bytes]:
    contents = unpack(good)
    name = rng.choice(list(contents))
    match rng.choice(
        "flip cut twice packed bomb leave drop swap add header directory comment before overlap rename".split()
    ):
        case "flip":
            at, bit = rng.randrange(len(good)), 1 << rng.randrange(8)
            return f"bit {bit} of byte {at} flipped", good[:at] + bytes([good[at] ^ bit]) + good[at + 1 :]
        case "cut":
            at = rng.randrange(len(good))
            return f"cut at {at}", good[:at]
        case "twice":
            return f"{name} twice", zipped([*contents.items(), (name, contents[name])])
        case "packed":
            return f"{name} compressed", zipped(contents.items(), packed=name)
        case "bomb":
            return f"{name} is a bomb", zipped((contents | {name: bytes(1 << 26)}).items(), packed=name)
        case "leave":
            return f"{name} leaves the folder", zipped([*contents.items(), (f"../{name}", b"")])
        case "drop":
            return f"{name} gone", pack({n: d for n, d in contents.items() if n != name}, fit=rng.random() < 0.5)
        case "swap":
            other = rng.choice(list(contents))
            swapped = contents | {name: contents[other], other: contents[name]}
            return f"{name} and {other} swapped", pack(swapped, fit=rng.random() < 0.5)
        case "add":
            extra = rng.choice(
                ["data/aotinductor/model/a.so", "data/constants/custom_obj_0", "models/other.json", "code/a.py", "a\nb"]
            )
            return f"{extra!r} added", pack(contents | {extra: b"\x80\x04cos\nsystem\n(S'touch CANARY'\ntR."})
        case "rename":
            renamed = {("x" + n if n == name else n): d for n, d in contents.items()}
            return f"{name} renamed", pack(renamed)
        case "comment":
            return "a comment", good[:-2] + struct.pack("<H", 5) + b"PK\x05\x06\x00"
        case "before":
            return "something before", rng.randbytes(rng.randrange(1, 200)) + good
        case "overlap":
            return "two records in one place", overlapping(contents, *rng.sample(range(len(contents)), 2))
        case "header":
            with zipfile.ZipFile(io.BytesIO(good)) as archive:
                return _number_in(good, rng, [entry.header_offset for entry in archive.infolist()], 30)
        case _:
            return _number_in(good, rng, [*directory(good), len(good) - 22], 46)


def _number_in(good: bytes, rng: random.Random, places: list[int], length: int) -> tuple[str, bytes]:
    data = bytearray(good)
    at = min(rng.choice(places) + rng.randrange(4, length - 4), len(data) - 4)
    data[at : at + 4] = struct.pack("<I", rng.choice([0, 1, 0xFFFF, 0xFFFFFFFF, 0x7FFFFFFF, rng.randrange(1 << 32)]))
    return f"number at {at} of {len(data)}", bytes(data)


# -- JSON ------------------------------------------------------------------------------------------------------------


def _json(good: bytes, rng: random.Random) -> tuple[str, bytes]:
    contents = unpack(good)
    name = rng.choice([n for n in (MODEL, MODEL, WEIGHTS, CONSTANTS, OWN) if n in contents])
    root = [json.loads(contents[name])]
    where, key = _somewhere(root, rng)
    label = f"{name} at {key!r}"
    match rng.choice("value value value delete add again order text tag".split()):
        case "value":
            where[key] = deepcopy(rng.choice(VALUES))
            label += f" is {str(where[key])[:40]!r}"
        case "delete":
            del where[key]
            label += " deleted"
        case "add" if isinstance(where, dict):
            where["unknown"] = deepcopy(rng.choice(VALUES))
            label += ", a key more"
        case "again" | "add" if isinstance(where, list):
            where.insert(rng.randrange(len(where) + 1), deepcopy(where[key]))
            label += " once more"
        case "order" if isinstance(where, list):
            rng.shuffle(where)
            label += ", order"
        case "tag" if isinstance(where, dict):
            where[rng.choice(["as_none", "as_int", "as_name", "as_tensor", "as_graph", "as_string"])] = where.pop(key)
            label += " under another tag"
        case _:
            text = json.dumps(root[0]) if root else "null"
            new = rng.choice(
                [
                    *(
                        text[: rng.randrange(len(text))],
                        "[" * 100_000,
                        '{"a":' * 50_000,
                        text.replace("1", "1" * 400, 1),
                    ),
                    *(
                        text.replace("0", "NaN", 1),
                        text.replace("0", "1e999", 1),
                        text.replace("{", '{"config": 1, ', 1),
                    ),
                    *(text + "x", "\ufeff" + text, text.replace('"', "'"), "null", '"text"', ""),
                ]
            )
            return f"{label}, text", pack(contents | {name: new.encode()})
    text = json.dumps(root[0] if root else None)
    return label, pack(contents | {name: text.encode()}, fit=rng.random() < 0.9)


def _somewhere(root: list[Any], rng: random.Random) -> tuple[Any, Any]:
    """A container and a key in it, any depth with the same chance."""
    found: list[list[tuple[Any, Any]]] = []
    todo = [(root, 0, 0)]
    while todo:
        where, key, depth = todo.pop()
        found += [[]] * max(0, depth + 1 - len(found))
        found[depth] = [*found[depth], (where, key)] if len(found[depth]) < 400 else found[depth]
        child = where[key]
        if isinstance(child, dict):
            todo += [(child, k, depth + 1) for k in child]
        elif isinstance(child, list):
            todo += [(child, k, depth + 1) for k in range(len(child))]
    return rng.choice(rng.choice(found[1:] or found))


# -- the graph -------------------------------------------------------------------------------------------------------


def _graph(good: bytes, rng: random.Random) -> tuple[str, bytes]:
    contents = unpack(good)
    model = json.loads(contents[MODEL])
    graph = model["graph_module"]["graph"]
    nodes, index = graph["nodes"], rng.randrange(len(graph["nodes"]))
    node = nodes[index]
    match rng.choice(
        "target target operand name order constant parts doubling size size range traces guards cycle signature".split()
    ):
        case "target":
            node["target"] = rng.choice(TARGETS)
            what = f"target {node['target']!r}"
        case "operand" if node["inputs"]:
            operand = rng.choice(node["inputs"])
            operand["arg"] = deepcopy(
                rng.choice([*(other["arg"] for n in nodes for other in n["inputs"]), *_operands()])
            )
            what = f"operand {operand['name']!r} of {node['name']} is {str(operand['arg'])[:60]}"
        case "name":
            old, new = (
                _a_name(graph, rng),
                rng.choice([_a_name(graph, rng), "x", "torch", "__class__", "a b", "ｘ", "def", "a;b"]),
            )
            text = json.dumps(model).replace(f'"{old}"', f'"{new}"')
            return f"{old!r} is called {new!r}", pack(contents | {MODEL: text.encode()})
        case "order":
            other = rng.randrange(len(nodes))
            nodes[index], nodes[other] = nodes[other], nodes[index]
            what = f"operations {index} and {other} swapped"
        case "constant":
            target, inputs, shape = rng.choice(_LARGE)
            what = f"a constant by {target} of {shape}"
            insert(graph, 0, target, inputs, "large", shape)
        case "parts":
            what = "a split into many parts"
            insert(graph, 0, "torch.ops.aten.zeros.default", {"size": {"as_ints": [1 << 40]}}, "long", [1 << 40])
            parts = {"target": "torch.ops.aten.unbind.int", "inputs": [item("self", {"as_tensor": {"name": "long"}})]}
            nodes.insert(1, parts | {"outputs": [{"as_tensors": [{"name": "part"}]}], "metadata": {}, "name": "unbind"})
        case "doubling":
            what = "a value that doubles in size"
            insert(graph, 0, "torch.ops.aten.ones.default", {"size": {"as_ints": [4]}}, "d0", [4])
            for n in range(1, 50):
                operands = {"tensors": {"as_tensors": [{"name": f"d{n - 1}"}] * 2}}
                insert(graph, n, "torch.ops.aten.cat.default", operands, f"d{n}", [4 << n])
        case "size":
            sizes = [s for t in graph["tensor_values"].values() for s in (*t["sizes"], *t["strides"])]
            sizes = [size for size in sizes if "as_expr" in size] or sizes
            size = rng.choice(sizes)
            size.clear()
            size["as_expr"] = {"expr_str": rng.choice(EXPRESSIONS), "hint": rng.choice([None, {"as_int": 3}])}
            what = f"size {size['as_expr']['expr_str'][:40]!r}"
        case "range":
            low, high = rng.choice([(5, 1), (-1, 2**62), (2**62, 2**63 - 1), (None, None), (0, 0), (100, 200)])
            model["range_constraints"] = {k: {"min_val": low, "max_val": high} for k in model["range_constraints"]}
            model["range_constraints"]["s0\n"] = {"min_val": low, "max_val": high}
            what = f"ranges {low} to {high}"
        case "traces":
            evil = [
                "os.system",
                "torch.hub.load",
                "torch.nn.modules.os.system",
                "__import__('os')",
                "a,b;c,d,e,f",
                "[[[",
            ]
            node["metadata"] = {
                key: rng.choice([f"x,{rng.choice(evil)}", rng.choice(evil), '[{"name": 1}]', "[" * 3000])
                for key in ("stack_trace", "source_fn_stack", "nn_module_stack", "custom", "from_node", "torch_fn")
            }
            what = "metadata of an operation"
        case "guards":
            model["guards_code"] = ["__import__('os').system('touch CANARY')"]
            model["verifiers"] = [rng.choice(["os.system", "EDGE", "", "ATEN"])]
            for entry in model["graph_module"]["module_call_graph"]:
                if entry["signature"]:
                    entry["signature"]["in_spec"] = rng.choice(
                        ['[1, {"type": "os.system"}]', "[" * 9999, "__import__('os')"]
                    )
            what = "guards, verifiers, structures"
        case "cycle" if node["inputs"]:
            node["inputs"][0]["arg"] = {"as_tensor": {"name": _a_name(graph, rng)}}
            what = f"{node['name']} reads another value"
        case _:
            specs = model["graph_module"]["signature"][rng.choice(["input_specs", "output_specs"])]
            where, key = _somewhere([specs], rng)
            where[key] = deepcopy(rng.choice(VALUES))
            what = f"signature at {key!r}"
    return what, pack(contents | {MODEL: json.dumps(model).encode()})


def _operands() -> list[Any]:
    return [
        *({"as_int": 2**62}, {"as_int": -7}, {"as_ints": [2**40, 2**40]}, {"as_ints": [1] * 100}, {"as_float": "NaN"}),
        *(
            {"as_string": "x" * 99},
            {"as_device": {"type": "cuda", "index": 99}},
            {"as_device": {"type": "privateuseone", "index": 0}},
        ),
        *(
            {"as_scalar_type": 0},
            {"as_layout": 1},
            {"as_none": True},
            {"as_bool": True},
            {"as_complex": {"real": 1, "imag": 1}},
        ),
        *({"as_graph": {"name": "g", "graph": None}}, {"as_nested_tensors": [[]]}, {"as_string_to_argument": {}}),
    ]


_LARGE = [
    ("torch.ops.aten.full.default", {"size": {"as_ints": [10**12]}, "fill_value": {"as_float": 1.0}}, [10**12]),
    ("torch.ops.aten.arange.default", {"end": {"as_int": 10**12}}, [10**12]),
    ("torch.ops.aten.zeros.default", {"size": {"as_ints": [1 << 31, 1 << 31]}}, [1 << 31, 1 << 31]),
    ("torch.ops.aten.zeros.default", {"size": {"as_ints": [1 << 62]}}, [1 << 62]),
    ("torch.ops.aten.eye.default", {"n": {"as_int": 1 << 24}}, [1 << 24, 1 << 24]),
    ("torch.ops.aten.rand.default", {"size": {"as_ints": [10**11]}}, [10**11]),
    (
        "torch.ops.aten.tril_indices.default",
        {"row": {"as_int": 1 << 20}, "col": {"as_int": 1 << 20}},
        [2, 549756338176],
    ),
]


def _a_name(graph: Any, rng: random.Random) -> str:
    return rng.choice(list(graph["tensor_values"]))


# -- sizes of weights ------------------------------------------------------------------------------------------------


def _sizes(good: bytes, rng: random.Random) -> tuple[str, bytes]:
    contents = unpack(good)
    config = rng.choice([WEIGHTS, CONSTANTS])
    payload = json.loads(contents[config])
    if not payload["config"]:
        config = WEIGHTS
        payload = json.loads(contents[config])
    name = rng.choice(list(payload["config"]))
    entry = payload["config"][name]
    meta = entry["tensor_meta"]
    number = rng.choice([-1, 0, 1, 2, 1000, 2**31, 2**40, 2**62, 2**63 - 1])
    match rng.choice("size stride offset rank dtype layout pickle record bytes repeat device share".split()):
        case "size" if meta["sizes"]:
            rng.choice(meta["sizes"])["as_int"] = number
            what = f"a size is {number}"
        case "stride" if meta["strides"]:
            rng.choice(meta["strides"])["as_int"] = number
            what = f"a stride is {number}"
        case "offset":
            meta["storage_offset"]["as_int"] = number
            what = f"the offset is {number}"
        case "rank":
            meta["sizes"] = [{"as_int": 1}] * rng.choice([0, 1, 40, 1000])
            what = f"{len(meta['sizes'])} axes"
        case "dtype":
            meta["dtype"] = rng.choice([0, 1, 5, 6, 7, 8, 12, 13, 28, 99, -1])
            what = f"dtype {meta['dtype']}"
        case "layout":
            meta["layout"] = rng.randrange(9)
            what = f"layout {meta['layout']}"
        case "pickle":
            entry["use_pickle"] = True
            what = "a pickled tensor"
            contents[config.rpartition("/")[0] + "/" + entry["path_name"]] = (
                b"\x80\x04cos\nsystem\n(S'touch CANARY'\ntR."
            )
        case "record":
            entry["path_name"] = rng.choice(
                ["weight_999", "../weight_0", "weight_0/", "custom_obj_0", "model.pt", "opaque_obj_0", "weight_٣"]
            )
            what = f"record {entry['path_name']!r}"
        case "bytes":
            record = config.rpartition("/")[0] + "/" + entry["path_name"]
            length = rng.choice([0, 1, 3, 4096])
            contents[record] = rng.randbytes(length)
            what = f"{record} of {length} bytes"
        case "repeat":
            meta["sizes"] = [{"as_int": 1 << 20}, {"as_int": 1 << 20}]
            meta["strides"] = [{"as_int": 0}, {"as_int": 0}]
            what = "strides of zero"
        case "share":
            for other in payload["config"].values():
                other["path_name"] = entry["path_name"]
            what = "one record for all"
        case _:
            meta["device"] = rng.choice(
                [{"type": "cuda", "index": 0}, {"type": "meta", "index": None}, {"type": "../x", "index": -1}]
            )
            what = f"device {meta['device']}"
    return f"{config} {name!r}: {what}", pack(contents | {config: json.dumps(payload).encode()})
