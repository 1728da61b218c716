"""How much an ONNX file adds to the memory of a process at its peak: `python benchmarks/peak_memory.py file 8x512`.

A script of its own that imports little, as `inference.py` starts it for every file and setting anew. Linux only.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime


def session(path: Path, threads: int, disabled: tuple[str, ...]) -> onnxruntime.InferenceSession:
    """A session on the CPU whose threads do not spin between runs."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(
        str(path), options, ["CPUExecutionProvider"], disabled_optimizers=list(disabled)
    )


def feeds(loaded: onnxruntime.InferenceSession, batch: int, length: int, vocabulary: int) -> dict[str, np.ndarray]:
    """Random tokens [batch, length] for the session's only input."""
    tokens = np.random.default_rng(0).integers(0, vocabulary, (batch, length))
    return {loaded.get_inputs()[0].name: tokens}


def peak_megabytes(
    path: Path, batch: int, length: int, *, vocabulary: int, threads: int, disabled: tuple[str, ...] = ()
) -> float:
    """What loading and running the file once adds to the memory of a fresh process, at its peak."""
    options = ["--vocabulary", str(vocabulary), "--threads", str(threads), "--disabled", *disabled]
    command = [sys.executable, __file__, str(path), f"{batch}x{length}", *options]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _status(key: str) -> int:
    """Kilobytes of this process, from Linux."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("shape", metavar="BATCHxLENGTH", help="of the only input, tokens")
    parser.add_argument("--vocabulary", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--disabled", nargs="*", default=[], metavar="OPTIMIZER", help="of ONNX Runtime's optimisers")
    args = parser.parse_args()
    batch, length = map(int, args.shape.split("x"))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what the process holds now
    before = _status("VmRSS")
    loaded = session(args.file, args.threads, tuple(args.disabled))
    loaded.run(None, feeds(loaded, batch, length, args.vocabulary))
    print(round((_status("VmHWM") - before) / 1024, 1))


if __name__ == "__main__":
    main()
