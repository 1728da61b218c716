"""The table of norms is complete, true, and what docs/norms.md shows."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import normfuse.nn
from normfuse.folding import fold
from normfuse.nn import PowerNorm, ProgressiveNorm
from normfuse.nn.registry import NORMS, NOTHING, page
from tests.property.programs import FAMILY

ROOT = Path(__file__).parent.parent.parent
C = 8
FUNCTIONS = {
    "layer_placements",
    "batch_norm_penalty",
    "calibrate",
    "choose_domain",
    "convert_sync",
    "keep_norms",
    "monitor",
    "norm_bounds",
    "set_momentum",
}
NO_NORMS = {"Monitor", "FeedForward", "NormedBranch", "SelfAttention", "TransformerBlock", "TransformerStack"}


def test_every_public_norm_has_a_row():
    named = {entry.name.partition("(")[0] for entry in NORMS}
    public = set(normfuse.nn.__all__) - FUNCTIONS - NO_NORMS
    assert public - named == set()
    assert named <= set(normfuse.nn.__all__)
    assert len({entry.name for entry in NORMS}) == len(NORMS)


def test_the_committed_page_is_made_from_the_table_and_the_committed_measurement():
    costs = json.loads((ROOT / "benchmarks" / "results" / "norm_costs.json").read_text())
    assert set(costs["ratios"]) == {entry.name for entry in NORMS}
    assert (ROOT / "docs" / "norms.md").read_text() == page(costs)


class Between(nn.Module):
    """The norm between two weights; ``none`` leaves it out."""

    def __init__(self, entry, none=False):
        super().__init__()
        if entry.layout == "image":
            self.first, self.second = nn.Conv2d(3, C, 1), nn.Conv2d(C, 2, 1)
        else:
            self.first, self.second = nn.Linear(3, C), nn.Linear(C, 2)
        self.norm = nn.Linear(C, C) if none and entry.layout == "weight" else nn.Identity() if none else entry.make(C)
        self.none = none

    def forward(self, x, *others):
        x = self.first(x)
        return self.second(self.norm(x) if self.none else self.norm(x, *others))


def trained(model):
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("alpha") or not tensor.is_floating_point():
                continue
            tensor.copy_(0.5 + torch.rand_like(tensor) if "var" in name or "phi" in name else torch.randn_like(tensor))
    for module in model.modules():
        if hasattr(module, "advance"):
            module.advance(module.end)
    return model.double().eval()


def data_operations(program):
    constants = set()
    for node in program.graph.nodes:
        stored = node.op == "placeholder" and node.name not in program.graph_signature.user_inputs
        if stored or (node.op == "call_function" and set(node.all_input_nodes) <= constants):
            constants.add(node)
    return [str(n.target) for n in program.graph.nodes if n.op == "call_function" and n not in constants]


@functools.cache
def without_norm(layout):
    """The operations on data of the folded program without a norm."""
    entry = next(entry for entry in NORMS if entry.layout == layout)
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64) if layout == "image" else torch.randn(2, 5, 3).double()
    bare, _ = fold(torch.export.export(Between(entry, none=True).double().eval(), (x,)))
    return data_operations(bare)


@pytest.mark.parametrize("entry", NORMS, ids=lambda entry: entry.name)
def test_what_remains_is_what_the_table_says(entry):
    """Static: the folded program is that without the norm. Dynamic: it is longer."""
    model = trained(Between(entry))
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64) if entry.layout == "image" else torch.randn(2, 5, 3).double()
    others = entry.others(x.new_zeros(2, C, 5, 4) if entry.layout == "image" else x.new_zeros(2, 5, C))
    folded, report = fold(torch.export.export(model, (x, *others)))
    with torch.no_grad():
        torch.testing.assert_close(folded.module()(x, *others), model(x, *others), rtol=1e-10, atol=1e-10)
    assert entry.static == entry.remains.startswith(NOTHING)
    assert (data_operations(folded) == without_norm(entry.layout)) is entry.static
    if entry.static:
        assert not report.remaining


@pytest.mark.slow
def test_the_benchmark_writes_the_page(tmp_path):
    results, file = tmp_path / "costs.json", tmp_path / "norms.md"
    command = [sys.executable, str(ROOT / "benchmarks" / "norm_costs.py"), "--rounds", "1", "--batch", "2"]
    subprocess.run([*command, "--results", str(results), "--page", str(file)], check=True, capture_output=True)
    assert file.read_text() == page(json.loads(results.read_text()))


LAYERS = [entry for entry in NORMS if entry.layout != "weight"]


def inputs_of(entry, batch, dtype):
    shape = (batch, C, 5, 3) if entry.layout == "image" else (batch, 7, C)
    x = torch.randn(shape).to(dtype)
    return x, *entry.others(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("entry", LAYERS, ids=lambda entry: entry.name)
def test_every_dtype_trains_and_keeps_its_dtype(entry, dtype):
    norm, wide = entry.make(C), entry.make(C).double()
    norm.load_state_dict(wide.state_dict())
    norm.to(dtype)
    x, *others = inputs_of(entry, 4, dtype)
    x.requires_grad_()
    y = norm(x, *others)
    assert y.dtype == dtype and y.shape == x.shape
    y.square().sum().backward()
    assert x.grad.dtype == dtype and x.grad.isfinite().all()
    expected = wide(x.detach().double(), *(o.double() if o.is_floating_point() else o for o in others))
    # Statistics are wide; input, result and what compositions hold in between are rounded to the dtype.
    tolerance = 16 * torch.finfo(dtype).eps * expected.abs().amax().item()
    assert (y.double() - expected).abs().max() <= tolerance


@pytest.mark.parametrize("entry", LAYERS, ids=lambda entry: entry.name)
def test_an_empty_batch_is_no_accident(entry):
    norm = entry.make(C)
    before = {name: value.clone() for name, value in norm.named_buffers() if value.is_floating_point()}
    x, *others = inputs_of(entry, 0, torch.float32)
    for training in (True, False):
        assert norm.train(training)(x, *others).shape == x.shape
    for name, value in norm.named_buffers():
        if name in before and "buffer" not in name:
            assert torch.equal(value, before[name]), name


def test_random_programs_hold_every_static_norm():
    """A ProgressiveNorm at its end is the static norm in it."""

    def kind(module):
        return (type(module), module.group_num) if isinstance(module, PowerNorm) else type(module)

    static = {kind(entry.make(C)) for entry in NORMS if entry.static and entry.layout != "weight"}
    assert static - {kind(make(C)) for make in FAMILY} == {ProgressiveNorm}
