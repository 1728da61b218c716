import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "optimizers.py"


def test_the_benchmark_prints_a_row_for_every_size():
    command = [sys.executable, str(SCRIPT), "--rounds", "2", "--sizes", "4x1", "8x2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("|")]
    assert [row[0].strip() for row in rows[2:]] == ["4 × 1", "8 × 2"]
    assert all(float(cell) > 0 for row in rows[2:] for cell in row[3:])
