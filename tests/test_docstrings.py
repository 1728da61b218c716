"""Every public name says what it takes, gives and raises, and shows how it is used."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "docs"))
from public import Public, public_names

NAMES = list(public_names())


def test_there_are_public_names() -> None:
    assert len(NAMES) > 150 and {"normfuse.fold", "normfuse.onnx.export"} <= {name.path for name in NAMES}


@pytest.mark.parametrize("name", NAMES, ids=lambda name: name.path)
def test_a_docstring_is_complete(name: Public) -> None:
    assert name.missing() == []


def example(x: int, y: int = 1) -> int:  # noqa: D417
    """Add.

    Args:
        x: a number.

    Example:
        >>> example(1)
        2
    """
    if x < 0:
        raise ValueError
    return x + y


class Passing:
    """Pass options on.

    Args:
        x: a number.
        **options: those below.
        y: a number.
        z: a number (default 1).

    Example:
        >>> Passing(1)
    """

    def __init__(self, x: int, **options: int) -> None: ...


def test_what_is_missing_is_found() -> None:
    assert Public("example", example).missing() == ["Args: y", "Returns", "Raises"]
    assert Public("passing", Passing).missing() == ["the default of y"]
    assert Public("main", lambda: None).missing() == ["a docstring"]
