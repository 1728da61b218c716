"""Loads archives that were tampered with, one after the other, and reports whatever Python does meanwhile.

``watched(FOLDER, FIRST, LAST)`` mutates the good files in FOLDER (``*.good``) with the seeds FIRST to LAST. Everything
runs in one process, which ``test_archive_mutations.py`` starts: a new one for each file would import torch each time.
"""

import ast
import contextlib
import io
import logging
import os
import re
import resource
import sys
import time
import warnings
from pathlib import Path

import archive_mutations

import normfuse

GIGABYTES = 2
# Audit events of what a reader of data has no business with. https://docs.python.org/3/library/audit_events.html
SUSPICIOUS = re.compile(
    r"import|socket\.|subprocess\.|os\.|shutil\.|ctypes\.|pickle\.|marshal\.|pty\.|tempfile\.|urllib\.|webbrowser\.|"
    r"ftplib\.|http\.|smtplib\.|ensurepip|fcntl\.|mmap\.|signal\.|syslog\.|winreg|sqlite3|setopencodehook|sys\.(set|unraisable)"
)
TYPES = re.compile(
    r"(Tensor|List|Optional|int|float|bool|str|number|Generator|Dict|Device|Layout|MemoryFormat|[\[\], ])+"
)
CALLS = re.compile(r"torch\.ops\.aten\.\w+\.\w+|torch\.sym_\w+|math\.\w+|operator\.\w+|device")


class Watch:
    """Collects what happens while it is on, but for reading one file, and torch.fx making a function of a graph."""

    def __init__(self, path: Path) -> None:
        self.path, self.on, self.found = str(path), False, []
        sys.addaudithook(self.hook)

    def hook(self, event: str, args: tuple) -> None:
        if not self.on:
            return
        if event == "open":
            path, _, flags = args
            writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
            suspicious = not (path == self.path or isinstance(path, int)) or flags & writes
        elif event == "compile":
            suspicious = not self.is_torchs(*args)
        elif event == "exec":
            suspicious = not re.fullmatch(r"<eval_with_key>\.\d+|<string>", args[0].co_filename)
        else:
            suspicious = SUSPICIOUS.match(event)
        if suspicious:
            self.found.append(f"{event} {str(args)[:200]}")

    def is_torchs(self, source: bytes | str, filename: str) -> bool:
        """Whether torch compiles something of its own.

        That is the function of a graph that has been checked, or the name of a type in the schemas of its own
        operations.
        """
        text = source.decode() if isinstance(source, bytes) else str(source)
        if filename == "<string>":
            return TYPES.fullmatch(text) is not None
        if not str(filename).startswith("<eval_with_key>"):
            return False
        self.on = False
        tree = ast.parse(text)
        self.on = True
        calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
        strange = (ast.Import, ast.ImportFrom, ast.Lambda, ast.ClassDef, ast.Global, ast.Try, ast.With)
        return all(CALLS.fullmatch(call) for call in calls) and not any(isinstance(n, strange) for n in ast.walk(tree))


def attempt(path: Path) -> tuple[str, str]:
    """How loading ends: ``loaded``, ``refused``, or ``foreign`` for an error that is none of ours; and its message."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            normfuse.load(path)
    except normfuse.CheckpointError as error:
        text = str(error)
        fine = len(text) <= 400 and text.isprintable() and not said.getvalue()
        return ("refused" if fine else "foreign"), text + said.getvalue()
    except BaseException as error:  # SystemExit too: nothing that is read may end the process
        return "foreign", f"{type(error).__name__}: {error}"
    return ("foreign" if said.getvalue() else "loaded"), said.getvalue()


def watched(folder: Path, first: int, last: int) -> dict:
    """What went wrong, how often a file was loaded and refused, and the longest processor time of one."""
    path = folder / "m.pt"
    good = [file.read_bytes() for file in sorted(folder.glob("*.good"))]
    for data in good:
        path.write_bytes(data)
        assert attempt(path) == ("loaded", ""), attempt(path)
    os.chdir(folder)
    before = sorted(os.listdir(folder))
    (size,) = re.findall(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text())
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (int(size) * 1024 + (GIGABYTES << 30), most))
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    watch, wrong, counts, slowest = Watch(path), [], {"loaded": 0, "refused": 0, "foreign": 0}, 0.0
    for seed in range(first, last):
        what, data = archive_mutations.mutation(good[seed % len(good)], seed)
        path.write_bytes(data)
        begin, watch.found, watch.on = time.process_time(), [], True
        end, message = attempt(path)
        watch.on = False
        slowest = max(slowest, time.process_time() - begin)
        counts[end] += 1
        if end == "foreign" or watch.found or sorted(os.listdir(folder)) != before:
            wrong.append([what, end, message[:300], watch.found[:3], sorted(set(os.listdir(folder)) - set(before))])
    return {"wrong": wrong, "counts": counts, "slowest": slowest}
