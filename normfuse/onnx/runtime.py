"""ONNX Runtime in a process of its own: a file on which it crashes, or never ends, costs that process only."""

from __future__ import annotations

import atexit
import itertools
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from normfuse.errors import NormfuseError

from . import runtime_process

LONGEST_RUN = 600.0  # seconds, where nothing is known of how long a run may take
SLOWER = 20.0  # times as long as a known run on the same inputs that another may take, beyond what any may
_LONGEST_LOAD = 3600.0  # seconds, for files of many gigabytes on a slow disk
_KEYS = itertools.count()


class RuntimeFailure(NormfuseError):
    """ONNX Runtime cannot load or run a file; in its words."""


class RuntimeEnded(RuntimeFailure):
    """ONNX Runtime has crashed, or was ended because it took too long."""


class Value(NamedTuple):
    """An input or an output: its name, its type as ``tensor(float)``, and its shape of numbers and symbols."""

    name: str
    type: str
    shape: list[int | str | None]


class Session:
    """A file that ONNX Runtime has loaded, on the CPU.

    Args:
        source: a path, or a model in bytes.
        folder: where the weights of a model in bytes lie.
        optimise: whether ONNX Runtime optimises the graph.
        optimised: where to write the optimised graph; nowhere if empty.
        threads: within an operation; 0 for all.
        settings: further entries of the session's configuration.

    Attributes:
        inputs, outputs: in the order of the file.
        properties: the file's metadata.

    Raises:
        RuntimeFailure: it cannot be loaded.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | bytes,
        *,
        folder: str = "",
        optimise: bool = True,
        optimised: str = "",
        threads: int = 0,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        entries = dict(settings or {})
        if folder:
            entries["session.model_external_initializers_file_folder_path"] = folder
        # The working folder may change after the process has started.
        self._source = source if isinstance(source, bytes) else os.path.abspath(source)
        self._options = {"optimise": optimise, "optimised": optimised, "threads": threads, "settings": entries}
        self._key = next(_KEYS)
        self._process: _Process | None = None
        with _Process.lock:
            inputs, outputs, self.properties = self._load()
        self.inputs = [Value(*value) for value in inputs]
        self.outputs = [Value(*value) for value in outputs]
        weakref.finalize(self, _Process.forget, self._key).atexit = False

    def run(self, feeds: Mapping[str, Any], *, seconds: float = LONGEST_RUN) -> list[Any]:
        """The outputs, in the order of the file.

        Raises:
            RuntimeFailure: it fails.
            RuntimeEnded: it crashes, or takes longer than so many seconds.
        """
        with _Process.lock:
            return self._living().ask("run", self._key, dict(feeds), seconds=seconds)

    def _load(self) -> tuple[list, list, dict[str, str]]:
        self._process = _Process.living()
        return self._process.ask("load", self._key, self._source, self._options, seconds=_LONGEST_LOAD)

    def _living(self) -> _Process:
        """The process, in which the file is loaded once more where another file has ended the one before."""
        if self._process is not _Process.living():
            self._load()
        assert self._process is not None
        return self._process


def clock(
    sessions: Sequence[Session], feeds: Sequence[Mapping[str, Any]], *, warm_up: int, rounds: int
) -> list[list[float]]:
    """Milliseconds of so many rounds, a list for each session; they run in turns. Raises RuntimeFailure."""
    keys = [session._key for session in sessions]
    with _Process.lock:
        for session in sessions:
            process = session._living()
        return process.ask("clock", keys, list(feeds), warm_up, rounds, seconds=None)


def failure(path: Path) -> RuntimeFailure | None:
    """What goes wrong where ONNX Runtime loads and optimises a file; None if it can."""
    try:
        Session(path)
    except RuntimeFailure as error:
        return error
    return None


class _Process:
    """The process, and the connection to it. One serves all sessions, until a file ends it."""

    lock = threading.Lock()  # for one request at a time
    _now: ClassVar[_Process | None] = None
    _forgotten: ClassVar[list[int]] = []

    def __init__(self) -> None:
        self._connection, theirs = Pipe()
        # Isolated, and without the working folder: modules may lie there that nobody asked for.
        command = [sys.executable, "-I", runtime_process.__file__, str(theirs.fileno()), *filter(None, sys.path)]
        with theirs:
            self._child = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

    @classmethod
    def living(cls) -> _Process:
        """The process; a new one where there is none."""
        if cls._now is None or cls._now._child.poll() is not None:
            cls._now = cls()
        return cls._now

    @classmethod
    def forget(cls, key: int) -> None:
        """Let a session go: now, or with the next request where one is under way."""
        cls._forgotten.append(key)
        if cls.lock.acquire(blocking=False):
            try:
                if cls._now is not None and cls._now._child.poll() is None:
                    with suppress(RuntimeEnded):
                        cls._now._drop()
            finally:
                cls.lock.release()

    @classmethod
    def end(cls) -> None:
        """End the process, if there is one."""
        if cls._now is not None:
            cls._now._end()

    @classmethod
    def forked(cls) -> None:
        """In a forked process: the process belongs to the one that it was forked from."""
        cls._now, cls.lock = None, threading.Lock()

    def ask(self, function: str, *arguments: Any, seconds: float | None) -> Any:
        """What a function of :mod:`normfuse.onnx.runtime_process` returns, after so many seconds at most."""
        if self._forgotten:
            self._drop()
        well, result = self._answer(function, arguments, seconds)
        if not well:
            raise RuntimeFailure(result)
        return result

    def _drop(self) -> None:
        keys = [self._forgotten.pop() for _ in range(len(self._forgotten))]
        self._answer("drop", (keys,), _LONGEST_LOAD)

    def _answer(self, function: str, arguments: tuple, seconds: float | None) -> tuple[bool, Any]:
        try:
            runtime_process.send(self._connection, (function, arguments))
            if self._connection.poll(seconds):
                return runtime_process.receive(self._connection)
        except (EOFError, OSError) as error:
            raise RuntimeEnded(f"ONNX Runtime crashed ({_signal(self._end())})") from error
        except BaseException:  # interrupted: what comes would be the answer to another question
            self._end()
            raise
        self._end()
        raise RuntimeEnded(f"ONNX Runtime did not end within {seconds:.0f} s")

    def _end(self) -> int:
        """End the process, if it has not ended; its exit status."""
        self._child.kill()
        self._connection.close()
        return self._child.wait()


def _signal(status: int) -> str:
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"exit status {status}"


atexit.register(_Process.end)
os.register_at_fork(after_in_child=_Process.forked)
