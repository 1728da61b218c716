"""What norms do not take, for every row of the registry: the message names the argument, and nothing moves."""

import copy
import inspect

import pytest
import torch
from registry_cases import LAYERS, C, every, inputs_of, same

NOTHING = torch.tensor(1.0)


def size_along_channels(x, entry, size):
    dim = 1 if entry.layout == "image" else -1
    return x.narrow(dim, 0, 1).expand(*(size if n == dim % x.dim() else s for n, s in enumerate(x.shape)))


# What x is given as, and what the message says of it. Some norms say of a shape that it does not fit another argument.
WRONG_X = {
    "no axes": (lambda x: NOTHING, "x .*shape|channel_dim=.*shape"),
    "one axis": (lambda x: x.new_ones(C + 1), "x .*shape|channel_dim=.*shape"),
    "integers": (torch.Tensor.long, "^x has dtype torch.int64; allowed are .*float32"),
    "bool": (torch.Tensor.bool, "^x has dtype torch.bool"),
    "complex": (lambda x: x.to(torch.complex64), "^x has dtype torch.complex64"),
    "another device": (lambda x: x.to("meta"), "^x is on meta but .* is on cpu"),
    "numpy": (torch.Tensor.numpy, "^x is of type ndarray; give a torch.Tensor"),
    "list": (torch.Tensor.tolist, "^x is of type list"),
    "nothing": (lambda x: None, "^x is of type NoneType"),
    "nested": (lambda x: torch.nested.nested_tensor(list(x)), r"^x is a nested tensor.*to_padded_tensor\(0.0\)"),
    "sparse": (torch.Tensor.to_sparse, r"^x has layout torch.sparse_coo.*to_dense\(\)"),
}
WRONG_OTHERS = {
    "no axes": (lambda other: NOTHING.to(other.dtype), "^{0} is .*of shape|{0} (of|has) shape"),
    "another shape": (
        lambda other: other.new_ones([size + 1 for size in other.shape]),
        "^{0} is .*of shape|{0} (of|has) shape",
    ),
    "complex": (lambda other: other.to(torch.complex64), "^{0} is torch.complex64|^{0} has dtype torch.complex64"),
    "another device": (lambda other: other.to("meta"), "^x is on cpu but {0} is on meta|^{0} is .* on meta"),
    "list": (torch.Tensor.tolist, "^{0} is of type list"),
}


def refused(entry, training, pattern, x, *others, **named):
    norm = entry.make(C).train(training)
    before = copy.deepcopy(norm.state_dict())
    with pytest.raises((TypeError, ValueError), match=pattern):
        norm(x, *others, **named)
    assert same(norm.state_dict(), before)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wrong", WRONG_X)
@every(LAYERS)
def test_an_input_that_no_norm_takes(entry, wrong, training):
    x, *others = inputs_of(entry)
    make, pattern = WRONG_X[wrong]
    refused(entry, training, pattern, make(x), *others)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [C + 1, 1, 0])
@every([entry for entry in LAYERS if "num_features" in str(inspect.signature(type(entry.make(C)).__init__))])
def test_another_number_of_channels(entry, size, training):
    x, *others = inputs_of(entry)
    refused(entry, training, f"x of shape .*{size}", size_along_channels(x, entry, size), *others)


def others_of(entry):
    """A right value for each further tensor that a norm takes, by name."""
    x, *others = inputs_of(entry)
    names = list(inspect.signature(entry.make(C).forward).parameters)
    found = dict(zip(names[1:], others, strict=False))
    if "pad_mask" in names:
        rows = x.select(entry.make(C).get_submodule(_half(entry)).channel_dim, 0)
        found["pad_mask"] = torch.zeros_like(rows, dtype=torch.bool)
    return found | ({"residual": x} if "residual" in names else {})


def _half(entry):
    return "static" if entry.name == "ProgressiveNorm" else ""


OTHERS = [(entry, name) for entry in LAYERS for name in others_of(entry)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wrong", WRONG_OTHERS)
@pytest.mark.parametrize(("entry", "name"), OTHERS, ids=lambda value: getattr(value, "name", value))
def test_a_further_argument_that_does_not_fit(entry, name, wrong, training):
    make, pattern = WRONG_OTHERS[wrong]
    given = others_of(entry)
    refused(entry, training, pattern.format(name), inputs_of(entry)[0], **(given | {name: make(given[name])}))
