"""What a program's dimensions may be: asked for in many forms, narrowed by what tracing and the model say."""

import pytest
import torch
from torch import nn
from torch.export import Dim

import normfuse.onnx
from normfuse.checkpoint import CheckpointError, ExportableModel, inputs, parse_input

X = torch.randn(4, 8)


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.linear = function, nn.Linear(8, 8)

    def forward(self, x, y=None):
        return self.function(self.linear(x), y)


def captured(function, *examples, shapes) -> ExportableModel:
    return ExportableModel.from_model(Function(function), examples, shapes)


def dims(checkpoint: ExportableModel) -> list[str]:
    return [str(spec).partition(":")[2].partition("[")[2].removesuffix("]") for spec in checkpoint.inputs]


def appended(x, y):
    return torch.cat([x, x[:1]]) * y[:, None]


def bounded(x, y):
    return x + torch.ones(6, 8)[: x.shape[0]]


def lacking_five(x, y):
    return x if x.shape[0] != 5 else -x


AUTO = Dim.AUTO
PAST, HALF = Dim("past", max=9), Dim("half", max=5)
FOUND = {
    "a name": (lambda x, y: x, (X,), ({0: "batch"},), ["batch,8"], []),
    "a Dim with bounds": (lambda x, y: x, (X,), ({0: Dim("batch", min=2, max=7)},), ["2<=batch<=7,8"], []),
    "text with bounds": (lambda x, y: x, (X,), ({0: "0<=batch<=7"},), ["0<=batch<=7,8"], []),
    "one entry per axis": (lambda x, y: x, (X,), (("batch", None),), ["batch,8"], []),
    "an axis from behind": (lambda x, y: x, (X,), ({-2: "batch"},), ["batch,8"], []),
    "AUTO": (lambda x, y: x + y, (X, X), ({0: AUTO}, {0: AUTO}), ["x_dim_0,8", "x_dim_0,8"], []),
    "DYNAMIC with a bound": (lambda x, y: x, (X,), ({0: Dim.DYNAMIC(max=9)},), ["x_dim_0<=9,8"], []),
    "AUTO of size 1": (lambda x, y: x + y, (X, X[:1]), ({0: AUTO}, {0: AUTO}), ["x_dim_0,8", "1,8"], []),
    "STATIC": (lambda x, y: x, (X,), ({0: Dim.STATIC, 1: 8},), ["4,8"], []),
    "a bound": (bounded, (X,), ({0: "n"},), ["n<=6,8"], ["n <= 6: the model takes no more"]),
    "a bound that was known": (bounded, (X,), ({0: Dim("n", max=6)},), ["n<=6,8"], []),
    "a branch": (lambda x, y: x if x.shape[0] > 3 else -x, (X,), ({0: "n"},), ["4<=n,8"],
                 ["n >= 4: the model takes no less"]),
    "no choice": (lambda x, y: x + torch.ones(4, 1), (X,), ({0: "n"},), ["4,8"],
                  ["n is fixed at 4: the model takes no other size"]),
    "two names": (lambda x, y: x + y, (X, X), ({0: "n"}, {0: "m"}), ["n,8", "n,8"], ["m is always n"]),
    "one more, said": (appended, (X, torch.ones(5)), ({0: PAST}, {0: PAST + 1}), ["past<=9,8", "past+1"], []),
    "one more, as text": (appended, (X, torch.ones(5)), ({0: "past"}, {0: "past + 1"}), ["past,8", "past+1"], []),
    "one more, found": (appended, (X, torch.ones(5)), ({0: "past"}, {0: "total"}), ["past,8", "past+1"],
                        ["total is always past+1"]),
    "a sum, found from size 1": (lambda x, y: torch.cat([x, y]) * torch.ones(y.shape[0] + x.shape[0], 1), (X, X[:1]),
                                 ({0: "past"}, {0: "new"}), ["past,8", "new,8"], []),
    "multiples, said": (lambda x, y: x.view(-1, 2, 8), (X,), ({0: 2 * HALF},), ["2*half,8"], []),
    "multiples, found": (lambda x, y: x.view(-1, 2, 8), (X,), ({0: "n"},), ["2*n_2,8"], ["n is always 2*n_2"]),
    "windows": (lambda x, y: x.view(x.shape[0], x.shape[1] // 4, 4, 8), (torch.randn(1, 16, 8),), ({0: "b", 1: "l"},),
                ["b,4*l_4,8"], ["l is always 4*l_4"]),
    "fewer than others": (lambda x, y: x if x.shape[0] < y.shape[0] else -x, (X, torch.ones(6)), ({0: "n"}, {0: "m"}),
                          ["n,8", "3<=m"], ["m >= 3: the model takes no less",
                                            "traced for sizes with n < m; with others the model takes another path"]),
    "at least two": (lambda x, y: x[1], (X,), ({0: "n"},), ["2<=n,8"], ["n >= 2: the model fails with 1"]),
    "not one": (lambda x, y: x if x.shape[0] > 1 else -x, (X,), ({0: "n"},), ["2<=n,8"],
                ["n >= 2: the model takes another path with 1"]),
    "not five": (lacking_five, (X,), ({0: "n"},), ["n,8"],
                 ["traced for sizes with n != 5; with others the model takes another path"]),
    "a difference": (lambda x, y: x.sum() + y if x.shape[0] - y.shape[0] != 3 else -y, (X, torch.ones(6)),
                     ({0: "n"}, {0: "m"}), ["n,8", "2<=m"],
                     ["traced for sizes with n - m != 3; with others the model takes another path",
                      "m >= 2: the model takes another path with 1"]),
    "no rows": (lambda x, y: x, (X[:0],), ({0: "n"},), ["n,8"], ["the examples have no n: generated instead, with 3"]),
}  # fmt: skip


@pytest.mark.parametrize("case", FOUND)
def test_dimensions(case):
    function, examples, shapes, wanted, notes = FOUND[case]
    checkpoint = captured(function, *examples, shapes=shapes)
    assert dims(checkpoint) == wanted and list(checkpoint.notes) == notes
    sizes = inputs.consistent_sizes(checkpoint.inputs, checkpoint.example_inputs)
    for name, dim in inputs.dimensions(checkpoint.inputs).items():
        for size in (dim.minimum, inputs.clamp(7, dim)):
            tensors = [
                inputs.resize(x, spec.shape(sizes | {name: size}))
                for spec, x in zip(checkpoint.inputs, checkpoint.example_inputs, strict=True)
            ]
            assert checkpoint.run(tensors)[0].dtype == torch.float32


def test_the_bound_is_in_the_file_and_the_note_in_the_result(tmp_path):
    import onnx

    model = Function(lambda x, y: torch.cat([x, y]) + torch.ones(64, 8)[: x.shape[0] + y.shape[0]])
    result = normfuse.onnx.export(
        model, tmp_path / "m.onnx", example_inputs=(X, X[:1]), dynamic_shapes=({0: "past"}, {}), opset=20
    )
    assert result.notes == ["past <= 63: the model takes no more"]
    model = onnx.load(result.path)
    (metadata,) = model.metadata_props
    assert metadata.key == "normfuse.inputs" and metadata.value == "x:float32[past<=63,8]\ny:float32[1,8]"
    graph = model.graph
    assert graph.output[0].type.tensor_type.shape.dim[0].dim_param in ("past + 1", "1 + past")


def test_a_collection_of_shapes():
    x, y = torch.randn(3, 8), torch.randn(3, 8)
    shapes = torch.export.ShapesCollection()
    shapes[x], shapes[y] = {0: AUTO}, (Dim.DYNAMIC, None)
    assert dims(captured(lambda x, y: x + y, x, y, shapes=shapes)) == ["x_dim_0,8", "x_dim_0,8"]


def test_multiples_are_exported_and_verified_at_their_smallest(tmp_path):
    import onnx

    model = Function(lambda x, y: x.view(-1, 2, 8))
    result = normfuse.onnx.export(model, tmp_path / "m.onnx", example_inputs=X, dynamic_shapes=({0: "n"},), opset=20)
    assert any("[2,8]" in shapes for shapes in result.verification.shapes)
    graph = onnx.load(result.path).graph
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "2*n_2"


@pytest.mark.parametrize(
    ("shapes", "because"),
    [
        ({"z": {0: "n"}}, "names 'z', but the example inputs are x, y"),
        ([{0: "n"}], "1 entries for 2"),
        ({"x": {2: "n"}}, "axis 2 of a tensor with 2 axes"),
        ({"x": {0: 1.5}}, "give the dimension a name"),
        ({"x": {0: "a b"}}, "needs a word"),
        ({"x": {0: "n"}, "y": {1: "n"}}, "but n is 4 elsewhere"),
        ({"x": {0: "n"}, "y": {0: "n+2"}}, "but n.2 is 6 elsewhere"),
        ({"x": {0: "9<=n<=7"}}, "can have no size"),
        ({"x": [0]}, "1 entries for 2 axes"),  # as torch.onnx's dynamic_axes were
        ({"x": {0: 5}}, "fixes axis 0 at 5, but the example has 4"),
    ],
)
def test_refusals(shapes, because):
    with pytest.raises(CheckpointError, match=because):
        captured(lambda x, y: x + y, X, X, shapes=shapes)


def test_a_size_that_no_sum_gives_is_refused():
    with pytest.raises(CheckpointError, match=r"axis 0 of 'y' can only be .* make it fixed"):
        captured(
            lambda x, y: x.flatten(0, 1) * y[:, None],
            torch.randn(3, 4, 8),
            torch.ones(12),
            shapes=({0: "n", 1: "k"}, {0: "m"}),
        )


@pytest.mark.parametrize("text", ["x:float32[past+1,8]", "x:float32[past+seq,32*rows]", "x:float32[2*past-1]"])
def test_sums_in_input_specs(text):
    spec = parse_input(text)
    assert str(spec) == text and parse_input(str(spec)) == spec
    sizes = {"past": 5, "seq": 3, "rows": 2}
    assert spec.shape(sizes) in ([6, 8], [8, 64], [9])
    example = torch.zeros(spec.shape(sizes))
    assert inputs.consistent_sizes([spec, parse_input("s:bool[seq]")], [example, torch.ones(3).bool()])["past"] == 5


@pytest.mark.parametrize("text", ["x:float32[past+]", "x:float32[+]", "x:float32[2+3]", "x:float32[past seq]"])
def test_sums_that_are_none(text):
    with pytest.raises(CheckpointError, match="needs a word or a number"):
        parse_input(text)
