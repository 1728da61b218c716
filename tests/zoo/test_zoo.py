"""Exact in float64, verified in ONNX Runtime, and as many norms gone as were counted once by hand.

The everyday run takes a few models; ``NORMFUSE_ZOO=all python -m pytest tests/zoo`` takes all of them.
"""

import os

import pytest

from .models import ZOO
from .runs import built, run, swapped

pytestmark = pytest.mark.filterwarnings("ignore")
MISSING = "not installed: pip install --no-deps -r requirements/ecosystem.txt"
CHOSEN = [entry for entry in ZOO if entry.quick or os.environ.get("NORMFUSE_ZOO") == "all"]


def check(outcome, entry, variant):
    assert outcome.error64 <= 1e-10 and outcome.error32 <= 1e-4
    counts, expected = outcome.counts(), entry.expected
    if variant == "swapped":
        assert counts["static"] == expected.swapped
    else:
        assert counts == {"rms": expected.rms, "gains": expected.gains, "static": expected.static}


@pytest.mark.parametrize("variant", ["as it is", "swapped"])
@pytest.mark.parametrize("entry", CHOSEN, ids=lambda entry: entry.name)
def test_zoo(entry, variant, tmp_path):
    pytest.importorskip(entry.library, reason=MISSING)
    model = built(entry) if variant == "as it is" else swapped(entry)
    if model is None:
        pytest.skip("it has BatchNorms only, which are static as they are")
    check(run(entry, model, tmp_path), entry, variant)
