"""fold and fuse compare what they made with what they were given."""

import pytest
import torch
from torch import nn

import normfuse
from normfuse.folding import FoldError, api
from normfuse.programs import Runner, own_rounding


class Net(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.inner, self.norm, self.outer = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.drop = nn.Dropout(0.5)
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)
        self.to(dtype)

    def forward(self, x, scale=None):
        y = self.outer(self.norm(self.drop(self.inner(x))))
        return y if scale is None else y * scale


def traced(dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    return torch.export.export(Net(dtype).eval(), (torch.randn(3, 4, dtype=dtype),), kwargs or None)


def broken(monkeypatch, factor):
    """Folding that scales one weight wrongly."""
    real = api.Program.finish

    def finish(self):
        folded = real(self)
        with torch.no_grad():
            for name in [name for name in folded.state_dict if name.endswith("weight_folded")][:1]:
                folded.state_dict[name].mul_(factor)
        return folded

    monkeypatch.setattr(api.Program, "finish", finish)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_difference_is_rounding_and_in_the_report(dtype):
    _, report = normfuse.fold(traced(dtype))
    # A few dozen roundings on the way, of at most eps each.
    assert report.verified is not None and report.verified <= 64 * torch.finfo(dtype).eps
    assert report.to_dict()["verified"] == report.verified


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_computes_something_else_is_an_error_that_names_the_size(monkeypatch, dtype):
    program = traced(dtype)
    broken(monkeypatch, 1.5)
    with pytest.raises(
        FoldError, match=r"differs from the program on its example inputs: output 0 by \d\.\d\de-01"
    ) as e:
        normfuse.fold(program)
    assert "\n" not in str(e.value) and "verify=False" in str(e.value)
    with pytest.raises(FoldError, match="differs"):
        normfuse.fuse(Net(dtype).eval(), (torch.randn(3, 4, dtype=dtype),))
    assert normfuse.fold(program, verify=False)[1].verified is None
    normfuse.fuse(Net(dtype).eval(), (torch.randn(3, 4, dtype=dtype),), verify=False)


def test_keyword_arguments_are_handed_over(monkeypatch):
    program = traced(scale=torch.tensor(3.0))
    assert normfuse.fold(program)[1].verified is not None
    broken(monkeypatch, 1.5)
    with pytest.raises(FoldError, match="differs"):
        normfuse.fold(program)


def test_without_example_inputs_there_is_nothing_to_compare_on():
    program = traced()
    program.example_inputs = None
    assert normfuse.fold(program)[1].verified is None


def test_examples_that_the_program_does_not_take_prove_nothing():
    program = traced()
    program.example_inputs = ((torch.randn(3, 5),), {})
    assert normfuse.fold(program)[1].verified is None


def test_places_without_a_value_are_left_out(monkeypatch):
    class Log(Net):
        def forward(self, x):
            return torch.log(super().forward(x))

    torch.manual_seed(0)
    program = torch.export.export(Log().eval(), (torch.randn(3, 4),))
    assert program.module()(*program.example_inputs[0]).isnan().any()
    assert normfuse.fold(program)[1].verified is not None
    broken(monkeypatch, 1.5)
    with pytest.raises(FoldError, match="differs"):
        normfuse.fold(program)


def test_a_program_that_loses_digits_itself_is_no_error():
    class Cancelling(Net):
        def forward(self, x):
            return (super().forward(x) + 1e5) - 1e5

    torch.manual_seed(0)
    _, report = normfuse.fold(torch.export.export(Cancelling().eval(), (torch.randn(3, 4),)))
    assert report.verified is not None


class Island(Net):
    """Net whose result meets a small value that was rounded to bfloat16."""

    def forward(self, x):
        return super().forward(x) + 1e-3 * x[:, :3].bfloat16().float()


def test_a_coarse_dtype_somewhere_in_a_program_does_not_hide_a_fault(monkeypatch):
    torch.manual_seed(0)
    program = torch.export.export(Island().eval(), (torch.randn(3, 4),))
    assert normfuse.fold(program)[1].verified < 1e-6
    broken(monkeypatch, 1.02)
    with pytest.raises(FoldError, match="differs"):
        normfuse.fold(program)


class Inside(nn.Module):
    """A norm between two weights in autocast; the exporter hides all of it in a region."""

    def __init__(self):
        super().__init__()
        self.inner, self.norm, self.outer = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.outer(self.norm(self.inner(x))).float()


@pytest.mark.parametrize("seed", range(4))
def test_what_a_region_rounds_is_no_fault(monkeypatch, seed):
    torch.manual_seed(seed)
    program = torch.export.export(Inside().eval(), (torch.randn(16, 8),))
    _, report = normfuse.fold(program)
    assert report.norms[0].status == "folded" and 1e-4 < report.verified < 0.05
    broken(monkeypatch, 1.5)
    with pytest.raises(FoldError, match="differs"):
        normfuse.fold(program)


def test_the_rounding_of_a_program_is_that_of_all_its_values():
    class Large(nn.Module):
        def forward(self, x):
            return x.cumsum(0)[-1] * 1e3 + x.sum(0) * 1e-3 - x.sum(0) * 1e3

    x = torch.randn(5, 4, dtype=torch.float64)
    program = torch.export.export(Large(), (x,))
    # The last place of values a million times as large as the result, in float64.
    assert 1e-11 < own_rounding(program, Runner(program)(x), (x,))[0] < 1e-8


def test_values_that_were_equal_stay_equal_when_they_are_rounded():
    class Chosen(nn.Module):
        def forward(self, x):
            p = x.softmax(-1)
            return p * (p == p.amax(-1, keepdim=True))

    x = torch.randn(50, 7)
    program = torch.export.export(Chosen(), (x,))
    assert own_rounding(program, Runner(program)(x), (x,))[0] < 1e-6


def test_the_examples_and_the_programs_state_stay_as_they_are():
    program = traced()
    (x,), _ = program.example_inputs
    before, state = x.clone(), {name: tensor.clone() for name, tensor in program.state_dict.items()}
    normfuse.fold(program)
    assert torch.equal(x, before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in program.state_dict.items())
