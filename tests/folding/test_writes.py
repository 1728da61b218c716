"""Values that are written into others, and tensors that are made in a forward."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from .checks import folded
from .maps import C, MapNorm, Net, sequence, status


def put(base: Tensor, where: object, value: Tensor | float) -> Tensor:
    base[where] = value
    return base


def shifted_in_time(x: Tensor) -> Tensor:
    """A part of the channels one step earlier, another one step later (TSM)."""
    out = torch.zeros_like(x)
    out[:, :-1, :2] = x[:, 1:, :2]
    out[:, 1:, 2:4] = x[:, :-1, 2:4]
    out[:, :, 4:] = x[:, :, 4:]
    return out


def turned(x: Tensor) -> Tensor:
    """Pairs of channels, turned by a right angle."""
    out = torch.empty_like(x)
    out[..., ::2], out[..., 1::2] = -x[..., 1::2], x[..., ::2]
    return out


def behind_zeros(x: Tensor) -> Tensor:
    out = torch.zeros(x.shape[0], x.shape[1] + 2, C, dtype=x.dtype)
    out[:, 2:] = x
    return out


def by_group(x: Tensor, kind: str) -> Tensor:
    groups = torch.arange(x.shape[1]).remainder(2)[None, :, None].expand_as(x)
    return x.new_zeros(x.shape[0], 2, C).scatter_reduce(1, groups, x, kind, include_self=False)


WRITES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "zeros in front": lambda x, _: behind_zeros(x),
    "a zero token": lambda x, _: put(x.clone(), (slice(None), 0), 0.0),
    "a zero channel": lambda x, _: put(x.clone(), (..., 1), 0.0),
    "padding": lambda x, seen: put(x.clone(), ~seen, 0.0),
    "places": lambda x, _: put(x.new_zeros(x.shape[0], 9, C), (slice(None), torch.tensor([7, 1])), x[:, :2]),
    "one token for another": lambda x, _: put(x.clone(), (slice(None), 0), x[:, 1]),
    "a shift in time": lambda x, _: shifted_in_time(x),
    "a turn": lambda x, _: turned(x),
    "means by group": lambda x, _: by_group(x, "mean"),
    "maxima by group": lambda x, _: by_group(x, "amax"),
    "a mask of truth values": lambda x, seen: x * seen[..., None],
    "a mask of counts": lambda x, seen: (x * seen[..., None].long()).sum(1) / seen.sum(1, keepdim=True).clamp(min=1),
    "a mask in the values' dtype": lambda x, seen: x * seen[..., None].expand_as(x).to(x),
    "a sum": lambda x, _: sum([x, x.flip(1)], torch.zeros_like(x)),
    "a running sum": lambda x, _: torch.zeros(x.shape[0], 1, C, dtype=x.dtype).add(x),
    "an average": lambda x, _: x.sum(1) / x.shape[1],
}  # fmt: skip


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_scales_pass_what_is_written(write: Callable[[Tensor, Tensor], Tensor]) -> None:
    model = Net(
        lambda m, x: m.last(write(m.norm(torch.tanh(x)), x[..., 0] > 0)),
        norm=MapNorm(shift=False), last=torch.nn.Linear(C, 4),
    )  # fmt: skip
    model.norm.scale.data.abs_()
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", min=3)}
    _, report = folded(model, sequence(), dynamic_shapes={"x": sizes})
    assert status(report) == ["folded"], report


TOLERANT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "maximum of what is seen": lambda x, seen: x.masked_fill(~seen[..., None], -math.inf).amax(1),
    "minimum of what is seen": lambda x, seen: torch.where(seen[..., None], x, math.inf).amin(1),
    "a half": lambda x, seen: x + torch.full_like(x, 0.5),
}  # fmt: skip


@pytest.mark.parametrize("write", TOLERANT.values(), ids=TOLERANT)
def test_shifts_pass_infinities_and_numbers_that_fill(write: Callable[[Tensor, Tensor], Tensor]) -> None:
    model = Net(
        lambda m, x: m.last(write(m.norm(torch.tanh(x)), torch.cat([x[:, :1, 0].abs(), x[:, 1:, 0]], 1) > 0)),
        norm=MapNorm(), last=torch.nn.Linear(C, 4),
    )  # fmt: skip
    model.norm.scale.data.abs_()
    _, report = folded(model, sequence())
    assert status(report) == ["folded"], report


def test_a_token_that_is_put_at_masked_places_shares_their_scale() -> None:
    model = Net(
        lambda m, x: m.last(put(m.norm(torch.tanh(x)).clone(), x[..., 0] > 0, m.token)),
        norm=MapNorm(shift=False), last=torch.nn.Linear(C, 4), token=torch.nn.Parameter(torch.randn(C)),
    )  # fmt: skip
    _, report = folded(model, sequence())
    assert status(report) == ["folded"], report
    assert "token" in report.norms[0].absorbed_by
