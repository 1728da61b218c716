"""What is said of a file that cannot be used."""

from __future__ import annotations

from collections.abc import Sequence

from normfuse.errors import NormfuseError, one_line


class CheckpointError(NormfuseError):
    """A checkpoint cannot be written or read.

    The message is one line of at most `limit` characters: the file, the problem, and what to do.
    """

    def __init__(self, message: str, *, advice: Sequence[str] = (), limit: int = 400) -> None:
        super().__init__(one_line(message, limit), advice=advice)
