"""Every block of code in the documentation runs: python -m pytest tests/docs/blocks.py (part of ``make docs-test``).

Blocks of a page share names, in the order of the page. What a page takes for granted, such as a trained model, is made
in a comment that readers do not see: ``<!--- invisible-code-block: python … --->``. Of shell blocks, the lines that
begin with ``normfuse`` run. A page's ``without`` holds words of commands that cannot run here.
"""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path
from typing import Any
from unittest import SkipTest

import pytest
import torch
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser
from typer.testing import CliRunner

from normfuse.cli.app import app

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def run_commands(example: Example) -> str | None:
    """Run the lines of a shell block that call ``normfuse``."""
    text = str(example.parsed).replace("\\\n", " ")
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] != ["normfuse"] or example.namespace.get("without", set()) & set(words):
            continue
        done = CliRunner().invoke(app, words[1:])
        if done.exit_code:
            return f"{line}\nexit status {done.exit_code}\n{done.output}"
    return None


SYBIL = Sybil(parsers=[SkipParser(), PythonCodeBlockParser(), CodeBlockParser("sh", run_commands)])


def examples(page: Path) -> list[Any]:
    return list(SYBIL.parse(page).examples())


@pytest.mark.parametrize("page", [page for page in PAGES if examples(page)], ids=lambda page: page.name)
def test_every_block_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    document = SYBIL.parse(page)
    for example in document.examples():
        with contextlib.suppress(SkipTest):  # of this block only
            example.evaluate()
