"""The picture of the room in docs/architecture.md, the example in docs/folding.md, and who writes which result."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from torch import nn
from torch.export import export

import normfuse.folding
from normfuse.folding import fold
from normfuse.folding.centre import centre
from normfuse.folding.gauge import Facts, Options
from normfuse.folding.program import Program
from normfuse.folding.relate import match_all, relate
from normfuse.folding.rules.affine import Affine
from normfuse.folding.rules.order import Bend
from normfuse.folding.rules.products import Linear
from normfuse.folding.settle import settle
from normfuse.folding.solve import solve

ROOM = Path(normfuse.folding.__file__).parent
DOCS = Path(__file__).parents[2] / "docs"


def picture() -> dict[str, int]:
    """The line, from the bottom, on which every file stands."""
    text = (DOCS / "architecture.md").read_text()
    (lines,) = re.findall(r"<!-- room -->\n```text\n(.*?)```", text, re.DOTALL)
    return {name: height for height, line in enumerate(reversed(lines.splitlines())) for name in line.split()}


def imports(file: Path) -> Iterator[str]:
    """The files of the room that a file imports when it runs."""
    depth = len(file.relative_to(ROOM).parts)
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            yield from [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]


def test_every_file_imports_from_lower_lines_only() -> None:
    height = picture()
    files = [file for file in ROOM.rglob("*.py") if file != ROOM / "__init__.py"]
    names = {file: file.relative_to(ROOM).parts[0].removesuffix(".py") for file in files}
    assert set(height) == set(names.values())
    for file, name in names.items():
        for imported in imports(file):
            assert height[imported] < height[name], f"{name} imports {imported}, which does not stand below it"


def test_each_result_is_written_by_its_step_alone() -> None:
    owners = {
        "matches": set(),  # frozen from the start
        "solution": {"solve", "gains"},
        "shifts": {"settle", "opposites", "gains"},
        "centring": {"centre"},
    }
    changed = re.compile(
        r"\.(matches|solution|shifts|centring)\.\w+(\[[^\]]+\] = |\.(append|add|update|setdefault|clear)\()"
    )
    for file in ROOM.rglob("*.py"):
        name = file.relative_to(ROOM).parts[0].removesuffix(".py")
        for result, *_ in changed.findall(file.read_text()):
            assert name in owners[result], f"{file.name} writes into {result}"


def test_matches_are_frozen_and_depend_on_the_program_alone() -> None:
    program = export(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU()).eval(), (torch.randn(2, 3),))
    facts = Facts(Program(program), Options())
    before = [str(node.format_node()) for node in facts.program.graph.nodes]
    first, second = match_all(facts), match_all(facts)
    assert list(map(type, first.values())) == list(map(type, second.values())) == [Linear, Affine, Bend]
    assert [str(node.format_node()) for node in facts.program.graph.nodes] == before
    matches = relate(facts.program, facts.options).matches
    for found in matches.of.values():
        with pytest.raises(FrozenInstanceError):
            found.node = None
    for name in ("of", "scale_of", "affine"):
        with pytest.raises(TypeError):
            getattr(matches, name)[None] = None


def test_what_a_step_found_is_closed() -> None:
    program = export(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.ReLU()).eval(), (torch.randn(2, 3),))
    gauge = centre(settle(solve(relate(Program(program), Options()))))
    for result in (gauge.solution, gauge.shifts, gauge.centring):
        for entry in fields(result):
            found = getattr(result, entry.name)
            assert isinstance(found, MappingProxyType | frozenset | tuple), entry.name


def test_the_worked_example_is_what_folding_computes() -> None:
    class Map(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.tensor(v)) for v in ([2.0, -0.5], [1.0, 3.0]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.addcmul(self.b, x, self.a)

    model = nn.Sequential(nn.Linear(2, 2), Map(), nn.Linear(2, 1)).eval()
    for linear, weight, bias in ((model[0], [[1, 2], [3, 4]], [1, 0]), (model[2], [[1, 2]], [0])):
        linear.weight.data, linear.bias.data = torch.tensor(weight).float(), torch.tensor(bias).float()
    x = torch.ones(1, 2)
    assert model[0](x).tolist() == [[4, 7]] and model[:2](x).tolist() == [[9, -0.5]] and model(x).tolist() == [[8]]
    program, _ = fold(export(model, (x,)))
    assert {name.removesuffix("_folded"): value.tolist() for name, value in program.state_dict.items()} == {
        "0.weight": [[1, 2], [3, 4]],
        "0.bias": [1, 0],
        "2.weight": [[2, -1]],
        "2.bias": [7],
    }
    assert program.module()(x).tolist() == [[8]]
