"""The rows of the registry as cases of tests: a norm, its inputs, training steps, a model around it."""

import copy

import pytest
import torch
from norms import has_statistics
from torch import nn

from normfuse.nn.registry import NORMS

C = 8


def every(entries):
    return pytest.mark.parametrize("entry", entries, ids=lambda entry: entry.name)


EVERY = every(NORMS)
LAYERS = [entry for entry in NORMS if entry.layout != "weight"]


def has_running_statistics(entry):
    return any(has_statistics(module) for module in entry.make(C).modules())


def inputs_of(entry, seed=0):
    x = torch.randn(
        (4, C, 5, 3) if entry.layout == "image" else (4, 7, C), generator=torch.Generator().manual_seed(seed)
    )
    return x, *entry.others(x)


def train(norm, inputs, steps=3):
    norm.train()
    for _ in range(steps):
        x, *others = inputs
        norm(x.clone().requires_grad_(), *others).square().sum().backward()
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    norm.zero_grad()
    return norm


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left.values(), right.values(), strict=True))


def copies(entry, count=2, dtype=None):
    """The same trained norm several times."""
    norm = train(entry.make(C), inputs_of(entry))
    return [copy.deepcopy(norm).to(dtype).train() for _ in range(count)]


def in_dtype(inputs, dtype):
    return tuple(value.to(dtype) if value.is_floating_point() else value for value in inputs)


def loss(y):
    return (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)).sin().sum()


class Traced(nn.Module):
    def __init__(self, entry):
        super().__init__()
        self.norm = entry.make(C)


class Alone(Traced):
    def forward(self, x):
        return torch.relu(self.norm(x.sin()))


class WithAnother(Traced):
    def forward(self, x, other):
        return torch.relu(self.norm(x.sin(), other))


def model_of(entry):
    model = (WithAnother if inputs_of(entry)[1:] else Alone)(entry)
    train(model, inputs_of(entry))
    return model
