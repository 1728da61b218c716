"""Writing files: whole or not at all, over plain files only, and without a trace of what went wrong."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from normfuse.errors import NormfuseError

_PREFIX = ".normfuse-"  # of the folders in which files are made ready, each locked by the run that made it
_LEFTOVERS = "leftovers"  # in such a folder: names of data that go unless an ONNX file names them
_LOOKS = 8  # at a file that others may be replacing just then
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ENAMETOOLONG)


class OutputError(NormfuseError):
    """A file cannot be written; the message is one line. What was there before is as it was."""


def check_target(
    path: str | os.PathLike[str],
    *,
    reads: Iterable[str | os.PathLike[str]] = (),
    error: type[ValueError] = OutputError,
) -> Path:
    """The plain file that a path stands for, known before any work is done.

    Args:
        path: the file to write. A symbolic link stands for what it points to, whether that exists or not.
        reads: files that are read; none of them may be written, whatever name or link it is reached by.
        error: what to raise.

    Returns:
        The file itself, in the folder that it lies in or will lie in.

    Raises:
        OutputError (`error`): it is no plain file, read-only, one of `reads`, or in a folder that does not exist.

    Example::

        check_target("model.onnx", reads=["model.pt"])
    """
    path = Path(path)

    def refuse(why: str) -> NoReturn:
        raise error(f"cannot write {path}: {why}")

    try:
        found = os.stat(path)
    except FileNotFoundError:
        found = None
    except (OSError, ValueError) as problem:  # ValueError: a name with a zero in it
        refuse(_reason(problem))
    try:
        target = Path(os.path.realpath(path))
    except FileNotFoundError:
        refuse("the working directory is gone")
    if found is not None:
        kind = _KINDS.get(stat.S_IFMT(found.st_mode))
        if kind:
            refuse(f"it is {kind}")
        if any(os.path.samestat(found, own) for own in _printed_to()):
            refuse("it is where this program prints to")
        if not any(_lies_at(path, target) for _ in range(_LOOKS)):
            refuse("it is an open file without a name")  # such as /dev/fd/3 of a file that was removed
        if not os.access(target, os.W_OK):
            refuse("it is read-only")
    folder = target.parent if path.is_symlink() else path.parent
    if not folder.is_dir():
        refuse(f"there is no folder {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        refuse(f"the folder {folder} is read-only")
    for read in reads:
        if same_file(path, read):
            refuse("this command reads it too; give the output another name")
    return target


def same_file(first: str | os.PathLike[str], second: str | os.PathLike[str]) -> bool:
    """Whether two paths lead to one file: by links, by hard links, or as two spellings of a name."""
    try:
        return os.path.realpath(first) == os.path.realpath(second) or os.path.samefile(first, second)
    except (OSError, ValueError):  # one is not there, or its name is none: too long, or with a zero in it
        return False


def _lies_at(path: Path, target: Path) -> bool:
    """Whether a path, which may be a link, leads to the file at `target`."""
    try:
        return os.path.samefile(path, target)
    except FileNotFoundError:
        return False


class Output:
    """A file that is made ready beside its target and renamed into place.

    What a run leaves that is killed meanwhile is cleared by the next one that writes to the folder.

    Args:
        path, reads, error: see :func:`check_target`.

    Example::

        with Output("report.json") as output:
            output.staged.write_text("{}")
            output.publish()
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        reads: Sequence[str | os.PathLike[str]] = (),
        error: type[ValueError] = OutputError,
    ) -> None:
        self.path, self.reads, self.error = Path(path), tuple(reads), error
        self.target = check_target(path, reads=reads, error=error)

    def __enter__(self) -> Output:
        try:
            _clear_stale(self.target.parent, self.reads)
            self.folder, self._lock = _locked_folder(self.target.parent)
        except OSError as problem:
            raise self.error(f"cannot write {self.path}: {_reason(problem)}") from problem
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        gone = not self.folder.exists()
        with _alone_in(self.target.parent):
            _discard_leftovers(self.folder, self.reads)
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)
        if gone and isinstance(problem, Exception):
            raise self.error(f"cannot write {self.path}: its folder was removed meanwhile") from problem
        if isinstance(problem, OSError) and problem.errno in _FULL:
            raise self.error(f"cannot write {self.path}: {_reason(problem)}") from problem

    @property
    def staged(self) -> Path:
        """Where to write the file before it is published; files beside it may be published with it."""
        return self.folder / self.target.name

    def publish(self, beside: Sequence[str] = (), replaced: Callable[[], Sequence[str]] = tuple) -> None:
        """Put the staged file in its place.

        Args:
            beside: names of files in the staging folder that the file names as its data. They are in place before it.
            replaced: gives the names of data of the file that is there, which nobody else replaces meanwhile. They go
                afterwards, unless an ONNX file beside them names them, or they are read.

        Raises:
            OutputError (`error` of the constructor): nothing has changed then.
        """
        check_target(self.path, reads=self.reads, error=self.error)
        folder = self.target.parent
        try:
            for name in (*beside, self.target.name):
                _flush(self.folder / name)
            with _alone_in(folder):
                names = [self.target.name, *beside, *replaced()]
                (self.folder / _LEFTOVERS).write_text("\0".join(names))
                for name in beside:
                    os.replace(self.folder / name, folder / name)
                os.replace(self.staged, self.target)
        except OSError as problem:
            raise self.error(f"cannot write {self.path}: {_reason(problem)}") from problem


def _locked_folder(parent: Path) -> tuple[Path, int]:
    """A folder of our own, and the lock that says that its maker is alive."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # another run has taken it for stale already
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: nobody else can lock the folder, so nobody takes it for stale
            return folder, lock
        if folder.exists():  # else another run came between
            return folder, lock
        os.close(lock)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """While no other run puts files in place or takes them away in a folder; waits for it."""
    try:
        lock = os.open(folder, os.O_RDONLY)
    except OSError:  # gone, or not to be read: what is done there fails, or goes on as where there are no locks
        yield
        return
    try:
        if not folder.name.startswith(_PREFIX):  # that is one run's own, and locked by it
            with suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _clear_stale(parent: Path, reads: Sequence[str | os.PathLike[str]]) -> None:
    """Removes what killed runs left in a folder, and finishes what they had begun to put in place."""
    for folder in parent.glob(f"{_PREFIX}*"):
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # gone meanwhile, somebody else's, or no folder
            continue
        try:
            if os.fstat(lock).st_uid == os.geteuid():
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with _alone_in(parent):
                    _discard_leftovers(folder, reads)
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue  # its run is alive
        finally:
            os.close(lock)


def _discard_leftovers(staging: Path, reads: Sequence[str | os.PathLike[str]]) -> None:
    """Removes data that no ONNX file names: new data if the file did not appear, old data if it did."""
    try:
        target, *names = (staging / _LEFTOVERS).read_text().split("\0")
    except FileNotFoundError:
        return
    folder = staging.parent
    for name in set(names):
        file = folder / name
        if os.path.basename(name) != name or not name or file.is_symlink() or not file.is_file():
            continue
        owners = {folder / target, *folder.glob("*.onnx")} - {file}
        if not any(same_file(file, read) for read in reads) and not any(_names_data(owner, name) for owner in owners):
            file.unlink(missing_ok=True)


def _names_data(owner: Path, name: str) -> bool:
    """Whether an ONNX file may name this file as its data, without reading more than its bytes.

    In doubt it does. A protobuf entry ``location`` holds the name: the key, a tag, the name's length, the name.
    """
    entry = re.compile(rb"location\x12.{1,2}(?:\./)*" + re.escape(os.fsencode(name)), re.DOTALL)
    try:
        with owner.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                return False
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return entry.search(content) is not None
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True


def _printed_to() -> list[os.stat_result]:
    """Standard output and error, where they are files."""
    results = []
    for stream in (sys.__stdout__, sys.__stderr__):
        try:
            if stream is not None:
                results.append(os.fstat(stream.fileno()))
        except (OSError, ValueError):  # closed
            continue
    return results


def _flush(path: Path) -> None:
    """To the disk, so that a name never stands for less than the whole file."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _reason(problem: BaseException) -> str:
    text = getattr(problem, "strerror", None) or str(problem)
    return text[:1].lower() + text[1:]
