"""A thousand archives that were tampered with: each loads, or ends in one line; nothing is run, imported or written.

What is watched: imports, files that are opened, sockets, processes, code that is compiled or run (audit events of
Python), files that appear, memory (2 GB beside what a process with torch has), processor time, and what is said.
"""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim

import normfuse


class Small(nn.Module):
    """Little of everything, so that every mutation meets something."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)
        self.tied = self.first
        self.register_buffer("table", torch.randn(6), persistent=False)

    def forward(self, x):
        left, right = (self.norm(self.tied(x)) + self.table).split(3, -1)
        with torch.no_grad():
            y = torch.cat([left, right], -1).reshape(x.shape[0] * 2, 3)
        return {"y": y.reshape(x.shape[0], -1)}


PLANTED = {
    "import colorsys": "import",
    "open('planted', 'w').close()": "open ('planted'",
    "open('/etc/hostname').read()": "open ('/etc/hostname'",
    "eval('1 + 1')": "compile",
    "__import__('os').system('true')": "os.system",
    "socket.socket()": "socket.",
    "print('said')": "said",
    "raise SystemExit(0)": "SystemExit",
}
# First the reader as it is, then with what is planted where it parses JSON: the good files are read before.
CODE = f"""
import json, socket
from pathlib import Path
from archive_watcher import watched
import normfuse.checkpoint.pt2.reader as reader

reports = [watched(Path.cwd(), 0, 1000)]
parse, planted, calls = reader.parse_json, {list(PLANTED)}, []
def evil(data, what):
    calls.append(what)
    if len(calls) > 20:
        exec(planted[len(calls) % len(planted)])
    return parse(data, what)
reader.parse_json = evil
print(json.dumps([*reports, watched(Path.cwd(), 0, 80)]))
"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("archives")
    torch.manual_seed(0)
    model, x = Small().eval(), torch.randn(3, 4)
    normfuse.save(model, folder / "ours.good", example_inputs=x, dynamic_shapes=({0: "batch"},))
    elsewhere = io.BytesIO()
    torch.export.save(torch.export.export(model, (x,), dynamic_shapes=({0: Dim("batch", max=64)},)), elsewhere)
    (folder / "elsewhere.good").write_bytes(elsewhere.getvalue())
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, f"the reader died: {done.returncode} {done.stderr[-2000:]}"
    return json.loads(done.stdout)


def test_a_thousand_mutations(reports):
    report, _ = reports
    assert report["wrong"] == []
    assert report["slowest"] < 20
    # Most changes matter. Those that do not are in stack traces, hints on devices, records of nobody.
    assert report["counts"]["refused"] > 600 and report["counts"]["loaded"] > 50
    assert sum(report["counts"].values()) == 1000


def test_the_watcher_sees_what_it_looks_for(reports):
    wrong = str(reports[1]["wrong"])
    assert all(event in wrong for event in PLANTED.values()), wrong
