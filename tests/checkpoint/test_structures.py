"""Inputs and outputs of any structure become flat tensors with names, and the program computes what the model does."""

import collections
import dataclasses
import types
import typing

import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import normfuse.onnx
from normfuse.checkpoint import CheckpointError, ExportableModel, structure
from normfuse.checkpoint.arguments import bind

X, Y = torch.randn(2, 4), torch.randn(2, 4)


@dataclasses.dataclass
class Hidden:
    states: torch.Tensor
    label: str = "last"
    attention: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Answer:
    logits: torch.Tensor
    hidden: Hidden | None = None
    count: int = 3


@dataclasses.dataclass(slots=True)
class Slotted:
    left: torch.Tensor
    right: torch.Tensor | None = None


class Pair(typing.NamedTuple):
    first: torch.Tensor
    second: torch.Tensor | None = None


class Triple(tuple):
    pass


class Record:
    """No container that anybody knows: two places for values."""

    __slots__ = ("left", "right")

    def __init__(self, left, right):
        self.left, self.right = left, right


class Options(dict):
    __getattr__ = dict.__getitem__


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 4)
        self.register_buffer("table", torch.arange(4.0))

    def body(self, x):
        return self.linear(self.norm(x))


def network(forward) -> nn.Module:
    torch.manual_seed(0)
    return type("Network", (Network,), {"forward": forward})()


def check(checkpoint: ExportableModel, inputs: str, outputs: str) -> None:
    assert " ".join(checkpoint.input_names) == inputs
    assert " ".join(checkpoint.outputs) == outputs
    computed = checkpoint.run(checkpoint.example_inputs)
    for got, want in zip(computed, checkpoint.expected_outputs, strict=True):
        torch.testing.assert_close(got, want)


def everything(self, x, *rest, scale, **extra):
    return self.body(x) + rest[0] * scale + extra["shift"]


def named(self, **batch):
    return self.body(batch["ids"]) + batch["mask"]


def appended(self, x):
    lists = collections.defaultdict(list)
    lists["h"] += [x + 1, self.body(x)]
    return lists


INPUTS = {
    "a list": (lambda self, xs: self.body(xs[0] + xs[1]), ([X, Y],), "xs_0 xs_1"),
    "a dictionary": (lambda self, x, more: self.body(x) + more["b"], (X, {"b": Y}), "x more_b"),
    "a dictionary that is all": (lambda self, batch: self.body(batch["ids"]) + batch["m"], {"ids": X, "m": Y}, "ids m"),
    "lists in a dictionary": (lambda self, batch: self.body(batch["a"][1]) + batch["m"], ({"a": [X, Y], "m": X},),
                              "a_0 a_1 m"),
    "keys that are no words": (lambda self, b: self.body(b["a.b"]) + b["class"], ({"a.b": X, "class": Y},),
                               "a_b class"),
    "any number of arguments": (lambda self, *xs: self.body(xs[0] + xs[1]), (X, Y), "xs_0 xs_1"),
    "arguments of every kind": (everything, {"x": X, "rest": (Y,), "scale": X, "shift": Y}, "x rest_0 scale shift"),
    "any number of names": (named, {"ids": X, "mask": Y}, "ids mask"),
    "nothing for an optional one": (lambda self, x, mask=None, y=None: self.body(x) + y, (X, None, Y), "x y"),
    "a dataclass": (lambda self, r: self.body(r.logits) + r.hidden.states, Answer(X, Hidden(Y)),
                    "logits hidden_states"),
    "a dataclass with slots": (lambda self, r, y: self.body(r.left) + y, (Slotted(X), Y), "r_left y"),
    "an object with slots": (lambda self, r: self.body(r.left) * r.right, (Record(X, 2),), "left"),
    "a named tuple": (lambda self, p: self.body(p.first) + p.second, (Pair(X, Y),), "first second"),
    "a class of tuples": (lambda self, t: self.body(t[0]) + t[1], (Triple((X, Y)),), "t_0 t_1"),
    "a namespace": (lambda self, n: self.body(n.x) * n.k, (types.SimpleNamespace(x=X, k=2, none=None),), "x"),
    "a class of dictionaries": (lambda self, o: self.body(o.x) + o["y"], (Options(x=X, y=Y),), "x y"),
    "one tensor twice": (lambda self, x, y: self.body(x) - y, (X, X), "x y"),
    "views of one tensor": (lambda self, x, y: self.body(x) - y, (X[:1], X[1:]), "x y"),
    "a number as a tensor": (lambda self, x, s: self.body(x) * s, (X, torch.tensor(2.0)), "x s"),
}  # fmt: skip


@pytest.mark.parametrize("case", INPUTS)
def test_inputs(case):
    forward, inputs, names = INPUTS[case]
    check(ExportableModel.from_model(network(forward), inputs), names, "output")


OUTPUTS = {
    "one tensor in a tuple": (lambda self, x: (self.body(x), None, 3), "output"),
    "a dictionary of one": (lambda self, x: {"logits": self.body(x)}, "logits"),
    "a list in a dictionary": (lambda self, x: {"y": self.body(x), "states": [x + 1, x + 2]}, "y states_0 states_1"),
    "tuples in a tuple": (lambda self, x: (self.body(x), (x + 1, {"a": x + 2})), "output_0 output_1_0 output_1_1_a"),
    "a dataclass in a dataclass": (lambda self, x: Answer(self.body(x), Hidden(x * 2)), "logits hidden_states"),
    "a named tuple": (lambda self, x: Pair(self.body(x), x + 1), "first second"),
    "what torch returns": (lambda self, x: torch.max(self.body(x), 1), "values indices"),
    "a namespace": (lambda self, x: types.SimpleNamespace(u=self.body(x), v=None), "u"),
    "lists that grew": (appended, "h_0 h_1"),
    "numbers as keys": (lambda self, x: {1: self.body(x), 2: x + 1}, "output_1 output_2"),
    "the input": (lambda self, x: {"x": x, "y": self.body(x)}, "x_out y"),
    "the input alone": (lambda self, x: x, "output"),
    "views of the input": (lambda self, x: (x.view(-1), x.t(), x[:, :1]), "output_0 output_1 output_2"),
    "one tensor under two names": (lambda self, x: dict.fromkeys("ab", self.body(x)), "a b"),
    "weights and constants": (lambda self, x: (self.body(x), self.linear.weight, self.table, torch.ones(3)),
                              "output_0 output_1 output_2 output_3"),
    "a number that is the same": (lambda self, x: (self.body(x), torch.tensor(4)), "output_0 output_1"),
    "a number as a tensor": (lambda self, x: (self.body(x).sum(), x.argmax()), "output_0 output_1"),
}  # fmt: skip


@pytest.mark.parametrize("case", OUTPUTS)
def test_outputs(case):
    forward, names = OUTPUTS[case]
    model = network(forward)
    checkpoint = ExportableModel.from_model(model, X)
    check(checkpoint, "x", names)
    tensors = [leaf for _, leaf in structure.leaves(model.eval()(X)) if isinstance(leaf, torch.Tensor)]
    assert all(torch.equal(*pair) for pair in zip(checkpoint.expected_outputs, tensors, strict=True))


def same_structure(got: object, want: object) -> None:
    assert type(got) is type(want)
    pairs = zip(structure.leaves(got), structure.leaves(want), strict=True)
    for (path, leaf), (wanted, other) in pairs:
        assert path == wanted
        if isinstance(other, torch.Tensor):
            torch.testing.assert_close(leaf, other)
        else:
            assert leaf == other


@pytest.mark.parametrize("case", INPUTS)
def test_a_fused_model_takes_what_the_model_takes(case):
    forward, inputs, _ = INPUTS[case]
    model = network(forward).eval()
    call = bind(model, inputs)
    same_structure(normfuse.fuse(model, inputs)(*call.args, **call.kwargs), model(*call.args, **call.kwargs))


@pytest.mark.parametrize("case", OUTPUTS)
def test_a_fused_model_returns_what_the_model_returns(case):
    model = network(OUTPUTS[case][0]).eval()
    same_structure(normfuse.fuse(model, X)(X), model(X))


@pytest.mark.parametrize("shapes", [({0: "batch"},), (({0: "batch"},),), {"xs": ({0: "batch"},)}])
def test_dimensions_of_the_only_one_of_any_number_of_arguments(shapes):
    model = network(lambda self, *xs: self.body(xs[0]))
    assert str(ExportableModel.from_model(model, X, shapes).inputs[0]) == "xs_0:float32[batch,4]"


def test_a_file_has_the_names_and_gives_what_the_model_does(tmp_path):
    model = network(
        lambda self, xs, *, extra: {"y": self.body(xs[0]) + extra["e"], "xs_0": xs[0], "all": [xs[1], xs[1]]}
    )
    shapes = {"xs": [{0: "batch"}, {0: "batch"}], "extra": {"e": {0: "batch"}}}
    result = normfuse.onnx.export(
        model,
        tmp_path / "m.onnx",
        example_inputs={"xs": [X, Y], "extra": {"e": X, "unused": None}},
        dynamic_shapes=shapes,
    )
    graph = onnx.load(result.path).graph
    assert [value.name for value in graph.input] == ["xs_0", "xs_1", "extra_e"]
    assert [value.name for value in graph.output] == ["y", "xs_0_out", "all_0", "all_1"]
    assert {value.type.tensor_type.shape.dim[0].dim_param for value in (*graph.input, *graph.output)} == {"batch"}
    inputs = {name: torch.randn(5, 4) for name in ("xs_0", "xs_1", "extra_e")}
    session = onnxruntime.InferenceSession(result.path, providers=["CPUExecutionProvider"])
    got = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    want = model.eval()([inputs["xs_0"], inputs["xs_1"]], extra={"e": inputs["extra_e"]})
    for array, tensor in zip(got, (want["y"], want["xs_0"], *want["all"]), strict=True):
        torch.testing.assert_close(torch.from_numpy(array), tensor, rtol=1e-5, atol=1e-5)


def test_weights_that_are_returned_are_not_folded_into(tmp_path):
    class Returning(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.BatchNorm1d(4), nn.Linear(4, 4)
            self.norm.running_var.uniform_(0.5, 2)

        def forward(self, x):
            return self.linear(self.norm(x)), self.linear.weight, self.linear.weight[0], self.norm.running_var

    model = Returning().eval()
    result = normfuse.onnx.export(model, tmp_path / "m.onnx", example_inputs=X, opset=20)
    assert not result.report.remaining
    session = onnxruntime.InferenceSession(result.path, providers=["CPUExecutionProvider"])
    got = session.run(None, {"x": X.numpy()})
    for array, tensor in zip(got, model(X), strict=True):
        torch.testing.assert_close(torch.from_numpy(array), tensor.detach(), rtol=1e-5, atol=1e-5)


def test_flags_and_numbers_keep_their_values_and_are_said():
    model = network(lambda self, x, mode="a", flag=True, n=2: self.body(x) * n if flag and mode == "b" else x)
    checkpoint = ExportableModel.from_model(model, {"x": X, "n": 3, "mode": "b"})
    check(checkpoint, "x", "output")
    assert checkpoint.notes == ("fixed in the program: mode='b', n=3",)


def test_numbers_that_follow_from_a_size_are_outputs_and_other_values_are_left_out():
    model = network(lambda self, x: (self.body(x), x.shape[0], x.shape[0] * 0.5, x.shape[1], "text"))
    checkpoint = ExportableModel.from_model(model, X, ({0: "batch"},))
    check(checkpoint, "x", "output_0 output_1 output_2")
    _, count, half = checkpoint.run([torch.randn(6, 4)])
    assert (count.dtype, count.item(), half.item()) == (torch.int64, 6, 3.0)
    assert checkpoint.notes == ("no tensors, left out of the outputs: output_3 (4), output_4 ('text')",)


@pytest.mark.parametrize(
    ("forward", "inputs", "because"),
    [
        (lambda self, x: None, X, "returns no tensor"),
        (lambda self, x: x.shape[0], X, "returns no tensor"),
        (lambda self, x: x, {"y": X}, "forward.*fails|taken for it as a whole"),
        (lambda self, x, y: x + y, {"x": X, "z": X}, r"names 'z', but Network.forward takes x, y.*\(\{…\},\)"),
        (lambda self, x, y: x + y, (X,), "missing a required argument: 'y'"),
        (lambda self, x, *, y: x + y, (X, X), "2 example inputs, but Network.forward names 1"),
        (lambda self, x: x, (), "is empty"),
        (lambda self, x: x, {"x": 3}, "holds no tensor"),
        (lambda self, x: x, X.to_sparse(), "sparse"),
        (lambda self, x: x, X.to("meta"), "meta device"),
        (lambda self, x: x @ x, X, "fails on the example inputs: RuntimeError"),
    ],
)
def test_refusals(forward, inputs, because):
    if because.startswith("forward"):
        forward = lambda self, x: self.body(x)  # noqa: E731
    with pytest.raises(CheckpointError, match=because) as caught:
        ExportableModel.from_model(network(forward), inputs)
    assert "\n" not in str(caught.value)


_LEAVES = st.one_of(st.none(), st.integers(), st.booleans(), st.text(max_size=2), st.builds(lambda: torch.zeros(1)))
_KEYS = st.text("ab", min_size=1, max_size=2)
_VALUES = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.lists(inner, max_size=3).map(Triple),
        st.lists(inner, max_size=3).map(collections.deque),
        st.dictionaries(_KEYS, inner, max_size=3),
        st.dictionaries(_KEYS, inner, max_size=3).map(Options),
        st.builds(Pair, inner, inner),
        st.builds(Answer, inner, inner),
        st.builds(Slotted, inner, inner),
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(_VALUES)
def test_other_tensors_in_a_structure_change_nothing_else(value):
    before = structure.leaves(value)
    count = sum(isinstance(leaf, torch.Tensor) for _, leaf in before)
    others = [torch.full((1,), float(number)) for number in range(count)]
    after = structure.leaves(structure.replaced(value, others))
    assert [path for path, _ in after] == [path for path, _ in before]
    remaining = iter(others)
    for (_, old), (_, new), (_, now) in zip(before, after, structure.leaves(value), strict=True):
        assert now is old
        assert new is next(remaining) if isinstance(old, torch.Tensor) else new is old


def test_names_are_words_and_differ():
    assert structure.input_names([("a", 0), ("a_0",), ("b", "c.d"), ("b", "c d")]) == [
        "a_0",
        "a_0_1",
        "b_c_d",
        "b_c_d_1",
    ]
    assert structure.output_names([(0,), (1, "x"), ("x",)], ["x"]) == ["output_0", "output_1_x", "x_out"]
    assert structure.output_names([("é",), (1,)], []) == ["output", "output_1"]
