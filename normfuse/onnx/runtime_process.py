"""What runs in the process of :mod:`normfuse.onnx.runtime`: ONNX Runtime, asked through a connection.

Started as a script by itself, so that it need not load torch.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Thread
from typing import Any

_CHUNK = 1 << 16  # bytes; a connection takes as much memory for every read as is left to read
_sessions: dict[int, Any] = {}


def send(connection: Connection, value: Any) -> None:
    """Send a value, arrays without a copy. Sends nothing where it cannot be pickled."""
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(value, 5, buffer_callback=buffers.append)
    parts = [memoryview(head), *(buffer.raw() for buffer in buffers)]
    connection.send([len(part) for part in parts])
    for part in parts:
        for start in range(0, len(part), _CHUNK):
            connection.send_bytes(part[start : start + _CHUNK])


def receive(connection: Connection) -> Any:
    """What :func:`send` has sent."""
    parts = [bytearray(size) for size in connection.recv()]
    for part in parts:
        for start in range(0, len(part), _CHUNK):
            connection.recv_bytes_into(part, start)
    return pickle.loads(parts[0], buffers=parts[1:])


def load(key: int, source: str | bytes, options: Mapping[str, Any]) -> tuple[list, list, dict[str, str]]:
    """Make a session; returns its inputs and outputs as (name, type, shape), and its properties."""
    import onnxruntime

    asked = onnxruntime.SessionOptions()
    asked.intra_op_num_threads = options["threads"]
    if not options["optimise"]:
        asked.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if options["optimised"]:
        asked.optimized_model_filepath = options["optimised"]
    for name, value in options["settings"].items():
        asked.add_session_config_entry(name, value)
    session = onnxruntime.InferenceSession(source, asked, providers=["CPUExecutionProvider"])
    _sessions[key] = session
    inputs, outputs = (
        [(value.name, value.type, value.shape) for value in values]
        for values in (session.get_inputs(), session.get_outputs())
    )
    return inputs, outputs, dict(session.get_modelmeta().custom_metadata_map)


def drop(keys: Sequence[int]) -> None:
    """Forget sessions."""
    for key in keys:
        _sessions.pop(key, None)


def run(key: int, feeds: Mapping[str, Any]) -> list[Any]:
    """The outputs of a session."""
    return _sessions[key].run(None, feeds)


def clock(keys: Sequence[int], feeds: Sequence[Mapping[str, Any]], warm_up: int, rounds: int) -> list[list[float]]:
    """Milliseconds of every round, a list for each session; they run in turns."""
    times: list[list[float]] = [[] for _ in keys]
    order = list(range(len(keys)))
    for number in range(warm_up + rounds):
        for index in order[number % len(order) :] + order[: number % len(order)]:
            start = time.perf_counter()
            _sessions[keys[index]].run(None, feeds[index])
            if number >= warm_up:
                times[index].append(1e3 * (time.perf_counter() - start))
    return times


def main() -> None:
    """Answer (function, arguments) with (whether it went well, result or words)."""
    connection = Connection(int(sys.argv[1]))
    sys.path[:] = sys.argv[2:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who asks decides what is interrupted
    functions = {function.__name__: function for function in (load, drop, run, clock)}
    requests: SimpleQueue = SimpleQueue()
    Thread(target=_listen, args=(connection, requests), daemon=True).start()
    while True:
        name, arguments = requests.get()
        try:
            send(connection, (True, functions[name](*arguments)))
        except Exception as error:  # a dozen exception types of ONNX Runtime, without a common base
            send(connection, (False, str(error) or type(error).__name__))


def _listen(connection: Connection, requests: SimpleQueue) -> None:
    """Take requests; when who asks has ended, end with it, whatever is running."""
    try:
        while True:
            requests.put(receive(connection))
    finally:
        os._exit(1)


if __name__ == "__main__":
    main()
