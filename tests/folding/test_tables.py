"""Tables that an index reads, and tokens that stand beside what a norm has shifted: they take shifts too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from .checks import folded, operations
from .maps import C, MapNorm, Net, sequence, status

LOOKUPS: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "indexed": lambda m, ids: m.table[ids],
    "selected": lambda m, ids: m.table.index_select(0, ids.flatten()),
    "gathered": lambda m, ids: m.table.gather(0, ids.flatten()[:, None].expand(-1, C)),
    "concatenated": lambda m, ids: torch.cat([m.left(ids), m.right(ids)], -1),
    "concatenated by index": lambda m, ids: torch.cat([m.table[ids][..., :2], m.right(ids), m.other[ids]], -1)[..., :C],
}


@pytest.mark.parametrize("lookup", LOOKUPS.values(), ids=LOOKUPS)
def test_tables_take_scale_and_shift_of_a_norm_behind_them(lookup: Callable[[Net, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = Net(
        lambda m, ids: torch.relu(m.norm(lookup(m, ids))), norm=MapNorm(), table=nn.Parameter(torch.randn(7, C)),
        left=nn.Embedding(7, 2), right=nn.Embedding(7, 4), other=nn.Parameter(torch.randn(7, 3)),
    )  # fmt: skip
    program, report = folded(model, (torch.randint(0, 7, (3, 5)),))
    assert status(report) == ["folded"], report
    assert not {"aten.add.Tensor", "aten.mul.Tensor"} & set(operations(program))


TOKENS: dict[str, Callable[[Net, Tensor, Tensor], Tensor]] = {
    "in front": lambda m, x, hidden: torch.cat([m.token.expand(x.shape[0], 1, C), x], 1),
    "at masked places": lambda m, x, hidden: torch.where(hidden[..., None], m.token, x),
    "put there": lambda m, x, hidden: x.clone().index_put((hidden,), m.token),
    "computed": lambda m, x, hidden: torch.cat([m.first(hidden[:, :1].to(x)[..., None].expand(-1, -1, C)), x], 1),
}


@pytest.mark.parametrize("place", TOKENS.values(), ids=TOKENS)
def test_tokens_get_the_shift_that_their_neighbours_keep(place: Callable[[Net, Tensor, Tensor], Tensor]) -> None:
    model = Net(
        lambda m, x: m.last(place(m, m.norm(torch.tanh(x)), x[..., 0] > 0)), norm=MapNorm(),
        token=nn.Parameter(torch.randn(C)), first=nn.Linear(C, C), last=nn.Linear(C, 4),
    )  # fmt: skip
    program, report = folded(model, sequence(), {"x": {0: torch.export.Dim("batch")}})
    assert status(report) == ["folded"], report
    assert "aten.add.Tensor" not in operations(program)


def test_a_token_that_another_operation_reads_keeps_its_numbers() -> None:
    model = Net(
        lambda m, x: m.last(torch.cat([(t := m.token.expand(x.shape[0], 1, C)), m.norm(torch.tanh(x))], 1)).sum(1)
        + t.relu().sum(-1),
        norm=MapNorm(shift=True), token=nn.Parameter(torch.randn(C)), last=nn.Linear(C, 4),
    )  # fmt: skip
    _, report = folded(model, sequence(), {"x": {0: torch.export.Dim("batch")}})
    assert status(report) != ["folded"]
