"""Every example in the docstring of a public name runs; part of ``make docs-test``.

Examples know ``torch`` and ``nn``; what else they need they import. Each runs in a folder of its own.
"""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest
import torch
from public import Public, public_names
from torch import nn

NAMES = list(public_names())
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.mark.parametrize("name", [name for name in NAMES if ">>>" in (name.thing.__doc__ or "")], ids=lambda n: n.path)
def test_the_example_runs(name: Public, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    example = doctest.DocTestParser().get_doctest(
        name.thing.__doc__ or "", {"torch": torch, "nn": nn}, name.path, None, None
    )
    report: list[str] = []
    doctest.DocTestRunner(optionflags=FLAGS).run(example, out=report.append)
    assert not report, "".join(report)


@pytest.mark.parametrize("name", NAMES, ids=lambda n: n.path)
def test_examples_are_doctests(name: Public) -> None:
    """Also those that ``+SKIP`` says cannot run here."""
    assert ">>>" in name.sections.get("Example", ">>>")
