"""What MkDocs does beyond the files in docs/: pages of the files beside it, and the help of the command."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}
COMMANDS = "reference/commands.md"
_LINK = re.compile(r"(?<=\]\()([^()#\s]+)(?=[#)])")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie beside docs/, the page of the command, and the data that pages link to."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=_linked((ROOT / name).read_text(), name, ".")))
    files.append(File.generated(config, COMMANDS, content=commands()))
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        files.append(File.generated(config, f"benchmarks/results/{path.name}", abs_src_path=str(path)))
    texts = ROOT / "examples" / "data" / "held_out_sentences.txt"
    files.append(File.generated(config, "examples/data/held_out_sentences.txt", abs_src_path=str(texts)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they are in the site."""
    if page.file.src_uri in PAGES.values():
        return markdown
    return _linked(markdown, f"docs/{page.file.src_uri}", posixpath.dirname(page.file.src_uri))


def _linked(markdown: str, source: str, folder: str) -> str:
    """Links between files of the repository as links between pages of the site."""

    def link(match: re.Match[str]) -> str:
        target = match[1]
        if "://" in target or target.startswith("mailto:"):
            return target
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        page = PAGES.get(path, path.removeprefix("docs/"))
        return posixpath.relpath(page, folder or ".")

    return _LINK.sub(link, markdown)


def commands() -> str:
    """A page with the help of every command."""
    import os

    os.environ["COLUMNS"] = "100"
    from typer.main import get_command
    from typer.testing import CliRunner

    from normfuse.cli.app import app

    runner = CliRunner()
    parts = ["# The command\n\n`normfuse COMMAND --help` prints what is below.\n"]
    for name in get_command(app).commands:
        text = runner.invoke(app, [name, "--help"], prog_name="normfuse").output
        parts.append(f"## normfuse {name}\n\n```text\n{text.strip()}\n```\n")
    return "\n".join(parts)
