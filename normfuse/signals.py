"""Ctrl-C and termination end the command with one line, whatever it is doing."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

_WORDS = {signal.SIGINT: b"normfuse: interrupted\n", signal.SIGTERM: b"normfuse: terminated\n"}
_received: list[int] = []


def end_at_once() -> None:
    """While nothing is written yet: imports of large libraries do not let every exception pass."""
    _handle(_leave)


def end_with_clean_up() -> None:
    """Once files may be half-written: as an exception, the signal passes through every clean-up."""
    _handle(_raise)


def exit_status() -> int | None:
    """What the command ends with because of a signal; None if there was none."""
    return 128 + _received[0] if _received else None


def _handle(handler: Any) -> None:
    for number in _WORDS:
        signal.signal(number, handler)


def _leave(number: int, frame: FrameType | None) -> None:
    if not _received:
        os.write(2, _WORDS[signal.Signals(number)])  # unlike print, safe in the middle of another print
    os._exit(128 + number)


def _raise(number: int, frame: FrameType | None) -> None:
    _handle(_leave)  # for a second one, if a clean-up hangs
    os.write(2, _WORDS[signal.Signals(number)])
    _received.append(number)
    raise SystemExit(128 + number)
