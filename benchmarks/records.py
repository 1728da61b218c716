"""How every benchmark writes its results: JSON with one record on a line, so that files stay short."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

_LINES = 2  # containers of this depth and above are written on one line each


def dumps(content: Any) -> str:
    """JSON whose outermost container, and the containers in it, have one entry on a line.

    Args:
        content: what ``json.dumps`` takes, NaN and infinities excepted.

    Returns:
        The text, with a newline at its end. ``json.loads`` gives ``content`` back.
    """
    return _text(content, 0) + "\n"


def write(path: Path, content: Any) -> None:
    """Write :func:`dumps` of ``content`` beside ``path``, then rename it."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    beside.write_text(dumps(content), encoding="utf-8")
    beside.replace(path)


def between(page: Path, name: str, text: str) -> None:
    """Put `text` between the marks ``<!-- name: begin -->`` and ``<!-- name: end -->`` of a page.

    Raises:
        SystemExit: the page has not one of each.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    content = page.read_text(encoding="utf-8")
    if content.count(begin) != 1 or content.count(end) != 1:
        raise SystemExit(f"{page} needs one line {begin!r} and one {end!r} for the text to stand between")
    before, _, rest = content.partition(begin)
    page.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def _text(content: Any, depth: int) -> str:
    if depth == _LINES or not isinstance(content, dict | list) or not content:
        return json.dumps(content, ensure_ascii=False, allow_nan=False)
    indent, end = "\n" + " " * (depth + 1), "\n" + " " * depth
    if isinstance(content, list):
        return f"[{indent}" + f",{indent}".join(_text(entry, depth + 1) for entry in content) + f"{end}]"
    entries = (f"{_text(str(key), _LINES)}: {_text(entry, depth + 1)}" for key, entry in content.items())
    return f"{{{indent}" + f",{indent}".join(entries) + f"{end}}}"
