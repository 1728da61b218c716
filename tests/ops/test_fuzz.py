"""No argument makes a compiled operation leave the memory of its tensors: see fuzz.py."""

import json
import subprocess
import sys
from pathlib import Path

from native import needs_kernels

PROGRAM = Path(__file__).with_name("fuzz.py")


@needs_kernels
def test_fuzz():
    done = subprocess.run([sys.executable, str(PROGRAM), "120", "0"], capture_output=True, text=True, timeout=300)
    last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
    assert done.returncode == 0, f"ended with {done.returncode} in the call after: {last}\n{done.stderr[-2000:]}"
    for name, outcomes in json.loads(done.stdout).items():
        assert outcomes["carried out"] > 5 and outcomes["refused"] > 5, f"{name}: {outcomes}"
