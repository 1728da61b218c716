import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "optimizers.py"


@pytest.mark.usefixtures("one_thread")
def test_the_benchmark_prints_a_row_for_every_size(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["optimizers.py", "--rounds", "2", "--sizes", "4x1", "8x2"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [row[0].strip() for row in rows[2:]] == ["4 × 1", "8 × 2"]
    assert all(float(cell) > 0 for row in rows[2:] for cell in row[3:])
